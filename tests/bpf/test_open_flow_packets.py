"""Packets of an open flow take a shorter way through the program; what the long way refuses does not pass by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import DENY, PEER4, PEER6, POD4, POD6, Pod
from harness import ACK, FIN, RST, SYN, TCP, UDP, ethernet, ip, ipv4, ipv6, tcp, tcp_header, udp, udp_header

from meshbridge.abi import DropReason, EventType

CLIENT, SERVER = 40000, 80
Build = Callable[[str, str, bytes], bytes]


def segment(*, offset: int = 5) -> bytes:
    whole = bytearray(tcp_header(CLIENT, SERVER, ACK))
    whole[12] = offset << 4
    return bytes(whole)


V4: dict[str, tuple[int, bytes, dict[str, object]]] = {
    "longer than the frame": (TCP, segment(), {"total": 41}),
    "shorter than its header": (TCP, segment(), {"total": 19}),
    "cut off before its TCP header ends": (TCP, segment(), {"total": 39}),
    "a TCP header shorter than one can be": (TCP, segment(offset=4), {}),
    "a TCP header longer than the packet": (TCP, segment(offset=6), {}),
    "a UDP datagram shorter than its header": (UDP, udp_header(CLIENT, SERVER, -1) + bytes(20), {}),
    "a UDP datagram longer than the packet": (UDP, udp_header(CLIENT, SERVER, 21) + bytes(20), {}),
    "a source route": (TCP, segment(), {"options": bytes((131, 3, 4, 0))}),
}


@pytest.fixture
def open_pod(pod: Pod) -> Pod:
    """A pod with an answered TCP flow and an answered UDP flow, in both families."""
    for peer, own in ((PEER4, POD4), (PEER6, POD6)):
        assert pod.receive(tcp(peer, own, CLIENT, SERVER, SYN)).passed
        assert pod.send(tcp(own, peer, SERVER, CLIENT, SYN | ACK)).passed
        assert pod.receive(udp(peer, own, CLIENT, SERVER)).passed
        assert pod.send(udp(own, peer, SERVER, CLIENT)).passed
    return pod


@pytest.mark.parametrize(("protocol", "payload", "extra"), V4.values(), ids=V4.keys())
def test_a_malformed_packet_of_an_open_flow_is_dropped(
    open_pod: Pod, protocol: int, payload: bytes, extra: dict[str, int]
) -> None:
    padding = bytes(0 if "total" in extra else 6)  # beyond the end of the packet, as on a wire
    frame = ethernet(ipv4(PEER4, POD4, protocol, payload, **extra) + padding, 0x0800)  # type: ignore[arg-type]
    assert open_pod.receive(frame).reason is DropReason.DROP_INVALID_PACKET


def test_a_payload_length_beyond_the_frame_is_dropped_in_ipv6(open_pod: Pod) -> None:
    frame = ethernet(ipv6(PEER6, POD6, TCP, segment(), length=21), 0x86DD)
    assert open_pod.receive(frame).reason is DropReason.DROP_INVALID_PACKET


def test_an_ipv4_flow_is_not_continued_by_ipv6_with_mapped_addresses(open_pod: Pod) -> None:
    frame = ip(f"::ffff:{PEER4}", f"::ffff:{POD4}", TCP, segment())
    assert open_pod.receive(frame).reason is DropReason.DROP_INVALID_PACKET


@pytest.mark.parametrize(("peer", "own"), [(PEER4, POD4), (PEER6, POD6)])
def test_plain_packets_of_an_open_flow_pass_without_a_word(open_pod: Pod, peer: str, own: str) -> None:
    padding = bytes(6)
    for frame in (tcp(peer, own, CLIENT, SERVER, ACK), udp(peer, own, CLIENT, SERVER, b"more than a little data")):
        assert open_pod.receive(frame).events == ()
        assert open_pod.receive(frame + padding).events == ()
    for frame in (tcp(own, peer, SERVER, CLIENT, ACK), udp(own, peer, SERVER, CLIENT, b"more than a little data")):
        assert open_pod.send(frame).events == ()


@pytest.mark.parametrize("flags", [ACK, FIN | ACK, RST, SYN])
def test_every_packet_of_a_flow_that_is_denied_now_is_dropped(open_pod: Pod, flags: int) -> None:
    open_pod.change(ingress=DENY)
    for _ in range(2):
        outcome = open_pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, flags))
        assert outcome.reason is DropReason.DROP_POLICY
        assert not open_pod.send(tcp(POD4, PEER4, SERVER, CLIENT, ACK)).passed


def test_the_first_reply_is_told_once(pod: Pod) -> None:
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, SYN)).passed
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK)).events == ()
    answer = tcp(POD4, PEER4, SERVER, CLIENT, ACK)
    assert [event.type for event in pod.send(answer).events] == [EventType.EVENT_TRACE]
    assert pod.send(answer).events == ()
