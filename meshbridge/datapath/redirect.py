"""Reading which redirect rules really are in a pod's network namespace: legacy and nft iptables, native nftables.

The tools run in the pod's *network* namespace only, with the node's own binaries, bounded in time and output. What
cannot be read is a problem in the answer, and then nothing counts as captured; it is never taken for "no rules".

A namespace whose nftables generation did not change is not read again, so a poll costs one netlink message; legacy
tables, which have no generation, are read every time where there are any, and so is all on kernels before 5.14.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from meshbridge.bypass.iptables import parse_iptables_save
from meshbridge.bypass.nft import parse_nft_json
from meshbridge.bypass.rules import MAX_TEXT_BYTES, RuleSet, SeenRules
from meshbridge.errors import MeshBridgeError
from meshbridge.identity.model import IpFamily

TOOL_TIMEOUT_S: Final = 3.0
NAMESPACE_DIRECTORIES: Final = (Path("/run/netns"), Path("/run/docker/netns"))
_CLONE_NEWNET: Final = 0x40000000
_NS_GET_NSTYPE: Final = 0xB703
_NETLINK_ROUTE, _NETLINK_NETFILTER = 0, 12
_RTM_NEWNSID, _RTM_GETNSID = 88, 90
_NETNSA_NSID, _NETNSA_FD = 1, 3
_NFT, _NFT_MSG_GETTABLE, _NFT_MSG_GETGEN = 10, 1, 16
_NLMSG_ERROR, _NLMSG_DONE, _NLM_F_DUMP = 2, 3, 0x300
_NFTA_TABLE_NAME: Final = 1
_SO_NETNS_COOKIE: Final = 71
_NFT_FAMILIES: Final = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_IPTABLES_NAMES: Final = frozenset({"raw", "mangle", "nat", "filter", "security"})
_MAX_TABLES: Final = 4096
_NLM_F_REQUEST: Final = 1
_NFTA_GEN_ID: Final = 1
_FAMILY_TOOLS: Final = {IpFamily.IPV4: "iptables", IpFamily.IPV6: "ip6tables"}
_LEGACY_TABLES: Final = {IpFamily.IPV4: "ip_tables_names", IpFamily.IPV6: "ip6_tables_names"}
_NFT_FAMILY: Final = {IpFamily.IPV4: "ip", IpFamily.IPV6: "ip6"}
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


class NamespaceError(MeshBridgeError):
    """A network namespace cannot be entered: it is gone, or the path is not one."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a tool printed, or why that cannot be used."""

    text: str = ""
    problem: str = ""


@dataclass(slots=True)
class _Kept:
    fingerprint: tuple[object, ...]
    seen: SeenRules


