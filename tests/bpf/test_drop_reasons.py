"""Every reason to drop a packet, each shown by a packet that is dropped for it and one beside it that passes."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from conftest import ALLOW, NODE4, PEER4, PEER6, POD4, POD6, Pod
from harness import (
    HOST_MAC,
    ICMP,
    ICMP6,
    SYN,
    TCP,
    UDP,
    Layer,
    arp,
    entry,
    ethernet,
    fragment_header,
    icmp,
    icmp_error,
    icmp_header,
    ip,
    ipv6,
    mac_option,
    neighbour,
    ping,
    sctp,
    tcp,
    tcp_header,
    udp,
    udp_header,
)

from meshbridge.abi import DropReason, PolicyVerdict

DENY_ENTRY = entry(PolicyVerdict.POLICY_DENY, rule_id=42)
ANY = (0, 0, 0, 17)
SYN4, SYN6 = tcp(PEER4, POD4, 40000, 80), tcp(PEER6, POD6, 40000, 80)
OUT4, OUT6 = tcp(POD4, PEER4, 40000, 80), tcp(POD6, PEER6, 40000, 80)
OTHER_MAC = bytes.fromhex("0a00000000aa")
Prepare = Callable[[Pod], None]


def nothing(_: Pod) -> None:
    pass


def policy(network: Layer | None = None, mesh: Layer | None = None) -> Prepare:
    """Make the pod's sets say this in both directions."""
    return lambda pod: pod.kernel.policy_set(ALLOW, network or Layer(), mesh or Layer())


def vlan(frame: bytes, tag: int) -> bytes:
    return frame[:12] + struct.pack("!HH", tag, 5) + frame[12:]


def extension(count: int, kind: int = 60) -> bytes:
    """An IPv6 TCP packet behind so many extension headers of a kind."""
    chain = b"".join(bytes((TCP if last else kind, 0)) + bytes(6) for last in [False] * (count - 1) + [True])
    return ethernet(ipv6(PEER6, POD6, kind, chain + tcp_header(40000, 80, SYN)), 0x86DD)


def routing(segments_left: int) -> bytes:
    header = bytes((TCP, 2, 0, segments_left)) + bytes(20)
    return ethernet(ipv6(PEER6, POD6, 43, header + tcp_header(40000, 80, SYN)), 0x86DD)


def fragment4(offset: int, more: bool, payload: bytes, protocol: int = UDP) -> bytes:
    return ip(PEER4, POD4, protocol, payload, offset=offset, more=more, identification=9)


def fragment6(offset: int, more: bool, payload: bytes, protocol: int = UDP) -> bytes:
    return ip(PEER6, POD6, 44, fragment_header(protocol, offset, more, 9) + payload)


