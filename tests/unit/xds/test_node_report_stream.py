"""A node's report over gRPC: authenticated, bounded, kept over a restart of the agent, withdrawn when it is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.identity.model import IpFamily, TcpPorts
from meshbridge.protos.agent_pb2 import Revision
from meshbridge.protos.agent_pb2 import TcpPorts as Ports
from meshbridge.protos.reports_pb2 import NodeReport as ReportMessage
from meshbridge.protos.reports_pb2 import PodCondition as ConditionMessage
from meshbridge.protos.reports_pb2 import PodExclusions, PodReport, ProgrammedPolicy
from meshbridge.protos.reports_pb2_grpc import NodeReportsStub
from meshbridge.xds.auth import CLOCK_SKEW, Caller, TokenKey, bearer, mint_token, node_caller, pod_caller
from meshbridge.xds.client import MESSAGES, ControllerClient
from meshbridge.xds.exclusions import MAX_GROUPS, MAX_PODS, Exclusions
from meshbridge.xds.messages import MAX_RANGES, MessageError
from meshbridge.xds.nodereport import (
    MAX_CONDITIONS,
    MAX_MESSAGE,
    MAX_POLICIES,
    ConditionStatus,
    NodeReport,
    PodCondition,
    report_message,
    report_of,
)
from meshbridge.xds.reports import ReportServer
from meshbridge.xds.server import DeltaServer, Refusals, start_server
from meshbridge.xds.snapshot import Resource, Resources, Snapshot
from meshbridge.xds.types import REVISION

KEY = b"k" * 32
NODE, POD = node_caller("node-a"), pod_caller("node-a", "shop", "web", "sa", "uid")
PORTS = (TcpPorts(IpFamily.IPV4, 8080, 8080), TcpPorts(IpFamily.IPV6, 0, 65535))
KEPT_S = 1.0


class Sink:
    """Who takes reports, and a controller that has nothing to say but where the controllers are."""

    refusal = ""

    def __init__(self) -> None:
        self.told: list[tuple[str, Exclusions]] = []
        self.snapshot: Snapshot | None = None
        self.wakes: list[Callable[[], None]] = []

    def name(self, number: int, *controllers: str) -> None:
        revision = Revision(number=number, controllers=controllers)
        empty: dict[str, Resources] = {type_url: {} for type_url in MESSAGES}
        self.snapshot = Snapshot({**empty, REVISION: {"revision": Resource.of(revision.SerializeToString())}})
        for wake in self.wakes:
            wake()

    def report(self, node: str, report: NodeReport) -> None:
        self.told.append((node, report.exclusions))

    def open(self, _caller: Caller, wake: Callable[[], None]) -> Sink:
        self.wakes.append(wake)
        return self

    def refuses(self, _refusals: Refusals) -> None:
        pass

    def close(self) -> None:
        pass


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is watched has no event of its own
        await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[tuple[Sink, str]]:
    sink, target = Sink(), f"unix:{directory / 's'}"
    server = await start_server(
        DeltaServer(TokenKey(KEY), sink), target, reports=ReportServer(TokenKey(KEY), sink, KEPT_S)
    )
    try:
        yield sink, target
    finally:
        await server.stop(0)
        await until(lambda: not (directory / "s").exists())  # gRPC removes it a little later: it may be the next one's


@asynccontextmanager
async def following(target: str, token: Callable[[], str]) -> AsyncIterator[ControllerClient]:
    client = ControllerClient(target, "node-a", token)

    async def follow() -> None:
        async for _ in client.updates():
            pass

    task = asyncio.create_task(follow())
    try:
        yield client
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def token(caller: Caller = NODE, **more: Any) -> str:
    return mint_token(KEY, caller, now=datetime.now(UTC), **more)


def seen(exclusions: Exclusions) -> NodeReport:
    return NodeReport(exclusions)


WORDS = st.text(st.sampled_from("Abc9"), min_size=1, max_size=9)
CONDITIONS = st.lists(
    st.builds(PodCondition, WORDS, st.sampled_from(ConditionStatus), WORDS, st.text(max_size=9)),
    min_size=1, max_size=MAX_CONDITIONS, unique_by=lambda condition: condition.type,
).map(tuple)  # fmt: skip
UIDS = st.text(min_size=1, max_size=9)
REPORTS = st.builds(
    NodeReport,
    st.dictionaries(UIDS, st.sampled_from([PORTS, PORTS[:1], ()]), max_size=9),
    st.dictionaries(UIDS, st.integers(0, (1 << 63) - 1), max_size=9),
    st.dictionaries(UIDS, CONDITIONS, max_size=9),
)


@given(REPORTS)
def test_a_report_is_read_as_it_was_meant(report: NodeReport) -> None:
    sent = report_message(report).SerializeToString()
    assert report_of(ReportMessage.FromString(sent), "x") == report


def test_what_is_beyond_the_limits_is_left_out() -> None:
    many = tuple(TcpPorts(IpFamily.IPV4, n, n) for n in range(0, 4 * MAX_RANGES, 2))

    def taken(report: NodeReport) -> NodeReport:
        return report_of(report_message(report), "x")

    assert taken(seen({"a": many, "b": PORTS, "x" * 9999: PORTS})).exclusions == {"b": PORTS}
    assert len(taken(seen({str(n): PORTS for n in range(MAX_PODS + 9)})).exclusions) == MAX_PODS
    lonely = {str(n): (TcpPorts(IpFamily.IPV4, n, n),) for n in range(MAX_GROUPS + 9)}
    assert len(taken(seen(lonely)).exclusions) == MAX_GROUPS
    wordy = PodCondition("Captured", ConditionStatus.FALSE, "GhostBypass", "x" * 9999)
    assert len(taken(NodeReport(conditions={"a": (wordy,)})).conditions["a"][0].message) == MAX_MESSAGE
    assert len(taken(NodeReport(conditions={str(n): (wordy,) for n in range(MAX_PODS + 9)})).conditions) == MAX_PODS
    assert len(taken(NodeReport(programmed={str(n): 1 for n in range(MAX_POLICIES + 9)})).programmed) == MAX_POLICIES


def one(*ports: Ports, uids: tuple[str, ...] = ("a",)) -> ReportMessage:
    return ReportMessage(groups=[PodExclusions(uids=uids, excluded=ports)])


def said(**fields: Any) -> ConditionMessage:
    return ConditionMessage(**{"type": "Captured", "reason": "GhostBypass", **fields})


def told(*conditions: ConditionMessage) -> ReportMessage:
    return ReportMessage(pods=[PodReport(uid="a", conditions=conditions)])


HOSTILE = {
    "a port that is none": one(Ports(first=1, last=70_000)),
    "backwards": one(Ports(first=9, last=8)),
    "not in order": one(Ports(first=9, last=9), Ports(first=1, last=1)),
    "overlapping": one(Ports(first=1, last=5), Ports(first=5, last=9)),
    "IPv6 first": one(Ports(ipv6=True, first=1, last=5), Ports(first=8, last=9)),
    "too many ranges": one(*(Ports(first=2 * n, last=2 * n) for n in range(MAX_RANGES + 1))),
    "too many groups": ReportMessage(groups=[PodExclusions()] * (MAX_GROUPS + 1)),
    "too many pods": one(uids=tuple(map(str, range(MAX_PODS + 1)))),
    "one pod twice": one(uids=("a", "a")),
    "nobody": one(uids=("",)),
    "an endless UID": one(uids=("a" * 100_000,)),
    "too many policies": ReportMessage(programmed=[ProgrammedPolicy(uid=str(n)) for n in range(MAX_POLICIES + 1)]),
    "one policy twice": ReportMessage(programmed=[ProgrammedPolicy(uid="p")] * 2),
    "a pod told of twice": ReportMessage(pods=[PodReport(uid="a")] * 2),
    "too many pods told of": ReportMessage(pods=[PodReport(uid=str(n)) for n in range(MAX_PODS + 1)]),
    "a condition twice": told(said(), said()),
    "too many conditions": told(*(said(type=f"T{n}") for n in range(MAX_CONDITIONS + 1))),
    "a condition without a type": told(said(type="")),
    "a reason of several lines": told(said(reason="a\nb")),
    "a status that is none": told(said(status=9)),
    "an endless text": told(said(message="x" * (MAX_MESSAGE + 1))),
}


@pytest.mark.parametrize("report", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_report_is_refused_as_a_whole(report: ReportMessage) -> None:
    with pytest.raises(MessageError, match="node-x"):
        report_of(report, "report of node-x")


def test_a_refused_report_withdraws_the_one_before(tmp_path: Path) -> None:
    async def body() -> None:
        async with serving(tmp_path) as (sink, target), grpc.aio.insecure_channel(target) as channel:
            call = NodeReportsStub(channel).Report(metadata=bearer(token()))  # type: ignore[no-untyped-call]
            await call.write(report_message(seen({"a": PORTS})))
            with suppress(asyncio.InvalidStateError):
                await call.write(HOSTILE["backwards"])
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert sink.told == [("node-a", {"a": PORTS}), ("node-a", {})]

    run(body)


STRANGERS = {
    "a pod": (lambda: token(POD), grpc.StatusCode.PERMISSION_DENIED),
    "nobody": (lambda: "x", grpc.StatusCode.UNAUTHENTICATED),
}


@pytest.mark.parametrize(("present", "code"), STRANGERS.values(), ids=STRANGERS.keys())
def test_only_a_node_reports(tmp_path: Path, present: Callable[[], str], code: grpc.StatusCode) -> None:
    async def body() -> None:
        async with serving(tmp_path) as (sink, target), grpc.aio.insecure_channel(target) as channel:
            call = NodeReportsStub(channel).Report(metadata=bearer(present()))  # type: ignore[no-untyped-call]
            assert await call.code() is code
            assert not sink.told

    run(body)


def test_a_client_tells_its_newest_report_once_and_again_to_a_restarted_controller(tmp_path: Path) -> None:
    async def body() -> None:
        async with following(f"unix:{tmp_path / 's'}", token) as client:
            async with serving(tmp_path) as (sink, _):
                client.report(seen({"a": PORTS}))
                await until(lambda: bool(sink.told))
                client.report(seen({"a": PORTS}))
                client.report(seen({"b": PORTS}))
                await until(lambda: len(sink.told) > 1)
                assert sink.told == [("node-a", {"a": PORTS}), ("node-a", {"b": PORTS})]
            async with serving(tmp_path) as (sink, _):
                await until(lambda: bool(sink.told))
                assert sink.told == [("node-a", {"b": PORTS})]

    run(body)


def test_a_report_outlives_its_stream_for_a_while_only(tmp_path: Path) -> None:
    async def body() -> None:
        async with serving(tmp_path) as (sink, target):
            async with following(target, token) as client:
                client.report(seen({"a": PORTS}))
                await until(lambda: bool(sink.told))
            async with following(target, token) as client:
                client.report(seen({"a": PORTS}))
                await until(lambda: len(sink.told) > 1)
                await asyncio.sleep(1.5 * KEPT_S)
                assert sink.told == [("node-a", {"a": PORTS})] * 2, "the agent was back in time"
            await until(lambda: len(sink.told) > 2)
            assert sink.told[-1] == ("node-a", {})

    run(body)


def test_a_client_with_nothing_to_report_takes_nobodys_place(tmp_path: Path) -> None:
    async def body() -> None:
        async with serving(tmp_path) as (sink, target), following(target, token) as agent:
            agent.report(seen({"a": PORTS}))
            await until(lambda: bool(sink.told))
            async with following(target, token):
                await asyncio.sleep(1.5 * KEPT_S)
            assert sink.told == [("node-a", {"a": PORTS})]

    run(body)


def test_streams_of_a_node_end_with_its_token_and_come_back_with_the_new_one(tmp_path: Path) -> None:
    presented: list[str] = []

    def renewed() -> str:
        lifetime = timedelta(seconds=4) - CLOCK_SKEW if len(presented) < 2 else timedelta(hours=1)
        presented.append(token(lifetime=lifetime))
        return presented[-1]

    async def body() -> None:
        async with serving(tmp_path) as (sink, target), following(target, renewed) as client:
            client.report(seen({"a": PORTS}))
            await until(lambda: len(sink.told) >= 2 and len(presented) >= 4)
            await asyncio.sleep(1.5 * KEPT_S)
            assert sink.told[-1] == ("node-a", {"a": PORTS})

    run(body)


def test_a_client_reports_to_every_controller_that_is_named_and_to_none_twice(tmp_path: Path) -> None:
    """The first names itself under another address, as a Service stands before it."""
    ones, others = tmp_path / "one", tmp_path / "other"
    ones.mkdir()
    others.mkdir()
    report = ("node-a", {"a": PORTS})

    async def body() -> None:
        async with serving(ones) as (one, target), following(target, token) as client:
            client.report(seen({"a": PORTS}))
            await until(lambda: one.told == [report])
            async with serving(others) as (other, another):
                one.name(1, target, another)
                await until(lambda: other.told == [report] and len(one.told) == 2)
                client.report(seen({"b": PORTS}))
                await until(lambda: all(sink.told[-1] == ("node-a", {"b": PORTS}) for sink in (one, other)))
                await asyncio.sleep(1.5 * KEPT_S)
                assert [len(sink.told) for sink in (one, other)] == [3, 2], "no stream has ended another"
            one.name(2, target)
            client.report(seen({"c": PORTS}))
            await until(lambda: one.told[-1] == ("node-a", {"c": PORTS}))
            async with serving(others) as (other, _):  # it comes back under its address, and is named again
                one.name(3, target, another)
                await until(lambda: other.told == [("node-a", {"c": PORTS})])

    run(body)


def test_a_client_without_a_report_reports_to_nobody_that_is_named(tmp_path: Path) -> None:
    async def body() -> None:
        async with serving(tmp_path) as (sink, target), following(target, token) as client:
            sink.name(1, target)
            await until(lambda: client.revision_received == 1)
            await asyncio.sleep(0.2)
            assert not sink.told

    run(body)
