"""Who has an address or a UID, where several say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cluster_views import A, B, World, document, pod

from meshbridge.identity.model import Entity
from meshbridge.protos import agent_pb2
from meshbridge.xds import types as xds
from meshbridge.xds.server import Feed


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_pod_that_says_it_holds_the_gateways_address_of_a_pod_range_is_no_node(world: World) -> None:
    a = world.connect(A)
    node = document("Node", "node-b", spec={"podCIDR": "10.244.2.0/24"})
    world.put(node, pod("web-0", "10.244.2.1", "node-b"))
    assert world.address(a, "10.244.2.1").name == "web-0"
    assert not world.controller.problems
    world.put(document("Node", "node-c", status={"addresses": [{"type": "InternalIP", "address": "10.244.2.1"}]}))
    assert world.address(a, "10.244.2.1").peer.entities == {Entity.UNMANAGED}, "a node's status is no guess"
    world.drop(document("Node", "node-c"), pod("web-0", "10.244.2.1"))
    assert world.address(a, "10.244.2.1").node == "node-b"


def endpoints(feed: Feed) -> dict[str, agent_pb2.Endpoint]:
    assert feed.snapshot is not None
    found = feed.snapshot.of(xds.ENDPOINT)
    return {name: agent_pb2.Endpoint.FromString(each.body) for name, each in found.items()}


def test_two_pods_of_a_node_with_one_uid_are_closed_and_named(world: World) -> None:
    a, b = world.connect(A), world.connect(B)
    web, api = pod("web", "10.0.0.1", uid="u"), pod("api", "10.0.0.2", uid="u")
    world.put(web, api, pod("db", "10.0.0.3", "node-b", uid="u"))
    told = endpoints(a)
    assert {message.name for message in told.values()} == {"web", "api"}
    assert {message.uid for message in told.values()} == set(told), "no interface announced for the UID is either's"
    assert "u" not in told
    for message in told.values():
        assert message.fault == (
            "pods shop/api and shop/web on node node-a have the UID 'u'; all are closed until it is one's alone"
        )
    assert [problem.text for problem in world.controller.problems] == [next(iter(told.values())).fault]
    assert [message.fault for message in endpoints(b).values()] == [""], "another node keeps its own"
    assert world.address(a, "10.0.0.1").name == "web", "to others both are who they are"
    world.drop(api)
    assert [(name, message.fault) for name, message in endpoints(a).items()] == [("u", "")]
    assert not world.controller.problems


def test_a_uid_that_is_written_as_a_conflict_is_named_opens_nothing(world: World) -> None:
    a = world.connect(A)
    web, api = pod("web", "10.0.0.1", uid="u"), pod("api", "10.0.0.2", uid="u")
    world.put(web, api, pod("evil", "10.0.0.3", uid="u of shop/web"))
    assert all(message.fault for message in endpoints(a).values())


def test_a_pod_that_cannot_be_read_is_closed_by_its_node(world: World) -> None:
    a = world.connect(A)
    refused = pod("web", "10.0.0.1", spec={"serviceAccountName": "x/ns/finance/sa/client"})
    world.put(refused)
    ((uid, message),) = endpoints(a).items()
    assert (uid, message.name, message.labels) == ("uid-web", "web", {})
    assert "serviceAccountName" in message.fault
    world.put(pod("web", "10.0.0.1"))
    assert [message.fault for message in endpoints(a).values()] == [""]
    world.put(refused)
    world.drop(refused)
    assert not endpoints(a)


NOT_TOLD = {
    "no node runs it": {"spec": {"serviceAccountName": "x/y", "nodeName": ""}},
    "it has ended": {"phase": "Failed", "spec": {"serviceAccountName": "x/y"}},
    "it is in its node's network": {"spec": {"serviceAccountName": "x/y", "hostNetwork": True}},
    "its node is no name": {"spec": {"serviceAccountName": "x/y", "nodeName": 5}},
}


@pytest.mark.parametrize("more", NOT_TOLD.values(), ids=NOT_TOLD.keys())
def test_a_pod_that_cannot_be_read_and_has_no_interface(world: World, more: dict[str, Any]) -> None:
    a = world.connect(A)
    world.put(pod("web", "10.0.0.1", **more))
    assert not endpoints(a)
