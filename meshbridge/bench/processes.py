"""Processes a measurement needs: started in a namespace, pinned, and ended by pid whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from meshbridge.bench.errors import BenchError
from meshbridge.bench.network import NETNS, Netns

STOP_TIMEOUT_S = 3.0
PYTHON = sys.executable
# Others on the machine make way for what is measured. With autogroups a priority counts within its session only, and
# each session has another of its own.
_FIRST = '{ echo -20 >/proc/self/autogroup; } 2>/dev/null; exec nice -n -20 "$@"'


class Process:
    """A running child. Its output goes to ``log``; ending it is the caller's ``ExitStack``'s task."""

    def __init__(self, argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = Path(argv[0]).name
        self.log = log
        with log.open("ab") as output:
            # A session of its own: Ctrl-C reaches only this process, which then ends its children in order.
            self._child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    def check(self) -> None:
        """Raise BenchError with the end of its log when it has ended."""
        if not self.running:
            raise BenchError(
                f"{self.name} ended with code {self._child.returncode}: {self.last_lines()}", where=str(self.log)
            )

    def last_lines(self, count: int = 3) -> str:
        return " | ".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])

    def kill(self) -> None:
        """End it at once, as kill -9 does."""
        self._child.kill()
        self._child.wait()

    def stop(self) -> None:
        """It has ended afterwards: by SIGTERM, and by SIGKILL if it does not listen."""
        if self._child.poll() is None:
            self._child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(STOP_TIMEOUT_S)
        if self._child.poll() is None:
            self.kill()


def inside(netns: Netns | None, core: int | None, argv: Sequence[str]) -> list[str]:
    """The command line that runs ``argv`` in a namespace, on one core and before others; it ends with the bench.

    Every step execs, so the pid stays. ``ip netns exec`` would hide bpffs.
    """
    enter = ["nsenter", f"--net={NETNS / netns.name}"] if netns is not None else []
    pin = ["taskset", "-c", str(core)] if core is not None else []
    return ["setpriv", "--pdeathsig", "KILL", "--", *enter, "sh", "-c", _FIRST, "sh", *pin, *argv]


def start(
    stack: ExitStack,
    argv: Sequence[str],
    log: Path,
    *,
    netns: Netns | None = None,
    core: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Process:
    """Start a process that ends with ``stack``."""
    process = Process(inside(netns, core, argv), log, environment or {})
    process.name = Path(argv[0]).name
    stack.callback(process.stop)
    return process


def run(
    argv: Sequence[str], *, netns: Netns | None = None, core: int | None = None, stdin: str = "", timeout_s: float = 60
) -> str:
    """The standard output of a command that has to succeed."""
    command = inside(netns, core, argv)
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"did not end in {timeout_s:g} s", where=" ".join(command)) from None
    except FileNotFoundError:
        raise BenchError("not installed", where=argv[0], fix="run scripts/setup dev") from None
    if done.returncode:
        raise BenchError(done.stderr.strip()[-400:] or f"exit code {done.returncode}", where=" ".join(command))
    return done.stdout


def wait_for_port(netns: Netns, host: str, port: int, process: Process, timeout_s: float = 10) -> None:
    """Something accepts on the port, or BenchError."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        process.check()
        with netns.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.settimeout(0.5)
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.02)
    raise BenchError(f"nothing accepts on {host}:{port} after {timeout_s:g} s", where=process.name)


def interrupt_on_terminate() -> None:
    """Make SIGTERM unwind like Ctrl-C, so that everything is taken down."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
