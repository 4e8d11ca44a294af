"""A node whose pods send past their own sidecars is told every policy of the mesh: it must know who refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cluster_views import World, cnp, document, pod

from meshbridge.bypass.annotations import EXCLUDE_OUTBOUND_PORTS
from meshbridge.policy.model import Document
from meshbridge.protos import agent_pb2
from meshbridge.xds import types as xds
from meshbridge.xds.auth import node_caller
from meshbridge.xds.server import Feed

ELSEWHERE = "security.istio.io/AuthorizationPolicy/pay/ledger"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def authorization(name: str = "ledger", namespace: str = "pay") -> Document:
    return document("AuthorizationPolicy", name, namespace, spec={"action": "ALLOW", "rules": [{}]})


def knows_all(feed: Feed) -> bool:
    assert feed.snapshot is not None
    return bool(agent_pb2.Mesh.FromString(feed.snapshot.of(xds.MESH)["mesh"].body).all_mesh_policies)


def test_a_node_without_outbound_bypass_is_told_only_what_selects_its_pods(world: World) -> None:
    feed = world.connect(node_caller("node-a"))
    world.put(pod("web", "10.0.0.1"), pod("ledger", "10.0.0.2", "node-b", namespace="pay"), authorization())
    assert ELSEWHERE not in world.names(feed, xds.POLICY)
    assert not knows_all(feed)


def test_a_node_with_one_is_told_every_policy_of_the_mesh_and_that_these_are_all(world: World) -> None:
    feed = world.connect(node_caller("node-a"))
    scraper = pod("scraper", "10.0.0.1", annotations={EXCLUDE_OUTBOUND_PORTS: "8080"})
    world.put(scraper, pod("ledger", "10.0.0.2", "node-b", namespace="pay"))
    world.put(authorization(), cnp("elsewhere", "ledger", {"app": "x"}, namespace="pay"))
    assert world.names(feed, xds.POLICY) == {ELSEWHERE}
    assert knows_all(feed)
    world.drop(authorization())
    assert world.names(feed, xds.POLICY) == set()
    world.put(authorization())
    world.drop(scraper)
    assert world.names(feed, xds.POLICY) == set()
    assert not knows_all(feed)


def test_addresses_keep_the_labels_by_which_those_policies_select(world: World) -> None:
    feed = world.connect(node_caller("node-a"))
    selecting = document(
        "AuthorizationPolicy", "ledger", "pay", spec={"selector": {"matchLabels": {"app": "ledger"}}, "action": "ALLOW"}
    )
    ledger = pod("ledger", "10.0.0.2", "node-b", namespace="pay", app="ledger")
    world.put(pod("web", "10.0.0.1"), ledger, selecting)
    assert "app" not in world.address(feed, "10.0.0.2").peer.labels
    world.put(pod("scraper", "10.0.0.3", annotations={EXCLUDE_OUTBOUND_PORTS: "8080"}))
    assert world.address(feed, "10.0.0.2").peer.labels["app"] == "ledger"
