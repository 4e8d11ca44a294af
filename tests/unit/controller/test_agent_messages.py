"""What the controller encodes, agents and authz decode to an equal value."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import TypeVar

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.controller import messages as writing
from meshbridge.identity.model import ContainerPort, Entity, Peer, ProxyClass, ProxyContainer, Workload
from meshbridge.policy.mesh import MeshSettings, ProviderKind
from meshbridge.policy.model import Document, Source
from meshbridge.protos import agent_pb2
from meshbridge.xds import messages as reading

T = TypeVar("T", bound=Message)
TEXT = st.text(max_size=6)
MAP = st.dictionaries(TEXT, TEXT, max_size=3)
ADDRESS = st.builds(IPv4Address, st.integers(0, 2**32 - 1)) | st.builds(IPv6Address, st.integers(2**64, 2**128 - 1))
PORT = st.builds(ContainerPort, TEXT, st.integers(1, 65535), st.sampled_from(["TCP", "UDP"]))
WORKLOADS = st.builds(
    Workload,
    namespace=TEXT,
    name=TEXT,
    uid=TEXT,
    node=TEXT,
    addresses=st.lists(ADDRESS, max_size=2).map(tuple),
    labels=MAP,
    namespace_labels=MAP,
    annotations=MAP,
    service_account=TEXT,
    ports=st.lists(PORT, max_size=2).map(tuple),
    probe_ports=st.lists(st.integers(1, 65535) | st.sampled_from(["http", "x-8"]), max_size=2).map(tuple),
    host_network=st.booleans(),
    proxy=st.sampled_from(ProxyClass),
    init_args=st.none() | st.lists(TEXT, max_size=3).map(tuple),
    phase=TEXT,
    init_env=st.just({}),
    proxy_container=st.none() | st.builds(ProxyContainer, TEXT, MAP, st.none() | st.integers(0, 2**31), st.none()),
    init_containers=st.lists(TEXT, max_size=2).map(tuple),
)
PEERS = st.builds(
    Peer,
    namespace=st.none() | st.text(min_size=1, max_size=6),
    labels=MAP,
    namespace_labels=MAP,
    service_account=TEXT,
    cluster=TEXT,
    trust_domain=TEXT,
    proxy=st.sampled_from(ProxyClass),
    entities=st.frozensets(st.sampled_from(Entity)),
    ports=st.frozensets(PORT, max_size=3),
)


def through(message: T) -> T:
    return type(message).FromString(writing.resource(message).body)


@given(WORKLOADS, st.lists(ADDRESS, max_size=2).map(tuple))
def test_endpoints(workload: Workload, extra: tuple[IPv4Address | IPv6Address, ...]) -> None:
    message = through(writing.endpoint_message(workload, extra))
    assert reading.workload_of(message) == workload
    assert tuple(reading.address_of(packed, "") for packed in message.extra_addresses) == extra


def test_a_probe_port_of_too_many_digits_is_a_message_error() -> None:
    with pytest.raises(reading.MessageError, match="5000 digits"):
        reading.workload_of(agent_pb2.Endpoint(namespace="s", name="a", probe_ports=["9" * 5000]))


@given(ADDRESS, PEERS)
def test_addresses(address: IPv4Address | IPv6Address, peer: Peer) -> None:
    message = through(writing.address_message(address, peer, name="n", uid="u", node="node-a"))
    assert reading.holder_of(message) == reading.AddressHolder(address, peer, "n", "u", "node-a")


def test_policies_travel_without_status_and_managed_fields() -> None:
    beside = {"managedFields": [1], "resourceVersion": "7"}
    data = {"metadata": {"name": "p", **beside}, "spec": {"é": [1, None, True, 0.5]}, "status": {"x": 1}}
    document = Document("K", "g/v1", "ns", "p", data, Source("f.yaml", {"": 3, "spec": 4}), "uid", "is defined twice")
    decoded = reading.document_of(through(writing.policy_message(document)))
    assert decoded.data == {"metadata": {"name": "p"}, "spec": {"é": [1, None, True, 0.5]}}
    assert (decoded.key, decoded.uid, decoded.fault) == (document.key, "uid", "is defined twice")
    assert (decoded.source.file, decoded.source.lines) == ("f.yaml", {"": 3, "spec": 4})


def test_mesh() -> None:
    mesh = MeshSettings("root", "td", ("a", "b"), "c")
    assert reading.mesh_of(through(writing.mesh_message(mesh))) == mesh
    for providers in ((), (("a", ProviderKind.HTTP), ("b", ProviderKind.UNUSABLE))):
        told = replace(mesh, providers=providers)
        assert reading.mesh_of(through(writing.mesh_message(told))) == told


def test_equal_values_have_equal_versions_whatever_order_they_were_made_in() -> None:
    one = Peer(namespace="a", labels={"x": "1", "y": "2"}, entities=frozenset({Entity.HOST, Entity.WORLD}))
    two = Peer(namespace="a", labels={"y": "2", "x": "1"}, entities=frozenset({Entity.WORLD, Entity.HOST}))
    address = IPv4Address("10.0.0.1")
    first, second = (writing.resource(writing.address_message(address, peer)) for peer in (one, two))
    assert first == second
