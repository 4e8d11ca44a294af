"""A sample target of scrapes: ``/metrics`` in Prometheus's text format on PORT, and an API on API_PORT.

Besides the counters of the sample service it counts bytes by the address they came from, and connections that began
with a TLS hello: where no Envoy takes the TLS off, the application is sent one.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

from meshbridge.demo.apps import server
from meshbridge.demo.apps.server import COUNTERS, Application, CountingFile, DualStackServer

METRICS_PATH = "/metrics"
_TLS_HANDSHAKE = b"\x16\x03"


class _FromPeer:
    """The reading side of a connection, counted by peer as well."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self._connection = connection
        self._counter = f"bytes:{peer}"
        self._first = True

    def recv(self, size: int) -> bytes:
        data = self._connection.recv(size)
        COUNTERS.add(self._counter, len(data))
        if self._first and data.startswith(_TLS_HANDSHAKE):
            COUNTERS.add("tls_hellos")
        self._first = False
        return data


class Exporter(Application):
    def setup(self) -> None:
        super().setup()
        peer = str(self.client_address[0]).removeprefix("::ffff:")
        self.rfile = CountingFile(_FromPeer(self.connection, peer))  # type: ignore[arg-type, assignment]  # only recv

    def _answer(self) -> None:
        if self.path.partition("?")[0] != METRICS_PATH:
            super()._answer()
            return
        COUNTERS.add("requests")
        COUNTERS.add(f"requests:{self.headers.get(server.MARK_HEADER, 'unmarked')}")
        body = "".join(f"# TYPE {line.partition(' ')[0]} counter\n{line}\n" for line in _samples()).encode()
        self.send_response(200)
        self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()


def _samples() -> list[str]:
    counted = COUNTERS.snapshot()
    return [f"sample_{name}_total {counted.get(name, 0)}" for name in ("connections", "bytes", "requests")]


def main() -> None:
    """Serve until ended."""
    ports: list[Any] = [
        server.LoopbackServer(("127.0.0.1", server.COUNTERS_PORT), server.CountersHandler),
        DualStackServer(("::", server.HEALTH_PORT), server.HealthHandler),
        DualStackServer(("::", int(os.environ.get("API_PORT", "9000"))), Exporter),
    ]
    for port in ports:
        threading.Thread(target=port.serve_forever, daemon=True).start()
    DualStackServer(("::", int(os.environ.get("PORT", "8080"))), Exporter).serve_forever()


if __name__ == "__main__":
    main()
