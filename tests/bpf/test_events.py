"""No packet leaves without a trace: events, what the limiter kept back, and counters add up exactly."""

from __future__ import annotations

import select
from dataclasses import replace

from conftest import DENY, PEER4, POD4, POD6, Pod
from harness import ACK, SMALL, SYN, Harness, tcp, udp

from meshbridge import abi
from meshbridge.abi import EVENTS_PER_WINDOW, DropReason, EventType


def test_events_and_losses_add_up_to_the_drops(kernel: Harness, pod: Pod) -> None:
    pod.change(ingress=DENY)
    kernel.reset_limiter()
    kernel.events()
    counted_before = kernel.maps.counters().get((DropReason.DROP_POLICY, 0), (0, 0))[0]
    drops = 50_000
    kernel.measure(pod.ifindex, "to_pod", tcp(PEER4, POD4, 1, 80), repeat=drops)
    events = kernel.events()
    told, untold = sum(event.lost for event in events), kernel.maps.lost_events()
    assert len(events) + told + untold == drops
    assert untold > 0, "faster than the limiter lets through"
    assert kernel.maps.counters()[DropReason.DROP_POLICY, 0][0] - counted_before == drops


def test_losses_are_told_by_the_next_event(kernel: Harness, pod: Pod) -> None:
    pod.change(ingress=DENY)
    kernel.reset_limiter()
    kernel.measure(pod.ifindex, "to_pod", tcp(PEER4, POD4, 1, 80), repeat=20_000)
    events = kernel.events()
    lost = kernel.maps.lost_events()
    limiter = abi.EventLimiter(window_start_ns=1, sent=EVENTS_PER_WINDOW, lost=5)
    kernel.maps.event_limiter.put_all(kernel.maps.event_limiter.key_type(number=0), limiter)
    assert lost > 0
    assert events
    outcome = pod.receive(tcp(PEER4, POD4, 1, 80), limited=True)
    assert outcome.event.lost == 5
    assert pod.receive(tcp(PEER4, POD4, 1, 80), limited=True).event.lost == 0


def test_new_flows_cannot_hide_a_drop(kernel: Harness, pod: Pod) -> None:
    kernel.endpoint(kernel.interfaces[1], [POD6], sets=(2, 2, 2, 2))
    kernel.reset_limiter()
    for port in range(2000):
        kernel.verdict(pod.ifindex, "to_pod", udp(PEER4, POD4, port, 53))
    assert not pod.receive(tcp(PEER4, "10.7.7.7", 1, 80), limited=True).passed
    drops = [event for event in kernel.events() if event.type == EventType.EVENT_DROP]
    assert len(drops) <= 1  # read by receive() already, or still here


def test_a_ring_that_nobody_reads_loses_and_counts() -> None:
    with Harness.open(interfaces=1, sizes=replace(SMALL, events=4096)) as harness:
        harness.reset_limiter()
        for _ in range(EVENTS_PER_WINDOW // 2):  # the ring has room for 36
            harness.verdict(harness.interfaces[0], "to_pod", tcp(PEER4, POD4, 1, 80))
        events = harness.events()
        assert len(events) == 4096 // 112
        assert len(events) + harness.maps.lost_events() == EVENTS_PER_WINDOW // 2


def test_the_ring_can_be_polled(kernel: Harness, pod: Pod) -> None:
    poller = select.epoll()
    poller.register(kernel.maps.events_fd, select.EPOLLIN)
    kernel.events()
    assert poller.poll(0) == []
    kernel.reset_limiter()
    kernel.verdict(pod.ifindex, "to_pod", tcp(PEER4, "10.7.7.7", 1, 80))
    assert poller.poll(1)
    assert len(kernel.events()) == 1
    poller.close()


def test_the_sender_is_shown_on_the_way_out_only(pod: Pod) -> None:
    assert pod.send(tcp(POD4, PEER4, 1, 80)).event.uid == 0
    assert pod.receive(tcp(PEER4, POD4, 80, 1, SYN | ACK)).event.uid == 0xFFFFFFFF


def test_forwarded_packets_are_counted(kernel: Harness, pod: Pod) -> None:
    packet = tcp(PEER4, POD4, 1, 80)
    before = kernel.maps.counters().get((0, 0), (0, 0))
    kernel.measure(pod.ifindex, "to_pod", packet, repeat=100)
    after = kernel.maps.counters()[0, 0]
    assert (after[0] - before[0], after[1] - before[1]) == (100, 100 * len(packet))