IN: dict[str, tuple[DropReason, bytes, Prepare]] = {
    "no endpoint is ready": (DropReason.DROP_ENDPOINT_NOT_READY, SYN4, lambda pod: pod.change(flags=0)),
    "the endpoint is not known": (
        DropReason.DROP_ENDPOINT_NOT_READY, SYN4, lambda pod: pod.kernel.maps.endpoints.clear()),
    "no set yet for IPv4": (DropReason.DROP_ENDPOINT_NOT_READY, SYN4, lambda pod: pod.change(sets=(0, 1, 1, 1))),
    "no set yet for IPv6": (DropReason.DROP_ENDPOINT_NOT_READY, SYN6, lambda pod: pod.change(sets=(1, 0, 1, 1))),
    "a set that is not there": (DropReason.DROP_ENDPOINT_NOT_READY, SYN4, lambda pod: pod.change(sets=(99, 1, 1, 1))),
    "no flow table": (
        DropReason.DROP_ENDPOINT_NOT_READY, SYN4, lambda pod: bool(pod.kernel.maps.conntrack.remove(pod.incarnation))),
    "an entry that names no flow table": (
        DropReason.DROP_ENDPOINT_NOT_READY, SYN4, lambda pod: pod.change(flow_table=0)),
    "a flow table out of range": (DropReason.DROP_ENDPOINT_NOT_READY, SYN4, lambda pod: pod.change(flow_table=0xFFFF)),
    "an incarnation without an address": (
        DropReason.DROP_UNKNOWN_L3_TARGET, SYN4, lambda pod: pod.change(incarnation=pod.incarnation + 1000)),
    "a VLAN tag": (DropReason.DROP_VLAN, vlan(SYN4, 0x8100), nothing),
    "a service VLAN tag": (DropReason.DROP_VLAN, vlan(SYN4, 0x88A8), nothing),
    "an unknown ethertype": (DropReason.DROP_UNSUPPORTED_L2, SYN4[:12] + b"\x88\xb5" + SYN4[14:], nothing),
    "an 802.3 length": (DropReason.DROP_UNSUPPORTED_L2, SYN4[:12] + b"\x00\x40" + SYN4[14:], nothing),
    "MPLS": (DropReason.DROP_UNSUPPORTED_L2, SYN4[:12] + b"\x88\x47" + SYN4[14:], nothing),
    "IPv6 under IPv4's ethertype": (DropReason.DROP_INVALID_PACKET, SYN6[:12] + b"\x08\x00" + SYN6[14:], nothing),
    "IPv4 under IPv6's ethertype": (DropReason.DROP_INVALID_PACKET, SYN4[:12] + b"\x86\xdd" + SYN4[14:], nothing),
    "an IPv4 header shorter than one": (
        DropReason.DROP_INVALID_PACKET, SYN4[:14] + b"\x44" + SYN4[15:], nothing),
    "an IPv4 total beyond the frame": (
        DropReason.DROP_INVALID_PACKET, ip(PEER4, POD4, TCP, tcp_header(1, 80, SYN), total=41), nothing),
    "an IPv4 total that cuts the TCP header": (
        DropReason.DROP_INVALID_PACKET, ip(PEER4, POD4, TCP, tcp_header(1, 80, SYN), total=39), nothing),
    "an IPv4 total of zero": (
        DropReason.DROP_INVALID_PACKET, ip(PEER4, POD4, TCP, tcp_header(1, 80, SYN), total=0), nothing),
    "an IPv6 length beyond the frame": (
        DropReason.DROP_INVALID_PACKET, ip(PEER6, POD6, TCP, tcp_header(1, 80, SYN), length=21), nothing),
    "a jumbo length nobody joined": (
        DropReason.DROP_INVALID_PACKET,
        ip(PEER6, POD6, 0, bytes((TCP, 0)) + bytes(6) + tcp_header(1, 80, SYN), length=0), nothing),
    "loose source routing": (
        DropReason.DROP_INVALID_PACKET,
        ip(PEER4, POD4, TCP, tcp_header(1, 80, SYN), options=b"\x01\x83\x07\x04\x0a\x00\x00\x07"), nothing),
    "a TCP header shorter than one": (
        DropReason.DROP_INVALID_PACKET, ip(PEER4, POD4, TCP, bytes(12) + b"\x40\x02" + bytes(6)), nothing),
    "a TCP header longer than the packet": (
        DropReason.DROP_INVALID_PACKET, ip(PEER4, POD4, TCP, bytes(12) + b"\x60\x02" + bytes(6)), nothing),
    "a UDP length beyond the packet": (
        DropReason.DROP_INVALID_PACKET, ip(PEER4, POD4, UDP, udp_header(1, 2, 1)), nothing),
    "an IPv4 address in an IPv6 packet": (
        DropReason.DROP_INVALID_PACKET, tcp(f"::ffff:{PEER4}", POD6, 1, 80), nothing),
    "an IPv4 target in an IPv6 packet": (
        DropReason.DROP_INVALID_PACKET, tcp(PEER6, f"::ffff:{POD4}", 1, 80), nothing),
    "another pod's address": (DropReason.DROP_UNKNOWN_L3_TARGET, tcp(PEER4, "10.0.0.6", 1, 80), nothing),
    "an address of an earlier pod": (
        DropReason.DROP_UNKNOWN_L3_TARGET, SYN4, lambda pod: pod.change(incarnation=pod.incarnation + 1)),
    "ICMPv6 in IPv4": (DropReason.DROP_UNKNOWN_L4, ip(PEER4, POD4, ICMP6, icmp_header(128)), nothing),
    "ICMP in IPv6": (DropReason.DROP_UNKNOWN_L4, ip(PEER6, POD6, ICMP, icmp_header(8)), nothing),
    "a later fragment without its first": (DropReason.DROP_FRAG_NOT_FOUND, fragment4(1480, False, bytes(8)), nothing),
    "a later IPv6 fragment without its first": (
        DropReason.DROP_FRAG_NOT_FOUND, fragment6(1480, False, bytes(8)), nothing),
    "a first fragment without its ports": (DropReason.DROP_FRAG_TINY, fragment4(0, True, bytes(4)), nothing),
    "a first fragment without its TCP flags": (
        DropReason.DROP_FRAG_TINY, fragment4(0, True, tcp_header(1, 80, SYN)[:16], TCP), nothing),
    "a first IPv6 fragment without its TCP flags": (
        DropReason.DROP_FRAG_TINY, fragment6(0, True, tcp_header(1, 80, SYN)[:16], TCP), nothing),
    "seven extension headers": (DropReason.DROP_IPV6_EXTENSION, extension(7), nothing),
    "an unknown extension header": (DropReason.DROP_IPV6_EXTENSION, extension(1, 253), nothing),
    "mobility": (DropReason.DROP_IPV6_EXTENSION, extension(1, 135), nothing),
    "no next header": (DropReason.DROP_IPV6_EXTENSION, ip(PEER6, POD6, 59, b""), nothing),
    "hop-by-hop options that do not come first": (
        DropReason.DROP_IPV6_EXTENSION, extension(2, 0), nothing),
    "a fragment of a fragment": (
        DropReason.DROP_IPV6_EXTENSION,
        fragment6(0, False, fragment_header(UDP, 0, False) + udp_header(1, 2), protocol=44),
        nothing,
    ),
    "a routing header that leads on": (DropReason.DROP_IPV6_EXTENSION, routing(1), nothing),
    "policy, by default": (
        DropReason.DROP_POLICY, SYN4, policy(Layer(default=PolicyVerdict.POLICY_DENY))),
    "policy, by an entry": (DropReason.DROP_POLICY_DENY, SYN6, policy(Layer({ANY: DENY_ENTRY}))),
    "mesh policy, by default": (
        DropReason.DROP_MESH_POLICY, SYN4, policy(mesh=Layer(default=PolicyVerdict.POLICY_DENY))),
    "mesh policy, by an entry": (DropReason.DROP_MESH_POLICY_DENY, SYN4, policy(mesh=Layer({ANY: DENY_ENTRY}))),
    "a default of no known kind": (DropReason.DROP_POLICY, SYN4, policy(Layer(default=77))),
    "an entry of no known kind": (DropReason.DROP_POLICY_DENY, SYN4, policy(Layer({ANY: entry(verdict=77)}))),  # type: ignore[arg-type]
    "an ICMP error about nothing": (
        DropReason.DROP_ICMP_ERROR_UNRELATED, icmp_error(PEER4, POD4, OUT4), nothing),
    "an ICMPv6 error about nothing": (
        DropReason.DROP_ICMP_ERROR_UNRELATED, icmp_error(PEER6, POD6, OUT6), nothing),
    "ARP for another": (
        DropReason.DROP_FORBIDDEN_ARP, arp(1, PEER4, "10.0.0.6", sender_mac=HOST_MAC), nothing),
    "a router advertisement from off the link": (
        DropReason.DROP_FORBIDDEN_ICMP6, neighbour(134, "fe80::1", POD6, options=bytes(8), hop_limit=64), nothing),
}  # fmt: skip
IN |= {
    f"an entry that says {reason.name}": (
        reason, SYN4, policy(Layer({ANY: entry(PolicyVerdict.POLICY_DENY, deny_reason=reason)})))
    for reason in (
        DropReason.DROP_NO_L7_JUDGE, DropReason.DROP_SERVICE_BACKENDS_DIFFER, DropReason.DROP_COMPENSATION,
        DropReason.DROP_NO_SERVICE_BACKENDS,
    )
}  # fmt: skip

