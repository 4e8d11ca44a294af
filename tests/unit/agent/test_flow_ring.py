"""The ring of flows and those who follow it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from meshbridge.agent.ring import CLIENT_BACKLOG, KEPT_FLOWS, MAX_CLIENTS, FlowRing
from meshbridge.observe.flow import Flow, FlowKind, FlowVerdict
from meshbridge.observe.messages import decode_flow
from meshbridge.protos import observer_pb2 as pb

FLOW = Flow(1, "n", FlowKind.DROP, FlowVerdict.DROPPED)


def decoded(record: bytes) -> Flow:
    return decode_flow(pb.Flow.FromString(record))


def test_the_ring_keeps_the_newest() -> None:
    ring = FlowRing("n")
    for number in range(KEPT_FLOWS + 3):
        ring.add(replace(FLOW, time_ns=number + 1))
    assert decoded(ring.past(0)[0]).time_ns == 4
    assert [decoded(r).time_ns for r in ring.past(2)] == [KEPT_FLOWS + 2, KEPT_FLOWS + 3]


def test_a_slow_client_loses_the_oldest_and_is_told_how_many() -> None:
    async def body() -> None:
        ring = FlowRing("n")
        follower = ring.follow()
        assert follower is not None
        for number in range(CLIENT_BACKLOG + 5):
            ring.add(replace(FLOW, time_ns=number + 1))
        records = follower.records()
        first = decoded(await anext(records))
        assert (first.kind, first.lost, first.lost_by) == (FlowKind.LOST, 5, "AGENT_RING_BUFFER")
        assert decoded(await anext(records)).time_ns == 6

    asyncio.run(body())


def test_a_follower_gets_what_comes_in_order_and_waits_for_more() -> None:
    async def body() -> None:
        ring = FlowRing("n")
        follower = ring.follow()
        assert follower is not None
        records = follower.records()
        waiting = asyncio.ensure_future(anext(records))
        await asyncio.sleep(0)
        ring.add(FLOW)
        assert decoded(await waiting) == FLOW

    asyncio.run(body())


def test_followers_are_limited_and_leave_room_when_they_go() -> None:
    ring = FlowRing("n")
    followers = [ring.follow() for _ in range(MAX_CLIENTS)]
    assert ring.follow() is None
    assert followers[0] is not None
    ring.leave(followers[0])
    assert ring.follow() is not None


def test_losses_of_the_kernel_add_up() -> None:
    ring = FlowRing("n")
    ring.add(Flow(1, "n", FlowKind.LOST, FlowVerdict.DROPPED, lost=4))
    ring.add(Flow(2, "n", FlowKind.LOST, FlowVerdict.DROPPED, lost=3))
    assert (ring.lost, ring.seen) == (7, 2)
