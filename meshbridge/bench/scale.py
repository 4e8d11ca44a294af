"""One controller and a thousand agents: what a change costs until the last of them has it, by the cluster's size."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding

from meshbridge.bench import cluster, simulated
from meshbridge.bench.cluster import Object
from meshbridge.bench.errors import BenchError
from meshbridge.bench.figures import Column, Section, Target, Value
from meshbridge.bench.machine import cpu_time_ns, peak_bytes, resident_bytes
from meshbridge.bench.processes import Process, start
from meshbridge.bench.samples import percentile
from meshbridge.bench.simulated import Size
from meshbridge.bench.system import meshbridge, replace_file
from meshbridge.bench.workbench import Workbench
from meshbridge.xds.auth import load_or_create_key
from meshbridge.xds.certificates import new_authority, serving_certificate

LIMIT_S: Final = 2.0
_FULL: Final = Size(1_000, 20_000, 2_000)
_MIDDLE: Final = Size(300, 20_000, 2_000)
_SMALL: Final = Size(100, 2_000, 200)
_SIZES: Final = {
    "100 agents": Size(100, 20_000, 2_000),
    "300 agents": _MIDDLE,
    "300 agents, 2,000 pods": replace(_MIDDLE, pods=2_000),
    "300 agents, 200 policies": replace(_MIDDLE, policies=200),
    "300 agents, a label key for each namespace": replace(_MIDDLE, own_keys=True),
    "1,000 agents": _FULL,
}
_QUIET_S: Final = 0.3
_TIMEOUT_S: Final = 300.0

_SIZE_COLUMNS: Final = (
    Column("variant", "cluster"),
    Column("size", "nodes / pods / policies"),
    Column("read_s", "objects read s", ".1f"),
    Column("first_s", "all have all s", ".1f"),
    Column("first_mb", "sent MB", ",.0f"),
    Column("first_cpu_s", "CPU s", ".1f"),
    Column("memory_mb", "memory MB", ",.0f"),
    Column("peak_mb", "at most MB", ",.0f"),
    Column("again_s", "again after kill -9 s", ".1f"),
    Column("again_mb", "sent MB", ",.1f"),
    Column("again_cpu_s", "CPU s", ".1f"),
)
_CHANGE_COLUMNS: Final = (
    Column("variant", "cluster"),
    Column("change", "change"),
    Column("samples", "times", "d"),
    Column("agents", "agents", ",.0f"),
    Column("messages", "messages", ",.0f"),
    Column("kilobytes", "kB in all", ",.1f"),
    Column("first_ms", "first agent ms", ",.0f"),
    Column("p50_ms", "last agent p50 ms", ",.0f"),
    Column("p99_ms", "p99 ms", ",.0f"),
    Column("cpu_ms", "controller CPU ms", ",.0f"),
    Column("fleet_ms", "agents' CPU ms", ",.0f"),
)
_NOTES: Final = (
    "The real controller, on TCP with TLS. Agents are simulated: one process with a connection, a token and a delta "
    "stream for each, which decodes and acknowledges everything, and shares the machine with the controller.",
    "Times: from just before the object is replaced to the last acknowledgement among the agents that got something.",
    "Sent: the responses' bytes before TLS, of all agents together.",
)


def measure(bench: Workbench) -> list[Section]:
    sizes = {"100 agents": _SMALL} if bench.quick else _SIZES
    size_rows: list[dict[str, Value]] = []
    change_rows: list[dict[str, Value]] = []
    targets: list[Target] = []
    for number, (name, size) in enumerate(sizes.items()):
        bench.tell(f"scale: {name}: {size}")
        mesh = Mesh(bench, bench.folder / f"scale-{number}", size)
        size_rows.append({"variant": name, "size": str(size), **mesh.first(), **mesh.again()})
        repeats = bench.pick(100, 10) if size in (_FULL, _SMALL) else bench.pick(20, 5)
        changes = mesh.changes(repeats)
        change_rows += [{"variant": name, **row(what, found)} for what, found in changes.items()]
        if size == _FULL:
            targets += [
                Target(f"{what}, to the last of {size.nodes:,} agents, p99", _p99_ms(changes[what]) / 1e3, LIMIT_S, "s")
                for what in POD_CHANGES
            ]
        mesh.stop()
    return [
        Section("scale", "One controller, by the size of the cluster", _SIZE_COLUMNS, size_rows, [], _NOTES[:1]),
        Section("scale-changes", "From a change to the last agent that it concerns", _CHANGE_COLUMNS, change_rows,
                targets, _NOTES),
    ]  # fmt: skip


IGNORED, RELABELLED = "label no policy looks at", "label policies look at"
CREATED, DELETED = "pod created", "pod deleted"
ONE_POLICY, EVERYWHERE = "policy of one workload", "policy that selects every pod"
POD_CHANGES: Final = (IGNORED, RELABELLED, CREATED, DELETED)


@dataclass(frozen=True, slots=True)
class Change:
    """What one change caused."""

    agents: int
    messages: int
    size_bytes: int
    first_ms: float
    last_ms: float
    cpu_ms: float
    fleet_ms: float


def row(what: str, found: list[Change]) -> dict[str, Value]:
    return {
        "change": what,
        "samples": len(found),
        "agents": median(change.agents for change in found),
        "messages": median(change.messages for change in found),
        "kilobytes": median(change.size_bytes for change in found) / 1e3,
        "first_ms": median(change.first_ms for change in found),
        "p50_ms": median(change.last_ms for change in found),
        "p99_ms": _p99_ms(found),
        "cpu_ms": median(change.cpu_ms for change in found),
        "fleet_ms": median(change.fleet_ms for change in found),
    }


def _p99_ms(found: list[Change]) -> float:
    return percentile([change.last_ms for change in found], 99)


class Mesh:
    """A controller on the manifests of a made-up cluster, and its agents."""

    def __init__(self, bench: Workbench, folder: Path, size: Size, *, silent: int = 0) -> None:
        self._bench, self._folder, self.size = bench, folder, size
        (folder / "manifests").mkdir(parents=True)
        (folder / "tls").mkdir(mode=0o700)
        authority = new_authority(datetime.now(UTC), "bench")
        self._serving = folder / "tls" / "serving.pem"
        self._serving.write_bytes(serving_certificate(authority, ["127.0.0.1"], datetime.now(UTC), "bench"))
        self._serving.chmod(0o600)
        (folder / "ca.pem").write_bytes(authority.certificate.public_bytes(Encoding.PEM))
        load_or_create_key(folder / "state" / "token.key")
        for name, text in cluster.files(simulated.objects(size), "objects"):
            replace_file(folder / "manifests" / name, text)
        self._address = f"127.0.0.1:{_free_port()}"
        self.controller = self._start_controller()
        self._fleet = _FleetProcess(bench, folder, {
            "target": self._address, "ca": str(folder / "ca.pem"), "key": str(folder / "state" / "token.key"),
            "names": simulated.node_names(size), "silent": silent,
        })  # fmt: skip

    def first(self) -> dict[str, Value]:
        """Agents that have nothing come to a controller that has read nothing."""
        started = time.monotonic()
        found = self._fleet.ask("synced", timeout_s=_TIMEOUT_S)
        self._expect(found)
        return {
            "read_s": (found["reached_ns"][0] / 1e9) - started,
            "first_s": found["reached_ns"][-1] / 1e9 - started,
            "first_mb": found["size_bytes"] / 1e6,
            "first_cpu_s": cpu_time_ns(self.controller.pid) / 1e9,
            "memory_mb": resident_bytes(self.controller.pid) / 1e6,
            "peak_mb": peak_bytes(self.controller.pid) / 1e6,
        }

    def again(self) -> dict[str, Value]:
        """The controller is killed; the next one is found by all agents with what they have."""
        self._fleet.ask("cut")
        self.controller.kill()
        started = time.monotonic()
        self.controller = self._start_controller()
        found = self._fleet.ask("synced", timeout_s=_TIMEOUT_S)
        self._expect(found)
        return {
            "again_s": found["reached_ns"][-1] / 1e9 - started,
            "again_mb": found["size_bytes"] / 1e6,
            "again_cpu_s": cpu_time_ns(self.controller.pid) / 1e9,
        }

    def changes(self, repeats: int) -> dict[str, list[Change]]:
        """Every kind of change, by turns."""
        found: dict[str, list[Change]] = {}
        kinds = _Changes(self.size)
        self.change(kinds.outset(), self.size.nodes)
        for number in range(repeats):
            for what, objects, at_least in kinds.of(number):
                self._bench.tell(f"scale: {what}: {number + 1} of {repeats}")
                found.setdefault(what, []).append(self.change(objects, at_least))
        return found

    def change(self, objects: dict[str, list[Object]], at_least: int) -> Change:
        """These objects, and no others, are in the named files from now on; waits until nobody gets anything more."""
        self._fleet.ask("gathered", quiet_s=_QUIET_S, timeout_s=_TIMEOUT_S, at_least=0)
        texts = {name: "\n---\n".join(json.dumps(each, indent=1) for each in held) for name, held in objects.items()}
        cpu, fleet_cpu = cpu_time_ns(self.controller.pid), cpu_time_ns(self._fleet.pid)
        started = time.monotonic()
        for name, text in texts.items():
            replace_file(self._folder / "manifests" / name, text + "\n")
        found = self._fleet.ask("gathered", quiet_s=_QUIET_S, timeout_s=_TIMEOUT_S, at_least=at_least)
        reached = [ns / 1e9 - started for ns in found["reached_ns"]] or [0.0]
        self.controller.check()
        return Change(
            agents=found["agents"], messages=found["messages"], size_bytes=found["size_bytes"],
            first_ms=reached[0] * 1e3, last_ms=reached[-1] * 1e3,
            cpu_ms=(cpu_time_ns(self.controller.pid) - cpu) / 1e6,
            fleet_ms=(cpu_time_ns(self._fleet.pid) - fleet_cpu) / 1e6,
        )  # fmt: skip

    def stop(self) -> None:
        self._fleet.stop()
        self.controller.stop()

    def _expect(self, found: dict[str, Any]) -> None:
        self.controller.check()
        if found["synced"] != self.size.nodes:
            what = f"{found['synced']} of {self.size.nodes} agents have a revision: {found['failures']}"
            raise BenchError(f"{what}; {self.controller.last_lines()}", where="scale")

    def _start_controller(self) -> Process:
        argv = [meshbridge(), "controller", "--manifests", str(self._folder / "manifests")]
        argv += ["--state-dir", str(self._folder / "state"), "--listen", self._address, "--log-level", "warning"]
        argv += ["--tls-cert", str(self._serving), "--tls-key", str(self._serving)]
        process = start(self._bench.stack, argv, self._folder / "controller.log")
        process.name = "controller"
        return process


class _Changes:
    """What is changed, as the contents of single files; ``outset`` has the state that they start from."""

    def __init__(self, size: Size) -> None:
        self._size = size
        self._random = Random(9)
        self._first = size.pods  # pods beside those of the cluster

    def outset(self) -> dict[str, list[Object]]:
        return {
            "moving.yaml": [self._pod(0, 0)],
            "coming.yaml": [],
            "policy.yaml": [self._policy(8080)],
            "everywhere.yaml": [simulated.everywhere(8080)],
        }

    def of(self, number: int) -> Iterator[tuple[str, dict[str, list[Object]], int]]:
        """Each kind of change, its files, and how many agents it reaches at least."""
        every = self._size.nodes
        node = self._random.randrange(self._size.nodes)
        port = 9000 + number
        rollout = f"rollout-{number}"
        yield IGNORED, {"moving.yaml": [self._pod(0, number, rollout=rollout)]}, 1
        yield RELABELLED, {"moving.yaml": [self._pod(0, number + 1, rollout=rollout)]}, 1
        yield CREATED, {"coming.yaml": [self._pod(1 + number % 50, number, node)]}, every
        yield DELETED, {"coming.yaml": []}, every
        yield ONE_POLICY, {"policy.yaml": [self._policy(port)]}, 1
        yield EVERYWHERE, {"everywhere.yaml": [simulated.everywhere(port)]}, every

    def _pod(self, index: int, state: int, node: int = 0, rollout: str = "") -> Object:
        """A pod of the first workloads; policies look at the label with ``state``, and not at that with ``rollout``."""
        made = simulated.pod(self._size, index, node, {"app": f"app-{state % 40}", simulated.IGNORED: rollout})
        name = f"moving-{index}"
        made["metadata"] |= {"name": name, "uid": f"uid-{name}"}
        address = f"10.255.0.{1 + index}"
        made["status"] |= {"podIP": address, "podIPs": [{"ip": address}]}
        return made

    def _policy(self, port: int) -> Object:
        made = simulated.policy(self._size, 7, Random(1), port)
        made["metadata"]["name"] = "changing"
        return made


class _FleetProcess:
    def __init__(self, bench: Workbench, folder: Path, told: dict[str, Any]) -> None:
        self._log = folder / "fleet.log"
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "meshbridge.bench.fleet", json.dumps(told)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        bench.stack.callback(self.stop)

    @property
    def pid(self) -> int:
        return self._child.pid

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._child.stdin.flush()
        if not select.select([self._child.stdout], [], [], _TIMEOUT_S + 30)[0]:
            raise BenchError(f"the agents do not answer to {do}", where="scale")
        line = self._child.stdout.readline()
        if not line:
            raise BenchError(f"the agents ended: {self._log.read_text()[-400:]}", where="scale")
        return json.loads(line)

    def stop(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
