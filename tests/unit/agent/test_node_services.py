"""What the agent makes of Services: whose address is whose, and which pods with a restricted egress depend on it."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from meshbridge.abi import address_bytes
from meshbridge.agent.compilation import Compilation
from meshbridge.agent.services import Services
from meshbridge.agent.view import LocalPod, NodeView
from meshbridge.datapath.policysets import RuleIds
from meshbridge.identity.model import Entity, Peer, Workload
from meshbridge.identity.numbering import number_peers
from meshbridge.policy.frontends import Backend, FrontendPort
from meshbridge.policy.model import Document
from meshbridge.policy.policyset import PolicySet
from meshbridge.protos import agent_pb2
from meshbridge.xds import types as xds
from meshbridge.xds.client import MESSAGES, Update
from meshbridge.xds.messages import ServiceFrontends, ServicePort

VIP4, VIP6, OUTSIDE = (ip_address(text) for text in ("10.96.0.1", "fd96::1", "203.0.113.5"))
POD4, POD6, OTHER4 = (ip_address(text) for text in ("10.1.0.1", "fd00::1", "10.1.0.2"))
NUMBERS = {VIP4: 300, VIP6: 301, OUTSIDE: 302, POD4: 400, POD6: 401}


def number(address: bytes) -> int | None:
    return {address_bytes(known): found for known, found in NUMBERS.items()}.get(address)


def service(name: str, *addresses: Any, port: int = 80, backends: tuple[tuple[Any, int], ...] = ()) -> ServiceFrontends:
    return ServiceFrontends(name, addresses, (ServicePort(6, port, backends),))


def known(*given: ServiceFrontends) -> Services:
    services = Services()
    for each in given:
        services.put(each.name, each)
    return services


BOTH = ((POD4, 8080), (POD6, 8080))
FRONTENDS: dict[str, tuple[list[ServiceFrontends], dict[int, list[FrontendPort]]]] = {
    "each family has its own backends": (
        [service("s/a", VIP4, VIP6, backends=BOTH)],
        {300: [FrontendPort(6, 80, (Backend(400, 8080),))], 301: [FrontendPort(6, 80, (Backend(401, 8080),))]}),
    "nobody of the family": (
        [service("s/a", VIP6, backends=((POD4, 8080),))], {301: [FrontendPort(6, 80, ())]}),
    "a backend nobody holds makes all unknown": (
        [service("s/a", VIP4, backends=((POD4, 8080), (OTHER4, 8080)))], {300: [FrontendPort(6, 80, ())]}),
    "two Services behind one external IP": (
        [service("s/a", OUTSIDE, backends=BOTH), service("s/b", OUTSIDE, port=81, backends=((POD4, 81),))],
        {302: [FrontendPort(6, 80, (Backend(400, 8080),)), FrontendPort(6, 81, (Backend(400, 81),))]}),
    "two Services that claim one port": (
        [service("s/a", OUTSIDE, backends=((POD4, 1),)), service("s/b", OUTSIDE, backends=((POD4, 2),))],
        {302: [FrontendPort(6, 80, (Backend(400, 1), Backend(400, 2)))]}),
    "two Services that claim one port, one without backends": (
        [service("s/a", OUTSIDE, backends=((POD4, 1),)), service("s/b", OUTSIDE)], {302: [FrontendPort(6, 80, ())]}),
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), FRONTENDS.values(), ids=FRONTENDS.keys())
def test_frontends(given: list[ServiceFrontends], expected: dict[int, list[FrontendPort]]) -> None:
    assert {n: list(ports) for n, ports in known(*given).frontends(number).items()} == expected


def test_a_services_address_is_the_world_or_its_holder_with_the_services_name() -> None:
    services = known(service("s/b", VIP4, OUTSIDE), service("s/a", OUTSIDE))
    plain = services.peer(address_bytes(VIP4), None)
    assert plain is not None
    assert (plain.service, plain.entities) == ("s/b", frozenset({Entity.WORLD, Entity.WORLD_IPV4}))
    node = services.peer(address_bytes(OUTSIDE), Peer(entities=frozenset({Entity.REMOTE_NODE})))
    assert node is not None
    assert (node.service, node.entities) == ("s/a, s/b", frozenset({Entity.REMOTE_NODE}))
    assert services.peer(address_bytes(POD4), None) is None


def test_an_outside_address_is_apart_from_the_services_own() -> None:
    given = ServiceFrontends("s/a", (VIP4,), (ServicePort(6, 80, BOTH),), outside_addresses=(OUTSIDE,))
    services = known(given)
    assert services.peer(address_bytes(VIP4), None) != services.peer(address_bytes(OUTSIDE), None)
    frontends = services.frontends(number)
    assert {n: [port.outside for port in ports] for n, ports in frontends.items()} == {300: [False], 302: [True]}


def update(revision: int, removed: set[str] | None = None, **messages: agent_pb2.Service) -> Update:
    changed: dict[str, dict[str, Any]] = {type_url: {} for type_url in MESSAGES}
    changed[xds.SERVICE] = {f"s/{name}": message for name, message in messages.items()}
    return Update(revision, changed, {xds.SERVICE: frozenset(removed or ())})


def message(*addresses: Any, protocol: str = "TCP", port: int = 80) -> agent_pb2.Service:
    ports = [agent_pb2.ServicePort(protocol=protocol, port=port)]
    return agent_pb2.Service(namespace="s", name="a", addresses=[a.packed for a in addresses], ports=ports)


def test_a_change_of_a_service_touches_its_addresses_before_and_after() -> None:
    view = NodeView()
    assert view.apply(update(1, a=message(VIP4))).addresses == {address_bytes(VIP4)}
    assert view.apply(update(2, a=message(OUTSIDE))).addresses == {address_bytes(VIP4), address_bytes(OUTSIDE)}
    assert view.apply(update(3, {"s/a"})).addresses == {address_bytes(OUTSIDE)}
    assert list(view.services.addresses()) == []


HOSTILE = {
    "an address of three bytes": agent_pb2.Service(namespace="s", name="a", addresses=[b"abc"]),
    "an unknown protocol": message(VIP4, protocol="GOPHER"),
    "a port that is none": message(VIP4, port=70_000),
}


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_service_that_means_nothing_keeps_the_revision_from_use(bad: agent_pb2.Service) -> None:
    view = NodeView()
    view.apply(update(1, a=bad))
    assert list(view.unusable) == [(xds.SERVICE, "s/a")]


def test_a_change_behind_a_service_compiles_those_whose_egress_is_restricted() -> None:
    spec = {"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"]}
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
              "metadata": {"name": "p", "namespace": "shop"}, "spec": spec}  # fmt: skip
    policies = PolicySet.of([Document("NetworkPolicy", policy["apiVersion"], "shop", "p", policy)])  # type: ignore[arg-type]
    pods = {
        app: LocalPod(Workload("shop", app, app, "n", (ip_address(f"10.0.0.{n}"),), {"app": app}))
        for n, app in enumerate(("web", "db"), 1)
    }
    peers = {ip_address("10.1.0.1"): Peer("shop", {"app": "db"}), VIP4: Peer(service="shop/db")}
    numbering = number_peers(peers)
    db, vip = (numbering.addresses[address].identity for address in peers)
    kept = Compilation(RuleIds())
    nobody = {vip: (FrontendPort(6, 80, ()),)}
    kept.update(pods, policies, numbering.identities, frontends=nobody)
    before = dict(kept.compiled)
    assert kept.update(pods, policies, numbering.identities, PolicySet(), frontends=dict(nobody)) == 0
    somebody = {vip: (FrontendPort(6, 80, (Backend(db, 80),)),)}
    assert kept.update(pods, policies, numbering.identities, PolicySet(), frontends=somebody) == 1
    assert kept.compiled["web"] != before["web"]
    assert kept.compiled["db"] == before["db"]
    scratch = Compilation(kept.rules)
    scratch.update(pods, policies, numbering.identities, frontends=somebody)
    assert scratch.compiled == kept.compiled


def test_a_service_opens_no_pod_whose_address_it_claims() -> None:
    spec = {"endpointSelector": {}, "egress": [{"toEndpoints": [{"matchLabels": {"app": "mine"}}]}]}
    data = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {}, "spec": spec}
    policies = PolicySet.of([Document("CiliumNetworkPolicy", "cilium.io/v2", "shop", "p", data)])
    pods = {"web": LocalPod(Workload("shop", "web", "web", "n", (ip_address("10.0.0.1"),)))}
    peers = {POD4: Peer("shop", {"app": "mine"}), OTHER4: Peer("finance", service="shop/evil")}
    numbering = number_peers(peers)
    mine, claimed = (numbering.addresses[address].identity for address in peers)
    with_service, without = Compilation(RuleIds()), Compilation(RuleIds())
    with_service.update(
        pods, policies, numbering.identities, frontends={claimed: (FrontendPort(6, 80, (Backend(mine, 80),)),)}
    )
    without.update(pods, policies, numbering.identities)
    assert with_service.compiled == without.compiled
