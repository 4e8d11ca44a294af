"""What one packet costs in the kernel program, against the number of entries, addresses and endpoints."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
_COLD = 1_000
_STEADY = 5_000
_REPEAT = 10_000
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
}
_QUICK = ("10 policy entries", "10, again (A/A)", "1,000", "10,000")
_COLUMNS = (
    Column("variant", "state"),
    Column("steady_ns", "new flow ns", ",.0f"),
    Column("steady_ratio", "×", ".3f"),
    Column("cold_ns", "cold ns", ",.0f"),
    Column("cold_ratio", "×", ".3f"),
    Column("same_ns", "repeated ns", ",.0f"),
    Column("same_ratio", "×", ".3f"),
    Column("established_ns", "established ns", ",.0f"),
    Column("established_ratio", "×", ".3f"),
)


@dataclass(frozen=True, slots=True)
class Costs:
    """Nanoseconds of one packet, by kind."""

    steady_ns: float
    cold_ns: float
    same_ns: float
    established_ns: float


def measure(bench: Workbench) -> list[Section]:
    sizes = {name: size for name, size in _SIZES.items() if not bench.quick or name in _QUICK}
    costs: dict[str, list[Costs]] = {name: [] for name in sizes}
    with ExitStack() as stack:
        # Each size has maps of its own, so that a round over all of them is too short for the machine to drift.
        datapaths = {name: _filled(bench, stack, name, size, i) for i, (name, size) in enumerate(sizes.items())}
        packets = {name: list(kernelstate.openings(size, bench.pick(25_000, 10_000))) for name, size in sizes.items()}
        empty = _empty_program()
        stack.callback(os.close, empty)
        stack.enter_context(_on_core(bench.core))
        for number in range(bench.pick(11, 3)):
            for name in list(sizes) if number % 2 == 0 else list(reversed(sizes)):
                bench.tell(f"program: round {number + 1}, {name}")
                costs[name].append(_measure_once(datapaths[name], empty, packets[name]))
    baseline = next(iter(sizes))
    rows = [_row(name, found, costs[baseline]) for name, found in costs.items()]
    by_name = {row["variant"]: row for row in rows}
    targets = [
        Target("new flow, 10 to 10,000 policy entries", _number(by_name["10,000"]["steady_ratio"]), NEW_FLOW_LIMIT),
        Target(
            "established flow, 10 to 10,000 policy entries",
            _number(by_name["10,000"]["established_ratio"]),
            ESTABLISHED_LIMIT,
        ),
    ]
    notes = (
        "BPF_PROG_TEST_RUN of to-pod, nanoseconds as the kernel counts them; an allowed SYN: parse, look up, write the "
        "flow, send an event within the limit.",
        "New flow: one run per packet, every packet a new flow from a random peer to a random port, after twenty "
        "thousand like it; cold: the first thousand, after other tables were used; both less the cost of the clock. "
        "Repeated: the same packet each time.",
        "Entries are ten ports for each peer identity, so identities grow with them. 1,000 addresses where the row "
        "does not say (10,000 with 100,000 entries).",
    )
    title = "One packet in the kernel program, against the size of its tables"
    return [Section("program", title, _COLUMNS, rows, targets, notes)]


def _filled(bench: Workbench, stack: ExitStack, name: str, size: Size, number: int) -> Datapath:
    bench.tell(f"program: filling {name}")
    node = f"{PREFIX}-{os.getpid()}-program{number}"
    bench.stack.callback(remove_node, node)
    datapath = stack.enter_context(open_datapath(DEFAULT_PIN_ROOT / node))
    kernelstate.program(datapath.maps, size)
    return datapath


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


def _measure_once(datapath: Datapath, empty: int, flows: Sequence[bytes]) -> Costs:
    clock_ns = _mean_ns(_durations(empty, flows[:_COLD], 0))
    durations = _durations(datapath.to_pod, flows, _PASSES)
    same = syscall.program_test_run(datapath.to_pod, flows[0], repeat=_REPEAT)
    opening, packet = kernelstate.established()
    syscall.program_test_run(datapath.to_pod, opening)
    established = syscall.program_test_run(datapath.to_pod, packet, repeat=5 * _REPEAT)
    for run in (same, established):
        _check(run.verdict, _PASSES)
    return Costs(
        steady_ns=_mean_ns(durations[-_STEADY:]) - clock_ns,
        cold_ns=_mean_ns(durations[:_COLD]) - clock_ns,
        same_ns=same.duration_ns,
        established_ns=established.duration_ns,
    )


def _durations(program: int, packets: Sequence[bytes], verdict: int) -> list[int]:
    durations = []
    for packet in packets:
        run = syscall.program_test_run(program, packet)
        _check(run.verdict, verdict)
        durations.append(run.duration_ns)
    return durations


def _mean_ns(durations: Sequence[int]) -> float:
    """The mean without the slowest hundredth: interrupts fall into those."""
    return statistics.fmean(sorted(durations)[: len(durations) * 99 // 100])


def _check(found: int, wanted: int) -> None:
    if found != wanted:
        raise BenchError(f"the program answered {found}, not {wanted}: it measures something else", where="test run")


def _row(name: str, costs: Sequence[Costs], baseline: Sequence[Costs]) -> dict[str, Value]:
    row: dict[str, Value] = {"variant": name}
    for kind in ("steady", "cold", "same", "established"):
        values = [getattr(cost, f"{kind}_ns") for cost in costs]
        row[f"{kind}_ns"] = statistics.median(values)
        row[f"{kind}_ratio"] = paired_ratio(values, [getattr(cost, f"{kind}_ns") for cost in baseline]).median
    return row


def _number(value: Value) -> float:
    assert isinstance(value, int | float)
    return float(value)
