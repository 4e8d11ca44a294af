"""What one packet costs in the kernel program, against the number of entries, addresses and endpoints."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from meshbridge.bench import kernelstate
from meshbridge.bench.errors import BenchError
from meshbridge.bench.figures import Column, Section, Target, Value
from meshbridge.bench.kernelstate import Size
from meshbridge.bench.network import PREFIX
from meshbridge.bench.samples import paired_ratio
from meshbridge.bench.system import remove_node
from meshbridge.bench.workbench import Workbench
from meshbridge.datapath import syscall
from meshbridge.datapath.loader import Datapath, open_datapath
from meshbridge.datapath.maps import DEFAULT_PIN_ROOT

NEW_FLOW_LIMIT = 1.3
ESTABLISHED_LIMIT = 1.05
_PASSES = -1  # TC_ACT_UNSPEC
_ADDRESSES = 1_000  # the same for every number of entries, so that only that grows
_SIZES = {
    "10 policy entries": Size(10, _ADDRESSES),
    "10, again (A/A)": Size(10, _ADDRESSES),
    "100": Size(100, _ADDRESSES),
    "1,000": Size(1_000, _ADDRESSES),
    "10,000": Size(10_000, _ADDRESSES),
    "100,000": Size(100_000, 10 * _ADDRESSES),
    "10 entries, 10 addresses": Size(10, 10),
    "10 entries, 10,000 addresses": Size(10, 10_000),
    "10 entries, 100,000 addresses": Size(10, 100_000),
    "10 entries, 100 endpoints": Size(10, _ADDRESSES, endpoints=100),
    "10 entries, 1,000 endpoints": Size(10, _ADDRESSES, endpoints=1_000),
}
_QUICK = ("10 policy entries", "10, again (A/A)", "1,000", "10,000")
_COLUMNS = (
    Column("variant", "state"),
    Column("random_ns", "new flow, each another entry ns", ",.0f"),
    Column("random_ratio", "×", ".3f"),
    Column("same_ns", "new flow, the same ns", ",.0f"),
    Column("same_ratio", "×", ".3f"),
    Column("established_ns", "established ns", ",.0f"),
    Column("established_ratio", "×", ".3f"),
)


@dataclass(frozen=True, slots=True)
class Costs:
    """Nanoseconds of one packet, by kind."""

    random_ns: float
    same_ns: float
    established_ns: float


def measure(bench: Workbench) -> list[Section]:
    sizes = {name: size for name, size in _SIZES.items() if not bench.quick or name in _QUICK}
    # Interleaved although every size has to be written anew: drift between rounds would otherwise look like growth.
    costs: dict[str, list[Costs]] = {name: [] for name in sizes}
    with _datapath(bench) as datapath, _on_core(bench.core):
        empty = _empty_program()
        for number in range(bench.pick(5, 3)):
            for name, size in sizes.items():
                bench.tell(f"program: {name}")
                kernelstate.program(datapath.maps, size)
                costs[name].append(_measure_once(datapath, empty, size, bench.pick(10_000, 5_000), seed=number))
    baseline = next(iter(sizes))
    rows = [_row(name, found, costs[baseline]) for name, found in costs.items()]
    by_name = {row["variant"]: row for row in rows}
    targets = [
        Target("new flow, 10 to 10,000 policy entries", _number(by_name["10,000"]["random_ratio"]), NEW_FLOW_LIMIT),
        Target(
            "established flow, 10 to 10,000 policy entries",
            _number(by_name["10,000"]["established_ratio"]),
            ESTABLISHED_LIMIT,
        ),
    ]
    notes = (
        "BPF_PROG_TEST_RUN of to-pod, nanoseconds as the kernel counts them; an allowed SYN: parse, look up, write the "
        "flow, send an event within the limit.",
        "Each another entry: one run per packet, every packet a new flow from a random peer to a random port, so that "
        "caches are as cold as the tables are large; the clock's own cost is taken off.",
        "Entries are ten ports for each peer identity, so identities grow with them. 1,000 addresses where the row "
        "does not say (10,000 with 100,000 entries).",
    )
    return [Section("program", "One packet in the kernel program, against the size of its tables", _COLUMNS, rows,
                    targets, notes)]  # fmt: skip


@contextmanager
def _datapath(bench: Workbench) -> Iterator[Datapath]:
    node = f"{PREFIX}-{os.getpid()}-program"
    bench.stack.callback(remove_node, node)
    with open_datapath(DEFAULT_PIN_ROOT / node) as datapath:
        yield datapath


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _empty_program() -> int:
    """A program that does nothing: ``r0 = 0; exit``."""
    return syscall.program_load("mbben_empty", bytes.fromhex("b7000000000000009500000000000000"))


def _measure_once(datapath: Datapath, empty: int, size: Size, packets: int, seed: int) -> Costs:
    flows = list(kernelstate.openings(size, packets, seed))
    random_ns = _mean_ns(datapath.to_pod, flows, _PASSES) - _mean_ns(empty, flows[:1000], 0)
    same = syscall.program_test_run(datapath.to_pod, flows[0], repeat=packets)
    opening, packet = kernelstate.established()
    syscall.program_test_run(datapath.to_pod, opening)
    established = syscall.program_test_run(datapath.to_pod, packet, repeat=5 * packets)
    for run in (same, established):
        _check(run.verdict, _PASSES)
    return Costs(random_ns, same.duration_ns, established.duration_ns)


def _mean_ns(program: int, packets: Sequence[bytes], verdict: int) -> float:
    """The mean of single runs, without the slowest hundredth: interrupts fall into those."""
    durations = []
    for packet in packets:
        run = syscall.program_test_run(program, packet)
        _check(run.verdict, verdict)
        durations.append(run.duration_ns)
    durations.sort()
    return statistics.fmean(durations[: len(durations) * 99 // 100])


def _check(found: int, wanted: int) -> None:
    if found != wanted:
        raise BenchError(f"the program answered {found}, not {wanted}: it measures something else", where="test run")


def _row(name: str, costs: Sequence[Costs], baseline: Sequence[Costs]) -> dict[str, Value]:
    row: dict[str, Value] = {"variant": name}
    for kind in ("random", "same", "established"):
        values = [getattr(cost, f"{kind}_ns") for cost in costs]
        row[f"{kind}_ns"] = statistics.median(values)
        row[f"{kind}_ratio"] = paired_ratio(values, [getattr(cost, f"{kind}_ns") for cost in baseline]).median
    return row


def _number(value: Value) -> float:
    assert isinstance(value, int | float)
    return float(value)