@dataclass(slots=True)
class RedirectReader:
    """Reads namespaces, and keeps the last answer of each while nothing changed in it."""

    timeout_s: float = TOOL_TIMEOUT_S
    _kept: dict[str, _Kept] = field(default_factory=dict)

    def read(self, netns: str | Path) -> SeenRules:
        """The rules in a namespace now.

        Raises:
            NamespaceError: The namespace cannot be entered.
        """
        path = os.fspath(netns)
        return in_namespace(path, lambda: self._read(path))

    def forget(self, netns: str | Path) -> None:
        """Drop what is kept of a namespace that is gone."""
        self._kept.pop(os.fspath(netns), None)

    def _read(self, path: str) -> SeenRules:
        """Runs inside of the namespace."""
        fingerprint = (_cookie(), generation())
        kept = self._kept.get(path)
        if kept is None or kept.fingerprint != fingerprint or None in fingerprint:
            nft = self._read_nft()
            self._kept.pop(path, None)
            # what changed while it was read is read again at the next call
            if not nft.problems and fingerprint[1] == generation():
                self._kept[path] = _Kept(fingerprint, nft)
        else:
            nft = kept.seen
        legacy = self._read_legacy()
        return SeenRules(nft.rule_sets + legacy.rule_sets, nft.problems + legacy.problems)

    def _read_nft(self) -> SeenRules:
        """What iptables-nft wrote, through its own tool, which knows its extensions; all else as nft prints it."""
        tables = nft_tables()
        rule_sets: list[RuleSet] = []
        answers: list[_Answer] = []
        printed: set[tuple[str, str]] = set()
        for family, tool in _FAMILY_TOOLS.items():
            own = _NFT_FAMILY[family]
            if tables is not None and not any(kind == own and name in _IPTABLES_NAMES for kind, name in tables):
                continue
            answer = self._run(f"{tool}-nft-save")
            answers.append(answer)
            text = _whole_tables(answer.text)
            rule_sets.append(parse_iptables_save(text, family, f"{tool}-nft"))
            printed |= {(own, line[1:].strip()) for line in text.splitlines() if line.startswith("*")}
        # a table that has a name of iptables and was not printed whole is, at least in part, somebody else's
        if tables is None or any(table[0] in ("ip", "ip6", "inet") and table not in printed for table in tables):
            native = self._run("nft", "-j", "list", "ruleset")
            answers.append(native)
            if not native.problem:
                rule_sets += [parse_nft_json(native.text, family, printed) for family in IpFamily]
        return _seen(rule_sets, answers)

    def _read_legacy(self) -> SeenRules:
        """Legacy tables have no generation, so where there are any they are read every time."""
        families = [family for family, name in _LEGACY_TABLES.items() if _legacy_tables(name)]
        answers = {family: self._run(f"{_FAMILY_TOOLS[family]}-legacy-save") for family in families}
        rule_sets = [
            parse_iptables_save(answer.text, family, f"{_FAMILY_TOOLS[family]}-legacy")
            for family, answer in answers.items()
        ]
        return _seen(rule_sets, answers.values())

    def _run(self, tool: str, *arguments: str) -> _Answer:
        """Run a tool of the node in the calling thread's namespace."""
        binary = shutil.which(tool, path="/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
        if binary is None:
            return _Answer(problem=f"{tool} is not installed, so the rules it would show are not known")
        with subprocess.Popen(
            [binary, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"LC_ALL": "C"},
            cwd="/",
        ) as process:
            assert process.stdout is not None
            stop = threading.Timer(self.timeout_s, process.kill)
            stop.start()
            try:
                output = process.stdout.read(MAX_TEXT_BYTES + 1)
                if len(output) > MAX_TEXT_BYTES:
                    process.kill()
                status = process.wait()
            finally:
                timed_out = not stop.is_alive()
                stop.cancel()
        if len(output) > MAX_TEXT_BYTES:
            return _Answer(problem=f"{tool} printed more than {MAX_TEXT_BYTES} bytes")
        if timed_out:
            return _Answer(problem=f"{tool} did not end within {self.timeout_s} s")
        if status != 0:
            return _Answer(problem=f"{tool} ended with status {status}")
        return _Answer(output.decode(errors="replace"))


def _whole_tables(text: str) -> str:
    """What iptables-nft-save prints without the tables of which it says that it cannot show all."""
    partly = set(re.findall(r"^# Table `([^']+)'", text, re.MULTILINE))
    kept, table = [], ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        if table not in partly:
            kept.append(line)
    return "\n".join(kept)


def _seen(rule_sets: Iterable[RuleSet], answers: Iterable[_Answer]) -> SeenRules:
    return SeenRules(
        tuple(rules for rules in rule_sets if not rules.empty),
        tuple(answer.problem for answer in answers if answer.problem),
    )


def in_namespace(path: str, action: Callable[[], T]) -> T:
    """What ``action`` returns when run inside of a network namespace; the calling thread stays where it is.

    Raises:
        NamespaceError: The namespace cannot be entered.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            _enter(path)
            results.append(action())
        except BaseException as error:  # handed to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=enter, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _enter(path: str) -> None:
    """Move the calling thread into the namespace."""
    with _opened(path) as handle:
        if _libc.setns(handle, _CLONE_NEWNET) != 0:
            raise NamespaceError(f"cannot be entered: {os.strerror(ctypes.get_errno())}", where=path)


def _legacy_tables(name: str) -> str:
    """The legacy tables of the calling thread's namespace; empty when there are none (or no such module)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/thread-self/net/{name}").read_text()
    return ""


def _cookie() -> bytes | None:
    """What tells the calling thread's namespace from all there were since the machine started; None: not known.

    Neither its name nor its inode does: a pod's successor gets both, and may have as many changes of its rules.

    Spec: include/uapi/asm-generic/socket.h, SO_NETNS_COOKIE (5.14).
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return None


def generation() -> int | None:
    """The nftables generation of the calling thread's namespace: it grows with every change. None: not known.

    Spec: include/uapi/linux/netfilter/nf_tables.h, NFT_MSG_GETGEN.
    """
    for _, attributes in _ask_nft(_NFT_MSG_GETGEN, dump=False) or ():
        value = attributes.get(_NFTA_GEN_ID, b"")
        if len(value) == 4:
            return int(struct.unpack(">I", value)[0])
    return None


def nft_tables() -> frozenset[tuple[str, str]] | None:
    """The nftables tables (family, name) of the calling thread's namespace; None: not known."""
    answer = _ask_nft(_NFT_MSG_GETTABLE, dump=True)
    if answer is None:
        return None
    return frozenset(
        (
            _NFT_FAMILIES.get(family, str(family)),
            attributes.get(_NFTA_TABLE_NAME, b"").rstrip(b"\0").decode("ascii", "replace"),
        )
        for family, attributes in answer
    )


def _ask_nft(kind: int, *, dump: bool) -> list[tuple[int, dict[int, bytes]]] | None:
    """The (family, attributes) of every message nftables answers with; None when it does not answer."""
    body = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
    flags = _NLM_F_REQUEST | (_NLM_F_DUMP if dump else 0)
    header = struct.pack("=IHHII", 16 + len(body), _NFT << 8 | kind, flags, 1, 0)
    found: list[tuple[int, dict[int, bytes]]] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as netlink:
            netlink.settimeout(1.0)
            netlink.send(header + body)
            while True:
                answer = netlink.recv(1 << 16)
                position = 0
                while position + 16 <= len(answer):
                    length, message = struct.unpack_from("=IH", answer, position)
                    if length < 16 or message == _NLMSG_ERROR or len(found) > _MAX_TABLES:
                        return None
                    if message == _NLMSG_DONE:
                        return found
                    part = answer[position : position + length]
                    found.append((part[16] if len(part) > 16 else 0, dict(_attributes(part, 20))))
                    position += (length + 3) & ~3
                if not dump:
                    return found
    except OSError:
        return None


def find_namespaces(wanted: Collection[int], directories: Iterable[Path] = NAMESPACE_DIRECTORIES) -> dict[int, str]:
    """The network namespaces with these numbers, as ``Link.peer_netns`` names them, by a path to each.

    Names given to namespaces are looked at first, then those of processes; numbers that nobody holds a path of are
    missing in the answer.

    Spec: rtnetlink, RTM_GETNSID.
    """
    found: dict[int, str] = {}
    looked_at: set[int] = set()
    for path in _namespace_paths(directories):
        if len(found) == len(wanted):
            break
        with contextlib.suppress(OSError, NamespaceError), _opened(path) as handle:
            inode = os.fstat(handle).st_ino
            if inode in looked_at:
                continue
            looked_at.add(inode)
            number = _number_of(handle)
            if number in wanted:
                found[number] = path
    return found


def host_path(path: str) -> str:
    """A path as a program of the host names it, from here; in a container of the host's PID namespace the host's root
    is that of its first process."""
    with contextlib.suppress(NamespaceError), _opened(path):
        return path
    return f"/proc/1/root{path}"


def namespace_number(path: str) -> int:
    """The number that the namespace at a path has in the calling thread's; -1 when it has none.

    Raises:
        NamespaceError: There is no network namespace at the path.
    """
    with _opened(path) as handle:
        return _number_of(handle)


def namespace_inode(path: str) -> int:
    """What ``/proc/PID/ns/net`` of a process in the network namespace at a path has as its inode.

    Raises:
        NamespaceError: There is no network namespace at the path.
    """
    with _opened(path) as handle:
        return os.fstat(handle).st_ino


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """A descriptor of the network namespace at a path; another kind of file is never waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NamespaceError(f"cannot be opened: {error.strerror}", where=path) from error
    try:
        try:
            kind = fcntl.ioctl(handle, _NS_GET_NSTYPE)
        except OSError as error:
            raise NamespaceError("not a network namespace", where=path) from error
        if kind != _CLONE_NEWNET:
            raise NamespaceError("not a network namespace", where=path)
        yield handle
    finally:
        os.close(handle)


def _namespace_paths(directories: Iterable[Path]) -> Iterator[str]:
    for directory in directories:
        with contextlib.suppress(OSError):
            yield from sorted(str(entry) for entry in directory.iterdir())
    with contextlib.suppress(OSError):
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                yield f"/proc/{entry.name}/ns/net"


def _number_of(handle: int) -> int:
    """The number a namespace has in the calling thread's; -1 when it has none."""
    attribute = struct.pack("=HHI", 8, _NETNSA_FD, handle)
    body = struct.pack("=Bxxx", socket.AF_UNSPEC) + attribute
    header = struct.pack("=IHHII", 16 + len(body), _RTM_GETNSID, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as netlink:
        netlink.settimeout(1.0)
        netlink.send(header + body)
        answer = netlink.recv(4096)
    kind = struct.unpack_from("=H", answer, 4)[0] if len(answer) >= 20 else 0
    if kind != _RTM_NEWNSID:
        return -1
    numbers = [value for key, value in _attributes(answer, 20) if key == _NETNSA_NSID and len(value) == 4]
    return int(struct.unpack("=i", numbers[0])[0]) if numbers else -1


def _attributes(answer: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    while position + 4 <= len(answer):
        length, kind = struct.unpack_from("=HH", answer, position)
        if length < 4 or position + length > len(answer):
            return
        yield kind & 0x3FFF, answer[position + 4 : position + length]
        position += (length + 3) & ~3
