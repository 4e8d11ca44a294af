"""The machine a run was made on, and keeping measurements to one of its cores."""

from __future__ import annotations

import os
import platform
import resource
from contextlib import suppress
from pathlib import Path

_SCHEDSTAT = "/proc/{pid}/task/{tid}/schedstat"
_STAT_UTIME = 11  # counted from the field after the command's name


def describe() -> dict[str, str]:
    """What figures depend on: processor, cores, kernel, and how busy the machine was when the run began."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "virtual": "yes" if any("hypervisor" in line for line in _lines("/proc/cpuinfo")) else "no",
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": platform.python_version(),
    }


def measured_core() -> int:
    """The core everything measured is pinned to: the last one, since interrupts tend to go to the first."""
    return max(os.sched_getaffinity(0))


def leave_core(core: int) -> None:
    """Keep this process, and what it starts from now on, off the measured core where there is another."""
    others = os.sched_getaffinity(0) - {core}
    if others:
        os.sched_setaffinity(0, others)


def come_first() -> None:
    """This process is scheduled before others of the machine, as what it starts is."""
    with suppress(OSError):  # no autogroups: then the priority alone decides
        Path("/proc/self/autogroup").write_text("-20")
    os.nice(-20)


def cpu_time_ns(pid: int) -> int:
    """CPU time of all threads of a process that still run, user and system, in scheduler precision.

    Packets that a process sends over a veth are carried to the receiving socket in the sender's context, so their
    softirq time is in here; what the kernel put off is in ``deferred_softirq_ns``.
    """
    total = 0
    for tid in os.listdir(f"/proc/{pid}/task"):
        try:
            total += int(Path(_SCHEDSTAT.format(pid=pid, tid=tid)).read_text().split()[0])
        except FileNotFoundError:
            continue  # the thread ended between listing and reading
    return total


def user_time_ns(pid: int) -> int:
    """CPU time a process spent in user space, as the kernel splits it by its ticks: good over seconds, not over one."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[_STAT_UTIME]) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def children_cpu_ns() -> int:
    """CPU time of this process's children that have ended and been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return int((used.ru_utime + used.ru_stime) * 1e9)


def deferred_softirq_ns(core: int) -> int:
    """CPU time of the core's ksoftirqd: network work put off from the processes that caused it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _comm(entry) == f"ksoftirqd/{core}":
            return cpu_time_ns(int(entry.name))
    return 0


def resident_bytes(pid: int) -> int:
    """VmRSS of a process."""
    for line in _lines(f"/proc/{pid}/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_bytes(pid: int) -> int:
    """VmHWM of a process: the most it ever had resident."""
    for line in _lines(f"/proc/{pid}/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _comm(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
