"""The HTTPS side: bounded requests in, answers out, with a certificate that may change while it runs.

TLS is negotiated in the thread of the connection and under its time limit, so that a caller who says nothing holds up
nobody else. Whatever is sent that is no AdmissionReview gets a 4xx; a fault of our own is a 500, upon which the API
server does what ``failurePolicy`` says.
"""

from __future__ import annotations

import io
import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socket import AF_INET6, socket
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final

import structlog
from cryptography import x509

from meshbridge.errors import SettingsError
from meshbridge.observe.text import printable
from meshbridge.webhook import metrics
from meshbridge.webhook.admission import Answer, Request, ReviewError, answered, read_request

log = structlog.get_logger()

MAX_BODY_BYTES: Final = 3 << 20  # the API server's own limit of a request
REQUEST_S: Final = 15.0  # for all of a handshake, and of a request from its first byte to its last
IDLE_S: Final = 100.0  # between requests; the API server lets go of an idle connection after 90
MAX_CONNECTIONS: Final = 256
DRAIN_S: Final = 10.0
_JSON: Final = "application/json"

Judge = Callable[[Request], Answer]


class WebhookServer(ThreadingMixIn, TCPServer):
    """Serves ``judges`` by path. ``use_certificate`` may be called again at any time, for connections to come."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, host: str, port: int, judges: Mapping[str, Judge], health: Callable[[], Mapping[str, Any]]
    ) -> None:
        if ":" in host:
            self.address_family = AF_INET6
        self.judges, self.health = judges, health
        self.draining = False
        self._context: ssl.SSLContext | None = None
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._busy = 0
        self._idle = threading.Condition()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise SettingsError(
                f"cannot listen: {error}", where=f"--listen {host}:{port}", fix="choose another address"
            ) from error

    def use_certificate(self, chain: Path, key: Path | None = None) -> None:
        """Serve with it from the next connection on.

        Raises:
            SettingsError: the files are no certificate with its key; what was used before still is.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        try:
            context.load_cert_chain(chain, key, password="")
            expiry = x509.load_pem_x509_certificate(chain.read_bytes()).not_valid_after_utc
        except (OSError, ValueError) as error:
            what = f"cannot be used: {getattr(error, 'reason', None) or error}"
            raise SettingsError(what, where=f"certificate {chain}", fix="give a PEM chain and its own key") from None
        metrics.EXPIRY.set(expiry.timestamp())
        self._context = context

    def use_pem(self, content: bytes, where: str) -> None:
        """Serve with the certificate and key in ``content``, which is on no disk, from the next connection on.

        Raises:
            SettingsError: it is no certificate with its key; what was used before still is.
        """
        with os.fdopen(os.memfd_create("certificate"), "wb") as file:  # a context reads files only
            file.write(content)
            file.flush()
            try:
                self.use_certificate(Path(f"/proc/self/fd/{file.fileno()}"))
            except SettingsError as error:
                raise SettingsError(error.what, where=where, fix="remove it to have it made anew") from None

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)  # the API server tries again, or does what failurePolicy says
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            request.settimeout(REQUEST_S)
            secured = self._secured(request)
            if secured is not None:
                super().process_request_thread(secured, client_address)
        finally:
            self._room.release()

    def _secured(self, request: socket) -> ssl.SSLSocket | None:
        assert self._context is not None, "use_certificate comes first"
        try:
            return self._context.wrap_socket(request, server_side=True)
        except (OSError, ValueError):
            metrics.REFUSED.labels("tls").inc()
            self.shutdown_request(request)
            return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A fault of ours: connections that end as their callers like are no errors."""
        log.exception("connection.failed")

    def busy(self, change: int) -> None:
        with self._idle:
            self._busy += change
            self._idle.notify_all()

    def drain(self) -> None:
        """Take no new connection and return when every request under way is answered, or after ``DRAIN_S``."""
        self.draining = True
        self.shutdown()
        self.server_close()
        with self._idle:
            self._idle.wait_for(lambda: self._busy == 0, DRAIN_S)


class _Incoming(io.RawIOBase):
    """What a connection sends, until a point in time, however little comes how often."""

    def __init__(self, connection: socket) -> None:
        self._connection, self._until_s = connection, 0.0

    def allow(self, seconds: float) -> None:
        self._until_s = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(max(self._until_s - time.monotonic(), 0.001))
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    server: WebhookServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "meshbridge", ""

    def setup(self) -> None:
        super().setup()
        self._incoming = _Incoming(self.connection)
        self.rfile = self._buffered = io.BufferedReader(self._incoming)

    def handle_one_request(self) -> None:
        try:
            self._incoming.allow(IDLE_S)
            self._buffered.peek(1)
            self._incoming.allow(REQUEST_S)
            super().handle_one_request()
        except OSError:  # too slow, or gone
            self.close_connection = True

    def do_GET(self) -> None:
        if self.path != "/healthz":
            self._refuse(HTTPStatus.NOT_FOUND, "/healthz answers GET")
            return
        healthy = not self.server.draining
        body = {**self.server.health(), "draining": not healthy}
        self._send(HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE, body)

    def do_POST(self) -> None:
        self.server.busy(1)
        try:
            self._review()
        finally:
            self.server.busy(-1)

    def _review(self) -> None:
        path = self.path.partition("?")[0]  # the API server adds its timeout
        judge = self.server.judges.get(path)
        if judge is None:
            self._refuse(HTTPStatus.NOT_FOUND, f"reviews are answered at {', '.join(sorted(self.server.judges))}")
            return
        body = self._body()
        if body is None:
            return
        started = time.perf_counter()
        try:
            request = read_request(json.loads(body))
        except ReviewError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        except (ValueError, RecursionError):
            self._refuse(HTTPStatus.BAD_REQUEST, "the body is no JSON, or nested too deeply")
            return
        try:
            answer = judge(request)
            content = answered(request, answer)
        except Exception:
            log.exception("review.failed", path=path, object=printable(str(request.document)))
            metrics.REVIEWS.labels(path, "failed").inc()
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "MeshBridge's webhook failed; its log says why")
            return
        metrics.LATENCY.observe(time.perf_counter() - started)
        outcome = (
            "denied" if answer.denied else "patched" if answer.patch else "warned" if answer.warnings else "allowed"
        )
        metrics.REVIEWS.labels(path, outcome).inc()
        if answer.denied:
            log.info("object.denied", object=printable(str(request.document)), reason=answer.denied)
        self._send(HTTPStatus.OK, content)

    def _body(self) -> bytes | None:
        """The request's body, or None after a refusal."""
        if self.headers.get_content_type() != _JSON:
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"send {_JSON}")
            return None
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "send Content-Length")
            return None
        if len(length) > 12 or int(length) > MAX_BODY_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_BODY_BYTES} bytes")
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self._refuse(HTTPStatus.BAD_REQUEST, "the body is shorter than Content-Length")
            return None
        return body

    def _refuse(self, code: HTTPStatus, why: str) -> None:
        """What is left of the request is not read, so the connection ends."""
        metrics.REFUSED.labels(str(code.value)).inc()
        self.close_connection = True
        self._send(code, {"error": why})

    def _send(self, code: HTTPStatus, body: Mapping[str, Any]) -> None:
        content = json.dumps(body).encode()
        if self.server.draining:
            self.close_connection = True
        self.send_response(code)
        self.send_header("Content-Type", _JSON)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.connection.settimeout(REQUEST_S)
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are counted, not logged."""
