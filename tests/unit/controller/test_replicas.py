"""Where the controllers are reaches every node, and nobody is told again when nothing of it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cluster_views import NOW, A, B, World, pod

from meshbridge.controller.controller import Controller
from meshbridge.controller.replicas import MAX_REPLICAS, OwnService
from meshbridge.policy.model import Document
from meshbridge.protos.agent_pb2 import Revision
from meshbridge.xds import types as xds
from meshbridge.xds.secrets import SecretStore, load_or_create_authority
from meshbridge.xds.server import Feed

OURS = OwnService("meshbridge-system", "meshbridge-controller", 9400)


@pytest.fixture
def world(tmp_path: Path) -> World:
    found = World(tmp_path)
    secrets = SecretStore(load_or_create_authority(tmp_path, "cluster.local", NOW))
    found.controller = Controller(secrets, lambda: NOW, OURS)
    found.controller.apply({}, frozenset())
    return found


def part(
    *addresses: str, name: str = "a", namespace: str = OURS.namespace, service: str = OURS.name, **more: Any
) -> Document:
    data = {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "endpoints": [{"addresses": [address], **more} for address in addresses],
    }
    return Document("EndpointSlice", "discovery.k8s.io/v1", namespace, name, data)


def named(feed: Feed) -> list[str]:
    assert feed.snapshot is not None
    return list(Revision.FromString(feed.snapshot.of(xds.REVISION)["revision"].body).controllers)


def test_every_node_is_told_where_they_are(world: World) -> None:
    a, b = world.connect(A), world.connect(B)
    world.put(part("10.0.0.2", "10.0.0.1"), part("fd00::1", name="b"))
    assert named(a) == named(b) == ["10.0.0.1:9400", "10.0.0.2:9400", "[fd00::1]:9400"]
    before = world.revision(a)
    world.put(part("10.0.0.1", "10.0.0.2"))
    assert world.revision(a) == before, "the same in another order"
    world.put(pod("web", "10.1.0.1"))
    assert named(a)[0] == "10.0.0.1:9400"
    world.drop(part(name="a"), part(name="b"))
    assert named(a) == []


OTHERS = {
    "another Service": part("10.0.0.1", service="meshbridge-webhook"),
    "another namespace": part("10.0.0.1", namespace="shop"),
    "one that is not ready": part("10.0.0.1", conditions={"ready": False}),
    "a host name": part("example.com"),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_others_are_none(world: World, other: Document) -> None:
    a = world.connect(A)
    world.put(other)
    assert named(a) == []


def test_they_are_few() -> None:
    many = part(*(f"10.0.0.{n}" for n in range(1, 200)))
    assert len(OURS.replicas({many.key: (many,)})) == MAX_REPLICAS
