"""What a monitoring system and a probe may ask, on loopback: /metrics, and /healthz, which is 200 while checks are
decided by policy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from meshbridge.errors import SettingsError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_LOOPBACK: Final = ("127.0.0.1", "localhost")


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def serve_http(address: str, ready: Callable[[], bool]) -> WSGIServer:
    """Answer on ``HOST:PORT`` from a thread of its own until ``shutdown``.

    Raises:
        SettingsError: not a loopback address, or one that cannot be used.
    """
    host, _, port = address.rpartition(":")
    if host not in _LOOPBACK or not (port.isascii() and port.isdigit()):
        raise SettingsError(f"cannot serve metrics on {address!r}", where="--metrics", fix="use 127.0.0.1:PORT")
    metrics: WSGIApplication = make_wsgi_app()

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ.get("PATH_INFO") == "/metrics":
            return metrics(environ, start_response)
        serving = environ.get("PATH_INFO") == "/healthz" and ready()
        body = b"serving\n" if serving else b"not serving\n"
        status = "200 OK" if serving else "503 Service Unavailable"
        if environ.get("PATH_INFO") != "/healthz":
            status, body = "404 Not Found", b"ask /metrics or /healthz\n"
        start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]

    try:
        server = make_server(host, int(port), answer, _Server, _Handler)
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"cannot serve metrics on {address!r}: {error}", where="--metrics", fix="choose another port"
        ) from error
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server
