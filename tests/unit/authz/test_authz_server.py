"""The gRPC server on its Unix socket: health, truncated messages, drain, and who owns the socket."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from envoy.service.auth.v3.external_auth_pb2_grpc import AuthorizationStub
from grpc_health.v1 import health_pb2, health_pb2_grpc

from meshbridge.authz.caller import Caller
from meshbridge.authz.judge import Judge
from meshbridge.authz.server import SERVICE, AuthzServer
from meshbridge.authz.view import CurrentView
from meshbridge.errors import SettingsError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def listen(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/authz.sock"


@pytest.fixture
def server(listen: str) -> Iterator[AuthzServer]:
    made = AuthzServer(listen, Judge(CurrentView()).check)
    made.start()
    yield made
    made.drain()


def health(listen: str, service: str = SERVICE) -> int:
    with grpc.insecure_channel(listen) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer: int = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
        return answer


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_only_envoys_user_may_ask(listen: str, server: AuthzServer) -> None:
    found = Path(listen.removeprefix("unix:")).stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (1337, 0o600)


def test_health_follows_readiness(listen: str, server: AuthzServer) -> None:
    assert health(listen) == NOT_SERVING
    server.set_ready()
    assert health(listen) == SERVING
    assert health(listen, "") == SERVING


def test_check_before_the_first_revision_is_refused(listen: str, server: AuthzServer) -> None:
    with grpc.insecure_channel(listen) as channel:
        response = AuthorizationStub(channel).Check(CheckRequest(), timeout=5)
    assert response.status.code != 0
    assert response.denied_response.status.code == 503


@pytest.mark.parametrize("data", [b"\x0a\xff", b"\x0a\x05ab", b"\xff" * 100], ids=["length", "cut short", "noise"])
def test_truncated_message_is_answered_with_a_refusal(listen: str, server: AuthzServer, data: bytes) -> None:
    with grpc.insecure_channel(listen) as channel:
        call = channel.unary_unary(f"/{SERVICE}/Check")
        assert CheckResponse.FromString(call(data, timeout=5)).status.code != 0


def test_half_a_grpc_frame_leaves_the_server_answering(listen: str, server: AuthzServer) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
    for tail in (b"", b"\0\0\x10\x01", b"\0\xff\xff\x00\x01\0\0\0\x01" + b"x" * 100, b"\xff" * 64):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(listen.removeprefix("unix:"))
            raw.sendall(preface + tail)
    assert health(listen) == NOT_SERVING


def echo(data: bytes, _: Caller) -> bytes:
    return data


def slow_check(started: threading.Event) -> Callable[[bytes, Caller], bytes]:
    def check(_: bytes, __: Caller) -> bytes:
        started.set()
        time.sleep(0.5)
        encoded: bytes = CheckResponse().SerializeToString()
        return encoded

    return check


def test_drain_finishes_what_is_in_flight_and_takes_nothing_new(listen: str) -> None:
    started = threading.Event()
    server = AuthzServer(listen, slow_check(started))
    server.start()
    server.set_ready()
    with grpc.insecure_channel(listen) as channel, ThreadPoolExecutor(1) as pool:
        stub = AuthorizationStub(channel)
        answer = pool.submit(lambda: stub.Check(CheckRequest(), timeout=5))
        assert started.wait(5)
        server.drain()
        assert answer.result(5).status.code == 0
        with pytest.raises(grpc.RpcError):
            stub.Check(CheckRequest(), timeout=1)


def test_who_leaves_goes_on_answering_and_does_not_come_back(listen: str, server: AuthzServer) -> None:
    server.set_ready()
    server.leave()
    server.set_ready()  # a revision that comes late
    assert (health(listen), server.ready) == (NOT_SERVING, False)
    with grpc.insecure_channel(listen) as channel:
        assert AuthorizationStub(channel).Check(CheckRequest(), timeout=5).denied_response.status.code == 503


def test_a_socket_is_replaced_when_nobody_answers(listen: str) -> None:
    path = Path(listen.removeprefix("unix:"))
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    server = AuthzServer(listen, echo)
    server.start()
    with pytest.raises(SettingsError, match="another server answers"):
        AuthzServer(listen, echo)
    server.drain()


def test_a_file_in_the_sockets_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SettingsError, match="is no socket"):
        AuthzServer(f"unix:{tmp_path}/file", echo)
    assert (tmp_path / "file").read_text() == "mine"
