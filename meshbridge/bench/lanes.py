"""Lanes: one per variant, all built before anything is measured, used one at a time in interleaved rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from meshbridge.bench.figures import Column, Value
from meshbridge.bench.machine import cpu_time_ns, deferred_softirq_ns, user_time_ns
from meshbridge.bench.network import Node
from meshbridge.bench.processes import PYTHON, Process, run, start, wait_for_port
from meshbridge.bench.samples import Ratio, Sample, paired_ratio
from meshbridge.bench.workbench import Workbench

PORT = 7000
COLUMNS = (
    Column("variant", "path"),
    Column("p50_us", "p50 µs", ",.1f"),
    Column("p99_us", "p99 µs", ",.1f"),
    Column("p50_ratio", "p50 ×", ".3f"),
    Column("p50_rounds", "in the rounds"),
    Column("p99_ratio", "p99 ×", ".2f"),
    Column("per_second", "per second", ",.0f"),
    Column("cpu_us", "CPU µs each", ",.1f"),
    Column("cpu_ratio", "CPU ×", ".3f"),
)


@dataclass(frozen=True, slots=True)
class Lane:
    """A node whose client pod reaches ``address``:``port``; ``processes`` are what works for it besides the client."""

    node: Node
    address: str
    port: int
    server: Process
    others: tuple[Process, ...] = ()

    @property
    def processes(self) -> tuple[Process, ...]:
        return (self.server, *self.others)


def start_server(bench: Workbench, node: Node, host: str) -> Process:
    """The echo and HTTP server in the node's server pod; it accepts when this returns."""
    argv = [PYTHON, "-m", "meshbridge.bench.load", "serve", host, str(PORT)]
    log = bench.folder / f"{node.server.netns.name}.log"
    server = start(bench.stack, argv, log, netns=node.server.netns, core=bench.core)
    wait_for_port(node.server.netns, host, PORT, server)
    return server


def run_client(bench: Workbench, lane: Lane, client: str) -> Sample:
    """Load one lane with one of the clients of ``meshbridge.bench.load``."""
    argv = [
        PYTHON,
        "-m",
        "meshbridge.bench.load",
        client,
        lane.address,
        str(lane.port),
        "--seconds",
        f"{bench.seconds}",
    ]
    for process in lane.processes:
        process.check()
    with Meter(bench, lane) as meter:
        done = json.loads(run(argv, netns=lane.node.client.netns, core=bench.core))
    operations = done["operations_total"]
    return Sample(
        p50_ns=done["p50_ns"],
        p99_ns=done["p99_ns"],
        per_second=done["operations"] / done["elapsed_ns"] * 1e9,
        cpu_ns=(done["cpu_ns"] + meter.cpu_ns) / operations,
        generator_ns=(done["user_ns"] + meter.server_user_ns) / operations,
    )


class Meter:
    """CPU time that a lane's processes, and softirqs put off on the core, take inside the ``with``."""

    def __init__(self, bench: Workbench, lane: Lane) -> None:
        self._core, self._lane = bench.core, lane
        self.cpu_ns = self.server_user_ns = 0

    def __enter__(self) -> Meter:
        self._before = self._read()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.cpu_ns, self.server_user_ns = (
            after - before for after, before in zip(self._read(), self._before, strict=True)
        )

    def _read(self) -> tuple[int, int]:
        cpu = sum(cpu_time_ns(process.pid) for process in self._lane.processes) + deferred_softirq_ns(self._core)
        return cpu, user_time_ns(self._lane.server.pid)


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
                "cpu_us": median(sample.cpu_ns for sample in repeats) / 1e3,
                "cpu_ratio": compare(samples, variant, baseline, lambda sample: sample.cpu_ns).median,
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
