"""A real gRPC server and client over a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.config.core.v3.base_pb2 import Node
from envoy.service.discovery.v3 import ads_pb2_grpc
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest
from google.protobuf.message import Message

from meshbridge.errors import SettingsError
from meshbridge.protos.agent_pb2 import Address, Policy, Revision
from meshbridge.xds import types as xds
from meshbridge.xds.auth import Caller, TokenKey, bearer, mint_token, node_caller, pod_caller
from meshbridge.xds.client import ControllerClient, Update
from meshbridge.xds.server import DeltaServer, Refusals, start_server
from meshbridge.xds.snapshot import Resource, Snapshot

KEY = b"k" * 32
NODE = node_caller("node-a")


class Source:
    """One snapshot for everybody who asks, changed by the test."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.refusal = ""
        self.wakes: set[Callable[[], None]] = set()
        self.callers: list[Caller] = []

    def open(self, caller: Caller, wake: Callable[[], None]) -> Source:
        self.callers.append(caller)
        self.wakes.add(wake)
        return self

    def refuses(self, _refusals: Refusals) -> None:
        pass

    def close(self) -> None:
        pass

    def put(self, revision: int, types: dict[str, dict[str, Message | bytes]]) -> None:
        types = types | {xds.REVISION: {"revision": Revision(number=revision)}}
        self.snapshot = Snapshot(
            {
                type_url: {
                    n: Resource.of(m if isinstance(m, bytes) else m.SerializeToString()) for n, m in named.items()
                }
                for type_url, named in types.items()
            }
        )
        self.wake()

    def wake(self) -> None:
        for wake in self.wakes:
            wake()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is watched has no event of its own
        await asyncio.sleep(0.001)


async def exchange(call: grpc.aio.StreamStreamCall, request: DeltaDiscoveryRequest | bytes) -> list[Any]:
    await call.write(request)
    return [response async for response in call]


@asynccontextmanager
async def serving(socket: Path, source: Source) -> AsyncIterator[grpc.aio.Server]:
    server = await start_server(DeltaServer(TokenKey(KEY), source), f"unix:{socket}")
    try:
        yield server
    finally:
        await server.stop(0)


def token(caller: Caller = NODE, **kwargs: Any) -> str:
    return mint_token(kwargs.pop("key", KEY), caller, now=kwargs.pop("now", datetime.now(UTC)), **kwargs)


def client(socket: Path) -> ControllerClient:
    return ControllerClient(f"unix:{socket}", "node-a", token)


def test_updates_are_whole_revisions_with_only_what_changed(tmp_path: Path) -> None:
    async def body() -> None:
        source = Source()
        source.put(
            1,
            {xds.POLICY: {"a": Policy(name="a"), "b": Policy(name="b")}, xds.ADDRESS: {"10.0.0.1": Address(node="n")}},
        )
        async with serving(tmp_path / "s", source):
            updates = client(tmp_path / "s").updates()
            first = await anext(updates)
            assert first.revision == 1
            assert set(first.changed[xds.POLICY]) == {"a", "b"}
            assert first.changed[xds.ADDRESS] == {"10.0.0.1": Address(node="n")}
            source.put(2, {xds.POLICY: {"b": Policy(name="b", uid="2")}, xds.ADDRESS: {"10.0.0.1": Address(node="n")}})
            second = await anext(updates)
            assert (second.revision, second.changed[xds.POLICY]) == (2, {"b": Policy(name="b", uid="2")})
            assert second.removed[xds.POLICY] == {"a"}
            assert second.changed[xds.ADDRESS] == {}
            await updates.aclose()

    run(body)


def test_revisions_missed_while_busy_arrive_as_one_update(tmp_path: Path) -> None:
    async def body() -> None:
        source = Source()
        source.put(1, {xds.POLICY: {"a": Policy(name="a")}})
        async with serving(tmp_path / "s", source):
            follower = client(tmp_path / "s")
            updates = follower.updates()
            await anext(updates)
            for number in range(2, 6):
                source.put(number, {xds.POLICY: {f"p{number}": Policy(uid=str(number))}})
                await until(lambda number=number: follower.revision_received >= number)
            merged = await anext(updates)
            assert (merged.revision, set(merged.changed[xds.POLICY])) == (5, {"p5"})
            assert merged.removed[xds.POLICY] == {"a", "p2", "p3", "p4"}
            await updates.aclose()

    run(body)


def test_a_restarted_controller_resends_only_what_differs(tmp_path: Path) -> None:
    async def body() -> None:
        source = Source()
        policies: dict[str, Message | bytes] = {str(i): Policy(name=str(i)) for i in range(100)}
        source.put(1, {xds.POLICY: policies})
        follower = client(tmp_path / "s")
        updates = follower.updates()
        async with serving(tmp_path / "s", source):
            assert len((await anext(updates)).changed[xds.POLICY]) == 100
        await until(lambda: not follower.connected)
        source.put(2, {xds.POLICY: policies | {"7": Policy(name="changed")}})
        async with serving(tmp_path / "s", source):
            second = await anext(updates)
            assert second.changed[xds.POLICY] == {"7": Policy(name="changed")}
            assert not any(second.removed.values())
        await updates.aclose()

    run(body)


