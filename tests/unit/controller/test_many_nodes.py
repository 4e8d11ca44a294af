"""What a controller keeps and does stays bounded by what nodes have in common, not by how many there are."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cluster_views import NOW, World, cnp, pod

from meshbridge.controller import controller
from meshbridge.kube.problems import Problem, ProblemReason
from meshbridge.xds import types as xds
from meshbridge.xds.auth import node_caller
from meshbridge.xds.secrets import SecretStore, load_or_create_authority
from meshbridge.xds.server import Feed

NODES = 6


def own_key(number: int) -> dict[str, str]:
    return {f"part{number}": "main"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Six nodes with a pod each, and policies that look at a label key of each node's own; no more than four views."""
    monkeypatch.setattr(controller, "MAX_VIEWS", 4)
    world = World(tmp_path)
    pods = [pod(f"p{i}", f"10.0.0.{i}", f"node-{i}", app=f"a{i}") for i in range(NODES)]
    for each in pods:
        each.data["metadata"]["labels"] |= own_key(int(each.name[1:]))
    world.put(*pods, *(cnp(f"c{i}", f"a{i}", own_key(i)) for i in range(NODES)))
    return world


def views(feeds: list[Feed]) -> int:
    return len({id(feed.snapshot.of(xds.ADDRESS)) for feed in feeds if feed.snapshot is not None})


def test_nodes_see_no_more_than_their_own_policies_look_at_while_there_are_few(world: World) -> None:
    feeds = [world.connect(node_caller(f"node-{i}")) for i in range(3)]
    assert views(feeds) == 3
    assert world.address(feeds[0], "10.0.0.1").peer.labels == {"app": "a1"}
    assert world.address(feeds[1], "10.0.0.1").peer.labels == own_key(1) | {"app": "a1"}


def test_where_nodes_differ_too_much_all_see_the_same(world: World) -> None:
    feeds = [world.connect(node_caller(f"node-{i}")) for i in range(NODES)]
    world.put(cnp("another", "a0", {"app": "a1"}))
    assert views(feeds) == 1
    for number in range(NODES):
        peer = world.address(feeds[0], f"10.0.0.{number}").peer
        assert peer.labels == own_key(number) | {"app": f"a{number}"}


def test_views_stay_few_while_nodes_connect(world: World) -> None:
    feeds = []
    for number in range(NODES):
        feeds.append(world.connect(node_caller(f"node-{number}")))
        assert views(feeds) <= 5, "four of their own, and the common one"


def test_nodes_that_have_become_few_see_their_own_again(world: World) -> None:
    feeds = [world.connect(node_caller(f"node-{i}")) for i in range(NODES)]
    for feed in feeds[2:]:
        feed.close()
    world.put(cnp("another", "a0", {"app": "a1"}))
    assert views(feeds[:2]) == 2
    assert world.address(feeds[1], "10.0.0.1").peer.labels == own_key(1) | {"app": "a1"}


def test_the_node_a_change_is_about_is_told_first(world: World) -> None:
    for number in range(NODES):
        world.connect(node_caller(f"node-{number}"))
    world.put(pod("new", "10.0.1.1", "node-4", app="a1"))
    assert world.woken[0] == node_caller("node-4")
    assert len(world.woken) == NODES


def test_endpoints_that_did_not_change_are_not_encoded_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = world.connect(node_caller("node-0"))
    made: list[str] = []
    encode = controller.endpoint_message
    monkeypatch.setattr(controller, "endpoint_message", lambda pod, *rest, **more: (
        made.append(pod.name), encode(pod, *rest, **more))[1])  # fmt: skip
    world.put(cnp("c0", "a0", {"app": "a1"}), pod("p9", "10.0.0.9", "node-0", app="a9"))
    assert made == ["p9"]
    assert world.names(feed, xds.ENDPOINT) == {"uid-p0", "uid-p9"}


def test_before_everything_was_read_a_problem_makes_no_revision(tmp_path: Path) -> None:
    """A revision would say that there are no policies."""
    unread = controller.Controller(SecretStore(load_or_create_authority(tmp_path, "cluster.local", NOW)))
    feed = unread.open(node_caller("node-0"), lambda: None)
    unread.report_write_problems("election", frozenset({Problem(ProblemReason.UNWRITABLE, "may not")}))
    unread.cannot_read_yet(frozenset({Problem(ProblemReason.UNREADABLE, "may not either")}))
    assert feed.snapshot is None
    assert {problem.text for problem in unread.problems} == {"may not", "may not either"}
