"""Where a node's processes find the controller: as told, or in a pod by the Service's address and mounted files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshbridge.errors import SettingsError

SERVICE_NAME: Final = "meshbridge-controller.meshbridge-system.svc"
MOUNTED: Final = Path("/var/run/secrets/meshbridge")
"""Where a pod has one projected volume: its token, and the ConfigMap with the controller's CA (optional there, so that
the pod starts before there is one)."""
TOKEN_FILE: Final = MOUNTED / "token"
CA_FILE: Final = MOUNTED / "ca.crt"
_HOST, _PORT = "MESHBRIDGE_CONTROLLER_SERVICE_HOST", "MESHBRIDGE_CONTROLLER_SERVICE_PORT"


@dataclass(frozen=True, slots=True)
class Connection:
    """``server_name`` is what the controller's certificate has to be for; empty: the host of ``target``."""

    target: str
    token_file: Path
    ca: Path | None = None
    server_name: str = ""


def connection(
    controller: str | None,
    ca: Path | None,
    server_name: str | None,
    token_file: Path | None,
    environment: Mapping[str, str] = os.environ,
) -> Connection:
    """The connection that the options ask for; what they leave out is as the kubelet has it for pods.

    Raises:
        SettingsError: no controller is named and this is no pod beside one.
    """
    if controller is not None:
        if token_file is None:
            raise SettingsError("is needed with --controller", where="--token-file", fix="name the node's token")
        return Connection(controller, token_file, ca, server_name or "")
    host, port = environment.get(_HOST, ""), environment.get(_PORT, "")
    if not host or not (port.isascii() and port.isdigit()):
        raise SettingsError(
            f"is needed: the environment has no {_HOST} and {_PORT}", where="--controller",
            fix="give it, or run in a pod of the controller's namespace, made after its Service",
        )  # fmt: skip
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return Connection(target, token_file or TOKEN_FILE, ca or CA_FILE, server_name or SERVICE_NAME)
