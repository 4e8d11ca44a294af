"""The HTTPS server among callers who mean no good, are slow, or are there while it ends."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest

from meshbridge.errors import SettingsError
from meshbridge.webhook import server as serving
from meshbridge.webhook.admission import Answer, Request
from meshbridge.webhook.certificates import OwnCertificates
from meshbridge.webhook.server import MAX_BODY_BYTES, WebhookServer

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "n"}}
REVIEW = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
          "request": {"uid": "u", "operation": "CREATE", "object": POD}}  # fmt: skip
JSON = {"Content-Type": "application/json"}


class Running:
    """A server on the loopback, its certificates, and what it is asked by tests."""

    def __init__(self, directory: Path) -> None:
        self.certificates = OwnCertificates(directory, ("localhost", "127.0.0.1"))
        self.certificates.renew(datetime.now(UTC))
        self.hold = threading.Event()
        self.hold.set()
        judges = {"/validate": self.judge}
        self.server = WebhookServer("127.0.0.1", 0, judges, lambda: {"synced": True})
        self.server.use_certificate(self.certificates.serving)
        self.port: int = self.server.server_address[1]
        self.thread = threading.Thread(target=lambda: self.server.serve_forever(0.01), daemon=True)
        self.thread.start()

    def judge(self, request: Request) -> Answer:
        if request.document.name == "fault":
            raise RuntimeError("a fault")
        self.hold.wait(20)
        return Answer(("said",))

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.certificates.bundle.decode())

    def connection(self) -> HTTPSConnection:
        return HTTPSConnection("127.0.0.1", self.port, context=self.context(), timeout=20)

    def ask(self, body: Any, path: str = "/validate?timeout=5s", headers: Any = JSON) -> tuple[int, Any]:
        connection = self.connection()
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
        response = connection.getresponse()
        content = json.loads(response.read())
        connection.close()
        return response.status, content

    @contextmanager
    def raw(self) -> Iterator[ssl.SSLSocket]:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        with self.context().wrap_socket(plain, server_hostname="localhost") as secured:
            yield secured


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    found = Running(tmp_path)
    yield found
    found.hold.set()
    found.server.drain()


def test_a_review_is_answered_and_the_next_on_the_same_connection(running: Running) -> None:
    connection = running.connection()
    for _ in range(3):
        connection.request("POST", "/validate", json.dumps(REVIEW), JSON)
        response = connection.getresponse()
        assert json.loads(response.read())["response"] == {"uid": "u", "allowed": True, "warnings": ["said"]}
    connection.close()


def fault() -> dict[str, Any]:
    return {**REVIEW, "request": {**REVIEW["request"], "object": {**POD, "metadata": {"name": "fault"}}}}


HOSTILE: dict[str, tuple[Any, str, dict[str, str], int]] = {
    "no JSON": (b"{", "/validate", JSON, 400),
    "no text": (b"\xff\xfe\x00", "/validate", JSON, 400),
    "nothing": (b"", "/validate", JSON, 400),
    "no review": ([], "/validate", JSON, 400),
    "another version": ({**REVIEW, "apiVersion": "admission.k8s.io/v2"}, "/validate", JSON, 400),
    "deep": (b"[" * 200_000, "/validate", JSON, 400),
    "huge": (b" " * (MAX_BODY_BYTES + 1), "/validate", JSON, 413),
    "another type": (REVIEW, "/validate", {"Content-Type": "text/plain"}, 415),
    "another path": (REVIEW, "/validate/../mutate", JSON, 404),
    "a fault of ours": (fault(), "/validate", JSON, 500),
}


@pytest.mark.parametrize(("body", "path", "headers", "code"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_no_review_gets_an_error_and_the_next_caller_an_answer(
    running: Running, body: Any, path: str, headers: dict[str, str], code: int
) -> None:
    with suppress(ConnectionError, ssl.SSLError):  # of a body that is not read to its end
        assert running.ask(body, path, headers)[0] == code
    assert running.ask(REVIEW)[0] == 200


RAW = {
    "no length": (b"POST /validate HTTP/1.1\r\nContent-Type: application/json\r\n\r\n", b" 411 "),
    "chunked": (
        b"POST /validate HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n", b" 411 "),
    "a length that is none": (
        b"POST /validate HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: -5\r\n\r\n", b" 411 "),
    "a length beyond all": (
        b"POST /validate HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 99999999999999999\r\n\r\n",
        b" 413 "),
    "a line without end": (b"POST /" + b"x" * 70_000, b" 414 "),
    "no HTTP": (b"\x00\x01\x02\r\n\r\n", b"400"),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "answer"), RAW.values(), ids=RAW.keys())
def test_requests_without_form_are_refused(running: Running, sent: bytes, answer: bytes) -> None:
    with running.raw() as connection:
        connection.sendall(sent)
        assert answer in connection.recv(4096)
    assert running.ask(REVIEW)[0] == 200


def test_a_request_that_never_ends_runs_out_of_time(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "REQUEST_S", 0.5)
    started = time.monotonic()
    with running.raw() as connection, suppress(OSError):
        connection.sendall(b"POST /validate HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n")
        while time.monotonic() - started < 10:  # a byte now and then keeps no connection
            connection.sendall(b" ")
            time.sleep(0.1)
    assert time.monotonic() - started < 5
    assert running.ask(REVIEW)[0] == 200


def test_a_caller_who_leaves_in_the_middle_leaves_nothing_behind(running: Running) -> None:
    with running.raw() as connection:
        connection.sendall(b"POST /validate HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{")
    assert running.ask(REVIEW)[0] == 200


def test_callers_who_say_nothing_hold_up_nobody(running: Running) -> None:
    silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(20)]
    assert running.ask(REVIEW)[0] == 200
    for each in silent:
        each.close()


def test_more_connections_than_there_is_room_for_are_closed(running: Running) -> None:
    running.server._room = threading.BoundedSemaphore(2)
    silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(2)]
    time.sleep(0.2)
    with pytest.raises(OSError):  # noqa: PT011 - closed before or while it is secured
        running.ask(REVIEW)
    for each in silent:
        each.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
def test_tls_below_1_2_is_refused(running: Running) -> None:
    context = running.context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", running.port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="localhost")


def test_a_new_certificate_serves_the_next_connection(running: Running, tmp_path: Path) -> None:
    with running.raw() as connection:
        first = connection.getpeercert(binary_form=True)
    running.certificates.serving.unlink()
    running.certificates.renew(datetime.now(UTC))
    running.server.use_certificate(running.certificates.serving)
    with running.raw() as connection:
        assert connection.getpeercert(binary_form=True) != first
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    with pytest.raises(SettingsError, match="cannot be used"):
        running.server.use_certificate(broken)
    assert running.ask(REVIEW)[0] == 200


def test_draining_answers_what_is_under_way_and_takes_nothing_new(running: Running) -> None:
    running.hold.clear()
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(running.ask(REVIEW)[0]))
    asking.start()
    time.sleep(0.3)
    draining = threading.Thread(target=running.server.drain)
    draining.start()
    time.sleep(0.2)
    with pytest.raises(OSError):  # noqa: PT011 - refused
        running.ask(REVIEW)
    assert draining.is_alive()
    running.hold.set()
    draining.join(5)
    asking.join(5)
    assert not draining.is_alive()
    assert answers == [200]


def test_health_is_told_and_ends_before_the_server_does(running: Running) -> None:
    connection = running.connection()
    for draining, code in ((False, 200), (True, 503)):
        running.server.draining = draining
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())) == (code, {"synced": True, "draining": draining})
    connection.close()


def test_an_address_in_use_is_said_to_be(running: Running) -> None:
    with pytest.raises(SettingsError, match="cannot listen"):
        WebhookServer("127.0.0.1", running.port, {}, dict)


def test_no_thread_or_descriptor_is_left_behind(running: Running) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        running.ask(REVIEW)
    time.sleep(0.3)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
