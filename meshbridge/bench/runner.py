"""The sections of the bench by name, and a run over some of them that cleans up whatever happens."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from meshbridge.bench import agent, change, compile, denied, http, program, scale, tcp
from meshbridge.bench.errors import BenchError
from meshbridge.bench.figures import Failure, Report, Section
from meshbridge.bench.machine import come_first, describe, leave_core, measured_core
from meshbridge.bench.network import PREFIX
from meshbridge.bench.processes import interrupt_on_terminate
from meshbridge.bench.system import sweep
from meshbridge.bench.workbench import Workbench
from meshbridge.errors import MeshBridgeError


@dataclass(frozen=True, slots=True)
class Part:
    """A measurement that can be asked for by name; it may fill several tables."""

    summary: str
    measure: Callable[[Workbench], list[Section]]


PARTS: Mapping[str, Part] = {
    "tcp": Part("round trip and connection rate of plain TCP: no policy, ours, iptables", tcp.measure),
    "program": Part("one packet in the kernel program, by table sizes (BPF_PROG_TEST_RUN)", program.measure),
    "http": Part("HTTP directly and through two Envoys with mTLS: no filter, native RBAC, our ext_authz", http.measure),
    "denied": Part(
        "CPU time of a refused attempt to connect: dropped by the kernel, or 403 from Envoy", denied.measure
    ),
    "change": Part("from a changed policy file to the kernel, with real processes", change.measure),
    "compile": Part(
        "the compiler by cluster size, without a kernel: from nothing, and after one change", compile.measure
    ),
    "agent": Part("the agent by cluster size: memory, cold and warm start, kernel memory, changes", agent.measure),
    "scale": Part("one controller with a thousand simulated agents: memory, bytes and time of a change", scale.measure),
}


def run(names: Iterable[str], *, quick: bool, tell: Callable[[str], None]) -> Report:
    """Measure the named parts, one after another; one that fails is reported and the others go on.

    Nothing stays: namespaces, links, pins and processes end with each part, on Ctrl-C and SIGTERM too.
    """
    _require_root()
    interrupt_on_terminate()
    sweep()
    core = measured_core()
    machine = {**describe(), "measured core": str(core)}
    leave_core(core)
    come_first()
    started = time.monotonic()
    sections: list[Section] = []
    failures: list[Failure] = []
    for name in names:
        tell(f"{name}: setting up")
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{PREFIX}-{os.getpid()}-")))
            folder.chmod(0o711)  # an Envoy of another user opens its own file in it, and can list nothing
            try:
                sections += PARTS[name].measure(Workbench(stack, folder, core, quick, tell))
            except MeshBridgeError as error:
                failures.append(Failure(name, str(error)))
            except Exception as error:  # a fault of the bench itself must not cost the figures of the other parts
                traceback.print_exc()
                failures.append(Failure(name, f"{type(error).__name__}: {error}"))
    return Report(machine, quick, sections, failures, round(time.monotonic() - started, 1))


def _require_root() -> None:
    if os.geteuid() != 0:
        raise BenchError("needs root: it makes network namespaces and loads BPF programs", fix="run it with sudo")
