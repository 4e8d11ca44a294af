"""The lookup of bpf/abi.h: precedence, prefixes, identities, the two layers, audit, and who the peer is."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from conftest import ALLOW, MASQUERADED, NODE4, NODE6, PEER4, PEER6, PEER_IDENTITY, POD4, POD6, Pod
from harness import ICMP, SCTP, TCP, UDP, Harness, Layer, entry, icmp, ip, ping, sctp, tcp, udp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshbridge.abi import DropReason, EndpointFlags, EventType, MatchType, PolicyFlags, PolicyVerdict, ReservedIdentity

ANY_PREFIX = 17
DENY = PolicyVerdict.POLICY_DENY
ALLOWED = entry()
Key = tuple[int, int, int, int]


def only(*keys: Key) -> Layer:
    return Layer({key: entry(rule_id=7) for key in keys}, default=DENY, rule_id=9)


MATCHES: dict[str, tuple[Key, bytes, bool, MatchType]] = {
    "the peer": ((500, 0, 0, 17), tcp(PEER4, POD4, 1, 80), True, MatchType.MATCH_L3_ONLY),
    "another peer": ((501, 0, 0, 17), tcp(PEER4, POD4, 1, 80), False, MatchType.MATCH_NONE),
    "anybody": ((0, 0, 0, 17), tcp(PEER4, POD4, 1, 80), True, MatchType.MATCH_ALL),
    "the peer and port": ((500, TCP, 80, 16), tcp(PEER4, POD4, 1, 80), True, MatchType.MATCH_L3_L4),
    "the peer and a range": ((500, TCP, 80, 12), tcp(PEER4, POD4, 1, 95), True, MatchType.MATCH_L3_L4),
    "just outside a range": ((500, TCP, 80, 12), tcp(PEER4, POD4, 1, 96), False, MatchType.MATCH_NONE),
    "the port": ((0, TCP, 80, 16), tcp(PEER4, POD4, 1, 80), True, MatchType.MATCH_L4_ONLY),
    "another port": ((0, TCP, 80, 16), tcp(PEER4, POD4, 80, 81), False, MatchType.MATCH_NONE),
    "another protocol": ((0, TCP, 80, 16), udp(PEER4, POD4, 1, 80), False, MatchType.MATCH_NONE),
    "the peer and protocol": ((500, UDP, 0, 0), udp(PEER4, POD4, 1, 80), True, MatchType.MATCH_L3_PROTO),
    "the protocol": ((0, SCTP, 0, 0), sctp(PEER4, POD4, 1, 80), True, MatchType.MATCH_PROTO_ONLY),
    "SCTP by port": ((0, SCTP, 80, 16), sctp(PEER4, POD4, 1, 80), True, MatchType.MATCH_L4_ONLY),
    "the highest port": ((0, TCP, 65535, 16), tcp(PEER4, POD4, 1, 65535), True, MatchType.MATCH_L4_ONLY),
    "half of the ports": ((0, TCP, 32768, 1), tcp(PEER4, POD4, 1, 40000), True, MatchType.MATCH_L4_ONLY),
    "the other half": ((0, TCP, 32768, 1), tcp(PEER4, POD4, 1, 80), False, MatchType.MATCH_NONE),
    "echo requests": ((0, ICMP, 8, 16), ping(PEER4, POD4), True, MatchType.MATCH_L4_ONLY),
    "ICMP of another type": ((0, ICMP, 8, 16), icmp(PEER4, POD4, 13), False, MatchType.MATCH_NONE),
    "ICMP by type": ((0, ICMP, 13, 16), icmp(PEER4, POD4, 13), True, MatchType.MATCH_L4_ONLY),
    "ICMPv6 echo requests": ((0, 58, 128, 16), ping(PEER6, POD6), True, MatchType.MATCH_L4_ONLY),
    "a protocol without ports": ((0, 47, 0, 0), ip(PEER4, POD4, 47, bytes(8)), True, MatchType.MATCH_PROTO_ONLY),
}  # fmt: skip


@pytest.mark.parametrize(("key", "packet", "passes", "match"), MATCHES.values(), ids=MATCHES.keys())
def test_an_entry_for(kernel: Harness, pod: Pod, key: Key, packet: bytes, passes: bool, match: MatchType) -> None:
    kernel.policy_set(ALLOW, only(key))
    outcome = pod.receive(packet)
    assert (outcome.passed, outcome.event.match_type) == (passes, match)
    assert outcome.event.network_rule_id == (7 if passes else 9)


RIVALS: dict[str, tuple[dict[Key, tuple[PolicyVerdict, int]], bool]] = {
    "higher precedence wins, whatever the prefix": (
        {(500, TCP, 80, 16): (PolicyVerdict.POLICY_ALLOW, 1), (0, 0, 0, 17): (DENY, 2)}, False),
    "higher precedence wins the other way": (
        {(500, TCP, 80, 16): (DENY, 1), (0, 0, 0, 17): (PolicyVerdict.POLICY_ALLOW, 2)}, True),
    "on a tie the longer prefix": (
        {(0, TCP, 80, 16): (PolicyVerdict.POLICY_ALLOW, 5), (500, TCP, 80, 12): (DENY, 5)}, True),
    "on a tie any protocol is the shortest prefix": (
        {(500, 0, 0, 17): (DENY, 5), (0, TCP, 0, 0): (PolicyVerdict.POLICY_ALLOW, 5)}, True),
    "then the specific identity": (
        {(0, TCP, 80, 16): (PolicyVerdict.POLICY_ALLOW, 5), (500, TCP, 80, 16): (DENY, 5)}, False),
    "the highest number there is": (
        {(0, 0, 0, 17): (DENY, 0xFFFFFFFF), (500, TCP, 80, 16): (PolicyVerdict.POLICY_ALLOW, 0x7FFFFFFF)}, False),
    "precedence zero counts": ({(0, 0, 0, 17): (PolicyVerdict.POLICY_ALLOW, 0)}, True),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "passes"), RIVALS.values(), ids=RIVALS.keys())
def test_of_two_entries(kernel: Harness, pod: Pod, rows: dict[Key, tuple[PolicyVerdict, int]], passes: bool) -> None:
    layer = Layer({key: entry(verdict, precedence=rank) for key, (verdict, rank) in rows.items()}, default=DENY)
    kernel.policy_set(ALLOW, layer)
    assert pod.receive(tcp(PEER4, POD4, 1, 80)).passed is passes
    kernel.policy_set(ALLOW, mesh=layer)
    assert pod.receive(tcp(PEER4, POD4, 2, 80)).passed is passes


def test_a_prefix_that_the_set_does_not_name_is_not_looked_up(kernel: Harness, pod: Pod) -> None:
    kernel.policy_set(ALLOW, only((0, TCP, 80, 16)))
    assert pod.receive(tcp(PEER4, POD4, 1, 80)).passed
    value = kernel.maps.policy_sets.snapshot()
    for key, content in value.items():
        content.layers[0].any_prefixes = 1 << 12
        kernel.maps.policy_sets.put(key, content)
    assert not pod.receive(tcp(PEER4, POD4, 2, 80)).passed


def test_each_of_thousands_of_entries_is_found_and_what_has_none_is_not(kernel: Harness, pod: Pod) -> None:
    rows = {(PEER_IDENTITY if port % 3 else 0, TCP, port, 16): entry(rule_id=port) for port in range(2, 8000, 2)}
    kernel.policy_set(ALLOW, Layer(rows, default=DENY))
    for port in range(1, 8001, 3):
        outcome = pod.receive(tcp(PEER4, POD4, 40000, port))
        assert outcome.passed is (port % 2 == 0), port
        assert outcome.event.network_rule_id == (port if outcome.passed else 0)


def test_a_set_that_names_lines_which_do_not_exist_lets_nobody_in(kernel: Harness, pod: Pod) -> None:
    kernel.policy_set(ALLOW, only((0, TCP, 80, 16)))
    assert pod.receive(tcp(PEER4, POD4, 1, 80)).passed
    for key, content in kernel.maps.policy_sets.snapshot().items():
        content.first_line = 0xFFFFFFF0
        content.layers[0].verdict = PolicyVerdict.POLICY_ALLOW
        kernel.maps.policy_sets.put(key, content)
    assert pod.receive(tcp(PEER4, POD4, 2, 80)).reason is DropReason.DROP_ENDPOINT_NOT_READY


def test_both_layers_have_to_let_a_flow_pass_and_the_network_speaks_first(kernel: Harness, pod: Pod) -> None:
    yes, no = Layer(), Layer(default=DENY)
    for port, (network, mesh, reason) in enumerate(
        [
            (yes, yes, DropReason.DROP_NONE),
            (no, yes, DropReason.DROP_POLICY),
            (yes, no, DropReason.DROP_MESH_POLICY),
            (no, no, DropReason.DROP_POLICY),
        ]
    ):
        kernel.policy_set(ALLOW, network, mesh)
        outcome = pod.receive(tcp(PEER4, POD4, 100 + port, 80))
        assert outcome.reason == reason
        assert outcome.event.network_verdict == (2 if network is no else 1)
        assert outcome.event.mesh_verdict == (2 if mesh is no else 1)


def test_what_needs_l7_passes_in_the_kernel(kernel: Harness, pod: Pod) -> None:
    kernel.policy_set(ALLOW, mesh=Layer({(500, TCP, 80, 16): entry(PolicyVerdict.POLICY_NEEDS_L7)}, default=DENY))
    outcome = pod.receive(tcp(PEER4, POD4, 1, 80))
    assert (outcome.passed, outcome.event.mesh_verdict) == (True, PolicyVerdict.POLICY_NEEDS_L7)
    kernel.policy_set(ALLOW, mesh=Layer(default=PolicyVerdict.POLICY_NEEDS_L7))
    assert pod.receive(tcp(PEER4, POD4, 2, 80)).passed


def test_an_audited_deny_passes_and_is_told(kernel: Harness, pod: Pod) -> None:
    audited = Layer({(500, 0, 0, 17): entry(DENY, rule_id=3, flags=PolicyFlags.POLICY_F_AUDIT)})
    kernel.policy_set(ALLOW, audited)
    event = pod.receive(tcp(PEER4, POD4, 1, 80)).event
    assert (event.type, event.audit, event.reason) == (EventType.EVENT_VERDICT, 1, DropReason.DROP_POLICY_DENY)
    assert (event.network_verdict, event.network_rule_id) == (DENY, 3)
    kernel.policy_set(ALLOW, audited, Layer(default=DENY))
    outcome = pod.receive(tcp(PEER4, POD4, 2, 80))
    assert (outcome.passed, outcome.reason) == (False, DropReason.DROP_MESH_POLICY)
    kernel.policy_set(ALLOW, Layer(default=DENY, flags=PolicyFlags.POLICY_F_AUDIT))
    assert pod.receive(tcp(PEER4, POD4, 3, 80)).event.audit == 1


def test_directions_and_families_have_sets_of_their_own(kernel: Harness, pod: Pod) -> None:
    packets = [("receive", tcp(PEER4, POD4, 1, 80)), ("receive", tcp(PEER6, POD6, 1, 80)),
               ("send", tcp(POD4, PEER4, 1, 80)), ("send", tcp(POD6, PEER6, 1, 80))]  # fmt: skip
    for index in range(4):
        pod.change(sets=tuple(ALLOW if number == index else 2 for number in range(4)))
        assert [getattr(pod, way)(packet).passed for way, packet in packets] == [n == index for n in range(4)]


# --- who the peer is ---------------------------------------------------------------------------------------------


def test_an_exact_address_beats_a_cidr_and_a_longer_cidr_a_shorter(kernel: Harness, pod: Pod) -> None:
    kernel.peer("10.1.0.0/16", 700)
    kernel.peer("10.1.2.0/24", 701)
    kernel.peer("10.1.2.3", 702)
    kernel.peer("2001:db8::/32", 703)
    expected = {"10.1.9.9": 700, "10.1.2.9": 701, "10.1.2.3": 702, "10.2.0.1": ReservedIdentity.IDENTITY_WORLD_IPV4}
    for source, identity in expected.items():
        assert pod.receive(udp(source, POD4, 1, 2)).event.source_identity == identity
    for source, identity in {"2001:db8::1": 703, "2001:db9::1": ReservedIdentity.IDENTITY_WORLD_IPV6}.items():
        assert pod.receive(udp(source, POD6, 1, 2)).event.source_identity == identity
    assert pod.send(udp(POD4, "10.1.2.3", 1, 2)).event.destination_identity == 702


LOCALHOST = pytest.mark.parametrize(("node", "mine"), [(NODE4, POD4), (NODE6, POD6)], ids=["v4", "v6"])


@LOCALHOST
def test_the_nodes_own_processes_get_in_past_a_default_deny(kernel: Harness, pod: Pod, node: str, mine: str) -> None:
    kernel.policy_set(ALLOW, Layer(default=DENY))
    outcome = pod.receive(tcp(node, mine, 40000, 80), ingress_ifindex=0)
    assert (outcome.passed, outcome.event.source_identity) == (True, 1)
    assert pod.send(tcp(mine, node, 80, 40000, 0x12)).passed
    assert pod.receive(ping(node, mine), ingress_ifindex=0).passed


@LOCALHOST
def test_a_forwarded_packet_with_the_nodes_address_is_masqueraded(
    kernel: Harness, pod: Pod, node: str, mine: str
) -> None:
    kernel.policy_set(ALLOW, Layer(default=DENY))
    outcome = pod.receive(tcp(node, mine, 40000, 80))
    assert (outcome.passed, outcome.event.source_identity) == (False, MASQUERADED)
    kernel.policy_set(ALLOW, only((MASQUERADED, TCP, 80, 16)))
    assert pod.receive(tcp(node, mine, 40000, 80)).passed
    kernel.policy_set(ALLOW, only((1, TCP, 80, 16)))
    assert not pod.receive(tcp(node, mine, 40001, 80)).passed


@LOCALHOST
def test_the_nodes_own_processes_do_not_get_past(kernel: Harness, pod: Pod, node: str, mine: str) -> None:
    probe = tcp(node, mine, 40000, 80)
    kernel.policy_set(ALLOW, Layer({(0, TCP, 80, 16): entry(DENY)}, default=DENY))
    assert pod.receive(probe, ingress_ifindex=0).reason == DropReason.DROP_POLICY_DENY
    kernel.policy_set(ALLOW, Layer(default=DENY), Layer(default=DENY))
    assert pod.receive(probe, ingress_ifindex=0).reason == DropReason.DROP_MESH_POLICY
    kernel.policy_set(ALLOW, Layer(default=DENY))
    pod.change(flags=EndpointFlags.ENDPOINT_F_READY | EndpointFlags.ENDPOINT_F_NO_LOCALHOST)
    assert pod.receive(probe, ingress_ifindex=0).reason == DropReason.DROP_POLICY


@LOCALHOST
def test_the_way_out_to_the_node_is_not_free(kernel: Harness, pod: Pod, node: str, mine: str) -> None:
    kernel.policy_set(ALLOW, Layer(default=DENY))
    outcome = pod.send(tcp(mine, node, 40000, 80), ingress_ifindex=0)
    assert (outcome.passed, outcome.event.destination_identity) == (False, 1)


def test_a_local_packet_of_a_pod_is_nothing_special(kernel: Harness, pod: Pod) -> None:
    kernel.policy_set(ALLOW, Layer(default=DENY))
    assert not pod.receive(tcp(PEER4, POD4, 1, 80), ingress_ifindex=0).passed


# --- against a literal reading of abi.h ----------------------------------------------------------------------------

PREFIXES = st.integers(0, ANY_PREFIX)
PORTS = st.one_of(st.sampled_from([0, 1, 80, 443, 8080, 32767, 32768, 65535]), st.integers(0, 65535))
VERDICTS = st.sampled_from(list(PolicyVerdict))


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    entries = {}
    for _ in range(draw(st.integers(0, 6))):
        prefix = draw(PREFIXES)
        protocol = 0 if prefix == ANY_PREFIX else draw(st.sampled_from([TCP, UDP]))
        port = 0 if prefix == ANY_PREFIX else draw(PORTS) & (0xFFFF0000 >> prefix) & 0xFFFF
        key = (draw(st.sampled_from([0, 500, 501])), protocol, port, prefix)
        entries[key] = entry(draw(VERDICTS), precedence=draw(st.integers(0, 3)))
    return Layer(entries, default=draw(VERDICTS))


def literal(layer: Layer, identity: int, protocol: int, port: int) -> bool:
    """Does a layer let a flow pass? As abi.h says it, entry by entry."""
    matching = []
    for (peer, proto, base, prefix), value in layer.entries.items():
        length = -1 if prefix == ANY_PREFIX else prefix
        if peer not in (0, identity):
            continue
        if prefix != ANY_PREFIX and (proto != protocol or port >> (16 - prefix) != base >> (16 - prefix)):
            continue
        matching.append((value.precedence, length, peer != 0, value.verdict))
    verdict = max(matching)[3] if matching else layer.default
    return verdict in (PolicyVerdict.POLICY_ALLOW, PolicyVerdict.POLICY_NEEDS_L7)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers(), layers(), st.lists(st.tuples(st.sampled_from([500, 501, 502]), st.sampled_from([TCP, UDP]), PORTS),
                                    min_size=1, max_size=20))  # fmt: skip
def test_the_kernel_reads_the_tables_as_abi_h_says(
    kernel: Harness, pod: Pod, network: Layer, mesh: Layer, flows: list[tuple[int, int, int]]
) -> None:
    kernel.policy_set(ALLOW, network, mesh)
    pod.change(ingress=ALLOW)
    addresses = {500: PEER4, 501: "10.0.0.10", 502: "10.0.0.11"}
    for identity, address in addresses.items():
        kernel.peer(address, identity)
    for source_port, (identity, protocol, port) in enumerate(flows, 1):
        packet = (tcp if protocol == TCP else udp)(addresses[identity], POD4, source_port, port)
        expected = literal(network, identity, protocol, port) and literal(mesh, identity, protocol, port)
        assert pod.receive(packet).passed is expected


def test_addresses_of_the_two_families_never_meet(kernel: Harness, pod: Pod) -> None:
    assert IPv6Address(f"::ffff:{PEER4}").ipv4_mapped == IPv4Address(PEER4)
    assert not pod.receive(tcp(f"::ffff:{PEER4}", POD6, 1, 80)).passed
    assert not pod.send(tcp(f"::ffff:{POD4}", PEER6, 1, 80)).passed
    assert not pod.send(tcp(POD6, f"::ffff:{PEER4}", 1, 80)).passed
