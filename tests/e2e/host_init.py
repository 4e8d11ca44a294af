"""The first process of a host that a test makes: builds its namespaces and its root, then only reaps.

Run by host.py as ``python3 host_init.py SETTINGS``, SETTINGS being JSON. Prints its pid, as this machine sees it, when
the host is ready. When it ends, by whatever means, the kernel ends every process of the host, and its network, mounts
and pinned BPF objects go with them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x20000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x8000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG = 1
# The kubelet sets these, and they are the whole machine's: it gets files of its own to write.
MACHINE_WIDE_SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
libc = ctypes.CDLL(None, use_errno=True)


def main(settings: dict[str, Any]) -> None:
    if not settings["lives_on"]:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for cgroup in settings["cgroups"]:
        Path(cgroup, "cgroup.procs").write_text("0")
    everything = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if libc.unshare(everything):
        raise OSError(ctypes.get_errno(), "unshare")
    is_ready, says_ready = os.pipe()
    pid = os.fork()
    if pid:
        os.close(says_ready)
        if os.read(is_ready, 1):
            print(pid, flush=True)
            os.close(1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.close(1)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    build_root(settings)
    os.write(says_ready, b"!")
    reap()


def build_root(settings: dict[str, Any]) -> None:
    directory = Path(settings["directory"])
    root = directory / "root"
    for each in ("root", "upper", "work"):
        (directory / each).mkdir(exist_ok=True)
    call("mount", "--make-rprivate", "/")
    layers = f"lowerdir={settings['tree']},upperdir={directory}/upper,workdir={directory}/work"
    call("mount", "-t", "overlay", "-o", layers, "overlay", root)
    call("mount", "-t", "proc", "proc", root / "proc")
    call("mount", "-t", "sysfs", "sysfs", root / "sys")
    call("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", root / "sys/fs/cgroup")
    for name, kind, options in settings["hierarchies"]:
        (root / "sys/fs/cgroup" / name).mkdir()
        call("mount", "-t", kind, "-o", options, kind, root / "sys/fs/cgroup" / name)
    call("mount", "-t", "bpf", "bpf", root / "sys/fs/bpf")
    call("mount", "--bind", "/dev", root / "dev")
    call("mount", "-t", "devpts", "-o", "newinstance,ptmxmode=666,mode=620", "devpts", root / "dev/pts")
    call("mount", "-t", "tmpfs", "tmpfs", root / "dev/shm")
    call("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", root / "run")
    for number, name in enumerate(MACHINE_WIDE_SYSCTLS):
        if (root / "proc/sys" / name).exists():
            own = directory / f"sysctl-{number}"
            own.write_text(Path("/proc/sys", name).read_text())
            call("mount", "--bind", own, root / "proc/sys" / name)
    for source, target, mode in settings["binds"]:
        place = root / target.lstrip("/")
        if Path(source).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        call("mount", "--bind", source, place)
        call("mount", "-o", f"remount,bind,{mode}", place)
    (root / "etc/hostname").write_text(f"{settings['name']}\n")
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{settings['hosts']}")
    (root / "etc/resolv.conf").write_text("")
    call("hostname", settings["name"])
    call("ip", "link", "set", "lo", "up")
    (root / ".old").mkdir(exist_ok=True)
    call("pivot_root", root, root / ".old")
    os.chdir("/")
    call("umount", "-l", "/.old")
    call("mount", "--make-rshared", "/")  # the kubelet's and privileged pods' mounts spread as on any node


def reap() -> None:
    """Whatever loses its parent becomes a child of this process; forget those that end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        signal.sigtimedwait({signal.SIGCHLD}, 10)


def call(*command: str | Path) -> None:
    subprocess.run([str(each) for each in command], check=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
