"""Fragments: the later ones go where the first one went, for a bounded time; none reaches into a header."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import pytest
from conftest import ALLOW, DENY, PEER4, PEER6, POD4, POD6, Pod
from harness import (
    ICMP,
    ICMP6,
    POD_MAC,
    SYN,
    TCP,
    UDP,
    Harness,
    Layer,
    entry,
    fragment_header,
    icmp_header,
    ip,
    tcp_header,
    udp_header,
)

from meshbridge import abi
from meshbridge.abi import DropReason, PolicyVerdict
from meshbridge.datapath import syscall
from meshbridge.datapath.maps import Map

Cut = Callable[..., bytes]


def cut4(payload: bytes, offset: int, more: bool, protocol: int = UDP, identification: int = 9, **peers: str) -> bytes:
    return ip(peers.get("source", PEER4), peers.get("target", POD4), protocol, payload, offset=offset, more=more,
              identification=identification)  # fmt: skip


def cut6(payload: bytes, offset: int, more: bool, protocol: int = UDP, identification: int = 9, **peers: str) -> bytes:
    return ip(peers.get("source", PEER6), peers.get("target", POD6), 44,
              fragment_header(protocol, offset, more, identification) + payload)  # fmt: skip


CUTS = pytest.mark.parametrize("cut", [cut4, cut6], ids=["v4", "v6"])
UDP_FIRST = udp_header(5000, 53, 1464) + bytes(1472)


@CUTS
def test_later_fragments_follow_a_first_that_passed(pod: Pod, cut: Cut) -> None:
    assert pod.receive(cut(UDP_FIRST, 0, True)).passed
    assert pod.receive(cut(bytes(1480), 1480, True)).passed
    assert pod.receive(cut(bytes(100), 2960, False)).passed
    assert pod.flows() == 1


@CUTS
def test_later_fragments_are_judged_by_the_ports_of_their_first(kernel: Harness, pod: Pod, cut: Cut) -> None:
    kernel.policy_set(3, Layer({(0, UDP, 53, 16): entry()}, default=PolicyVerdict.POLICY_DENY))
    pod.change(ingress=3)
    assert pod.receive(cut(UDP_FIRST, 0, True)).passed
    assert pod.receive(cut(bytes(8), 1480, False)).passed
    assert not pod.receive(cut(udp_header(5000, 54, 100) + bytes(8), 0, True, identification=10)).passed
    assert pod.receive(cut(bytes(8), 1480, False, identification=10)).reason == DropReason.DROP_FRAG_NOT_FOUND


@CUTS
def test_a_denied_first_fragment_leaves_no_entry(pod: Pod, cut: Cut) -> None:
    pod.change(ingress=DENY)
    assert pod.receive(cut(UDP_FIRST, 0, True)).reason == DropReason.DROP_POLICY
    assert len(pod.kernel.maps.fragments) == 0
    assert pod.receive(cut(bytes(8), 1480, False)).reason == DropReason.DROP_FRAG_NOT_FOUND


@CUTS
def test_a_first_fragment_is_remembered_for_a_bounded_time(pod: Pod, cut: Cut) -> None:
    pod.receive(cut(UDP_FIRST, 0, True))
    for passed_s, found in ((29, True), (2, False)):
        for key, value in pod.kernel.maps.fragments.items():
            value.seen_ns -= int(passed_s * 1e9)
            pod.kernel.maps.fragments.put(key, value)
        outcome = pod.receive(cut(bytes(8), 1480, False))
        assert outcome.passed is found
    assert outcome.reason == DropReason.DROP_FRAG_NOT_FOUND


@CUTS
@pytest.mark.parametrize("other", [{"identification": 10}, {"protocol": TCP}], ids=str)
def test_fragments_of_other_datagrams_are_not_its(pod: Pod, cut: Cut, other: dict[str, int]) -> None:
    pod.receive(cut(UDP_FIRST, 0, True))
    assert pod.receive(cut(bytes(8), 1480, False, **other)).reason == DropReason.DROP_FRAG_NOT_FOUND


@CUTS
def test_fragments_do_not_cross_directions_or_pods(kernel: Harness, pod: Pod, cut: Cut) -> None:
    pod.receive(cut(UDP_FIRST, 0, True))
    peer, mine = (PEER4, POD4) if cut is cut4 else (PEER6, POD6)
    kernel.endpoint(kernel.interfaces[1], [mine], sets=(ALLOW,) * 4, mac=POD_MAC)
    assert not pod.send(cut(bytes(8), 1480, False, source=mine, target=peer)).passed
    outcome = kernel.run(kernel.interfaces[1], "to_pod", cut(bytes(8), 1480, False))
    assert outcome.reason == DropReason.DROP_FRAG_NOT_FOUND


OVERLAPS = {
    "into TCP's sequence number": (TCP, tcp_header(5000, 80, SYN), 8, False),
    "into TCP's flags": (TCP, tcp_header(5000, 80, SYN), 16, False),
    "behind TCP's flags": (TCP, tcp_header(5000, 80, SYN), 24, True),
    "behind a UDP header": (UDP, udp_header(5000, 53, 1000), 8, True),
}


@CUTS
@pytest.mark.parametrize(("protocol", "header", "offset", "passes"), OVERLAPS.values(), ids=OVERLAPS.keys())
def test_a_later_fragment_must_not_reach_into_the_header(
    pod: Pod, cut: Cut, protocol: int, header: bytes, offset: int, passes: bool
) -> None:
    assert pod.receive(cut(header + bytes(32), 0, True, protocol)).passed
    outcome = pod.receive(cut(bytes(8), offset, False, protocol))
    assert outcome.passed is passes
    assert passes or outcome.reason == DropReason.DROP_FRAG_OVERLAP


def test_overlap_counts_extension_headers_of_the_fragmented_part(pod: Pod) -> None:
    options = bytes((UDP, 0)) + bytes(6)
    assert pod.receive(cut6(options + udp_header(5000, 53, 1000) + bytes(8), 0, True, 60)).passed
    assert pod.receive(cut6(bytes(8), 8, False, 60)).reason == DropReason.DROP_FRAG_OVERLAP
    assert pod.receive(cut6(bytes(8), 16, False, 60)).passed


@CUTS
def test_a_long_ping_passes_in_pieces(kernel: Harness, pod: Pod, cut: Cut) -> None:
    protocol, kind = (ICMP, 8) if cut is cut4 else (ICMP6, 128)
    kernel.policy_set(3, Layer({(0, protocol, kind, 16): entry()}, default=PolicyVerdict.POLICY_DENY))
    pod.change(ingress=3, egress=DENY)
    assert pod.receive(cut(icmp_header(kind, 0, 7) + bytes(1472), 0, True, protocol)).passed
    assert pod.receive(cut(bytes(8), 1480, False, protocol)).passed
    mine, peer, answer = (POD4, PEER4, 0) if cut is cut4 else (POD6, PEER6, 129)
    where = {"source": mine, "target": peer}
    assert pod.send(cut(icmp_header(answer, 0, 7) + bytes(1472), 0, True, protocol, **where)).passed
    assert pod.send(cut(bytes(8), 1480, False, protocol, **where)).passed


@CUTS
def test_an_icmp_error_in_pieces_is_dropped(pod: Pod, cut: Cut) -> None:
    protocol, kind = (ICMP, 3) if cut is cut4 else (ICMP6, 1)
    outcome = pod.receive(cut(icmp_header(kind, 1) + bytes(64), 0, True, protocol))
    assert outcome.reason == DropReason.DROP_ICMP_ERROR_UNRELATED


def test_neighbour_discovery_in_pieces_is_dropped(pod: Pod) -> None:
    for kind in (133, 134, 135, 136, 137):
        piece = cut6(icmp_header(kind) + bytes(16), 0, True, ICMP6, source="fe80::5", target="fe80::1")
        assert pod.send(piece).reason == DropReason.DROP_FORBIDDEN_ICMP6


def test_a_first_fragment_that_cannot_be_remembered_is_dropped(kernel: Harness) -> None:
    """The table is an LRU map, which is never full; here it is a plain one that is."""
    full = syscall.map_create(syscall.MapType.HASH, name="full", key_size=ctypes.sizeof(abi.FragmentKey),
                              value_size=ctypes.sizeof(abi.FragmentValue), max_entries=1)  # fmt: skip
    Map("full", full, abi.FragmentKey, abi.FragmentValue).put(abi.FragmentKey(id=1), abi.FragmentValue())
    try:
        with Harness.open(replaced={"fragments": full}) as harness:
            harness.policy_set(ALLOW)
            harness.endpoint(harness.interfaces[0], [POD4], sets=(ALLOW,) * 4)
            outcome = harness.run(harness.interfaces[0], "to_pod", cut4(UDP_FIRST, 0, True))
            assert outcome.reason == DropReason.DROP_FRAG_NEEDED_STATE
    finally:
        os.close(full)
