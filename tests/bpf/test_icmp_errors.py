"""ICMP errors pass only about a packet of a flow that is alive and allowed, and they make no flow."""

from __future__ import annotations

import pytest
from conftest import DENY, NODE4, PEER4, PEER6, POD4, POD6, Pod
from harness import (
    ACK,
    ICMP,
    ICMP6,
    SYN,
    TCP,
    Harness,
    Layer,
    entry,
    fragment_header,
    icmp,
    icmp_error,
    icmp_header,
    ip,
    ping,
    tcp,
    tcp_header,
    udp,
)

from meshbridge.abi import DropReason, PolicyVerdict

FAMILIES = pytest.mark.parametrize(("mine", "peer", "router"),
                                   [(POD4, PEER4, NODE4), (POD6, PEER6, "fd00::fe")], ids=["v4", "v6"])  # fmt: skip
ERRORS4, ERRORS6 = (3, 11, 12), (1, 2, 3, 4)


def errors(address: str) -> tuple[int, ...]:
    return ERRORS6 if ":" in address else ERRORS4


@FAMILIES
def test_an_error_about_a_packet_the_pod_sent_comes_in(pod: Pod, mine: str, peer: str, router: str) -> None:
    pod.change(ingress=DENY)
    for packet in (tcp(mine, peer, 40000, 80), udp(mine, peer, 5000, 53), ping(mine, peer)):
        assert pod.send(packet).passed
        for kind in errors(mine):
            assert pod.receive(icmp_error(router, mine, packet, kind)).passed
    assert pod.flows() == 3


@FAMILIES
def test_an_error_about_a_reply_the_pod_sent_comes_in(pod: Pod, mine: str, peer: str, router: str) -> None:
    assert pod.receive(tcp(peer, mine, 40000, 80)).passed
    answer = tcp(mine, peer, 80, 40000, SYN | ACK)
    assert pod.send(answer).passed
    assert pod.receive(icmp_error(router, mine, answer)).passed


@FAMILIES
def test_the_pod_may_send_an_error_about_a_packet_it_received(pod: Pod, mine: str, peer: str, router: str) -> None:
    question = udp(peer, mine, 5000, 53)
    assert pod.receive(question).passed
    pod.change(egress=DENY)
    assert pod.send(icmp_error(mine, peer, question)).passed


@FAMILIES
def test_errors_about_anything_else_are_dropped(pod: Pod, mine: str, peer: str, router: str) -> None:
    sent = tcp(mine, peer, 40000, 80)
    assert pod.send(sent).passed
    v6 = ":" in mine
    quoted_error = icmp_error(mine, peer, tcp(peer, mine, 1, 2))
    later = (ip(mine, peer, 44, fragment_header(TCP, 1480, False) + bytes(8)) if v6
             else ip(mine, peer, TCP, bytes(8), offset=1480))  # fmt: skip
    unrelated = {
        "another port": tcp(mine, peer, 40001, 80),
        "another protocol": udp(mine, peer, 40000, 80),
        "another peer": tcp(mine, "fd00::77" if v6 else "10.0.0.77", 40000, 80),
        "the way back": tcp(peer, mine, 80, 40000, ACK),
        "an error": quoted_error,
        "a later fragment": later,
        "half a header": sent[: 14 + (40 if v6 else 20) + 7],
        "nothing": sent[:14],
    }
    for name, quoted in unrelated.items():
        outcome = pod.receive(icmp_error(router, mine, quoted))
        assert outcome.reason == DropReason.DROP_ICMP_ERROR_UNRELATED, name
    assert pod.flows() == 1


@FAMILIES
def test_an_error_about_a_flow_that_policy_cut_is_dropped(pod: Pod, mine: str, peer: str, router: str) -> None:
    sent = tcp(mine, peer, 40000, 80)
    assert pod.send(sent).passed
    pod.change(egress=DENY)
    assert pod.receive(icmp_error(router, mine, sent)).reason == DropReason.DROP_ICMP_ERROR_UNRELATED
    pod.change(egress=1)
    assert pod.receive(icmp_error(router, mine, sent)).passed


@FAMILIES
def test_an_error_about_a_flow_that_is_over_is_dropped(pod: Pod, mine: str, peer: str, router: str) -> None:
    sent = udp(mine, peer, 40000, 80)
    assert pod.send(sent).passed
    pod.kernel.age(pod.incarnation, 61)
    assert pod.receive(icmp_error(router, mine, sent)).reason == DropReason.DROP_ICMP_ERROR_UNRELATED


@FAMILIES
def test_an_error_does_not_keep_a_flow_alive_or_close_it(pod: Pod, mine: str, peer: str, router: str) -> None:
    sent = tcp(mine, peer, 40000, 80)
    pod.send(sent)
    before = pod.kernel.flows(pod.incarnation)
    assert pod.receive(icmp_error(router, mine, sent)).passed
    assert pod.kernel.flows(pod.incarnation) == before


@FAMILIES
def test_the_event_of_a_dropped_error_tells_the_error(pod: Pod, mine: str, peer: str, router: str) -> None:
    event = pod.receive(icmp_error(router, mine, tcp(mine, peer, 1, 2))).event
    v6 = ":" in mine
    assert (event.protocol, event.icmp_type, event.icmp_code) == ((ICMP6, 1, 1) if v6 else (ICMP, 3, 1))
    assert (event.source_port, event.destination_port, event.direction) == (0, 0, 0)
    assert bytes(event.source)[-1] == (0xFE if v6 else 1)


def test_a_quoted_header_with_options_is_read_behind_them(pod: Pod) -> None:
    sent = ip(POD4, PEER4, TCP, tcp_header(40000, 80, SYN), options=b"\x94\x04\x00\x00")
    assert pod.send(sent).passed
    assert pod.receive(icmp_error(NODE4, POD4, sent)).passed


def test_a_quoted_echo_reply_belongs_to_its_request(pod: Pod) -> None:
    assert pod.receive(ping(PEER4, POD4, 9)).passed
    answer = ping(POD4, PEER4, 9, reply=True)
    assert pod.send(answer).passed
    assert pod.receive(icmp_error(NODE4, POD4, answer)).passed
    assert not pod.receive(icmp_error(NODE4, POD4, ping(POD4, PEER4, 10, reply=True))).passed


def test_source_quench_is_judged_by_policy_like_any_message(pod: Pod) -> None:
    packet = ip(PEER4, POD4, ICMP, icmp_header(4) + bytes(28))
    assert pod.receive(packet).passed
    pod.change(ingress=DENY)
    assert pod.receive(packet).reason == DropReason.DROP_POLICY


@pytest.mark.parametrize("packet", [icmp(PEER4, POD4, 13), ping(PEER4, POD4, 0, reply=True)], ids=["request", "reply"])
def test_a_message_that_is_judged_by_itself_opens_no_flow(kernel: Harness, pod: Pod, packet: bytes) -> None:
    """Its key would be that of a ping whose identifier is 0."""
    only = {(0, ICMP, kind, 16): entry() for kind in (0, 13)}
    kernel.policy_set(3, Layer(only, default=PolicyVerdict.POLICY_DENY))
    pod.change(ingress=3, egress=DENY)
    assert pod.receive(packet).passed
    assert pod.flows() == 0
    assert not pod.receive(ping(PEER4, POD4, 0)).passed
    assert not pod.send(ping(POD4, PEER4, 0, reply=True)).passed
