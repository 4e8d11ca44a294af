"""HTTP under load: wrk keeps many connections busy, so that what is measured is work, not waiting for one answer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from meshbridge.bench.errors import BenchError
from meshbridge.bench.lanes import ENDS, PORT, Lane, cpu_by_kind
from meshbridge.bench.machine import children_cpu_ns
from meshbridge.bench.processes import run
from meshbridge.bench.samples import Sample
from meshbridge.bench.workbench import Workbench

CONNECTIONS = 32
_SCRIPT = """\
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('wrk-result {"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "failed": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""
_RESULT = re.compile(r"^wrk-result (\{.*\})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Result:
    """What wrk counted; ``failed`` are answers that were not 2xx or 3xx, and connections that broke."""

    requests: int
    duration_us: int
    p50_us: int
    p99_us: int
    failed: int


def parse_result(output: str) -> Result:
    """The line our script made wrk print.

    Raises:
        BenchError: It is not there, or requests failed: then the rate is that of failures.
    """
    found = _RESULT.search(output)
    if found is None:
        raise BenchError(f"printed no result: {output[-200:]!r}", where="wrk")
    result = Result(**json.loads(found[1]))
    if result.failed or not result.requests:
        raise BenchError(f"{result.failed} of {result.requests} requests failed", where="wrk")
    return result


def run_wrk(bench: Workbench, lane: Lane) -> Sample:
    """One second of as many requests as the lane takes."""
    script = bench.folder / "wrk.lua"
    _write_once(script)
    lane.check()
    argv = ["wrk", "-t1", f"-c{CONNECTIONS}", "-d1s", "-s", str(script), f"http://{lane.address}:{PORT}/pay"]
    before, own_before = cpu_by_kind(bench, lane), children_cpu_ns()
    result = parse_result(run(argv, netns=lane.node.client.netns, core=bench.core))
    cpu_ns = {kind: after - before[kind] for kind, after in cpu_by_kind(bench, lane).items()}
    cpu_ns[ENDS] += children_cpu_ns() - own_before
    return Sample(
        p50_ns=result.p50_us * 1e3,
        p99_ns=result.p99_us * 1e3,
        per_second=result.requests / result.duration_us * 1e6,
        cpu_ns={kind: used / result.requests for kind, used in cpu_ns.items()},
    )


def _write_once(script: Path) -> None:
    if not script.exists():
        script.write_text(_SCRIPT)
