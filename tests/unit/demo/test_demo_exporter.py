"""The sample target counts what really arrives, whatever it is, and speaks Prometheus's format."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from meshbridge.demo.apps.exporter import Exporter
from meshbridge.demo.apps.server import COUNTERS, DualStackServer

HELLO = bytes.fromhex("16030100a5010000a10303") + b"\n" * 8


@pytest.fixture
def port() -> Iterator[int]:
    server = DualStackServer(("::1", 0), Exporter)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield int(server.server_address[1])
    server.shutdown()
    server.server_close()
    thread.join()


def grown(before: dict[str, int], name: str) -> int:
    return COUNTERS.snapshot().get(name, 0) - before.get(name, 0)


def test_metrics_are_in_the_text_format(port: int) -> None:
    with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=5) as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = answer.read().decode().splitlines()
    assert "# TYPE sample_requests_total counter" in lines
    assert all(line.startswith("# TYPE ") or line.split()[1].isdigit() for line in lines)


def test_bytes_are_counted_by_the_address_they_came_from(port: int) -> None:
    before = COUNTERS.snapshot()
    urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=5).close()
    assert grown(before, "bytes:::1") == grown(before, "bytes") > 0
    assert grown(before, "requests") == 1


def test_a_tls_hello_is_counted_and_is_no_request(port: int) -> None:
    before = COUNTERS.snapshot()
    with socket.create_connection(("::1", port), timeout=5) as client:
        client.sendall(HELLO)
        client.recv(1)
    assert grown(before, "tls_hellos") == 1
    assert grown(before, "requests") == 0


def test_a_request_is_no_tls_hello(port: int) -> None:
    before = COUNTERS.snapshot()
    urllib.request.urlopen(f"http://[::1]:{port}/other", timeout=5).close()
    assert grown(before, "tls_hellos") == 0
