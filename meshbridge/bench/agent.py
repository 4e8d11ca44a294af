"""What the node agent needs at two sizes ten times apart: memory, time to start, CPU at rest, kernel memory."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from statistics import median

from meshbridge.bench import change, cluster
from meshbridge.bench.change import Prober, time_changes
from meshbridge.bench.cluster import Place, Scale
from meshbridge.bench.figures import Column, Section, Target, Value
from meshbridge.bench.machine import cpu_time_ns, resident_bytes
from meshbridge.bench.network import Node, Pod, batch, create_netns, create_node
from meshbridge.bench.samples import growth_exponent, percentile
from meshbridge.bench.system import System, start_system
from meshbridge.bench.workbench import Workbench
from meshbridge.datapath import syscall
from meshbridge.datapath.maps import maps_directory, open_pinned_maps

MEMORY_LIMIT_MB = 60
WARM_START_LIMIT_S = 1.0
_TENTH = Scale(endpoints=10, addresses=1_000, policies=100)
_FULL = Scale(endpoints=100, addresses=10_000, policies=1_000)
_REST_S = 3.0
_MB = 1e6
_COLUMNS = (
    Column("variant", "cluster"),
    Column("resident_mb", "agent MB", ".1f"),
    Column("cold_s", "cold start s", ".2f"),
    Column("warm_s", "warm start s", ".2f"),
    Column("rest_cpu", "CPU at rest %", ".2f"),
    Column("identities", "identities", ",d"),
    Column("entries", "policy entries", ",d"),
    Column("kernel_mb", "kernel maps MB", ".1f"),
    Column("controller_mb", "controller MB", ".1f"),
)


@dataclass(frozen=True, slots=True)
class Footprint:
    """An agent at one scale. ``kernel_bytes`` is what the kernel charges for its maps, not part of its own memory."""

    resident_bytes: int
    cold_s: float
    warm_s: float
    rest_share: float
    identities: int
    entries: int
    kernel_bytes: int
    controller_bytes: int


def measure(bench: Workbench) -> list[Section]:
    scales = (_TENTH,) if bench.quick else (_TENTH, _FULL)
    footprints: dict[Scale, Footprint] = {}
    rows: list[dict[str, Value]] = []
    targets: list[Target] = []
    for number, scale in enumerate(scales):
        bench.tell(f"agent: {scale}: setting up")
        # One after another, each taken down before the next: the small one must not run beside the large one.
        with contextlib.ExitStack() as stack:
            inner = Workbench(stack, bench.folder, bench.core, bench.quick, bench.tell)
            footprints[scale], times_ms = _measure_scale(inner, scale, number)
        rows += change.rows(str(scale), times_ms)
        every = [time_ms for times in times_ms.values() for time_ms in times]
        if scale is _FULL:
            text = f"policy change to kernel at this size, p99 of {len(every)}"
            targets.append(Target(text, percentile(every, 99), change.LIMIT_MS, "ms"))
    found = [_row(scale, footprint) for scale, footprint in footprints.items()]
    return [
        Section("agent", "The agent, by the size of its cluster", _COLUMNS, found, _targets(footprints),
                _notes(footprints)),
        Section("agent-change", "From a changed policy file to the first packet judged by it, at these sizes",
                change.COLUMNS, rows, targets, change.NOTES),
    ]  # fmt: skip


def _measure_scale(bench: Workbench, scale: Scale, number: int) -> tuple[Footprint, dict[str, list[float]]]:
    node = create_node(bench.stack, f"agent{number}", number)
    probes = change.probe_places(node)
    others = _other_endpoints(bench, node, scale, number)
    places = [*probes, *(place for place, _pod in others)]
    system = start_system(bench, node, cluster.population(scale, places, node.address))
    started = time.perf_counter()
    change.add_probes(system, node, probes)
    for place, pod in others:
        system.add_endpoint(place, pod.interface, pod.netns, wait_ready=False)
    status = system.wait_programmed(len(places), scale.policies)
    cold_s = time.perf_counter() - started
    warm_s = [_restart(bench, system, scale) for _ in range(bench.pick(3, 1))]
    bench.tell(f"agent: {scale}: at rest")
    rest_share = _at_rest(system)
    footprint = Footprint(
        resident_bytes=resident_bytes(system.agent.pid),
        cold_s=cold_s,
        warm_s=median(warm_s),
        rest_share=rest_share,
        identities=status.identities,
        entries=system.policy_entries(),
        kernel_bytes=_kernel_bytes(system.pins),
        controller_bytes=resident_bytes(system.controller.pid),
    )
    return footprint, time_changes(bench, system, Prober(bench, node), bench.pick(60, 20))


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


def _restart(bench: Workbench, system: System, scale: Scale) -> float:
    """Seconds from starting a new agent after kill -9 until all it receives is in the kernel again."""
    bench.tell(f"agent: {scale}: warm start")
    system.agent.kill()
    started = time.perf_counter()
    system.start_agent()
    system.wait_programmed(scale.endpoints + len(system.node.pods), scale.policies)
    return time.perf_counter() - started


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
        for incarnation in maps.conntrack.incarnations():
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
        "variant": str(scale),
        "resident_mb": found.resident_bytes / _MB,
        "cold_s": found.cold_s,
        "warm_s": found.warm_s,
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


def _notes(footprints: dict[Scale, Footprint]) -> list[str]:
    notes = [
        "Resident: VmRSS after a warm start; the kernel's maps are beside it, as the kernel charges them (fdinfo).",
        "Start: from the process until every endpoint is ready and the newest revision is in the kernel. Cold: the "
        "controller starts too, and all interfaces are still to hook. Warm: after kill -9, with hooks and maps there.",
        "Each endpoint is selected by 10 policies, each naming one class of ten peers on one port.",
    ]
    if _FULL in footprints and _TENTH in footprints:
        growth = growth_exponent(
            (_TENTH.policies, footprints[_TENTH].warm_s), (_FULL.policies, footprints[_FULL].warm_s)
        )
        notes.append(f"Ten times everything: warm start × {10**growth:.1f}.")
    return notes
