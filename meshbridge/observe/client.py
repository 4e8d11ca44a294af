"""The command line's way to the agents: their Unix sockets, one stream per agent, merged by time."""

from __future__ import annotations

import heapq
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from meshbridge.errors import MeshBridgeError
from meshbridge.observe.flow import Flow
from meshbridge.observe.messages import HISTORY_KEY, decode_flow
from meshbridge.protos import observer_pb2 as pb
from meshbridge.protos.observer_pb2_grpc import ObserverStub

RUN_DIRECTORY = Path("/run/meshbridge")
RUN_DIRECTORY_VARIABLE = "MESHBRIDGE_RUN_DIRECTORY"
SOCKET_NAME = "agent.sock"
CALL_TIMEOUT_S = 5.0
RECONNECT_S = 0.5
REORDER_S = 0.15  # events of several agents reach us within this; older ones are printed
_QUEUE_LENGTH = 16384


class AgentUnreachable(MeshBridgeError):
    """No agent runs where one was looked for, or it does not answer."""


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent's local API."""

    socket: Path

    @property
    def name(self) -> str:
        return self.socket.parent.name

    def stub(self, channel: grpc.Channel) -> Any:
        return ObserverStub(channel)  # type: ignore[no-untyped-call]  # generated

    def channel(self) -> grpc.Channel:
        # Unix sockets have no authority; without one grpc sends the escaped path, which servers may refuse.
        return grpc.insecure_channel(f"unix:{self.socket}", options=[("grpc.default_authority", "localhost")])

    def status(self) -> pb.Status:
        """Raises: AgentUnreachable."""
        status: pb.Status = self._call("GetStatus", pb.GetStatusRequest())
        return status

    def endpoints(self) -> list[pb.EndpointState]:
        """Raises: AgentUnreachable."""
        return list(self._call("ListEndpoints", pb.ListEndpointsRequest()).endpoints)

    def bypasses(self) -> bytes:
        """What bypasses the sidecars of its node's pods, as JSON.

        Raises: AgentUnreachable.
        """
        return bytes(self._call("GetBypasses", pb.GetBypassesRequest()).json)

    def history(self) -> list[Flow]:
        """The flows it keeps, oldest first.

        Raises: AgentUnreachable.
        """
        with self.channel() as channel:
            try:
                return [
                    decode_flow(m) for m in self.stub(channel).GetFlows(pb.GetFlowsRequest(), timeout=CALL_TIMEOUT_S)
                ]
            except grpc.RpcError as error:
                raise self._unreachable(error) from error

    def _call(self, method: str, request: Any) -> Any:
        with self.channel() as channel:
            try:
                return getattr(self.stub(channel), method)(request, timeout=CALL_TIMEOUT_S)
            except grpc.RpcError as error:
                raise self._unreachable(error) from error

    def _unreachable(self, error: grpc.RpcError) -> AgentUnreachable:
        detail = error.details() or error.code().name
        return AgentUnreachable(
            f"no agent answers ({detail})",
            where=str(self.socket),
            fix="is 'meshbridge agent' running on this node, and may this user open the socket (root)?",
        )


def find_agents(socket: Path | None, node: str | None, run_directory: Path | None = None) -> list[Agent]:
    """The agents meant: the one at ``socket``, the one of ``node``, else every agent of this machine.

    Raises: AgentUnreachable: there is none.
    """
    run_directory = run_directory or Path(os.environ.get(RUN_DIRECTORY_VARIABLE) or RUN_DIRECTORY)
    if socket is not None:
        found = [socket] if socket.exists() else []
        looked = str(socket)
    else:
        found = sorted(run_directory.glob(f"{_quote(node) if node else '*'}/{SOCKET_NAME}"))
        looked = f"{run_directory}/{node or '*'}/{SOCKET_NAME}"
    if not found:
        raise AgentUnreachable(
            "no agent's socket is there",
            where=looked,
            fix="start 'meshbridge agent' (or 'meshbridge demo up'), or point --socket at a running one",
        )
    return [Agent(path) for path in found]


def merged_history(agents: Iterable[Agent]) -> list[Flow]:
    """What all of them keep, by time.

    Raises: AgentUnreachable: one of them does not answer; half an answer would look like a whole one.
    """
    return sorted((flow for agent in agents for flow in agent.history()), key=lambda flow: flow.time_ns)


@dataclass(slots=True)
class Follower:
    """Flows of several agents as they come, by time; an agent that restarts is found again.

    ``notices`` collects sentences about streams that broke or came back; whoever prints shows them apart.
    """

    agents: list[Agent]
    notices: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    _past: list[Flow] = field(default_factory=list)
    _flows: queue.Queue[Flow] = field(default_factory=lambda: queue.Queue(_QUEUE_LENGTH))
    _caught_up: list[threading.Event] = field(default_factory=list)

    def start(self) -> None:
        for agent in self.agents:
            caught_up = threading.Event()
            self._caught_up.append(caught_up)
            threading.Thread(
                target=self._read, args=(agent, caught_up), name=f"follow-{agent.name}", daemon=True
            ).start()

    def history(self, timeout_s: float = CALL_TIMEOUT_S) -> list[Flow]:
        """The past of every agent by time; call once, before ``live``. An agent that stays silent is skipped."""
        deadline = time.monotonic() + timeout_s
        for event in self._caught_up:
            event.wait(max(0.0, deadline - time.monotonic()))
        return sorted(self._past, key=lambda flow: flow.time_ns)

    def live(self) -> Iterator[Flow | None]:
        """Flows in order; None each time there was nothing for a moment, so that the caller can print notices."""
        waiting: list[tuple[int, int, float, Flow]] = []
        serial = 0
        while True:
            try:
                flow = self._flows.get(timeout=0.05 if waiting else 0.5)
                serial += 1
                heapq.heappush(waiting, (flow.time_ns, serial, time.monotonic(), flow))
            except queue.Empty:
                yield None
            now = time.monotonic()
            while waiting and (now - waiting[0][2] >= REORDER_S or len(waiting) > _QUEUE_LENGTH):
                yield heapq.heappop(waiting)[3]

    def _read(self, agent: Agent, caught_up: threading.Event) -> None:
        newest_ns = 0
        broken = False
        while True:
            with agent.channel() as channel:
                stream = agent.stub(channel).GetFlows(pb.GetFlowsRequest(follow=True))
                seen_ns = newest_ns  # after a reconnect to the same agent its past has been seen
                try:
                    past = _history_length(stream)
                    if broken:
                        self.notices.put(f"agent {agent.name}: connected again")
                        broken = False
                    if past == 0:
                        caught_up.set()
                    for count, message in enumerate(stream, start=1):
                        flow = decode_flow(message)
                        newest_ns = max(newest_ns, flow.time_ns)
                        if count > past:
                            self._flows.put(flow)
                        elif not caught_up.is_set():
                            self._past.append(flow)
                        elif flow.time_ns > seen_ns:
                            self._flows.put(flow)
                        if count == past:
                            caught_up.set()
                except grpc.RpcError as error:
                    if not broken:
                        detail = error.details() or error.code().name
                        self.notices.put(f"agent {agent.name}: {detail}; trying again (enforcement goes on without it)")
                        broken = True
            caught_up.set()
            time.sleep(RECONNECT_S)


def _history_length(stream: Any) -> int:
    for key, value in stream.initial_metadata():
        if key == HISTORY_KEY and value.isdecimal():
            return int(value)
    return 0


def _quote(text: str) -> str:
    """``text`` as a glob that matches only itself, inside one directory."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in text.replace("/", "_"))
