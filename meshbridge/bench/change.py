"""From a policy file to the kernel: how long after the file changed the first packet is judged by it."""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import Sequence
from itertools import chain
from statistics import median

from meshbridge.bench import cluster
from meshbridge.bench.cluster import Place, Scale
from meshbridge.bench.errors import BenchError
from meshbridge.bench.figures import Column, Section, Target, Value
from meshbridge.bench.network import Node, create_node
from meshbridge.bench.samples import percentile
from meshbridge.bench.system import System, start_system
from meshbridge.bench.workbench import Workbench

LIMIT_MS = 100
PORT = 7000
CLIENT_LABELS = {"app": "probe-client"}
SERVER_LABELS = {"app": "probe-server"}
COLUMNS = (
    Column("variant", "cluster"),
    Column("change", "change"),
    Column("samples", "times", "d"),
    Column("p50_ms", "p50 ms", ".1f"),
    Column("p99_ms", "p99 ms", ".1f"),
    Column("worst_ms", "worst ms", ".1f"),
)
NOTES = (
    "Real controller and agent processes. From just before the file is replaced to the sending of the first of three "
    "probes in a row that the kernel judges the new way; one open UDP flow, a probe each half millisecond.",
)
_PROBE_S = 0.0005
_AGREE = 3  # probes in a row that say the same, so that one late packet is no verdict
_TIMEOUT_S = 10.0
_SMALL = Scale(endpoints=2, addresses=10, policies=10)


def measure(bench: Workbench) -> list[Section]:
    node = create_node(bench.stack, "change", 0)
    places = probe_places(node)
    system = start_system(bench, node, cluster.population(_SMALL, places, node.address))
    add_probes(system, node, places)
    times_ms = time_changes(bench, system, Prober(bench, node), bench.pick(200, 40))
    every = list(chain.from_iterable(times_ms.values()))
    target = Target(f"policy change to kernel, p99 of {len(every)}", percentile(every, 99), LIMIT_MS, "ms")
    return [Section("change", "From a changed policy file to the first packet judged by it", COLUMNS,
                    rows(str(_SMALL), times_ms), [target], NOTES)]  # fmt: skip


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


def time_changes(bench: Workbench, system: System, prober: Prober, count: int) -> dict[str, list[float]]:
    """Milliseconds of ``count`` changes of one policy, by what they do to the open flow, by turns."""
    times_ms: dict[str, list[float]] = {"now denied": [], "now allowed": []}
    _write(system, allowed=True)
    prober.wait(True)
    pause = random.Random(1)
    for number in range(count):
        allowed = number % 2 == 1
        bench.tell(f"change: {number + 1} of {count}")
        # Not in step with any timer of the product's.
        time.sleep(pause.uniform(0.05, 0.2))
        started = time.perf_counter()
        _write(system, allowed=allowed)
        decided = prober.wait(allowed)
        times_ms["now allowed" if allowed else "now denied"].append((decided - started) * 1e3)
    return times_ms


def rows(scale: str, times_ms: dict[str, list[float]]) -> list[dict[str, Value]]:
    return [
        {
            "variant": scale,
            "change": change,
            "samples": len(found),
            "p50_ms": median(found),
            "p99_ms": percentile(found, 99),
            "worst_ms": max(found),
        }
        for change, found in times_ms.items()
    ]


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
