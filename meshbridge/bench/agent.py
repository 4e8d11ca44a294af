"""What the node agent needs by the size of its cluster: memory, time to start, CPU at rest, kernel memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from statistics import median

from meshbridge.bench import change, cluster
from meshbridge.bench.change import Change, Prober, time_changes
from meshbridge.bench.cluster import Place, Scale
from meshbridge.bench.figures import Column, Section, Target, Value
from meshbridge.bench.machine import cpu_time_ns, resident_bytes
from meshbridge.bench.network import Node, Pod, batch, create_netns, create_node
from meshbridge.bench.system import System, start_system
from meshbridge.bench.workbench import Workbench
from meshbridge.datapath import syscall
from meshbridge.datapath.maps import maps_directory, open_pinned_maps

MEMORY_LIMIT_MB = 60
WARM_START_LIMIT_S = 1.0
_BASE = Scale(endpoints=10, addresses=1_000, policies=100)
_FULL = Scale(endpoints=100, addresses=10_000, policies=1_000)
_GROWN = {
    "10 × endpoints": Scale(100, 1_000, 100),
    "10 × addresses": Scale(10, 10_000, 100),
    "10 × policies, and the identities they tell apart": Scale(10, 1_000, 1_000),
    "10 × all three": _FULL,
}
_REST_S = 3.0
_MB = 1e6
_COLUMNS = (
    Column("variant", "endpoints / addresses / policies"),
    Column("resident_mb", "agent MB", ".1f"),
    Column("cold_s", "cold s", ".2f"),
    Column("warm_s", "warm s", ".2f"),
    Column("warm_cpu_s", "warm CPU s", ".2f"),
    Column("rest_cpu", "at rest %", ".2f"),
    Column("identities", "identities", ",d"),
    Column("entries", "entries", ",d"),
    Column("kernel_mb", "maps MB", ".1f"),
    Column("controller_mb", "controller MB", ".1f"),
)
_GROWTH_COLUMNS = (
    Column("variant", "grown"),
    Column("resident", "agent memory ×", ".2f"),
    Column("warm", "warm start ×", ".2f"),
    Column("change", "change p50 ×", ".2f"),
    Column("entries", "entries ×", ".1f"),
    Column("kernel", "maps ×", ".2f"),
)
_NOTES = (
    "Memory: VmRSS after a warm start; the kernel's maps are beside it, as the kernel charges them (fdinfo).",
    "Start: until every endpoint is ready and the newest revision is in the kernel. Cold: the controller starts too, "
    "and the endpoints are announced one by one. Warm: after kill -9, with hooks and maps in place.",
    "At rest: CPU time as a share of one core.",
    "Policies are shared out among the endpoints; each names one class of peers on one port.",
)


@dataclass(frozen=True, slots=True)
class Footprint:
    """An agent at one scale. ``kernel_bytes`` is what the kernel charges for its maps, not part of its own memory."""

    resident_bytes: int
    cold_s: float
    warm_s: float
    warm_cpu_s: float
    rest_share: float
    identities: int
    entries: int
    kernel_bytes: int
    controller_bytes: int


def measure(bench: Workbench) -> list[Section]:
    scales = (_BASE,) if bench.quick else (_BASE, *_GROWN.values())
    footprints: dict[Scale, Footprint] = {}
    changes: dict[Scale, list[Change]] = {}
    for number, scale in enumerate(scales):
        bench.tell(f"agent: {scale}: setting up")
        # One after another, each taken down before the next: no cluster must be measured beside another.
        with contextlib.ExitStack() as stack:
            inner = replace(bench, stack=stack)
            footprints[scale], changes[scale] = _measure_scale(inner, scale, number)
    title = "From a changed policy file to the first packet judged by it, at these sizes"
    rows = [row for scale, found in changes.items() for row in change.rows(scale.short, found)]
    targets = [change.target(str(_FULL), changes[_FULL])] if _FULL in changes else []
    sections = [
        Section("agent", "The agent, by the size of its cluster", _COLUMNS,
                [_row(scale, found) for scale, found in footprints.items()], _targets(footprints), _NOTES),
        Section("agent-change", title, change.COLUMNS, rows, targets, change.NOTES),
    ]  # fmt: skip
    return sections if bench.quick else [*sections, _growth(footprints, changes)]


def _growth(footprints: Mapping[Scale, Footprint], changes: Mapping[Scale, Sequence[Change]]) -> Section:
    """Each size divided by the smallest."""
    latencies = {scale: median(found.latency_ms for found in of_scale) for scale, of_scale in changes.items()}
    base = footprints[_BASE]
    rows: list[dict[str, Value]] = []
    for name, scale in _GROWN.items():
        found = footprints[scale]
        rows.append(
            {
                "variant": name,
                "resident": found.resident_bytes / base.resident_bytes,
                "warm": found.warm_s / base.warm_s,
                "change": latencies[scale] / latencies[_BASE],
                "entries": found.entries / base.entries,
                "kernel": found.kernel_bytes / base.kernel_bytes,
            }
        )
    return Section("growth", f"How costs grow from {_BASE}", _GROWTH_COLUMNS, rows)


def _measure_scale(bench: Workbench, scale: Scale, number: int) -> tuple[Footprint, list[Change]]:
    node = create_node(bench.stack, f"agent{number}", number)
    probes = change.probe_places(node)
    others = _other_endpoints(bench, node, scale, number)
    places = [*probes, *(place for place, _pod in others)]
    system = start_system(bench, node, cluster.population(scale, places, node.address), agent_core=bench.core)
    started = time.perf_counter()
    change.add_probes(system, node, probes)
    for place, pod in others:
        system.add_endpoint(place, pod.interface, pod.netns, wait_ready=False)
    status = system.wait_programmed(len(places), scale.policies)
    cold_s = time.perf_counter() - started
    starts = [_restart(bench, system, scale) for _ in range(bench.pick(5, 1))]
    bench.tell(f"agent: {scale}: at rest")
    rest_share = _at_rest(system)
    footprint = Footprint(
        resident_bytes=resident_bytes(system.agent.pid),
        cold_s=cold_s,
        warm_s=median(seconds for seconds, _cpu in starts),
        warm_cpu_s=median(cpu for _seconds, cpu in starts),
        rest_share=rest_share,
        identities=status.identities,
        entries=system.policy_entries(),
        kernel_bytes=_kernel_bytes(system.pins),
        controller_bytes=resident_bytes(system.controller.pid),
    )
    return footprint, time_changes(bench, system, Prober(bench, node), 60 if scale == _FULL else 20)


def _other_endpoints(bench: Workbench, node: Node, scale: Scale, number: int) -> list[tuple[Place, Pod]]:
    """The endpoints, besides the two that are probed. Their far ends share a namespace: nothing runs there."""
    netns = create_netns(bench.stack, f"agent{number}-others", forwards=False)
    found = []
    first = IPv4Address(node.address) + 1 + len(node.pods)
    for index in range(scale.endpoints):
        pod = Pod(netns, f"e{index}", str(first + index))
        batch(node.netns, [f"link add {pod.interface} type veth peer name e{index} netns {netns.name}"])
        found.append((Place(f"app-{index}", node.name, pod.address, cluster.endpoint_labels(scale, index)), pod))
    batch(node.netns, [f"link set {pod.interface} up" for _place, pod in found])
    return found


def _restart(bench: Workbench, system: System, scale: Scale) -> tuple[float, float]:
    """Seconds from starting a new agent after kill -9 until all it receives is in the kernel again; its CPU time."""
    bench.tell(f"agent: {scale}: warm start")
    system.agent.kill()
    started = time.perf_counter()
    system.start_agent()
    system.wait_programmed(scale.endpoints + len(system.node.pods), scale.policies)
    return time.perf_counter() - started, cpu_time_ns(system.agent.pid) / 1e9


def _at_rest(system: System) -> float:
    """The share of one core the agent takes while nothing happens."""
    time.sleep(1.0)
    before = cpu_time_ns(system.agent.pid)
    time.sleep(_REST_S)
    return (cpu_time_ns(system.agent.pid) - before) / (_REST_S * 1e9)


def _kernel_bytes(pins: Path) -> int:
    """Bytes the kernel charges for the node's maps, the flow tables of all endpoints included."""
    total = 0
    for pin in maps_directory(pins).iterdir():
        descriptor = syscall.get_pinned(str(pin))
        total += _charged_bytes(descriptor)
        os.close(descriptor)
    maps = open_pinned_maps(pins)
    try:
        for incarnation in maps.conntrack.tables():
            with maps.conntrack.flows(incarnation) as flows:
                total += _charged_bytes(flows.fd)
    finally:
        maps.close()
    return total


def _charged_bytes(descriptor: int) -> int:
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines():
        if line.startswith("memlock:"):
            return int(line.split()[1])
    return 0


def _row(scale: Scale, found: Footprint) -> dict[str, Value]:
    return {
        "variant": scale.short,
        "resident_mb": found.resident_bytes / _MB,
        "cold_s": found.cold_s,
        "warm_s": found.warm_s,
        "warm_cpu_s": found.warm_cpu_s,
        "rest_cpu": found.rest_share * 100,
        "identities": found.identities,
        "entries": found.entries,
        "kernel_mb": found.kernel_bytes / _MB,
        "controller_mb": found.controller_bytes / _MB,
    }


def _targets(footprints: dict[Scale, Footprint]) -> list[Target]:
    if _FULL not in footprints:
        return []
    found = footprints[_FULL]
    return [
        Target(f"agent resident at {_FULL}", found.resident_bytes / _MB, MEMORY_LIMIT_MB, "MB"),
        Target(f"warm start at {_FULL}", found.warm_s, WARM_START_LIMIT_S, "s"),
    ]