OUT: dict[str, tuple[DropReason, bytes, Prepare]] = {
    "no endpoint is ready": (DropReason.DROP_ENDPOINT_NOT_READY, OUT4, lambda pod: pod.change(flags=0)),
    "no ARP before it is ready": (
        DropReason.DROP_ENDPOINT_NOT_READY, arp(1, POD4, NODE4), lambda pod: pod.change(flags=0)),
    "no set yet": (DropReason.DROP_ENDPOINT_NOT_READY, OUT6, lambda pod: pod.change(sets=(1, 1, 1, 0))),
    "another's source address": (DropReason.DROP_INVALID_SOURCE_IP, tcp("10.0.0.6", PEER4, 1, 80), nothing),
    "another's IPv6 source address": (DropReason.DROP_INVALID_SOURCE_IP, tcp("fd00::6", PEER6, 1, 80), nothing),
    "a link-local source": (DropReason.DROP_INVALID_SOURCE_IP, tcp("fe80::5", PEER6, 1, 80), nothing),
    "a link-local ping": (DropReason.DROP_INVALID_SOURCE_IP, ping("fe80::5", PEER6), nothing),
    "an unspecified source": (DropReason.DROP_INVALID_SOURCE_IP, udp("0.0.0.0", "255.255.255.255", 68, 67), nothing),
    "an unspecified IPv6 source": (DropReason.DROP_INVALID_SOURCE_IP, udp("::", PEER6, 1, 2), nothing),
    "a loopback source": (DropReason.DROP_INVALID_SOURCE_IP, tcp("127.0.0.1", PEER4, 1, 80), nothing),
    "the node's source address": (DropReason.DROP_INVALID_SOURCE_IP, tcp(NODE4, PEER4, 1, 80), nothing),
    "a source of an earlier pod": (
        DropReason.DROP_INVALID_SOURCE_IP, OUT4, lambda pod: pod.change(incarnation=pod.incarnation + 1)),
    "a spoofed later fragment": (
        DropReason.DROP_INVALID_SOURCE_IP, ip("10.0.0.6", PEER4, UDP, bytes(8), offset=1480), nothing),
    "ARP in another's name": (DropReason.DROP_FORBIDDEN_ARP, arp(1, "10.0.0.6", NODE4), nothing),
    "ARP with another's hardware address": (
        DropReason.DROP_FORBIDDEN_ARP, arp(2, POD4, NODE4, sender_mac=OTHER_MAC, source=HOST_MAC), nothing),
    "ARP from another's hardware address": (
        DropReason.DROP_FORBIDDEN_ARP, arp(2, POD4, NODE4, source=OTHER_MAC), nothing),
    "an ARP answer from nobody": (DropReason.DROP_FORBIDDEN_ARP, arp(2, "0.0.0.0", NODE4), nothing),
    "reverse ARP": (DropReason.DROP_FORBIDDEN_ARP, arp(3, POD4, NODE4), nothing),
    "ARP of another protocol": (
        DropReason.DROP_FORBIDDEN_ARP, (lambda frame: frame[:16] + b"\x86\xdd" + frame[18:])(arp(1, POD4, NODE4)),
        nothing),
    "a router advertisement": (DropReason.DROP_FORBIDDEN_ICMP6, neighbour(134, "fe80::5", "ff02::1"), nothing),
    "a redirect": (DropReason.DROP_FORBIDDEN_ICMP6, neighbour(137, "fe80::5", PEER6, "fd00::7"), nothing),
    "an advertisement of another's address": (
        DropReason.DROP_FORBIDDEN_ICMP6, neighbour(136, "fe80::5", "ff02::1", "fd00::6"), nothing),
    "an advertisement with another's hardware address": (
        DropReason.DROP_FORBIDDEN_ICMP6, neighbour(136, POD6, "ff02::1", POD6, mac_option(2, OTHER_MAC)), nothing),
    "a solicitation from another's hardware address": (
        DropReason.DROP_FORBIDDEN_ICMP6, neighbour(135, POD6, "ff02::1", "fd00::1", mac=OTHER_MAC), nothing),
    "a solicitation in another's name": (
        DropReason.DROP_INVALID_SOURCE_IP, neighbour(135, "fd00::6", "ff02::1", "fd00::1"), nothing),
    "a solicitation that left the link": (
        DropReason.DROP_FORBIDDEN_ICMP6, neighbour(135, POD6, "ff02::1", "fd00::1", hop_limit=64), nothing),
    "a solicitation to the world": (
        DropReason.DROP_FORBIDDEN_ICMP6, neighbour(135, POD6, "2001:db8::1", "2001:db8::1"), nothing),
    "a solicitation with a letter in it": (
        DropReason.DROP_FORBIDDEN_ICMP6, neighbour(135, POD6, "ff02::1", "fd00::1", bytes((14, 60)) + bytes(478)),
        nothing),
    "a solicitation with options without end": (
        DropReason.DROP_FORBIDDEN_ICMP6, neighbour(135, POD6, "ff02::1", "fd00::1", bytes((14, 0)) * 4), nothing),
    "a solicitation cut short": (DropReason.DROP_INVALID_PACKET, neighbour(135, POD6, "ff02::1"), nothing),
    "a listener report that may travel": (
        DropReason.DROP_FORBIDDEN_ICMP6, icmp("fe80::5", "ff02::16", 143, payload=bytes(8), hop_limit=64), nothing),
    "a listener query": (
        DropReason.DROP_INVALID_SOURCE_IP, icmp("fe80::5", "ff02::1", 130, payload=bytes(16), hop_limit=1), nothing),
}  # fmt: skip


