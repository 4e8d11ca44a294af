"""Lanes: one per variant, all built before anything is measured, used one at a time in interleaved rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean, median

from meshbridge.bench.figures import Column, Section, Value
from meshbridge.bench.machine import cpu_time_ns, deferred_softirq_ns, user_time_ns
from meshbridge.bench.network import Node
from meshbridge.bench.processes import PYTHON, Process, run, start, wait_for_port
from meshbridge.bench.samples import Ratio, Sample, paired_ratio
from meshbridge.bench.workbench import Workbench

PORT = 7000
ENDS = "client and server"
COLUMNS = (
    Column("variant", "path"),
    Column("p50_us", "p50 µs", ",.1f"),
    Column("p99_us", "p99 µs", ",.1f"),
    Column("p50_ratio", "p50 ×", ".3f"),
    Column("p50_rounds", "half of rounds"),
    Column("p99_ratio", "p99 ×", ".2f"),
    Column("per_second", "per second", ",.0f"),
    Column("cpu_us", "CPU µs each", ",.1f"),
    Column("cpu_ratio", "CPU ×", ".3f"),
)


@dataclass(frozen=True, slots=True)
class Lane:
    """A node whose client pod reaches ``address`` at the server's port; ``others`` work for it, by kind."""

    node: Node
    address: str
    server: Process
    others: Mapping[str, tuple[Process, ...]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise BenchError when one of its processes has ended."""
        for process in (self.server, *chain.from_iterable(self.others.values())):
            process.check()


def start_server(bench: Workbench, node: Node, host: str) -> Process:
    """The echo and HTTP server in the node's server pod; it accepts when this returns."""
    argv = [PYTHON, "-m", "meshbridge.bench.load", "serve", host, str(PORT)]
    log = bench.folder / f"{node.server.netns.name}.log"
    server = start(bench.stack, argv, log, netns=node.server.netns, core=bench.core)
    wait_for_port(node.server.netns, host, PORT, server)
    return server


def run_client(bench: Workbench, lane: Lane, client: str) -> Sample:
    """Load one lane with one of the clients of ``meshbridge.bench.load``."""
    argv = [PYTHON, "-m", "meshbridge.bench.load", client, lane.address, str(PORT), "--seconds", f"{bench.seconds}"]
    lane.check()
    before = cpu_by_kind(bench, lane)
    user_before = user_time_ns(lane.server.pid)
    done = json.loads(run(argv, netns=lane.node.client.netns, core=bench.core))
    cpu_ns = {kind: after - before[kind] for kind, after in cpu_by_kind(bench, lane).items()}
    cpu_ns[ENDS] += done["cpu_ns"]
    operations = done["operations_total"]
    return Sample(
        p50_ns=done["p50_ns"],
        p99_ns=done["p99_ns"],
        per_second=done["operations"] / done["elapsed_ns"] * 1e9,
        cpu_ns={kind: used / operations for kind, used in cpu_ns.items()},
        generator_ns=(done["user_ns"] + user_time_ns(lane.server.pid) - user_before) / operations,
    )


def cpu_by_kind(bench: Workbench, lane: Lane) -> dict[str, int]:
    """CPU time so far of the lane's processes by kind; softirqs put off on the core count as the two ends'."""
    used = {kind: sum(cpu_time_ns(process.pid) for process in processes) for kind, processes in lane.others.items()}
    return {ENDS: cpu_time_ns(lane.server.pid) + deferred_softirq_ns(bench.core), **used}


def cpu_section(name: str, title: str, samples: Mapping[str, Sequence[Sample]], notes: Sequence[str]) -> Section:
    """Where the CPU time of one operation goes, by kind of process; medians, so rows need not add up."""
    kinds = list(dict.fromkeys(kind for repeats in samples.values() for kind in repeats[0].cpu_ns))
    columns = [Column("variant", "path"), *(Column(kind, f"{kind} µs", ",.1f") for kind in kinds)]
    found: list[dict[str, Value]] = []
    for variant, repeats in samples.items():
        row: dict[str, Value] = {"variant": variant, "all": median(sample.total_cpu_ns for sample in repeats) / 1e3}
        for kind in repeats[0].cpu_ns:
            row[kind] = median(sample.cpu_ns[kind] for sample in repeats) / 1e3
        found.append(row)
    return Section(name, title, [*columns, Column("all", "all µs", ",.1f")], found, (), notes)


def rows(samples: Mapping[str, Sequence[Sample]], baseline: str) -> list[dict[str, Value]]:
    """Medians over the rounds, and the medians of each round's ratios to the baseline of the same round."""
    found: list[dict[str, Value]] = []
    for variant, repeats in samples.items():
        ratio = compare(samples, variant, baseline, lambda sample: sample.p50_ns)
        found.append(
            {
                "variant": variant,
                "p50_us": median(sample.p50_ns for sample in repeats) / 1e3,
                "p99_us": median(sample.p99_ns for sample in repeats) / 1e3,
                "p50_ratio": ratio.median,
                "p50_rounds": f"{ratio.low:.2f}–{ratio.high:.2f}",
                "p99_ratio": compare(samples, variant, baseline, lambda sample: sample.p99_ns).median,
                "per_second": median(sample.per_second for sample in repeats),
                "cpu_us": median(sample.total_cpu_ns for sample in repeats) / 1e3,
                "cpu_ratio": compare(samples, variant, baseline, lambda sample: sample.total_cpu_ns).median,
            }
        )
    return found


def compare(
    samples: Mapping[str, Sequence[Sample]], variant: str, baseline: str, of: Callable[[Sample], float]
) -> Ratio:
    return paired_ratio(list(map(of, samples[variant])), list(map(of, samples[baseline])))


def without_generator(samples: Mapping[str, Sequence[Sample]], variant: str, baseline: str) -> tuple[float, float]:
    """The generator's own time per operation in µs, and the p50 ratio with it taken out of both sides.

    A generator slower than a real client flatters every ratio; this bounds by how much.
    """
    own_ns = fmean(sample.generator_ns for sample in samples[baseline])
    ratio = compare(samples, variant, baseline, lambda sample: sample.p50_ns - own_ns)
    return own_ns / 1e3, ratio.median
