"""A server for tests, run in pods: answers every request with who it is and what it saw. answer.py PORT…"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        if self.path == "/metrics":
            self.respond(b"# TYPE e2e_up gauge\ne2e_up 1\n", "text/plain; version=0.0.4")
            return
        length = int(self.headers.get("content-length") or 0)
        seen = {
            "pod": socket.gethostname(), "port": self.connection.getsockname()[1], "from": self.client_address[0],
            "method": self.command, "path": self.path, "length": len(self.rfile.read(length)),
            "headers": {name.lower(): value for name, value in self.headers.items()},
        }  # fmt: skip
        self.respond(json.dumps(seen).encode(), "application/json")

    def respond(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        """Say nothing: what a test wants to know is in the answer."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main(ports: list[int]) -> None:
    for port in ports:
        threading.Thread(target=Server(("", port), Answer).serve_forever, daemon=True).start()
    print(f"pid {os.getpid()} answers on {ports}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1:]])
