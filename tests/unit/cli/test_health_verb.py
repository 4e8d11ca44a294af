"""``meshbridge health`` against a real HTTP server."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from meshbridge.cli import cli
from meshbridge.controller.http import serve_http


@pytest.fixture
def served() -> Iterator[tuple[str, threading.Event]]:
    ready = threading.Event()
    server = serve_http("127.0.0.1:0", lambda: (), ready.is_set)
    yield f"127.0.0.1:{server.server_port}", ready
    server.shutdown()
    server.server_close()


def test_the_exit_code_is_what_the_component_says(served: tuple[str, threading.Event]) -> None:
    address, ready = served
    codes = []
    for _ in range(2):
        codes.append(CliRunner().invoke(cli, ["health", address]).exit_code)
        ready.set()
    assert codes == [1, 0]


@pytest.mark.parametrize(("address", "code"), [("127.0.0.1:1", 1), ("127.0.0.1:99999", 1), ("9401", 2), ("a:b", 2)])
def test_nobody_answers_or_it_is_no_address(address: str, code: int) -> None:
    assert CliRunner().invoke(cli, ["health", address]).exit_code == code


def test_it_loads_little_since_it_runs_every_few_seconds() -> None:
    code = "import sys; from meshbridge.cli import cli; cli.get_command(None, 'health'); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"kubernetes", "grpc", "structlog", "google.protobuf", "asyncio"} & set(loaded)
