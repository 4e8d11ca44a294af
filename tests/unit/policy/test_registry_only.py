"""REGISTRY_ONLY past Envoy: what the registry knows by address, and that nothing but the rest is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.identity.model import Entity, IpFamily, Peer, Workload
from meshbridge.identity.numbering import number_peers
from meshbridge.policy.capture import REGISTRY_ONLY, Capture, EgressRegistry, OutboundBypass
from meshbridge.policy.compile import Compiler
from meshbridge.policy.egressregistry import Known, known_of
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.frontends import Backend, FrontendPort, with_frontends
from meshbridge.policy.mesh import MeshSettings
from meshbridge.policy.model import ANY, Direction, Document, PolicyMap
from meshbridge.policy.parse import parse
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.precedence import DropReason

V4, TCP, UDP = IpFamily.IPV4, 6, 17
MESH = MeshSettings(registry_only=True)
WEB = Workload("shop", "web", "u", "n", (ip_address("10.0.0.1"),), {"app": "web"})


def known(kind: str, namespace: str = "shop", **spec: Any) -> Known:
    version = "networking.istio.io/v1"
    data = {"apiVersion": version, "kind": kind, "metadata": {"name": "x", "namespace": namespace}, "spec": spec}
    document = Document(kind, version, namespace, "x", data)
    return known_of(document, parse(document))


def port(number: int, **more: Any) -> dict[str, Any]:
    return {"number": number, "name": "p", "protocol": "TCP", **more}


ENTRY: dict[str, Any] = {"hosts": ["db.example.com"], "ports": [port(5432)]}
ENTRIES: dict[str, tuple[dict[str, Any], list[str], list[int]]] = {
    "addresses": ({**ENTRY, "addresses": ["192.0.2.0/24"], "resolution": "NONE"}, ["192.0.2.0/24"], []),
    "endpoints by address": (
        {**ENTRY, "resolution": "STATIC", "endpoints": [{"address": "192.0.2.7"}, {"address": "2001:db8::7"}]},
        ["192.0.2.7/32", "2001:db8::7/128"], [],
    ),
    "a host by name": ({**ENTRY, "resolution": "DNS"}, [], [5432]),
    "any address": ({**ENTRY, "resolution": "NONE"}, [], [5432]),
    "a virtual address whose host DNS knows": (
        {**ENTRY, "addresses": ["192.0.2.1"], "ports": [port(80, targetPort=443)], "resolution": "DNS"},
        ["192.0.2.1/32"], [80, 443],
    ),
    "endpoints by name, with ports of their own": (
        {**ENTRY, "resolution": "DNS", "endpoints": [{"address": "a.example.com", "ports": {"p": 6432}}]},
        [], [5432, 6432],
    ),
    "workloads by label": ({**ENTRY, "resolution": "STATIC", "workloadSelector": {"labels": {"a": "b"}}}, [], [5432]),
    "nothing when refused": ({"ports": [port(5432)]}, [], []),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "networks", "by_name"), ENTRIES.values(), ids=ENTRIES.keys())
def test_of_a_service_entry_is_known(spec: dict[str, Any], networks: list[str], by_name: list[int]) -> None:
    found = known("ServiceEntry", **spec)
    assert found.networks == frozenset(map(ip_network, networks))
    assert sorted(found.by_name) == by_name


def test_a_workload_entry_is_known_by_its_address() -> None:
    assert known("WorkloadEntry", address="192.0.2.9").networks == {ip_network("192.0.2.9")}
    assert known("WorkloadEntry", address="vm.example.com") == Known()


SCOPES: dict[str, tuple[list[Known], MeshSettings, bool]] = {
    "as the mesh says": ([], MESH, True),
    "no registry where the mesh lets everybody out": ([], MeshSettings(), False),
    "not where a Sidecar says otherwise": (
        [known("Sidecar", outboundTrafficPolicy={"mode": "ALLOW_ANY"})], MESH, False,
    ),
    "not where the root namespace's does": (
        [known("Sidecar", "istio-system", outboundTrafficPolicy={"mode": "ALLOW_ANY"})], MESH, False,
    ),
    "where another namespace's does": (
        [known("Sidecar", "pay", outboundTrafficPolicy={"mode": "ALLOW_ANY"})], MESH, True,
    ),
    "where one of other pods does": (
        [known("Sidecar", workloadSelector={"labels": {"app": "x"}}, outboundTrafficPolicy={"mode": "ALLOW_ANY"})],
        MESH, True,
    ),
    "where one says nothing of it": ([known("Sidecar", egress=[{"hosts": ["*/*"]}])], MESH, True),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "mesh", "asked"), SCOPES.values(), ids=SCOPES.keys())
def test_the_registry_binds_a_pod(parts: list[Known], mesh: MeshSettings, asked: bool) -> None:
    assert (Known.all_of(parts).registry_of(WEB, mesh) is not None) == asked


OUTSIDE = ip_network("192.0.2.0/24")
REGISTRY = EgressRegistry(frozenset({OUTSIDE}), (443,))
PEERS = {
    "behind a Service": ("10.0.0.2", Peer("shop", {"app": "api"}, registered=True)),
    "a Service": ("10.96.0.1", Peer(entities=frozenset({Entity.WORLD}), service="shop/api")),
    "of a ServiceEntry": ("192.0.2.9", Peer(entities=frozenset({Entity.WORLD}))),
    "a pod of no Service": ("10.0.0.3", Peer("shop", {"app": "job"})),
    "a node": ("172.16.0.1", Peer(entities=frozenset({Entity.REMOTE_NODE}))),
}
NUMBERING = number_peers({ip_address(a): p for a, p in PEERS.values()}, [OUTSIDE])
NUMBERS = {name: NUMBERING.addresses[ip_address(address)].identity for name, (address, _) in PEERS.items()}
NUMBERS |= {"the world": 9, "an identity of tomorrow": 9999}
KNOWN = {"behind a Service", "a Service", "of a ServiceEntry"}


def egress(bypasses: Sequence[OutboundBypass], registry: EgressRegistry | None) -> PolicyMap:
    capture = Capture(outbound={V4: tuple(bypasses)}, registry=registry)
    return Compiler(NUMBERING.identities).endpoint(WEB, PolicySet(mesh=MESH), capture).map(Direction.EGRESS, V4)


@pytest.mark.parametrize("name", NUMBERS)
def test_on_bypassed_ports_only_what_is_registered_is_reached(name: str) -> None:
    found = egress([OutboundBypass(443, 8080)], REGISTRY)
    decision = evaluate(found, NUMBERS[name], TCP, 8080)
    assert decision.passes == (name in KNOWN)
    if not decision.passes:
        assert (decision.deny_reason, decision.deciding.origins) == (DropReason.COMPENSATION, (REGISTRY_ONLY,))
    assert evaluate(found, NUMBERS[name], TCP, 443).passes, "a host is known by name on this port"
    assert evaluate(found, NUMBERS[name], TCP, 8081).passes, "this port is Envoy's"
    assert evaluate(found, NUMBERS[name], UDP, 8080).passes


def test_towards_some_destinations_only_those_are_closed() -> None:
    found = egress([OutboundBypass(0, 65535, (OUTSIDE,))], EgressRegistry())
    assert not evaluate(found, NUMBERS["of a ServiceEntry"], TCP, 80).passes
    assert all(evaluate(found, n, TCP, 80).passes for name, n in NUMBERS.items() if name != "of a ServiceEntry")


def test_a_service_without_known_backends_stays_open_as_its_backends_are_registered() -> None:
    number = NUMBERS["a Service"]
    ports = (FrontendPort(TCP, 443, ()), FrontendPort(TCP, 80, (Backend(NUMBERS["behind a Service"], 8080),)))
    found = with_frontends(egress([OutboundBypass(8080, 8080)], REGISTRY), {number: ports})
    assert evaluate(found, number, TCP, 443).passes
    assert evaluate(found, number, TCP, 80).passes


PORTS = st.sampled_from((0, 80, 443, 444, 8080, 65535))
BYPASSES = st.lists(
    st.builds(
        lambda a, b, networks, audit: OutboundBypass(min(a, b), max(a, b), networks, audit),
        PORTS, PORTS, st.sampled_from((ANY, (OUTSIDE,))), st.booleans(),
    ),
    max_size=4,
)  # fmt: skip


def past_envoy(bypass: OutboundBypass, name: str, number: int) -> bool:
    reached = bypass.networks is ANY or name == "of a ServiceEntry"
    return reached and bypass.first <= number <= bypass.last


@given(BYPASSES, st.booleans(), PORTS)
def test_it_only_subtracts_and_only_where_envoy_is_passed_by(
    bypasses: list[OutboundBypass], registered: bool, asked: int
) -> None:
    registry = REGISTRY if registered else replace(REGISTRY, networks=frozenset())
    without, found = egress(bypasses, None), egress(bypasses, registry)
    known_ = KNOWN if registered else KNOWN - {"of a ServiceEntry"}
    for name, number in NUMBERS.items():
        assert evaluate(without, number, TCP, asked).passes
        by = [bypass for bypass in bypasses if past_envoy(bypass, name, asked)]
        closed = bool(by) and name not in known_ and asked not in REGISTRY.by_name
        decision = evaluate(found, number, TCP, asked)
        assert decision.passes == (not closed or all(bypass.audit for bypass in by))
        assert (decision.audited is not None) == (closed and decision.passes)
