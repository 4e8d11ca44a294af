"""The gRPC side: one Unix socket or TCP port, a pool of threads, health, and a drain that loses no answer.

Threads, not asyncio: a Check costs less CPU that way (docs/adr/0031). Messages are taken as bytes and decoded by
ourselves, so that a truncated one is refused by a sentence in our log, not by a status of the library's.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from meshbridge.authz import metrics
from meshbridge.authz.caller import LOCAL, Caller, caller_of
from meshbridge.authz.request import MAX_CHECK_BYTES
from meshbridge.errors import SettingsError

SERVICE: Final = "envoy.service.auth.v3.Authorization"
UNIX: Final = "unix:"
THREADS: Final = 16
DRAIN_S: Final = 5.0

# A Check tells who may do what, and costs CPU: Envoy's user asks, nobody else but root.
SOCKET_MODE: Final = 0o600
PROXY_UID: Final = 1337

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

MAX_CHECKS: Final = 1024
"""Checks that wait or are answered at once; more are refused at once (RESOURCE_EXHAUSTED), not kept until too late."""

MAX_STREAMS: Final = 256
"""The same for one connection, so that one Envoy alone cannot fill the queue; its further Checks wait at its side."""

# Twice what is read: one byte too many has to reach decode_check to be refused with a reason.
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 2 * MAX_CHECK_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
)


class AuthzServer:
    """Serves Check on ``listen``. Health, and ``ready``, say so from ``set_ready`` until ``leave``."""

    def __init__(
        self,
        listen: str,
        check: Callable[[bytes, Caller], bytes],
        owner: int = PROXY_UID,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """
        Args:
            listen: ``unix:PATH``, where a socket that nobody answers any more is replaced, a live one is not; or
                ``HOST:PORT``.
            check: serialised CheckRequest and who sent it to serialised CheckResponse; it must not raise.
            owner: number of the user who may ask over the socket, where this process may give files away (root).
            credentials: for ``HOST:PORT``; None: in the clear.

        Raises:
            SettingsError: one that cannot be listened on, or where another server answers.
        """
        path = _free_socket(listen) if listen.startswith(UNIX) else None
        self.ready = self._decides = self._leaving = False
        self._health = health.HealthServicer()
        self._set_health(_NOT_SERVING)
        self._server = grpc.server(
            ThreadPoolExecutor(THREADS, thread_name_prefix="check"),
            options=_OPTIONS,
            maximum_concurrent_rpcs=MAX_CHECKS,
        )

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if not path and not self._decides:
                # No decision, so that it is failOpen's to say what follows; a refusal would be one.
                context.abort(grpc.StatusCode.UNAVAILABLE, "this node has no policies from the controller yet")
            return check(request, LOCAL if path else caller_of(context.peer(), context.auth_context()))

        handler = grpc.unary_unary_rpc_method_handler(answer)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Check": handler}),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            if credentials is not None:
                self._server.add_secure_port(listen, credentials)
            else:
                self._server.add_insecure_port(listen)
            if path is not None:
                path.chmod(SOCKET_MODE)
                if os.geteuid() == 0:
                    os.chown(path, owner, -1)
        except (OSError, RuntimeError) as error:
            what, other = (path, "path") if path else (listen, "address")
            raise SettingsError(
                f"cannot listen on {what}: {error}", where="--listen", fix=f"choose another {other}"
            ) from error

    def start(self) -> None:
        """Answer from now on; before ``set_ready`` every answer is a refusal, over TCP an error."""
        self._server.start()

    def set_ready(self) -> None:
        """Let health say that decisions are made by policy; without effect once it leaves."""
        self._decides = True
        if not self._leaving:
            self._set_health(_SERVING)

    def leave(self) -> None:
        """Say that nobody new should come, and go on answering."""
        self._leaving = True
        self._health.enter_graceful_shutdown()
        self.ready = False
        metrics.READY.set(0)

    def drain(self) -> None:
        """Take no new connection, finish the checks in flight, then stop; at most DRAIN_S."""
        self.leave()
        self._server.stop(DRAIN_S).wait()

    def _set_health(self, status: int) -> None:
        self.ready = status == _SERVING
        metrics.READY.set(int(self.ready))
        for service in ("", SERVICE):
            self._health.set(service, status)


def _free_socket(listen: str) -> Path:
    path = Path(listen.removeprefix(UNIX))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return path
    if not stat.S_ISSOCK(mode):
        raise SettingsError(f"{path} exists and is no socket", where="--listen", fix="remove it or use another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return path
    raise SettingsError(f"another server answers on {path}", where="--listen", fix="stop it first")
