"""Many agents in one process, as far as the controller can tell: each with a connection, a token and a delta stream.

They subscribe, take in and acknowledge as an agent's client does and keep names and versions, but compile nothing.
Whoever started the process asks on its standard input and reads answers from its standard output, a line of JSON each.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import grpc
from envoy.config.core.v3.base_pb2 import Node
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse

from meshbridge.xds.auth import load_key, mint_token, node_caller
from meshbridge.xds.bearer import bearer
from meshbridge.xds.client import CHANNEL_OPTIONS, MESSAGES
from meshbridge.xds.types import REVISION

METHOD: Final = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
RETRY_S: Final = 0.5
TOKEN_LIFETIME: Final = timedelta(hours=12)
_LINE_BYTES: Final = 1 << 16


@dataclass(slots=True)
class Tally:
    """What came in since somebody last asked: when (monotonic ns), at how many agents, and how much."""

    agents: int = 0
    messages: int = 0
    size_bytes: int = 0
    reached_ns: list[int] = field(default_factory=list)
    """For each agent that got a revision when it had acknowledged its last one, in order of time."""


@dataclass(slots=True, eq=False)
class _Agent:
    name: str
    silent: bool = False
    versions: dict[str, dict[str, str]] = field(default_factory=lambda: {type_url: {} for type_url in MESSAGES})
    revisions: int = 0
    connected: bool = False
    reached_ns: int = 0
    messages: int = 0
    size_bytes: int = 0


class Fleet:
    """The agents, and what was counted of them."""

    def __init__(self, target: str, ca: bytes, key: bytes, names: list[str], silent: int = 0) -> None:
        """
        Args:
            silent: how many of the agents never acknowledge anything.
        """
        self._target, self._ca, self._key = target, ca, key
        self._agents = [_Agent(name, silent=index < silent) for index, name in enumerate(names)]
        self._strings: dict[str, str] = {}
        self._last_ns = 0
        self.failures: dict[str, int] = {}

    async def run(self) -> None:
        """Follow the controller, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for agent in self._agents:
                tasks.create_task(self._follow(agent))

    async def synced(self, timeout_s: float) -> dict[str, Any]:
        """Every agent that acknowledges is connected and has a revision, or the time is up."""
        wanted = [agent for agent in self._agents if not agent.silent]
        until = time.monotonic() + timeout_s
        await _until(lambda: all(agent.connected and agent.revisions for agent in wanted), until)
        await self._quiet(0.3, until)
        have = sum(agent.connected and agent.revisions > 0 for agent in wanted)
        return {"synced": have, "failures": self.failures, **self._take()}

    async def gathered(self, quiet_s: float, timeout_s: float, at_least: int) -> dict[str, Any]:
        """What came in until nothing did for ``quiet_s``, after ``at_least`` agents got something."""
        until = time.monotonic() + timeout_s
        await _until(lambda: sum(agent.reached_ns > 0 for agent in self._agents) >= at_least, until)
        await self._quiet(quiet_s, until)
        return self._take()

    async def _quiet(self, quiet_s: float, until: float) -> None:
        begun_ns = time.monotonic_ns()
        while time.monotonic() < until:
            await asyncio.sleep(quiet_s / 10)
            if time.monotonic_ns() - max(self._last_ns, begun_ns) > quiet_s * 1e9:
                return

    def _take(self) -> dict[str, Any]:
        tally = Tally()
        for agent in self._agents:
            if agent.reached_ns:
                tally.agents += 1
                tally.reached_ns.append(agent.reached_ns)
            tally.messages += agent.messages
            tally.size_bytes += agent.size_bytes
            agent.reached_ns = agent.messages = agent.size_bytes = 0
        tally.reached_ns.sort()
        return asdict(tally)

    def cut(self) -> None:
        """Forget that anybody had a revision: the controller is about to be another."""
        for agent in self._agents:
            agent.revisions = 0

    async def _follow(self, agent: _Agent) -> None:
        credentials = grpc.ssl_channel_credentials(self._ca)
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        while True:
            async with grpc.aio.secure_channel(self._target, credentials, options=options) as channel:
                try:
                    await self._stream(agent, channel)
                except grpc.aio.AioRpcError as error:
                    reason = error.code().name
                    self.failures[reason] = self.failures.get(reason, 0) + 1
                except asyncio.InvalidStateError:
                    pass  # the stream ended while it was written to
                agent.connected = False
            await asyncio.sleep(RETRY_S)

    async def _stream(self, agent: _Agent, channel: grpc.aio.Channel) -> None:
        token = mint_token(self._key, node_caller(agent.name), now=datetime.now(UTC), lifetime=TOKEN_LIFETIME)
        method = channel.stream_stream(METHOD)  # bytes: what travels is counted
        call = method(metadata=bearer(token), wait_for_ready=True)
        try:
            for type_url, versions in agent.versions.items():
                request = DeltaDiscoveryRequest(
                    node=Node(id=agent.name), type_url=type_url, initial_resource_versions=versions
                )
                await call.write(request.SerializeToString())
            agent.connected = True
            async for content in call:
                await self._take_in(agent, call, content)
        finally:
            call.cancel()

    async def _take_in(self, agent: _Agent, call: Any, content: bytes) -> None:
        response = DeltaDiscoveryResponse.FromString(content)
        versions = agent.versions[response.type_url]
        shared = self._strings
        for each in response.resources:
            name, version = each.name, each.version
            versions[shared.setdefault(name, name)] = shared.setdefault(version, version)
        for name in response.removed_resources:
            versions.pop(name, None)
        agent.messages += 1
        agent.size_bytes += len(content)
        if agent.silent:
            return
        answer = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        await call.write(answer.SerializeToString())
        self._last_ns = time.monotonic_ns()
        if response.type_url == REVISION:
            agent.revisions += 1
            agent.reached_ns = self._last_ns


async def _until(condition: Callable[[], bool], until: float) -> None:
    while not condition() and time.monotonic() < until:  # noqa: ASYNC110 - an event of each agent would cost more
        await asyncio.sleep(0.02)


async def serve(fleet: Fleet) -> None:
    """Answer what is asked on standard input until it ends."""
    running = asyncio.create_task(fleet.run())
    answers: Mapping[str, Callable[..., Any]] = {"synced": fleet.synced, "gathered": fleet.gathered}
    async for question in _questions():
        do = question.pop("do")
        if do == "cut":
            fleet.cut()
            answer = {}
        else:
            answer = await answers[do](**question)
        print(json.dumps(answer), flush=True)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def _questions() -> AsyncIterator[dict[str, Any]]:
    reader = asyncio.StreamReader(_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        yield json.loads(line)


def main() -> None:
    """``python -m meshbridge.bench.fleet``, with one argument: what ``Fleet`` takes, as JSON with paths."""
    told = json.loads(sys.argv[1])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    fleet = Fleet(
        told["target"], Path(told["ca"]).read_bytes(), load_key(Path(told["key"])), told["names"], told["silent"]
    )
    asyncio.run(serve(fleet))


if __name__ == "__main__":
    main()
