"""A packet cut after any of its bytes, whole or as its headers claim, passes only when everything judged is there."""

from __future__ import annotations

import pytest
from conftest import DENY, PEER4, PEER6, POD4, POD6, Pod
from harness import (
    SCTP,
    SYN,
    TCP,
    UDP,
    Harness,
    Layer,
    arp,
    entry,
    fragment_header,
    frames,
    icmp,
    icmp_error,
    ip,
    neighbour,
    tcp,
    tcp_header,
    udp,
    udp_header,
)

from meshbridge.abi import DropReason, PolicyVerdict

EXTENSIONS = bytes((60, 0)) + bytes(6) + bytes((43, 0)) + bytes(6) + bytes((TCP, 0)) + bytes(6)
WHOLE = {
    "TCP": tcp(PEER4, POD4, 40000, 80),
    "IPv6 TCP": tcp(PEER6, POD6, 40000, 80),
    "TCP with options": ip(PEER4, POD4, TCP, tcp_header(1, 80, SYN, options=b"\x02\x04\x05\xb4")),
    "IP options": ip(PEER4, POD4, TCP, tcp_header(1, 80, SYN), options=b"\x94\x04\x00\x00" * 3),
    "extension headers": ip(PEER6, POD6, 0, EXTENSIONS + tcp_header(1, 80, SYN)),
    "authentication header": ip(PEER6, POD6, 51, bytes((TCP, 4)) + bytes(22) + tcp_header(1, 80, SYN)),
    "UDP": udp(PEER4, POD4, 1, 53),
    "IPv6 UDP": udp(PEER6, POD6, 1, 53),
    "SCTP": ip(PEER4, POD4, SCTP, bytes(12)),
    "ping": icmp(PEER4, POD4, 8),
    "first fragment": ip(PEER4, POD4, UDP, udp_header(1, 53, 64), more=True),
    "first IPv6 fragment": ip(PEER6, POD6, 44, fragment_header(TCP, 0, True) + tcp_header(1, 80, SYN)),
    "ARP": arp(2, PEER4, POD4),
    "neighbour solicitation": neighbour(135, "fd00::1", POD6, POD6),
}


@pytest.mark.parametrize("packet", WHOLE.values(), ids=WHOLE.keys())
def test_a_frame_cut_anywhere_is_dropped(pod: Pod, packet: bytes) -> None:
    if packet is not WHOLE["neighbour solicitation"]:
        assert pod.receive(packet).passed
    for cut in frames(packet):
        outcome = pod.receive(cut)
        # A solicitation to a pod passes as such; what it asks is the pod's business.
        if packet is WHOLE["neighbour solicitation"] and len(cut) >= 14 + 40 + 8:
            continue
        assert not outcome.passed, f"cut to {len(cut)} of {len(packet)} bytes"
        assert outcome.reason == DropReason.DROP_INVALID_PACKET


def claim(packet: bytes, payload_bytes: int) -> bytes:
    """The frame, its IP length field telling a shorter payload than follows."""
    if packet[12:14] == b"\x86\xdd":
        return packet[:18] + payload_bytes.to_bytes(2, "big") + packet[20:]
    return packet[:16] + (20 + payload_bytes).to_bytes(2, "big") + packet[18:]


CLAIMS = ["TCP", "IPv6 TCP", "UDP", "IPv6 UDP", "SCTP", "ping", "extension headers", "authentication header",
          "IP options"]  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_bytes_behind_the_claimed_length_are_not_read(pod: Pod, name: str) -> None:
    packet = WHOLE[name]
    header = 14 + (40 if packet[12:14] == b"\x86\xdd" else 20)
    for size in range(len(packet) - header):
        outcome = pod.receive(claim(packet, size))
        assert not outcome.passed, f"claims {size} bytes"
    assert pod.flows() == 0


@pytest.mark.parametrize(("mine", "peer"), [(POD4, PEER4), (POD6, PEER6)], ids=["v4", "v6"])
def test_an_icmp_error_cut_in_what_it_quotes_is_dropped(pod: Pod, mine: str, peer: str) -> None:
    sent = tcp(mine, peer, 40000, 80)
    assert pod.send(sent).passed
    header = 40 if ":" in mine else 20
    for size in range(header + 8):
        assert not pod.receive(icmp_error(peer, mine, sent[: 14 + size])).passed, f"quotes {size} bytes"
    for size in range(header + 8, len(sent) - 14 + 1):
        assert pod.receive(icmp_error(peer, mine, sent[: 14 + size])).passed, f"quotes {size} bytes"


@pytest.mark.parametrize("name", list(WHOLE))
def test_no_flipped_bit_gets_past_a_policy_that_allows_one_port(kernel: Harness, pod: Pod, name: str) -> None:
    """Allow a port nobody uses: whatever a bit flip makes of the packet, it must not pass unless it now names that."""
    kernel.policy_set(3, Layer({(0, TCP, 7, 16): entry()}, default=PolicyVerdict.POLICY_DENY))
    pod.change(ingress=3, egress=DENY)
    packet = WHOLE[name]
    for position in range(len(packet) * 8):
        flipped = bytearray(packet)
        flipped[position // 8] ^= 1 << position % 8
        if pod.receive(bytes(flipped)).passed:
            kind = int.from_bytes(flipped[12:14], "big")
            assert kind == 0x0806 or flipped[20] == 58, f"bit {position} of {name} made it pass"
