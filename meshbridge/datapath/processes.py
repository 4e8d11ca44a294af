"""Which processes are in a network namespace, as whom they run, and who listens there.

Nothing a process can choose is trusted to be text: names are bytes of its choice, and it may end between two reads. A
process is held by its directory in /proc, so that a successor of the same number is never read in its place.

Spec: proc_pid_status(5), proc_pid_stat(5); sock_diag(7), inet_diag.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import struct
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshbridge.bypass.owners import Process
from meshbridge.datapath import netlink

PROC: Final = Path("/proc")
MAX_LISTENERS: Final = 4096
MAX_DESCRIPTORS: Final = 4096
"""Of one process, the lowest: a server that has more connections than these has made its listening sockets before."""

_SOCK_DIAG_BY_FAMILY: Final = 20
_TCP, _LISTEN = 6, 1 << 10
_BYTECODE, _CGROUP_ID = 1, 21
_AT_LEAST, _AT_MOST = 2, 3
_REQUEST: Final = struct.Struct("=BBBxI48s")
_ANSWER_BYTES, _PORT_AT, _INODE_AT = 72, 4, 68
_STARTED_FIELD: Final = 22
_UNPRINTED: Final = re.compile(rb"[^A-Za-z0-9 ._:/@+,=-]")
_MAX_READ_BYTES: Final = 1 << 16
_TABLES: Final = ("net/tcp", "net/tcp6", "net/udp", "net/udp6")
_TABLE_INODE: Final = 9
MAX_ROWS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening TCP socket; ``cgroup`` is the number of the control group that made it, 0: not known."""

    port: int
    inode: int
    cgroup: int


@dataclass(frozen=True, slots=True)
class OwnedSocket:
    """A socket that a process has open: as whom it was made."""

    inode: int
    uid: int
    gid: int


def listeners(ports: Collection[int]) -> list[Listener]:
    """Who listens on these TCP ports in the calling thread's namespace, of either family.

    Raises:
        OSError: the kernel does not say.
    """
    found: dict[int, Listener] = {}
    if not ports:
        return []
    for family in (socket.AF_INET, socket.AF_INET6):
        header = _REQUEST.pack(family, _TCP, 0, _LISTEN, bytes(48))
        payload = header + netlink.attribute(_BYTECODE, _between(min(ports), max(ports)))
        answers = netlink.ask(_SOCK_DIAG_BY_FAMILY, payload, netlink.DUMP, protocol=netlink.NETLINK_SOCK_DIAG)
        for _, body in answers:
            if len(body) < _ANSWER_BYTES:
                continue
            (port,) = struct.unpack_from(">H", body, _PORT_AT)
            (inode,) = struct.unpack_from("=I", body, _INODE_AT)
            if port in ports and inode:
                cgroup = dict(netlink.attributes(body, _ANSWER_BYTES)).get(_CGROUP_ID, b"")
                found[inode] = Listener(port, inode, int.from_bytes(cgroup[:8], sys.byteorder))
            if len(found) >= MAX_LISTENERS:
                break
    return list(found.values())


def _between(first: int, last: int) -> bytes:
    """A program for the kernel: the socket's own port is one of these."""
    step = struct.Struct("=BBH")
    return (
        step.pack(_AT_LEAST, 8, 20) + step.pack(0, 0, first) + step.pack(_AT_MOST, 8, 12) + step.pack(0, 0, last)
    )  # yes: on to the next condition; no: past the end, which refuses


def processes_in(namespaces: Collection[int], proc: Path = PROC) -> dict[int, list[int]]:
    """The numbers of the processes in these network namespaces (by inode): one look at every process there is."""
    found: dict[int, list[int]] = {}
    if not namespaces:
        return found
    with contextlib.suppress(OSError), os.scandir(proc) as entries:
        for entry in entries:
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                inode = os.stat(f"{entry.path}/ns/net").st_ino
                if inode in namespaces:
                    found.setdefault(inode, []).append(int(entry.name))
    return found


