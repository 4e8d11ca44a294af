"""A host of the cluster: Debian in namespaces of its own, as a container would be, with its own cgroups.

Nothing of it is bound, mounted or registered on the machine: its network, mounts, processes and pinned BPF objects
live in its namespaces and go with its first process. On the machine's disk it keeps one directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

INIT = Path(__file__).parent / "host_init.py"
NAME = os.environ.get("MESHBRIDGE_E2E_NAME", "run")
"""Of the cluster: two of different names do not meet."""
CGROUP = f"meshbridge-e2e-{NAME}"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STOPPED_S = 20


@dataclass(frozen=True)
class Bind:
    """A file or directory of the machine that the host sees."""

    source: Path
    target: str
    mode: str = "ro"


@dataclass(frozen=True)
class Host:
    name: str
    directory: Path
    pid: int
    """Of its first process, as the machine counts."""

    @property
    def root(self) -> Path:
        """Its file system, to be read and written from outside."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    def argv(self, *command: str | Path) -> list[str]:
        """The command as it runs inside."""
        groups = [str(each) for each in _cgroups(self.name)]
        enter = ["nsenter", "-t", str(self.pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
        environment = ["env", "-i", f"PATH={PATH}", "HOME=/root", "LANG=C.UTF-8"]
        join = 'while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs"; shift; done; shift; exec "$@"'
        return ["sh", "-c", join, "sh", *groups, "--", *enter, *environment, *(str(each) for each in command)]

    def in_network(self, *command: str | Path) -> list[str]:
        """The machine's own program, in the host's network."""
        return ["nsenter", "-t", str(self.pid), "--net", *(str(each) for each in command)]

    def run(
        self, *command: str | Path, stdin: str = "", timeout_s: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside until it ends; when ``check`` is set, an AssertionError says what it printed."""
        return run(self.argv(*command), stdin=stdin, timeout_s=timeout_s, check=check, where=self.name)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(mode)

    def is_up(self) -> bool:
        """Whether its first process runs; another that got the same pid later is not taken for it."""
        try:
            status, groups = (Path(f"/proc/{self.pid}/{each}").read_text() for each in ("status", "cgroup"))
        except (FileNotFoundError, ProcessLookupError):
            return False
        numbers = next((each.split()[1:] for each in status.splitlines() if each.startswith("NSpid:")), [])
        return numbers[-1:] == ["1"] and f"/{CGROUP}/{self.name}\n" in groups and "State:\tZ" not in status

    # Services: long-running processes, known by name, with their output in ``logs``.

    def start(self, service: str, *command: str | Path) -> None:
        """Start a process that runs until it is stopped."""
        self.logs.mkdir(exist_ok=True)
        with (self.logs / f"{service}.log").open("ab") as log:
            outside = subprocess.Popen(
                self.argv(*command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        _children_of_ours.append(outside)
        state = {"outside": outside.pid, "command": [str(each) for each in command]}
        self._state(service).parent.mkdir(exist_ok=True)
        self._state(service).write_text(json.dumps(state))

    def stop(self, service: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End a service; it is gone when this returns."""
        pid = self.pid_of(service)
        if not pid:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
        until = time.monotonic() + STOPPED_S
        while self.pid_of(service):
            if time.monotonic() > until:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def start_again(self, service: str) -> None:
        """Start a service that was stopped, as it was started before."""
        self.start(service, *json.loads(self._state(service).read_text())["command"])

    def pid_of(self, service: str) -> int:
        """The machine's pid of a service's process; 0 when it does not run."""
        _reap_ours()
        try:
            outside = json.loads(self._state(service).read_text())["outside"]
            found = Path(f"/proc/{outside}/task/{outside}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return int(found[0]) if found else 0

    def log(self, service: str, lines: int = 40) -> str:
        path = self.logs / f"{service}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def _state(self, service: str) -> Path:
        return self.directory / "services" / f"{service}.json"

    # Its life.

    def shut_down(self) -> None:
        """End everything that runs in it, as pulling the plug would. Its directory stays."""
        with contextlib.suppress(ProcessLookupError):
            if self.is_up():
                os.kill(self.pid, signal.SIGKILL)
        until = time.monotonic() + STOPPED_S
        while self.is_up() and time.monotonic() < until:
            time.sleep(0.05)
        _reap_ours()
        remove_cgroups(self.name)

    def saved(self) -> dict[str, object]:
        return {**asdict(self), "directory": str(self.directory)}


def boot(
    name: str, directory: Path, tree: Path, binds: Iterable[Bind] = (), *, hosts: str = "", lives_on: bool = False
) -> Host:
    """A host on the Debian of ``tree``, which stays as it is, with no network but its loopback.

    It ends with this process unless it ``lives_on``. In a ``directory`` used before, it finds its files again.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings = {
        "name": name, "directory": str(directory), "tree": str(tree), "lives_on": lives_on, "hosts": hosts,
        "binds": [(str(each.source), each.target, each.mode) for each in binds],
        "cgroups": [str(each) for each in _make_cgroups(name)], "hierarchies": _hierarchies(),
    }  # fmt: skip
    with (directory / "init.log").open("ab") as log:
        init = subprocess.Popen(
            [sys.executable, str(INIT), json.dumps(settings)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True, text=True,
        )  # fmt: skip
    _children_of_ours.append(init)
    assert init.stdout is not None
    told = init.stdout.readline().strip()
    assert told, f"{name} did not start: {(directory / 'init.log').read_text()[-2000:]}"
    return Host(name, directory, int(told))


def run(
    command: Sequence[str | Path],
    *,
    stdin: str = "",
    timeout_s: float = 60,
    check: bool = True,
    where: str = "",
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command until it ends; when ``check`` is set, an AssertionError says what it printed."""
    shown = f"{where}: {' '.join(str(each) for each in command[-12:])}"
    try:
        done = subprocess.run(
            [str(each) for each in command], input=stdin, capture_output=True, text=True, errors="replace",
            timeout=timeout_s, env=None if env is None else dict(env),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not done after {timeout_s} s: {shown}") from error
    if check and done.returncode:
        raise AssertionError(f"{shown} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done


def connect(hub: Host, bridge: str, spoke: Host, address: str, gateway: str) -> None:
    """Plug a host's eth0 into a bridge of another."""
    for command in (
        ["ip", "link", "add", f"to-{spoke.name}"[:15], "type", "veth", "peer", "name", "eth0", "netns", str(spoke.pid)],
        ["ip", "link", "set", f"to-{spoke.name}"[:15], "master", bridge, "up"],
    ):
        run(hub.in_network(*command), where=hub.name)
    for command in (
        ["ip", "address", "add", address, "dev", "eth0"],
        ["ip", "link", "set", "eth0", "up"],
        ["ip", "route", "add", "default", "via", gateway],
    ):
        run(spoke.in_network(*command), where=spoke.name)


_children_of_ours: list[subprocess.Popen[bytes] | subprocess.Popen[str]] = []


def _reap_ours() -> None:
    _children_of_ours[:] = [each for each in _children_of_ours if each.poll() is None]


def _hierarchies() -> list[tuple[str, str, str]]:
    """The machine's cgroup hierarchies: directory under /sys/fs/cgroup, file system, mount options."""
    found = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind in ("cgroup", "cgroup2") and place.startswith("/sys/fs/cgroup/"):
            kept = [each for each in options.split(",") if each not in ("rw", "relatime", "nosuid", "nodev", "noexec")]
            named = any(each.startswith("name=") for each in kept)
            shown = ",".join(["none", *kept] if named else kept) if kind == "cgroup" else "rw"
            found.append((Path(place).name, kind, shown))
    return found


def _cgroups(name: str) -> list[Path]:
    return [Path("/sys/fs/cgroup", each, CGROUP, name) for each, _, _ in _hierarchies()]


def _make_cgroups(name: str) -> list[Path]:
    groups = _cgroups(name)
    for group in groups:
        for each in (group.parent, group):
            each.mkdir(exist_ok=True)
            for kind in ("cpus", "mems"):  # a cpuset takes no process before it has these
                if (each / f"cpuset.{kind}").exists():
                    (each / f"cpuset.{kind}").write_text((each.parent / f"cpuset.{kind}").read_text())
    return groups


def remove_cgroups(name: str) -> None:
    """Remove a host's cgroups and those its pods made; its processes have ended."""
    until = time.monotonic() + STOPPED_S
    while left := [group for group in _cgroups(name) if group.exists()]:
        for group in left:
            for place, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):  # a process that still ends holds it a moment longer
                    os.rmdir(place)
            with contextlib.suppress(OSError):
                os.rmdir(group.parent)
        if time.monotonic() > until:
            raise AssertionError(f"cgroups that will not go: {', '.join(str(each) for each in left)}")
        time.sleep(0.05)


def remove_directory(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
