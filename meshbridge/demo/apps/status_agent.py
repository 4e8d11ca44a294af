"""The part of Istio's agent that answers kubelet's rewritten probes: port 15020 asks the application on loopback.

Spec: istio pilot/cmd/pilot-agent/status/server.go, app probers.
"""

from __future__ import annotations

import http.client
import json
import os
from http.server import BaseHTTPRequestHandler
from typing import Any

from meshbridge.demo.apps.server import DualStackServer

PROBERS: dict[str, dict[str, Any]] = json.loads(os.environ.get("ISTIO_KUBE_APP_PROBERS") or "{}")


class Prober(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = PROBERS.get(self.path)
        self.send_response(404 if asked is None else self._ask(asked))
        self.send_header("content-length", "0")
        self.end_headers()

    def _ask(self, asked: dict[str, Any]) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", int(asked["port"]), timeout=2)
        try:
            connection.request("GET", asked["path"])
            return connection.getresponse().status
        except OSError:
            return 500
        finally:
            connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        """Probes are not logged."""


if __name__ == "__main__":
    DualStackServer(("::", 15020), Prober).serve_forever()
