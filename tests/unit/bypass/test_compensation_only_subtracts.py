"""Property 2: on excluded ports, access after ⊆ what Envoy would have let in; elsewhere nothing changes."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

from compensation_cases import (
    ADDRESSES,
    CLIENTS,
    NODE,
    PORTS,
    PROBE_PORT,
    SERVER,
    WORLDS,
    World,
    caller,
    capture_with,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbridge.identity.model import IpFamily, ProxyClass
from meshbridge.identity.numbering import Numbering, number_peers
from meshbridge.policy.capture import Capture, OutboundBypass, PortClass
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import LayerDecision, evaluate
from meshbridge.policy.model import Direction, Document, EndpointPolicy, Verdict
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.precedence import DropReason

V4 = IpFamily.IPV4


def identity(numbering: Numbering, address: str, *, forwarded: bool = False) -> int:
    held = next(held for holder, held in numbering.addresses.items() if str(holder) == address)
    return held.forwarded if forwarded else held.identity


def mesh(policy: EndpointPolicy, number: int, port: int, direction: Direction = Direction.INGRESS) -> LayerDecision:
    return evaluate(policy.map(direction, V4), number, 6, port).mesh


def sources(numbering: Numbering) -> list[tuple[str, int]]:
    return [*((a, identity(numbering, a)) for a in ADDRESSES), (NODE, identity(numbering, NODE, forwarded=True))]


@settings(max_examples=80, deadline=None)
@given(WORLDS)
def test_what_passes_on_an_excluded_port_is_what_envoy_would_have_let_in(world: World) -> None:
    numbering = world.numbering()
    policy = Compiler(numbering.identities).endpoint(SERVER, world.policies, world.capture)
    own_node = identity(numbering, NODE)
    for port in PORTS:
        for address, number in sources(numbering):
            if world.classes[port] is PortClass.EXCLUDED and not (number == own_node and port == PROBE_PORT):
                passes = mesh(policy, number, port).verdict is not Verdict.DENY
                assert not passes or world.always_admitted(address, port), (address, port)


@settings(max_examples=50, deadline=None)
@given(WORLDS)
def test_nothing_uncertain_passes_and_every_drop_is_told_as_compensation(world: World) -> None:
    numbering = world.numbering()
    policy = Compiler(numbering.identities).endpoint(SERVER, world.policies, world.capture)
    for port in (port for port in PORTS if world.classes[port] is PortClass.EXCLUDED):
        for _, number in sources(numbering):
            decision = mesh(policy, number, port)
            assert decision.verdict is not Verdict.NEEDS_L7
            if decision.verdict is Verdict.DENY:
                assert decision.deny_reason == DropReason.COMPENSATION
                assert decision.origins


@settings(max_examples=50, deadline=None)
@given(WORLDS)
def test_an_exclusion_changes_no_verdict_elsewhere(world: World) -> None:
    numbering = world.numbering()
    compiler = Compiler(numbering.identities)
    guarded = {port: c if c is not PortClass.EXCLUDED else PortClass.CAPTURED for port, c in world.classes.items()}
    before = compiler.endpoint(SERVER, world.policies, capture_with(guarded))
    after = compiler.endpoint(SERVER, world.policies, world.capture)
    elsewhere = [*(port for port in PORTS if world.classes[port] is not PortClass.EXCLUDED), 80, 15006, 65535]
    for _, number in sources(numbering):
        for port in elsewhere:
            assert mesh(after, number, port).verdict is mesh(before, number, port).verdict
        for protocol in (1, 17, 132):
            decisions = [evaluate(p.map(Direction.INGRESS, V4), number, protocol, PORTS[0]) for p in (before, after)]
            assert decisions[0].verdict is decisions[1].verdict
        for port in PORTS:
            network = [evaluate(p.map(Direction.INGRESS, V4), number, 6, port).network for p in (before, after)]
            assert network[0] == network[1]


@settings(max_examples=50, deadline=None)
@given(WORLDS)
def test_what_the_early_deny_drops_envoy_would_have_refused_under_any_name(world: World) -> None:
    """The other direction of the same verdict: a lowering taken for the other would fail here or above."""
    numbering = world.numbering()
    policy = Compiler(numbering.identities).endpoint(SERVER, world.policies, world.capture)
    names = [None, *(caller(str(client.addresses[0])).principal for client in CLIENTS)]
    for port in (port for port in PORTS if world.classes[port] is PortClass.CAPTURED):
        for address, number in sources(numbering):
            if mesh(policy, number, port).verdict is Verdict.DENY:
                assert not any(world.sometimes_admitted(address, port, name) for name in names)


@settings(max_examples=80, deadline=None)
@given(WORLDS, st.sampled_from([c for c in CLIENTS if c.proxy is ProxyClass.SIDECAR]), st.booleans())
def test_what_is_dropped_at_the_source_the_destination_drops_as_well(world: World, client: object, known: bool) -> None:
    numbering = world.numbering()
    server_number = identity(numbering, str(SERVER.addresses[0]))
    destinations = {server_number: world.capture.inbound if known else capture_with({}).inbound}
    compiler = Compiler(numbering.identities, destinations)
    bypass = Capture(outbound={V4: (OutboundBypass(8080, 9090),)})
    sending = compiler.endpoint(client, world.policies, bypass)  # type: ignore[arg-type]
    receiving = compiler.endpoint(SERVER, world.policies, world.capture)
    captured = compiler.endpoint(SERVER, world.policies, capture_with({}))
    own = identity(numbering, str(client.addresses[0]))  # type: ignore[attr-defined]
    for port in PORTS:
        dropped = mesh(sending, server_number, port, Direction.EGRESS).verdict is Verdict.DENY
        destination = receiving if known else captured
        if dropped:
            assert 8080 <= port <= 9090
            assert mesh(destination, own, port).verdict is Verdict.DENY
        elif 8080 <= port <= 9090 and (known or world.classes[port] is PortClass.CAPTURED):
            assert mesh(destination, own, port).verdict is not Verdict.DENY


def test_a_destination_whose_policies_are_not_all_known_is_left_to_its_own_node() -> None:
    deny = {
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "nobody", "namespace": "shop"}, "spec": {},
    }  # fmt: skip
    world = World([deny], dict.fromkeys(PORTS, PortClass.EXCLUDED))
    numbering = world.numbering()
    bypass = Capture(outbound={V4: (OutboundBypass(0, 65535),)})
    policy = Compiler(numbering.identities).endpoint(CLIENTS[0], world.policies, bypass)
    number = identity(numbering, str(SERVER.addresses[0]))
    assert mesh(policy, number, 8080, Direction.EGRESS).verdict is Verdict.ALLOW


def test_an_outbound_bypass_to_a_range_concerns_that_range_only() -> None:
    deny = {
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "nobody", "namespace": "shop"}, "spec": {},
    }  # fmt: skip
    world = World([deny], dict.fromkeys(PORTS, PortClass.CAPTURED))
    numbering = world.numbering()
    number = identity(numbering, str(SERVER.addresses[0]))
    for cidr, expected in (("10.1.0.0/16", Verdict.DENY), ("10.9.0.0/16", Verdict.ALLOW)):
        network = ip_network(cidr)
        identities = {
            n: replace(peer, networks=frozenset({network}) if n == number and cidr == "10.1.0.0/16" else frozenset())
            for n, peer in numbering.identities.items()
        }
        bypass = Capture(outbound={V4: (OutboundBypass(0, 65535, (network,)),)})
        policy = Compiler(identities, {number: world.capture.inbound}).endpoint(CLIENTS[0], world.policies, bypass)
        assert mesh(policy, number, 8080, Direction.EGRESS).verdict is expected
        assert bypass.networks == {network}


def test_no_pod_gets_what_was_compiled_for_what_another_sends_past_its_envoy() -> None:
    """One compiler for many pods, whose layers come and go: each gets the same as from a compiler of its own."""
    data = {
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "deny", "namespace": SERVER.namespace}, "spec": {"action": "DENY", "rules": [{}]},
    }  # fmt: skip
    policies = PolicySet.of([Document("AuthorizationPolicy", data["apiVersion"], SERVER.namespace, "deny", data)])
    numbering = number_peers({workload.addresses[0]: workload.peer() for workload in (SERVER, *CLIENTS)})
    number = numbering.addresses[SERVER.addresses[0]].identity
    destinations = {number: capture_with({}).inbound}
    shared = Compiler(numbering.identities, destinations)
    for port in range(1000, 1200):
        bypass = Capture(outbound={V4: (OutboundBypass(port, port),)})
        own = Compiler(numbering.identities, destinations).endpoint(CLIENTS[0], policies, bypass)
        found = shared.endpoint(CLIENTS[0], policies, bypass).map(Direction.EGRESS, V4)
        assert found == own.map(Direction.EGRESS, V4), port
        assert any(key.port == port for key in found.entries)