def test_a_revision_with_an_undecodable_policy_is_withheld_until_it_is_mended(tmp_path: Path) -> None:
    async def body() -> None:
        source = Source()
        source.put(1, {xds.POLICY: {"good": Policy(name="1"), "broken": b"\xff\xff\xff"}})
        async with serving(tmp_path / "s", source):
            updates: AsyncIterator[Update] = client(tmp_path / "s").updates()
            pending = asyncio.ensure_future(anext(updates))
            done, _ = await asyncio.wait({pending}, timeout=0.5)
            assert not done
            source.put(2, {xds.POLICY: {"good": Policy(name="1"), "broken": Policy(name="mended")}})
            update = await pending
            assert (update.revision, set(update.changed[xds.POLICY])) == (2, {"good", "broken"})
            await updates.aclose()  # type: ignore[attr-defined]

    run(body)


def test_an_undecodable_policy_that_went_while_the_controller_was_away_withholds_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        source = Source()
        source.put(1, {xds.POLICY: {"good": Policy(name="1"), "broken": b"\xff\xff\xff"}})
        follower = client(tmp_path / "s")
        updates = follower.updates()
        pending = asyncio.ensure_future(anext(updates))
        async with serving(tmp_path / "s", source):
            await until(lambda: follower.connected)
            await asyncio.sleep(0.2)
            assert not pending.done()
        await until(lambda: not follower.connected)
        source.put(2, {xds.POLICY: {"good": Policy(name="1")}})
        async with serving(tmp_path / "s", source):
            update = await pending
            assert (update.revision, set(update.changed[xds.POLICY])) == (2, {"good"})
        await updates.aclose()

    run(body)


def test_a_client_waits_until_its_snapshot_is_known(tmp_path: Path) -> None:
    async def body() -> None:
        source = Source()
        async with serving(tmp_path / "s", source):
            updates = client(tmp_path / "s").updates()
            pending = asyncio.ensure_future(anext(updates))
            await until(lambda: bool(source.wakes))
            source.put(1, {})
            assert (await pending).revision == 1
            await updates.aclose()

    run(body)


POD = pod_caller("node-a", "finance", "client", "default", "uid-1")
REFUSED = {
    "no token": ((), "node-a", grpc.StatusCode.UNAUTHENTICATED),
    "not a JWT": (bearer("nonsense"), "node-a", grpc.StatusCode.UNAUTHENTICATED),
    "two tokens": (bearer(token()) * 2, "node-a", grpc.StatusCode.UNAUTHENTICATED),
    "signed by another key": (bearer(token(key=b"x" * 32)), "node-a", grpc.StatusCode.UNAUTHENTICATED),
    "expired": (
        bearer(token(now=datetime.now(UTC) - timedelta(hours=2))),
        "node-a",
        grpc.StatusCode.UNAUTHENTICATED,
    ),
    "another node's name": (bearer(token()), "node-b", grpc.StatusCode.PERMISSION_DENIED),
    "no name": (bearer(token()), "", grpc.StatusCode.PERMISSION_DENIED),
    "a pod that calls itself a node": (bearer(token(POD)), "node-a", grpc.StatusCode.PERMISSION_DENIED),
    "a pod that calls itself another pod": (bearer(token(POD)), "finance/other", grpc.StatusCode.PERMISSION_DENIED),
}


@pytest.mark.parametrize(("metadata", "node_id", "code"), REFUSED.values(), ids=REFUSED.keys())
def test_who_is_not_who_it_says_gets_nothing(
    tmp_path: Path, metadata: tuple[tuple[str, str], ...], node_id: str, code: grpc.StatusCode
) -> None:
    async def body() -> None:
        source = Source()
        source.put(1, {xds.POLICY: {"a": Policy(name="a")}})
        async with serving(tmp_path / "s", source), grpc.aio.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
            call = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources(metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await exchange(call, DeltaDiscoveryRequest(node=Node(id=node_id), type_url=xds.POLICY))
            assert refused.value.code() is code

    run(body)


def test_a_client_that_is_gone_has_its_stream_ended(tmp_path: Path) -> None:
    async def body() -> None:
        source = Source()
        source.put(1, {})
        async with serving(tmp_path / "s", source), grpc.aio.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
            call = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources(
                metadata=bearer(token(POD))
            )
            await call.write(DeltaDiscoveryRequest(node=Node(id="finance/client"), type_url=xds.LISTENER))
            await call.read()
            source.refusal = "pod finance/client is gone"
            source.wake()
            with pytest.raises(grpc.aio.AioRpcError, match="is gone"):
                await call.read()

    run(body)


def test_a_truncated_message_ends_one_stream_and_harms_no_other(tmp_path: Path) -> None:
    async def body() -> None:
        source = Source()
        source.put(1, {})
        async with serving(tmp_path / "s", source), grpc.aio.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
            raw = channel.stream_stream(
                "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
            )
            call = raw(metadata=bearer(token()))
            with pytest.raises(grpc.aio.AioRpcError):
                await exchange(call, b"\x0a\xff")
            updates = client(tmp_path / "s").updates()
            assert (await anext(updates)).revision == 1
            await updates.aclose()

    run(body)


def test_the_server_takes_over_a_dead_socket_but_not_a_live_one(tmp_path: Path) -> None:
    async def body() -> None:
        async with serving(tmp_path / "s", Source()):
            with pytest.raises(SettingsError, match="another process listens there"):
                await start_server(DeltaServer(TokenKey(KEY), Source()), f"unix:{tmp_path / 's'}")
        (tmp_path / "file").write_text("precious")
        with pytest.raises(SettingsError, match="no socket"):
            await start_server(DeltaServer(TokenKey(KEY), Source()), f"unix:{tmp_path / 'file'}")
        assert (tmp_path / "file").read_text() == "precious"

    run(body)


def test_tcp_without_tls_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(SettingsError, match="TCP without TLS"):
            await start_server(DeltaServer(TokenKey(KEY), Source()), "127.0.0.1:0")

    run(body)
