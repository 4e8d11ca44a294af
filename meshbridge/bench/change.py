"""From a policy file to the kernel: how long after the file changed the first packet is judged by it."""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from meshbridge.bench import cluster
from meshbridge.bench.cluster import Place, Scale
from meshbridge.bench.errors import BenchError
from meshbridge.bench.figures import Column, Section, Target, Value
from meshbridge.bench.machine import cpu_time_ns
from meshbridge.bench.network import Node, create_node
from meshbridge.bench.samples import percentile
from meshbridge.bench.system import System, start_system
from meshbridge.bench.workbench import Workbench

LIMIT_MS = 100
PORT = 7000
CLIENT_LABELS = {"app": "probe-client"}
SERVER_LABELS = {"app": "probe-server"}
COLUMNS = (
    Column("variant", "endpoints / addresses / policies"),
    Column("change", "change"),
    Column("samples", "times", "d"),
    Column("p50_ms", "p50 ms", ".1f"),
    Column("p99_ms", "p99 ms", ".1f"),
    Column("worst_ms", "worst ms", ".1f"),
    Column("controller_ms", "controller CPU ms", ".1f"),
    Column("agent_ms", "agent CPU ms", ".1f"),
)
NOTES = (
    "Real controller and agent processes. From just before the file is replaced to the sending of the first of three "
    "probes in a row that the kernel judges the new way; one open UDP flow, a probe each half millisecond.",
    "CPU: medians, until the packet is judged; on an idle machine latency is little more than their sum.",
)
_PROBE_S = 0.0005
_AGREE = 3  # probes in a row that say the same, so that one late packet is no verdict
_TIMEOUT_S = 10.0
_SMALL = Scale(endpoints=2, addresses=10, policies=10)


def measure(bench: Workbench) -> list[Section]:
    node = create_node(bench.stack, "change", 0)
    places = probe_places(node)
    system = start_system(bench, node, cluster.population(_SMALL, places, node.address), agent_core=bench.core)
    add_probes(system, node, places)
    changes = time_changes(bench, system, Prober(bench, node), bench.pick(200, 40))
    title = "From a changed policy file to the first packet judged by it"
    return [Section("change", title, COLUMNS, rows(_SMALL.short, changes), [target("small cluster", changes)], NOTES)]


def target(where: str, changes: Sequence[Change]) -> Target:
    text = f"policy change to kernel, {where}, p99 of {len(changes)}"
    return Target(text, percentile([change.latency_ms for change in changes], 99), LIMIT_MS, "ms")


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one policy: what it did to the open flow, how long it took, and whose CPU time."""

    allowed: bool
    latency_ms: float
    controller_ms: float
    agent_ms: float


class Prober:
    """One UDP flow between the node's two pods, on which single packets tell what the kernel lets through."""

    def __init__(self, bench: Workbench, node: Node) -> None:
        self._receiver = node.server.netns.socket(socket.AF_INET, socket.SOCK_DGRAM)
        bench.stack.callback(self._receiver.close)
        self._sender = node.client.netns.socket(socket.AF_INET, socket.SOCK_DGRAM)
        bench.stack.callback(self._sender.close)
        self._receiver.bind((node.server.address, PORT))
        self._receiver.setblocking(False)
        self._sender.connect((node.server.address, PORT))
        self._number = 0

    def arrives(self) -> bool:
        """Whether a packet sent now arrives; one that does takes some 20 µs, within the sender's call."""
        self._number += 1
        sent = self._number.to_bytes(4, "big")
        self._sender.send(sent)
        until = time.perf_counter() + _PROBE_S
        while (left := until - time.perf_counter()) > 0:
            if select.select([self._receiver], [], [], left)[0] and self._receiver.recv(16) == sent:
                return True
        return False

    def wait(self, wanted: bool) -> float:
        """When (perf_counter) the first of several agreeing probes was sent."""
        give_up = time.perf_counter() + _TIMEOUT_S
        first, agreeing = 0.0, 0
        while agreeing < _AGREE:
            now = time.perf_counter()
            if now > give_up:
                raise BenchError(f"the kernel did not {'let through' if wanted else 'stop'} the probe in "
                                 f"{_TIMEOUT_S:g} s", where="policy change")  # fmt: skip
            if self.arrives() is not wanted:
                agreeing = 0
            else:
                first = first if agreeing else now
                agreeing += 1
            time.sleep(_PROBE_S / 2)
        return first


def time_changes(bench: Workbench, system: System, prober: Prober, count: int) -> list[Change]:
    """``count`` changes of one policy, denying and allowing the probe's flow by turns."""
    changes: list[Change] = []
    _write(system, allowed=True)
    prober.wait(True)
    pause = random.Random(1)
    for number in range(count):
        allowed = number % 2 == 1
        bench.tell(f"change: {number + 1} of {count}")
        # Not in step with any timer of the product's; and what the last change left to do is done.
        time.sleep(pause.uniform(0.05, 0.2))
        before = _cpu_ms(system)
        started = time.perf_counter()
        _write(system, allowed=allowed)
        decided = prober.wait(allowed)
        used = [now - then for now, then in zip(_cpu_ms(system), before, strict=True)]
        changes.append(Change(allowed, (decided - started) * 1e3, *used))
    return changes


def _cpu_ms(system: System) -> tuple[float, float]:
    return cpu_time_ns(system.controller.pid) / 1e6, cpu_time_ns(system.agent.pid) / 1e6


def rows(scale: str, changes: Sequence[Change]) -> list[dict[str, Value]]:
    found: list[dict[str, Value]] = []
    for allowed, name in ((False, "now denied"), (True, "now allowed")):
        of_kind = [change for change in changes if change.allowed is allowed]
        latencies = [change.latency_ms for change in of_kind]
        found.append(
            {
                "variant": scale,
                "change": name,
                "samples": len(of_kind),
                "p50_ms": median(latencies),
                "p99_ms": percentile(latencies, 99),
                "worst_ms": max(latencies),
                "controller_ms": median(change.controller_ms for change in of_kind),
                "agent_ms": median(change.agent_ms for change in of_kind),
            }
        )
    return found


def probe_places(node: Node) -> list[Place]:
    """The client's and the server's pod."""
    kinds = zip(("client", "server"), node.pods, (CLIENT_LABELS, SERVER_LABELS), strict=True)
    return [Place(f"probe-{kind}", node.name, pod.address, labels) for kind, pod, labels in kinds]


def add_probes(system: System, node: Node, places: Sequence[Place]) -> None:
    """The agent enforces the policies of both pods."""
    for place, pod in zip(places, node.pods, strict=True):
        system.add_endpoint(place, pod.interface, pod.netns)


def _write(system: System, *, allowed: bool) -> None:
    policy = cluster.allow("toggled", SERVER_LABELS, [CLIENT_LABELS], [PORT if allowed else PORT + 1], protocol="UDP")
    system.write([policy], "toggled")