@pytest.mark.parametrize(("reason", "packet", "prepare"), IN.values(), ids=IN.keys())
def test_to_pod_drops(pod: Pod, reason: DropReason, packet: bytes, prepare: Prepare) -> None:
    prepare(pod)
    before = pod.kernel.maps.counters().get((reason, 0), (0, 0))
    outcome = pod.receive(packet)
    assert (outcome.passed, outcome.reason) == (False, reason)
    assert outcome.event.direction == 0
    assert outcome.event.packet_bytes == len(packet)
    after = pod.kernel.maps.counters()[reason, 0]
    assert (after[0] - before[0], after[1] - before[1]) == (1, len(packet))


@pytest.mark.parametrize(("reason", "packet", "prepare"), OUT.values(), ids=OUT.keys())
def test_from_pod_drops(pod: Pod, reason: DropReason, packet: bytes, prepare: Prepare) -> None:
    prepare(pod)
    outcome = pod.send(packet)
    assert (outcome.passed, outcome.reason) == (False, reason)
    assert outcome.event.direction == 1


PASSES_IN = {
    "a connection": SYN4,
    "an IPv6 connection": SYN6,
    "a datagram": udp(PEER4, POD4, 1, 2),
    "an IPv6 datagram": udp(PEER6, POD6, 1, 2),
    "SCTP": sctp(PEER4, POD4, 1, 2),
    "a ping": ping(PEER4, POD4),
    "an IPv6 ping": ping(PEER6, POD6),
    "a timestamp request": icmp(PEER4, POD4, 13, payload=bytes(12)),
    "a protocol without ports": ip(PEER4, POD4, 47, bytes(8)),
    "a frame with padding": SYN4 + bytes(6),
    "a SYN with options": ip(PEER4, POD4, TCP, tcp_header(1, 80, SYN, options=b"\x02\x04\x05\xb4") + b"data"),
    "IP options": ip(PEER4, POD4, TCP, tcp_header(1, 80, SYN), options=b"\x94\x04\x00\x00"),
    "six extension headers": extension(6),
    "hop-by-hop options": extension(1, 0),
    "a routing header at its end": routing(0),
    "an atomic fragment": fragment6(0, False, udp_header(1, 2)),
    "a multicast": udp(PEER4, "224.0.0.251", 5353, 5353),
    "an IPv6 multicast": udp(PEER6, "ff02::fb", 5353, 5353),
    "a broadcast": udp(PEER4, "255.255.255.255", 1, 2),
    "a broadcast frame": b"\xff" * 6 + udp(PEER4, "10.0.0.255", 1, 2)[6:],
    "ARP for the pod": arp(1, NODE4, POD4, sender_mac=HOST_MAC),
    "an ARP answer": arp(2, NODE4, POD4, sender_mac=HOST_MAC),
    "an ARP answer to a probe": arp(2, POD4, "0.0.0.0", sender_mac=HOST_MAC),
    "an ARP announcement": arp(1, NODE4, NODE4, sender_mac=HOST_MAC),
    "a solicitation": neighbour(135, "fe80::1", "ff02::1:ff00:5", POD6, mac_option(1, HOST_MAC), mac=HOST_MAC),
    "an advertisement": neighbour(136, "fd00::1", POD6, "fd00::1", mac_option(2, HOST_MAC), mac=HOST_MAC),
    "an advertisement to a link-local address": neighbour(136, "fe80::1", "fe80::5", "fe80::1", mac=HOST_MAC),
    "a router advertisement": neighbour(134, "fe80::1", "ff02::1", options=bytes(8), mac=HOST_MAC),
    "a listener query": icmp("fe80::1", "ff02::1", 130, payload=bytes(16), hop_limit=1),
}
PASSES_OUT = {
    "a connection": OUT4,
    "an IPv6 connection": OUT6,
    "a ping": ping(POD6, PEER6),
    "an ARP request": arp(1, POD4, NODE4),
    "an ARP answer": arp(2, POD4, NODE4),
    "an ARP probe": arp(1, "0.0.0.0", POD4),
    "a solicitation": neighbour(135, POD6, "ff02::1:ff00:1", "fd00::1", mac_option(1, bytes.fromhex("0a0000000001"))),
    "a link-local solicitation": neighbour(135, "fe80::5", "fe80::1", "fe80::1"),
    "a solicitation of a neighbour it knows": neighbour(135, POD6, PEER6, PEER6),
    "duplicate address detection": neighbour(135, "::", "ff02::1:ff00:5", POD6, bytes((14, 1)) + bytes(6)),
    "an advertisement": neighbour(136, POD6, "fe80::1", POD6, mac_option(2, bytes.fromhex("0a0000000001"))),
    "a link-local advertisement": neighbour(136, "fe80::5", "fe80::1", "fe80::5"),
    "a router solicitation": neighbour(133, "fe80::5", "ff02::2"),
    "a listener report": icmp("fe80::5", "ff02::16", 143, payload=bytes(8), hop_limit=1),
    "a listener report without an address": icmp("::", "ff02::16", 143, payload=bytes(8), hop_limit=1),
}


