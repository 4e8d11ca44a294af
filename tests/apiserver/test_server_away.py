"""An API server that cannot be reached for a while: serving goes on, and what was to be written is, once it is back."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from api_server import REPLICAS, ApiServer, wait_for
from controllers import LEASE, controller, installation

AWAY_S = 25


class Way:
    """A way to a server that can be cut: connections are dropped, and new ones refused."""

    def __init__(self, port: int) -> None:
        self._port, self._open = port, True
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        self._open = False
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._open = True
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while self._open:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                return
            self._sockets += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=_copy, args=(one, other), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@contextmanager
def by_a_way(server: ApiServer) -> Iterator[tuple[ApiServer, Way]]:
    way = Way(urlsplit(server.url).port or 0)
    try:
        yield ApiServer(f"https://127.0.0.1:{way.port}", server.directory), way
    finally:
        with suppress(OSError):
            way.cut()


def policy(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy",
        "metadata": {"name": name, "namespace": "default"}, "spec": {"routes": []},
    }  # fmt: skip


def has_status(server: ApiServer, name: str) -> bool:
    path = f"/apis/meshbridge.io/v1alpha1/namespaces/default/bypasspolicies/{name}"
    return "status" in server.call("GET", path)[1]


def test_nothing_is_lost_while_it_is_away(api_server: ApiServer, tmp_path: Path) -> None:
    with installation(api_server) as server, by_a_way(server) as (reached, way):
        server.delete(LEASE)
        server.create(LEASE)
        with controller(reached, tmp_path / "a", REPLICAS[0]) as a:
            server.create(policy("before"))
            wait_for(lambda: has_status(server, "before"), "it is written", 40)
            way.cut()
            server.create(policy("meanwhile"))
            wait_for(lambda: not a.leads, "it does not hold on to the lease", 30)
            assert a.serves
            problems = json.loads(a.get("/problems"))
            assert any(p["reason"] == "unwritable" and "cannot be reached" in p["text"] for p in problems), problems
            time.sleep(AWAY_S - 15)
            assert not has_status(server, "meanwhile")
            assert a.process.poll() is None
            way.mend()
            began = time.monotonic()
            wait_for(lambda: has_status(server, "meanwhile"), "it is made up for", 60)
            print(f"written {time.monotonic() - began:.1f} s after the API server was back")
            wait_for(lambda: "unwritable" not in a.get("/problems"), "the problem is gone", 30)
        server.delete(policy("before"), policy("meanwhile"))
