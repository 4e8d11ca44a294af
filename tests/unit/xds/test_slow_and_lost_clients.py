"""Clients that do not answer, and connections of which one end is gone without a word."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from envoy.config.core.v3.base_pb2 import Node
from envoy.service.discovery.v3 import ads_pb2_grpc
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from prometheus_client import REGISTRY
from test_controller_over_tls import Authority, free_address
from test_delta_grpc import KEY, Source, run, serving, token, until

from meshbridge.protos.agent_pb2 import Policy
from meshbridge.xds import client as xds_client
from meshbridge.xds import server as xds_server
from meshbridge.xds import types as xds
from meshbridge.xds.auth import TokenKey, bearer
from meshbridge.xds.client import ControllerClient
from meshbridge.xds.server import DeltaServer, start_server

CHANGES = 200


def unanswered() -> float | None:
    return REGISTRY.get_sample_value("meshbridge_xds_streams_unanswered", {"kind": "node"})


def test_a_client_that_never_answers_is_sent_one_response_of_each_type_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xds_server, "UNANSWERED_S", 0.3)

    async def body() -> None:
        source = Source()
        source.put(1, {xds.POLICY: {"a": Policy(name="a")}})
        async with serving(tmp_path / "s", source), grpc.aio.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
            stub = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel)
            call = stub.DeltaAggregatedResources(metadata=bearer(token()))
            for type_url in (xds.POLICY, xds.REVISION):
                await call.write(DeltaDiscoveryRequest(node=Node(id="node-a"), type_url=type_url))
            received: list[DeltaDiscoveryResponse] = []

            async def read() -> None:
                async for response in call:
                    received.append(response)

            reading = asyncio.create_task(read())
            await until(lambda: bool(received))
            for number in range(2, CHANGES):
                source.put(number, {xds.POLICY: {"a": Policy(name="a", json=str(number).encode() * 1_000)}})
                await asyncio.sleep(0)
            await until(lambda: unanswered() == 1)
            assert len(received) <= 2
            for response in list(received):
                answer = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
                await call.write(answer)
            newest = str(CHANGES - 1).encode() * 1_000
            await until(lambda: any(newest in each.SerializeToString() for each in received))
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: unanswered() == 0)

    run(body)


class Cable:
    """Carries bytes between clients and a server until it is ``cut``: then nobody hears anything, and nothing ends."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.cut = False
        self.tasks: set[asyncio.Task[None]] = set()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        for pair in ((reader, far_writer), (far_reader, writer)):
            self.tasks.add(asyncio.create_task(self._carry(*pair)))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while content := await reader.read(1 << 16):
                if self.cut:
                    await asyncio.Event().wait()
                writer.write(content)
                await writer.drain()


def test_a_controller_that_is_gone_without_a_word_is_left_for_one_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"grpc.keepalive_time_ms": 300, "grpc.http2.ping_timeout_ms": 300}
    quicker = {**quick, "grpc.http2.min_recv_ping_interval_without_data_ms": 100}
    monkeypatch.setattr(xds_client, "CHANNEL_OPTIONS", tuple({**dict(xds_client.CHANNEL_OPTIONS), **quick}.items()))
    monkeypatch.setattr(xds_server, "SERVER_OPTIONS", tuple({**dict(xds_server.SERVER_OPTIONS), **quicker}.items()))

    async def body() -> None:
        source, ours, address = Source(), Authority("ours"), free_address()
        source.put(1, {xds.POLICY: {"a": Policy(name="a")}})
        server = await start_server(DeltaServer(TokenKey(KEY), source), address, ours.server())
        (tmp_path / "ca").write_bytes(ours.certificate)
        cable = Cable(int(address.rpartition(":")[2]))
        listening = await asyncio.start_server(cable.connect, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        client = ControllerClient(f"127.0.0.1:{port}", "node-a", token, tmp_path / "ca")
        updates = client.updates()
        try:
            assert set((await anext(updates)).changed[xds.POLICY]) == {"a"}
            cable.cut = True
            source.put(2, {xds.POLICY: {"b": Policy(name="b")}})
            await until(lambda: not client.connected)
            cable.cut = False
            assert set((await anext(updates)).changed[xds.POLICY]) == {"b"}
            await until(lambda: len(source.callers) == 2)
            await updates.aclose()
        finally:
            for task in cable.tasks:
                task.cancel()
            listening.close()
            await server.stop(0)

    run(body)
