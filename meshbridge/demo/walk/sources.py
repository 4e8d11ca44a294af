"""Callers of one port, all at once: what each was answered, and what of it reached the server."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

from meshbridge.demo.layout import NODES
from meshbridge.demo.netns import http_get
from meshbridge.demo.records import PodRecord
from meshbridge.demo.waiting import poll
from meshbridge.demo.walk.context import EVENT_TIMEOUT_S, Arrived, Outcome, Walk, now_ns
from meshbridge.demo.walk.sniffer import Sniffer
from meshbridge.observe.client import find_agents, merged_history
from meshbridge.observe.flow import Flow, FlowKind

_AT_ONCE = 10
ENVOY_COUNTERS = "Envoy's downstream_cx_total and no_filter_chain_match at 15006"


@dataclass(frozen=True, slots=True)
class Source:
    """A caller: a pod, by NAMESPACE/NAME, or a node's own address."""

    name: str
    note: str

    @property
    def is_node(self) -> bool:
        return self.name in NODES

    def __str__(self) -> str:
        return f"{self.name} ({self.note})"

    def addresses(self, walk: Walk) -> tuple[str, str]:
        """Its IPv4 and its IPv6 address."""
        if self.is_node:
            return str(NODES[self.name].ipv4.ip), str(NODES[self.name].ipv6.ip)
        record = walk.pod(self.name)
        return record.ipv4, record.ipv6


@dataclass(frozen=True, slots=True)
class Call:
    """One caller's request of one server, and how it ended for the caller."""

    source: Source
    target: str
    family: str
    outcome: Outcome

    @property
    def mark(self) -> str:
        return _mark(self.source, self.family)


@dataclass(frozen=True, slots=True)
class Round:
    """Calls made at once. ``packets`` counts those of the callers that got into a server's pod, by server."""

    since_ns: int
    calls: tuple[Call, ...]
    before: dict[str, Arrived]
    after: dict[str, Arrived]
    packets: dict[str, int]
    unseen: int

    def of(self, source: Source) -> list[Call]:
        return [call for call in self.calls if call.source == source]

    def bytes_at(self, target: str) -> int:
        """Payload that reached the application of one server."""
        return self.after[target].since(self.before[target], "bytes")

    def requests(self, call: Call) -> int:
        """Whether this very call's request reached the application."""
        return self.after[call.target].since(self.before[call.target], f"requests:{call.mark}")

    def envoy_connections(self, target: str) -> int:
        return self.after[target].envoy_connections - self.before[target].envoy_connections


def call_all(
    walk: Walk,
    sources: Sequence[Source],
    targets: Sequence[str],
    port: int,
    path: str,
    families: Sequence[str] = ("4", "6"),
    timeout_s: float = 3.0,
) -> Round:
    """Every source GETs the path of every target, over each family; what arrives meanwhile is counted."""
    records = {name: walk.pod(name) for name in targets}
    addresses = [address for source in sources for address in source.addresses(walk)]
    sniffers = {name: Sniffer(record.netns, "eth0", addresses, port=port) for name, record in records.items()}
    before = {name: walk.arrived(record) for name, record in records.items()}
    since = now_ns()
    for sniffer in sniffers.values():
        sniffer.__enter__()
    try:
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="call") as pool:
            jobs = [
                pool.submit(_call, walk, source, record, family, port, path, timeout_s)
                for record in records.values()
                for source in sources
                for family in families
            ]
            calls = tuple(job.result() for job in jobs)
    finally:
        for sniffer in sniffers.values():
            sniffer.__exit__(None, None, None)
    return Round(
        since,
        calls,
        before,
        {name: walk.arrived(record) for name, record in records.items()},
        {name: sniffer.packets for name, sniffer in sniffers.items()},
        sum(sniffer.lost for sniffer in sniffers.values()),
    )


def wait_event(
    walk: Walk,
    since_ns: int,
    kind: FlowKind,
    source: Source,
    target: str,
    port: int,
    timeout_s: float = EVENT_TIMEOUT_S,
) -> Flow | None:
    """The newest event of a flow between these addresses, at either end; waited for a moment."""
    return wait_events(walk, since_ns, kind, (source,), (target,), port, timeout_s)[source, target]


def wait_events(
    walk: Walk,
    since_ns: int,
    kind: FlowKind,
    sources: Sequence[Source],
    targets: Sequence[str],
    port: int,
    timeout_s: float = EVENT_TIMEOUT_S,
) -> dict[tuple[Source, str], Flow | None]:
    """The newest event of each source towards each target, waited for until all are there, or for a moment."""
    senders = {address: source for source in sources for address in source.addresses(walk)}
    records = {name: walk.pod(name) for name in targets}
    servers = {address: name for name, record in records.items() for address in (record.ipv4, record.ipv6)}
    found: dict[tuple[Source, str], Flow | None] = dict.fromkeys(product(sources, targets))

    def all_there() -> bool:
        for flow in merged_history(agent for node in NODES for agent in find_agents(None, node)):
            if flow.kind is kind and flow.time_ns >= since_ns and flow.destination.port == port:
                source, target = senders.get(str(flow.source.address)), servers.get(str(flow.destination.address))
                if source is not None and target is not None:
                    found[source, target] = flow
        return all(found.values())

    poll(all_there, timeout_s)
    return found


def _call(walk: Walk, source: Source, target: PodRecord, family: str, port: int, path: str, timeout_s: float) -> Call:
    address = walk.address(target, family)
    if source.is_node:
        answer = http_get(NODES[source.name].netns, address, port, path, timeout_s)
        outcome = Outcome(answer.status, {}, answer.body.decode("utf-8", "replace"), answer.error, 0.0)
    else:
        host = f"[{address}]" if family == "6" else address
        options = ("--method", "GET", "--mark", _mark(source, family))
        outcome = walk.request(walk.pod(source.name), f"http://{host}:{port}{path}", *options, timeout_s=timeout_s)
    return Call(source, target.key, family, outcome)


def _mark(source: Source, family: str) -> str:
    return "unmarked" if source.is_node else f"{source.name}-{family}"
