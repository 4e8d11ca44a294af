"""A look at the processes of pods: when it is repeated, and what is said where none is visible."""

from __future__ import annotations

import os
import socket
from itertools import pairwise

import pytest

from meshbridge.agent import processes as module
from meshbridge.agent.processes import Processes
from meshbridge.bypass.owners import ProxyOwner

OWN = "/proc/self/ns/net"


def owner(port: int) -> ProxyOwner:
    return ProxyOwner(frozenset({1337}), frozenset({1337}), frozenset({port}))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    # to enter a namespace takes a right that this test has not
    monkeypatch.setattr(module, "in_namespace", lambda _, action: action())


def test_who_holds_the_listening_socket_is_the_proxy_whatever_its_user(here: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        pods = {"u": (OWN, ProxyOwner(frozenset({os.getuid()}), frozenset(), frozenset({server.getsockname()[1]})))}
        found = Processes().look(pods)["u"]
    assert os.getpid() not in {impostor.pid for impostor in found.impostors.named}
    assert not found.problem


def test_without_the_nodes_processes_it_is_said_that_nothing_is_known(
    here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "processes_in", lambda _: {})
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = Processes().look({"u": (OWN, owner(server.getsockname()[1]))})["u"]
    assert "hostPID" in found.problem
    assert not found.impostors


def test_while_nobody_listens_nothing_is_said(here: None) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert Processes().look({"u": (OWN, owner(unused.getsockname()[1]))}) == {}


def test_a_look_that_took_long_is_not_repeated_soon(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    looks = []

    def slow(_: object) -> dict[int, list[int]]:
        looks.append(now_s[0])
        now_s[0] += 0.2
        return {}

    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(module, "processes_in", slow)
    watch = Processes()
    for _ in range(30):
        watch.look({})
        now_s[0] += 0.5
    # twenty times 0.2 s, and what is left of a step
    assert len(looks) > 2
    assert all(4.2 <= later - earlier < 4.8 for earlier, later in pairwise(looks))
