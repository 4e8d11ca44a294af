"""Who is calling: bearer tokens bound to a node, or to a pod with its namespace, service account and UID.

On one machine whoever plays the kubelet holds the key file and mints them (``TokenKey``); in a cluster they are service
account tokens that the API server reviews (``controller.tokenreviews``). The controller verifies every call and lets a
caller have only what is its own. A token is a JWT for the audience ``meshbridge``; it is never logged.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol

import jwt

from meshbridge.errors import MeshBridgeError, SettingsError
from meshbridge.xds.bearer import METADATA_KEY
from meshbridge.xds.bearer import bearer as bearer

AUDIENCE: Final = "meshbridge"
ISSUER: Final = "meshbridge-node"
ALGORITHM: Final = "HS256"
CLAIM: Final = "meshbridge.io"
DEFAULT_LIFETIME: Final = timedelta(hours=1)
CLOCK_SKEW: Final = timedelta(seconds=10)
KEY_BYTES: Final = 32
MAX_TOKEN_LENGTH: Final = 4_096


class AuthenticationError(MeshBridgeError):
    """The caller did not prove who it is. Says why, never quotes the token."""


class UnavailableError(MeshBridgeError):
    """Whether a caller is who it says cannot be told now; it may try again."""


class CallerKind(StrEnum):
    NODE = "node"
    POD = "pod"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a token was issued to. A node's has only ``node``; a pod's has everything."""

    kind: CallerKind
    node: str
    namespace: str = ""
    pod: str = ""
    service_account: str = ""
    uid: str = ""

    @property
    def node_id(self) -> str:
        """What the caller's ``Node.id`` has to be: the node's name, or ``NAMESPACE/POD``."""
        return self.node if self.kind is CallerKind.NODE else f"{self.namespace}/{self.pod}"

    def __str__(self) -> str:
        return f"{self.kind} {self.node_id}"


Metadata = Sequence[tuple[str, str | bytes]]


class Authenticator(Protocol):
    """Tells who calls."""

    async def authenticate(self, metadata: Metadata) -> tuple[Caller, float]:
        """The caller of an RPC, from its metadata, and for how many seconds its token is accepted.

        Raises:
            AuthenticationError: no single ``authorization: Bearer …``, or a token that is not accepted.
            UnavailableError: it cannot be told now.
        """


def node_caller(node: str) -> Caller:
    return Caller(CallerKind.NODE, node)


def pod_caller(node: str, namespace: str, pod: str, service_account: str, uid: str) -> Caller:
    return Caller(CallerKind.POD, node, namespace, pod, service_account, uid)


def mint_token(key: bytes, caller: Caller, *, now: datetime, lifetime: timedelta = DEFAULT_LIFETIME) -> str:
    """A token by which ``caller`` is known from ``now`` on, for ``lifetime``."""
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": str(caller),
        "iat": now,
        "nbf": now,
        "exp": now + lifetime,
        CLAIM: {
            "kind": caller.kind.value,
            "node": caller.node,
            "namespace": caller.namespace,
            "pod": caller.pod,
            "service_account": caller.service_account,
            "uid": caller.uid,
        },
    }
    return jwt.encode(claims, key, algorithm=ALGORITHM)


def verify_token(key: bytes, token: str) -> Caller:
    """The caller a token was issued to.

    Raises:
        AuthenticationError: malformed, signed by another key, for another audience, expired, or not yet valid.
    """
    return _caller(_claims(key, token).get(CLAIM))


def _claims(key: bytes, token: str) -> dict[str, Any]:
    try:
        return jwt.decode(
            token,
            key,
            algorithms=[ALGORITHM],
            audience=AUDIENCE,
            issuer=ISSUER,
            leeway=CLOCK_SKEW,
            options={"require": ["exp", "nbf", "aud", "sub", "iss"]},
        )
    except (jwt.ImmatureSignatureError, jwt.ExpiredSignatureError) as error:
        raise AuthenticationError(
            f"token not accepted: {error}",
            where="authorization",
            fix="have the node issue a new token; if it just did, compare its clock with the controller's",
        ) from None
    except jwt.PyJWTError as error:
        raise AuthenticationError(
            f"token not accepted: {error}", where="authorization", fix="have the node issue a new token"
        ) from None


def bearer_token(metadata: Metadata) -> str:
    """The token that a caller presents.

    Raises:
        AuthenticationError: no single ``authorization: Bearer …``, or one that is too long for a token.
    """
    values = [value for name, value in metadata if name.lower() == METADATA_KEY]
    if len(values) != 1 or not isinstance(values[0], str) or not values[0].startswith("Bearer "):
        raise AuthenticationError(
            "no bearer token" if not values else "not one single bearer token",
            where="authorization",
            fix="send the metadata 'authorization: Bearer TOKEN'",
        )
    token = values[0].removeprefix("Bearer ")
    if len(token) > MAX_TOKEN_LENGTH:
        raise AuthenticationError(
            f"token of {len(token)} characters", where="authorization", fix="present a node or pod token"
        )
    return token


class TokenKey:
    """Accepts the tokens that whoever holds the same key has minted."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    async def authenticate(self, metadata: Metadata) -> tuple[Caller, float]:
        claims = _claims(self._key, bearer_token(metadata))
        return _caller(claims.get(CLAIM)), claims["exp"] + CLOCK_SKEW.total_seconds() - time.time()


def load_key(path: Path) -> bytes:
    """The token key in a file that only its owner can read.

    Raises:
        SettingsError: missing, too short, or readable by others.
    """
    where = f"token key {path}"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(4_096)
    except OSError as error:
        raise SettingsError(
            f"cannot be read: {error.strerror}", where=where, fix="create it, or name it with --token-key"
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"mode {stat.S_IMODE(mode):04o} lets others read it", where=where, fix=f"chmod 600 {path}")
    if len(key) < KEY_BYTES:
        raise SettingsError(f"{len(key)} bytes are too few", where=where, fix=f"use at least {KEY_BYTES} random bytes")
    return key


def load_or_create_key(path: Path) -> bytes:
    """The key in ``path``; a new random one is written there, mode 0600, when there is none."""
    write_private_file(path, secrets.token_bytes(KEY_BYTES), keep_existing=True)
    return load_key(path)


def write_private_file(path: Path, content: bytes, *, keep_existing: bool = False) -> None:
    """Put ``content`` into ``path`` with mode 0600: whole or not at all, and never readable by others in between."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not keep_existing:
            scratch.replace(path)
        elif not path.exists():
            os.link(scratch, path)  # two starting at once end with one key
    except FileExistsError:
        pass
    finally:
        scratch.unlink(missing_ok=True)


def _caller(claim: Any) -> Caller:
    fields = ("kind", "node", "namespace", "pod", "service_account", "uid")
    if not isinstance(claim, Mapping) or not all(isinstance(claim.get(name), str) for name in fields):
        raise AuthenticationError(
            f"token without the claim {CLAIM!r}", where="authorization", fix="issue it with mint_token"
        )
    kind, *rest = (claim[name] for name in fields)
    if kind not in set(CallerKind):
        raise AuthenticationError(f"token for the unknown kind {kind[:40]!r}", where="authorization", fix="node or pod")
    caller = Caller(CallerKind(kind), *rest)
    required = (caller.node,) if caller.kind is CallerKind.NODE else (caller.namespace, caller.pod, caller.uid)
    if not all(required):
        raise AuthenticationError(
            f"token names no {caller.kind}", where="authorization", fix="issue it with mint_token"
        )
    return caller
