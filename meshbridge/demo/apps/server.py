"""The sample service: answers HTTP, and counts what really reached it.

Any request on any path is answered with 200 and JSON. What arrives is counted from the first byte, so that "no payload
byte" is something to read and not to believe: the counters are on 127.0.0.1:8081, in the pod only. Health is on a port
of its own, 8082, so that probes do not count.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

COUNTERS_PORT = 8081
HEALTH_PORT = 8082
MARK_HEADER = "x-demo-mark"


class Counters:
    """Everything that reached the application: connections, bytes, requests, and requests by mark."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] += amount

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


COUNTERS = Counters()


class CountingFile:
    """The read side of a connection; every byte that comes out of the socket is counted."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    def _fill(self) -> bool:
        data = self._connection.recv(65536)
        COUNTERS.add("bytes", len(data))
        self._buffer += data
        return bool(data)

    def readline(self, limit: int = -1) -> bytes:
        while b"\n" not in self._buffer and (limit < 0 or len(self._buffer) < limit):
            if not self._fill():
                break
        end = self._buffer.find(b"\n") + 1 or len(self._buffer)
        return self._take(end if limit < 0 else min(end, limit))

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size and self._fill():
            pass
        return self._take(size)

    def _take(self, size: int) -> bytes:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def close(self) -> None:
        """The connection is closed by the server."""


class Application(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 120
    disable_nagle_algorithm = True  # headers and body are two writes

    def setup(self) -> None:
        super().setup()
        COUNTERS.add("connections")
        self.rfile = CountingFile(self.connection)  # type: ignore[assignment]  # as much of a file as the base class uses

    def _answer(self) -> None:
        body_bytes = len(self.rfile.read(int(self.headers.get("content-length") or 0)))
        COUNTERS.add("requests")
        COUNTERS.add(f"requests:{self.headers.get(MARK_HEADER, 'unmarked')}")
        answer = {
            "service": os.environ.get("SERVICE_NAME", "service"),
            "method": self.command,
            "path": self.path,
            "received_bytes": body_bytes,
        }
        body = json.dumps(answer).encode() + b"\n"
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    do_PUT = do_DELETE = do_PATCH = do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are counted, not logged."""


class CountersHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(COUNTERS.snapshot()).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads a log of the counters."""


class HealthHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Probes are not logged."""


class DualStackServer(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 256

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)  # HTTPServer's asks DNS for its own name, and nobody answers here


class LoopbackServer(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        TCPServer.server_bind(self)


def main() -> None:
    """Serve until ended; PORT names the port, SERVICE_NAME what it calls itself."""
    counters = LoopbackServer(("127.0.0.1", COUNTERS_PORT), CountersHandler)
    health = DualStackServer(("::", HEALTH_PORT), HealthHandler)
    for server in (counters, health):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    DualStackServer(("::", int(os.environ.get("PORT", "8080"))), Application).serve_forever()


if __name__ == "__main__":
    main()
