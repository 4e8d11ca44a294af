"""Who has an address or a UID, where several say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cluster_views import A, World, document, pod

from meshbridge.identity.model import Entity


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