@contextlib.contextmanager
def held(pid: int, namespace: int, proc: Path = PROC) -> Iterator[HeldProcess | None]:
    """A process for as long as it is looked at; None when it ended, or is in another namespace by now."""
    try:
        handle = os.open(proc / str(pid), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        process = HeldProcess(pid, handle)
        yield process if process.namespace() == namespace else None
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class HeldProcess:
    """A process by an open directory. What is asked of one that has ended is empty, or None."""

    pid: int
    handle: int

    def namespace(self) -> int | None:
        """The inode of its network namespace."""
        with contextlib.suppress(OSError):
            return os.stat("ns/net", dir_fd=self.handle).st_ino
        return None

    def ids(self) -> tuple[frozenset[int], frozenset[int], int] | None:
        """All its user and group ids but the supplementary ones, and its parent."""
        fields = dict(line.partition(b":")[::2] for line in self._read("status").split(b"\n"))
        try:
            uids, gids = (frozenset(map(int, fields[name].split())) for name in (b"Uid", b"Gid"))
            return uids, gids, int(fields[b"PPid"])
        except (KeyError, ValueError):
            return None

    def process(self, own_container: str) -> Process | None:
        """Everything about it."""
        ids = self.ids()
        name, _, rest = self._read("stat").rpartition(b")")
        fields = rest.split()
        if ids is None or len(fields) <= _STARTED_FIELD - 3:
            return None
        command = _UNPRINTED.sub(b"?", name.partition(b"(")[2]).decode("ascii")
        container = self.container()
        container = "" if container == own_container else container
        return Process(self.pid, ids[2], int(fields[_STARTED_FIELD - 3]), command, ids[0], ids[1], container)

    def container(self) -> str:
        """What its control groups are called, all of them."""
        return self._read("cgroup").decode("utf-8", "replace")

    def map_of(self, kind: str) -> tuple[tuple[int, int, int], ...]:
        """Its user namespace's ids (``uid`` or ``gid``): first inside, first as we see it, how many."""
        rows = [tuple(map(int, line.split())) for line in self._read(f"{kind}_map").splitlines()]
        return tuple((row[0], row[1], row[2]) for row in rows if len(row) == 3)

    def descriptors(self, most: int = MAX_DESCRIPTORS) -> Iterator[OwnedSocket | None]:
        """The lowest ``most`` descriptors: as whom each socket was made; None is no socket."""
        with contextlib.suppress(OSError):
            directory = os.open("fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.handle)
            try:
                with os.scandir(directory) as entries:
                    for entry in itertools.islice(entries, most):
                        yield _owned(directory, entry.name)
            finally:
                os.close(directory)

    def sends_by(self, inode: int) -> bool:
        """Whether a socket is of TCP or UDP, in the process's network namespace."""
        wanted = str(inode).encode()
        for name in _TABLES:
            with contextlib.suppress(OSError), open(name, "rb", opener=self._opener) as table:
                for line in itertools.islice(table, MAX_ROWS):
                    fields = line.split()
                    if len(fields) > _TABLE_INODE and fields[_TABLE_INODE] == wanted:
                        return True
        return False

    def _opener(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC, dir_fd=self.handle)

    def _read(self, name: str) -> bytes:
        with contextlib.suppress(OSError):
            handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.handle)
            try:
                return os.read(handle, _MAX_READ_BYTES)
            finally:
                os.close(handle)
        return b""


def _owned(directory: int, name: str) -> OwnedSocket | None:
    with contextlib.suppress(OSError):
        # a file of the process's own file system could keep whoever asks for its owner waiting
        if os.readlink(name, dir_fd=directory).startswith("socket:"):
            found = os.stat(name, dir_fd=directory)
            return OwnedSocket(found.st_ino, found.st_uid, found.st_gid)
    return None


def own_container(proc: Path = PROC) -> str:
    """What the control groups of this process are called: who has the same is not told apart by them."""
    with contextlib.suppress(OSError):
        return (proc / "self/cgroup").read_text("utf-8", "replace")
    return ""


def translated(ids: Iterable[int], rows: Iterable[tuple[int, int, int]]) -> frozenset[int]:
    """Ids of a user namespace as they are seen from here."""
    maps = tuple(rows)
    return frozenset(
        outside + number - inside
        for number in ids
        for inside, outside, count in maps
        if inside <= number < inside + count
    )
