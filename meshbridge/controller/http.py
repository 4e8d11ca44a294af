"""What a person or a monitoring system may ask the controller, on loopback: /metrics, /problems, /healthz."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from meshbridge.errors import SettingsError
from meshbridge.kube.problems import Problem

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

LOOPBACK = ("127.0.0.1", "localhost")
REQUEST_TIMEOUT_S = 10


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def serve_http(address: str, problems: Callable[[], Iterable[Problem]], ready: Callable[[], bool]) -> WSGIServer:
    """Answer on ``HOST:PORT`` from a thread of its own until ``shutdown``.

    Raises:
        SettingsError: not a loopback address, or one that cannot be used.
    """
    host, _, port = address.rpartition(":")
    if host not in LOOPBACK or not port.isdigit():
        raise SettingsError(f"{address!r} is not on loopback", where="--metrics", fix="use 127.0.0.1:PORT")
    metrics: WSGIApplication = make_wsgi_app()

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ.get("PATH_INFO"):
            case "/metrics":
                return metrics(environ, start_response)
            case "/problems":
                body = [
                    {"reason": problem.reason.value, "text": problem.text, "file": problem.file, "line": problem.line}
                    for problem in problems()
                ]
                return _json(start_response, "200 OK", body)
            case "/healthz":
                synced = ready()
                return _json(start_response, "200 OK" if synced else "503 Service Unavailable", {"synced": synced})
            case _:
                return _json(start_response, "404 Not Found", {"paths": ["/metrics", "/problems", "/healthz"]})

    try:
        server = make_server(host, int(port), answer, _Server, _Handler)
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"cannot listen: {error}", where=f"--metrics {address}", fix="choose another port"
        ) from error
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def _json(start_response: StartResponse, status: str, body: object) -> list[bytes]:
    content = json.dumps(body, indent=1).encode() + b"\n"
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(content)))])
    return [content]
