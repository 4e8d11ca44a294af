"""The certificate that a server presents: files that somebody gives, or a Secret that its replicas share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from meshbridge.errors import SettingsError
from meshbridge.kube.api import Api
from meshbridge.kube.ownobjects import keep_config_map, keep_secret
from meshbridge.xds.certificates import Certificates, is_kept, renewed

CHECK_S: Final = 10.0
CONTROLLER_SERVICE: Final = "meshbridge-controller"
CONTROLLER_SECRET: Final = "meshbridge-controller-tls"
CONTROLLER_CA: Final = "meshbridge-ca"
CA_KEY: Final = "ca.crt"

Pair = tuple[bytes, bytes, str]
"""A chain, its key, and where they are from."""


def pair_of_files(chain: Path, key: Path) -> Pair:
    """
    Raises:
        SettingsError: one of them cannot be read.
    """
    try:
        return chain.read_bytes(), key.read_bytes(), f"--tls-cert {chain}, --tls-key {key}"
    except OSError as error:
        raise SettingsError(
            f"cannot be read: {error.strerror}", where=f"--tls-cert {chain}, --tls-key {key}", fix="name two PEM files"
        ) from error


def secret_certificates(api: Api, namespace: str, secret: str, names: Sequence[str], owner: str) -> Certificates:
    """The certificates in the Secret, with what was due; all replicas have the same. Blocking.

    Raises:
        SettingsError: what the Secret has under a name of ours is not ours.
        ClusterError: it cannot be read or written.
    """
    where, newest = f"Secret {namespace}/{secret}", Certificates({}, b"")

    def change(held: Mapping[str, bytes]) -> Mapping[str, bytes]:
        nonlocal newest
        ours = {name: content for name, content in held.items() if is_kept(name)}
        newest = renewed(ours, names, datetime.now(UTC), owner, where)
        return {**{name: content for name, content in held.items() if name not in ours}, **newest.files}

    keep_secret(api, namespace, secret, change)
    return newest


def controller_pair(api: Api, namespace: str, secret: str) -> Pair:
    """The controller's certificate of its Secret, after all agents can read whom to believe. Blocking.

    Raises:
        SettingsError: what the Secret has under a name of ours is not ours.
        ClusterError: the Secret or the ConfigMap cannot be read or written.
    """
    names = (f"{CONTROLLER_SERVICE}.{namespace}.svc",)
    found = secret_certificates(api, namespace, secret, names, "controller")
    keep_config_map(api, namespace, CONTROLLER_CA, {CA_KEY: found.bundle.decode("ascii")})
    return found.serving, found.serving, f"Secret {namespace}/{secret}"
