"""Lists over HTTP that a well-behaved API server seldom gives: too old, too slow, of the wrong form."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from meshbridge.kube import api
from meshbridge.kube.api import ClusterError
from meshbridge.kube.cluster import connect, read_cluster
from meshbridge.kube.objects import POLICY_KINDS, STATE_KINDS

PODS = "/api/v1/pods"


class Server(ThreadingHTTPServer):
    """Answers from a table of paths; a list of answers is gone through, the last one staying."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, list[tuple[int, Any]]] = {
            "/api/v1": [(200, {"resources": [
                {"name": "pods", "kind": "Pod", "namespaced": True},
                {"name": "pods/status", "kind": "Pod", "namespaced": True},
            ]})],
        }  # fmt: skip
        self.asked: list[str] = []
        self.stopped = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.server.asked.append(self.path)
        found = self.server.answers.get(f"{path}?{query}") or self.server.answers.get(path) or [(404, {})]
        code, body = found.pop(0) if len(found) > 1 else found[0]
        if body is None:
            self.server.stopped.wait(10)
            return
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()


def read(server: Server, tmp_path: Path) -> list[str]:
    config = tmp_path / "config"
    address = f"http://127.0.0.1:{server.server_port}"
    config.write_text(json.dumps({
        "clusters": [{"name": "c", "cluster": {"server": address}}], "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}], "current-context": "c",
    }))  # fmt: skip
    return [document.name for document in read_cluster(connect(config)).documents]


def pods(*names: str, following: str = "") -> dict[str, Any]:
    return {"metadata": {"continue": following}, "items": [{"metadata": {"name": name}} for name in names]}


def test_a_list_that_grew_too_old_is_begun_again(server: Server, tmp_path: Path) -> None:
    server.answers[f"{PODS}?limit=500"] = [(200, pods("old", following="x")), (200, pods("a", following="y"))]
    server.answers[f"{PODS}?limit=500&continue=x"] = [(410, {"message": "too old"})]
    server.answers[f"{PODS}?limit=500&continue=y"] = [(200, pods("b"))]
    assert read(server, tmp_path) == ["a", "b"]


def test_a_list_that_always_grows_too_old_is_an_error_and_no_part_of_it(server: Server, tmp_path: Path) -> None:
    server.answers[PODS] = [(410, {"message": "too old"})]
    with pytest.raises(ClusterError, match="changes faster than it can be read"):
        read(server, tmp_path)


def test_a_server_that_does_not_go_on_is_not_waited_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "TIMEOUT_S", (0.3, 0.3))
    server.answers[PODS] = [(200, None)]
    with pytest.raises(ClusterError, match=r"cannot be reached: .*timed out"):
        read(server, tmp_path)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"<html>", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
        (b"\xff\xfe", "no JSON object"),
        ({"kind": "PodList"}, "a list of pods without items"),
        ({"items": {"a": {}}}, "a list of pods without items"),
        ({"items": ["a"]}, "a Pod without a name"),
        ({"items": [{"metadata": {}}]}, "a Pod without a name"),
        ({"items": [{"metadata": {"name": 5}}]}, "a Pod without a name"),
    ],
)
def test_an_answer_of_another_form_is_an_error(server: Server, tmp_path: Path, body: Any, told: str) -> None:
    server.answers[PODS] = [(200, body)]
    with pytest.raises(ClusterError, match=told):
        read(server, tmp_path)


def test_an_answer_that_is_too_long_is_not_taken_in(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MAX_PAGE_BYTES", 1000)
    server.answers[PODS] = [(200, pods("x" * 2000))]
    with pytest.raises(ClusterError, match="more than 1000 bytes"):
        read(server, tmp_path)


def test_a_list_of_nothing_may_be_null(server: Server, tmp_path: Path) -> None:
    server.answers[PODS] = [(200, {"items": None})]
    assert read(server, tmp_path) == []


def test_a_failure_says_what_the_server_said(server: Server, tmp_path: Path) -> None:
    server.answers[PODS] = [(500, {"message": "etcd is away"})]
    with pytest.raises(ClusterError, match="answers 500: etcd is away"):
        read(server, tmp_path)


def test_only_kinds_that_are_read_are_asked_for_and_no_secrets(server: Server, tmp_path: Path) -> None:
    server.answers["/api/v1"][0][1]["resources"].append({"name": "secrets", "kind": "Secret", "namespaced": True})
    server.answers[PODS] = [(200, pods())]
    read(server, tmp_path)
    assert not [path for path in server.asked if "secret" in path]
    assert ("", "Secret") not in POLICY_KINDS | STATE_KINDS
