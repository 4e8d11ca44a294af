"""The whole walk: a fresh mesh, every step in turn, and nothing left."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from meshbridge.demo import lifecycle
from meshbridge.demo.layout import LOGS
from meshbridge.demo.walk import (
    step_a,
    step_b,
    step_c,
    step_d,
    step_e,
    step_f,
    step_g,
    step_h,
    step_i,
    step_j,
    step_k,
    step_l,
)
from meshbridge.demo.walk.context import Walk
from meshbridge.demo.walk.report import Report
from meshbridge.errors import MeshBridgeError

_LOG_LINES = 60

# A step is a module with LETTER, TITLE, ABOUT and run(walk). It leaves the mesh as it found it, but for g to l: those
# share Prometheus and what it scrapes (`scraping.py`), each brings what it lacks, and all of it stays to the end.
STEPS: Sequence[ModuleType] = (
    step_a, step_b, step_c, step_d, step_e, step_f, step_g, step_h, step_i, step_j, step_k, step_l,
)  # fmt: skip


def run(report: Report, keep: bool, report_file: Path | None) -> int:
    """Walk through all steps on a mesh of its own; returns how many checks failed.

    Without ``keep`` the mesh is taken down again, whatever happened; that nothing is left is a check as well.
    """
    report.say("Each line below: PASS or FAIL, what is expected: what was seen (how that was measured)")
    if lifecycle.remains():
        report.say("a mesh is up, or remains of one: taking it down, to begin from nothing")
        lifecycle.down(report.say)
    try:
        report.begin("up", "The mesh comes up", "Two nodes, five pods, the real controller, agents, authz and Envoys.")
        if _guarded(report, "the mesh is up", lambda: lifecycle.up(report.say)):
            walk = Walk(report)
            for step in STEPS:
                report.begin(step.LETTER, step.TITLE, step.ABOUT)
                _guarded(report, "the step runs to its end", partial(step.run, walk), quiet=True)
    except KeyboardInterrupt:
        report.check("the walk is made to its end", False, "interrupted", "SIGINT")
        raise
    finally:
        if report.failed:
            report.logs = _log_tails()  # they go with the mesh
        if keep:
            report.say("the mesh stays up, as asked; `meshbridge demo down` removes it")
        else:
            report.begin("down", "Nothing stays", "Processes, namespaces, links, pins and directories are looked for.")
            _guarded(report, "the mesh is taken down", lambda: lifecycle.down(report.say), quiet=True)
            left = lifecycle.remains()
            report.check(
                "nothing is left", not left, str(left) if left else "nothing", "/proc, /run/netns, bpffs, /run"
            )
        report.finish()
        if report_file:
            report.write(report_file)
    return report.failed


def _log_tails() -> dict[str, list[str]]:
    return {
        path.stem: path.read_text(errors="replace").splitlines()[-_LOG_LINES:] for path in sorted(LOGS.glob("*.log"))
    }


def _guarded(report: Report, claim: str, action: Callable[[], None], quiet: bool = False) -> bool:
    """Do it; an error is a failed check, and the walk goes on. With ``quiet`` only an error is worth a line."""
    try:
        action()
    except Exception as error:
        said = str(error) if isinstance(error, MeshBridgeError) else "".join(traceback.format_exception(error)[-3:])
        return report.check(claim, False, said.strip(), "it was tried")
    return quiet or report.check(claim, True, "every pod is ready", "readiness probes from the nodes")
