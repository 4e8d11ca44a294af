"""Processes of the sample mesh: started detached in a namespace, known by pid and start time, ended by nothing else."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import NETNS


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process for ever: a pid alone is reused, a pid with its start time is not."""

    pid: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        state, start_ticks = _stat(self.pid)
        return start_ticks == self.start_ticks and state not in ("Z", "X", "")


@dataclass(frozen=True, slots=True)
class Command:
    """What to run and where. ``mounts`` are bound (source, target) in a mount namespace of its own, as root."""

    argv: Sequence[str]
    netns: str
    log: Path
    uid: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[tuple[Path, Path]] = ()

    def full_argv(self) -> list[str]:
        """The command line that enters the namespace, binds the mounts, drops privileges and runs ``argv``.

        Every step execs the next, so the pid stays the same. ``ip netns exec`` would hide bpffs.
        """
        argv = ["nsenter", f"--net={NETNS / self.netns}"]
        if self.mounts:
            binds = [f'mount --bind "${2 * n + 1}" "${2 * n + 2}"' for n in range(len(self.mounts))]
            script = " && ".join([*binds, f"shift {2 * len(self.mounts)}", 'exec "$@"'])
            paths = [str(path) for mount in self.mounts for path in mount]
            argv += ["unshare", "--mount", "--propagation=slave", "sh", "-c", script, "sh", *paths]
        if self.uid:
            argv += ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]
            argv += ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
        return [*argv, *self.argv]


def identify(pid: int) -> ProcessId:
    """The process that has ``pid`` now."""
    _state, start_ticks = _stat(pid)
    return ProcessId(pid, start_ticks)


def start(command: Command) -> ProcessId:
    """Start ``command`` in a session of its own, its output appended to its log; it outlives this process."""
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("ab") as log:
        process = subprocess.Popen(
            command.full_argv(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**_base_env(), **command.env},
        )
    started = identify(process.pid)
    # collects it when it ends, so that no zombie stays
    threading.Thread(target=process.wait, name=f"wait-{process.pid}", daemon=True).start()
    return started


def run(command: Command, timeout_s: float, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run ``command`` to its end and return what it wrote."""
    return subprocess.run(
        command.full_argv(),
        input=stdin,
        capture_output=True,
        timeout=timeout_s,
        env={**_base_env(), **command.env},
        check=False,
    )


def end(processes: Iterable[ProcessId], grace_s: float = 3.0) -> None:
    """End every process of ``processes`` that still runs: asked first, killed after ``grace_s``."""
    running = [process for process in processes if process.alive]
    for sign, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        running = [process for process in running if send(process, sign)]
        wait_ended(running, patience_s)
        running = [process for process in running if process.alive]
    if running:
        raise DemoError(f"processes {[process.pid for process in running]} do not end", fix="look at them with ps")


def send(process: ProcessId, sign: signal.Signals) -> bool:
    """Send ``sign`` to exactly this process; False when it is gone."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not process.alive:
            return False
        signal.pidfd_send_signal(handle, sign)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def wait_ended(processes: Iterable[ProcessId], timeout_s: float) -> bool:
    """Wait until all have ended; False when some still run after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        try:
            handle = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        try:
            while process.alive:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                select.select([handle], [], [], left_s)
        finally:
            os.close(handle)
    return True


def in_netns(names: Iterable[str]) -> list[ProcessId]:
    """Every process whose network namespace is one of ``names``; those that run there were not recorded."""
    inodes = set()
    for name in names:
        try:
            inodes.add((NETNS / name).stat().st_ino)
        except FileNotFoundError:
            continue
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                inode = (entry / "ns" / "net").stat().st_ino
            except OSError:  # ended meanwhile, or a zombie without namespaces
                continue
            if inode in inodes:
                found.append(identify(int(entry.name)))
    return found


def _stat(pid: int) -> tuple[str, int]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "", -1
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _base_env() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