@pytest.mark.parametrize("packet", PASSES_IN.values(), ids=PASSES_IN.keys())
def test_to_pod_passes_what_policy_allows(pod: Pod, packet: bytes) -> None:
    assert pod.receive(packet).passed


@pytest.mark.parametrize("packet", PASSES_OUT.values(), ids=PASSES_OUT.keys())
def test_from_pod_passes_what_policy_allows(pod: Pod, packet: bytes) -> None:
    assert pod.send(packet).passed


NEVER_JUDGED = {name: packet for name, packet in PASSES_IN.items() if any(
    word in name for word in ("ARP", "solicitation", "advertisement", "listener"))}  # fmt: skip


@pytest.mark.parametrize("packet", NEVER_JUDGED.values(), ids=NEVER_JUDGED.keys())
def test_finding_neighbours_needs_no_policy(pod: Pod, packet: bytes) -> None:
    pod.change(ingress=2, egress=2)
    assert pod.receive(packet).passed


@pytest.mark.parametrize("name", [name for name in PASSES_IN if name not in NEVER_JUDGED])
def test_everything_else_is_stopped_by_default_deny(pod: Pod, name: str) -> None:
    pod.change(ingress=2, egress=2)
    assert pod.receive(PASSES_IN[name]).reason == DropReason.DROP_POLICY


def test_every_reason_is_shown_by_some_packet() -> None:
    shown = {case[0] for case in (*IN.values(), *OUT.values())}
    elsewhere = {
        DropReason.DROP_NONE,
        DropReason.DROP_FRAG_OVERLAP,  # test_fragments.py
        DropReason.DROP_FRAG_NEEDED_STATE,  # test_fragments.py
    }
    assert shown | elsewhere == set(DropReason)


@pytest.mark.parametrize("packet", [SYN4, SYN6], ids=["v4", "v6"])
def test_an_event_names_the_packet(pod: Pod, packet: bytes) -> None:
    pod.change(ingress=2)
    event = pod.receive(packet).event
    assert (event.source_identity, event.destination_identity) == (500, 300)
    assert (event.source_port, event.destination_port, event.protocol, event.tcp_flags) == (40000, 80, TCP, SYN)
    assert event.network_rule_id == 9000
    assert event.is_reply == 2
    assert event.endpoint_id == pod.ifindex
