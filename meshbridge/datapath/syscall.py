"""bpf(2) by ctypes: maps, programs, links and pins as plain functions over file descriptors.

Every call retries what a signal interrupted and raises a subclass of BpfError by errno; nothing here keeps state.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from meshbridge.errors import MeshBridgeError

_SYSCALL_NUMBERS: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

VERIFIER_LOG_BYTES: Final = 1 << 24
_LOG_TAIL_LINES: Final = 12
_EAGAIN_RETRIES: Final = 16


class BpfError(MeshBridgeError):
    """The kernel refused a bpf(2) call; ``errno`` says how."""

    def __init__(self, what: str, *, errno: int = 0, where: str = "", fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.errno = errno


class BpfNotFoundError(BpfError):
    """No such entry, pin, map or device (ENOENT, ENODEV)."""


class BpfExistsError(BpfError):
    """The entry or pin is there already (EEXIST)."""


class BpfFullError(BpfError):
    """The map has no room (E2BIG, ENOSPC)."""


class BpfPermissionError(BpfError):
    """Not privileged enough (EPERM, EACCES)."""


class BpfUnsupportedError(BpfError):
    """This kernel does not know the call, map type or attach type (EINVAL, EOPNOTSUPP, ENOSYS)."""


class VerifierError(BpfError):
    """The verifier refused a program; ``log`` keeps all of what it said, the message shows its last lines."""

    def __init__(self, what: str, *, errno: int, log: str, where: str = "") -> None:
        tail = "\n".join(log.rstrip().splitlines()[-_LOG_TAIL_LINES:])
        super().__init__(f"{what}\n{tail}", errno=errno, where=where)
        self.log = log


_ERRORS: Final[dict[int, tuple[type[BpfError], str]]] = {
    errno.ENOENT: (BpfNotFoundError, ""),
    errno.ENODEV: (BpfNotFoundError, ""),
    errno.EEXIST: (BpfExistsError, ""),
    errno.E2BIG: (BpfFullError, "raise the size of the map"),
    errno.ENOSPC: (BpfFullError, "raise the size of the map"),
    errno.EPERM: (BpfPermissionError, "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"),
    errno.EACCES: (BpfPermissionError, "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"),
    errno.EINVAL: (BpfUnsupportedError, ""),
    errno.EOPNOTSUPP: (BpfUnsupportedError, ""),
    524: (BpfUnsupportedError, ""),  # ENOTSUPP, internal to the kernel, leaks from some map operations
    errno.ENOSYS: (BpfUnsupportedError, "a kernel with BPF is needed"),
}


class Command(IntEnum):
    """enum bpf_cmd."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_TEST_RUN = 10
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_DETACH = 34


class MapType(IntEnum):
    """enum bpf_map_type, as far as it is used here."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    RINGBUF = 27


class ProgramType(IntEnum):
    """enum bpf_prog_type, as far as it is used here."""

    SCHED_CLS = 3


class AttachType(IntEnum):
    """enum bpf_attach_type, as far as it is used here."""

    TCX_INGRESS = 46
    TCX_EGRESS = 47


class UpdateFlag(IntEnum):
    """What an update may do."""

    ANY = 0
    NOEXIST = 1
    EXIST = 2


PER_CPU: Final = frozenset({MapType.PERCPU_HASH, MapType.PERCPU_ARRAY})
LINK_BEFORE: Final = 1 << 3  # BPF_F_BEFORE; without a relative link: the head of the chain
BPF_PSEUDO_MAP_FD: Final = 1
POINTER: Final = ctypes.c_uint64


class _Elem(ctypes.Structure):
    _fields_ = [("map_fd", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("key", POINTER), ("value", POINTER),
                ("flags", ctypes.c_uint64)]  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = [("in_batch", POINTER), ("out_batch", POINTER), ("keys", POINTER), ("values", POINTER),
                ("count", ctypes.c_uint32), ("map_fd", ctypes.c_uint32), ("elem_flags", ctypes.c_uint64),
                ("flags", ctypes.c_uint64)]  # fmt: skip


class _MapCreate(ctypes.Structure):
    _fields_ = [("map_type", ctypes.c_uint32), ("key_size", ctypes.c_uint32), ("value_size", ctypes.c_uint32),
                ("max_entries", ctypes.c_uint32), ("map_flags", ctypes.c_uint32), ("inner_map_fd", ctypes.c_uint32),
                ("numa_node", ctypes.c_uint32), ("map_name", ctypes.c_char * 16)]  # fmt: skip


class _ProgLoad(ctypes.Structure):
    _fields_ = [("prog_type", ctypes.c_uint32), ("insn_cnt", ctypes.c_uint32), ("insns", POINTER),
                ("license", POINTER), ("log_level", ctypes.c_uint32), ("log_size", ctypes.c_uint32),
                ("log_buf", POINTER), ("kern_version", ctypes.c_uint32), ("prog_flags", ctypes.c_uint32),
                ("prog_name", ctypes.c_char * 16)]  # fmt: skip


class _Obj(ctypes.Structure):
    _fields_ = [("pathname", POINTER), ("bpf_fd", ctypes.c_uint32), ("file_flags", ctypes.c_uint32)]


class _TestRun(ctypes.Structure):
    _fields_ = [("prog_fd", ctypes.c_uint32), ("retval", ctypes.c_uint32), ("data_size_in", ctypes.c_uint32),
                ("data_size_out", ctypes.c_uint32), ("data_in", POINTER), ("data_out", POINTER),
                ("repeat", ctypes.c_uint32), ("duration", ctypes.c_uint32), ("ctx_size_in", ctypes.c_uint32),
                ("ctx_size_out", ctypes.c_uint32), ("ctx_in", POINTER), ("ctx_out", POINTER),
                ("flags", ctypes.c_uint32), ("cpu", ctypes.c_uint32), ("batch_size", ctypes.c_uint32),
                ("pad", ctypes.c_uint32)]  # fmt: skip


class _LinkCreate(ctypes.Structure):
    _fields_ = [("prog_fd", ctypes.c_uint32), ("target_ifindex", ctypes.c_uint32), ("attach_type", ctypes.c_uint32),
                ("flags", ctypes.c_uint32), ("relative_fd", ctypes.c_uint32), ("pad", ctypes.c_uint32),
                ("expected_revision", ctypes.c_uint64)]  # fmt: skip


class _LinkUpdate(ctypes.Structure):
    _fields_ = [("link_fd", ctypes.c_uint32), ("new_prog_fd", ctypes.c_uint32), ("flags", ctypes.c_uint32),
                ("old_prog_fd", ctypes.c_uint32)]  # fmt: skip


class _LinkDetach(ctypes.Structure):
    _fields_ = [("link_fd", ctypes.c_uint32)]


class _Id(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint32), ("next_id", ctypes.c_uint32), ("open_flags", ctypes.c_uint32)]


class _Info(ctypes.Structure):
    _fields_ = [("bpf_fd", ctypes.c_uint32), ("info_len", ctypes.c_uint32), ("info", POINTER)]


class _MapInfo(ctypes.Structure):
    _fields_ = [("type", ctypes.c_uint32), ("id", ctypes.c_uint32), ("key_size", ctypes.c_uint32),
                ("value_size", ctypes.c_uint32), ("max_entries", ctypes.c_uint32), ("map_flags", ctypes.c_uint32),
                ("name", ctypes.c_char * 16)]  # fmt: skip


class _LinkInfo(ctypes.Structure):
    _fields_ = [("type", ctypes.c_uint32), ("id", ctypes.c_uint32), ("prog_id", ctypes.c_uint32),
                ("pad", ctypes.c_uint32), ("ifindex", ctypes.c_uint32), ("attach_type", ctypes.c_uint32)]  # fmt: skip


class _ProgInfo(ctypes.Structure):
    _fields_ = [("type", ctypes.c_uint32), ("id", ctypes.c_uint32), ("tag", ctypes.c_uint8 * 8)]


@dataclass(frozen=True, slots=True)
class MapInfo:
    """What the kernel says about a map."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """What the kernel says about a TCX link; ``ifindex`` 0: its device is gone."""

    id: int
    program_id: int
    ifindex: int
    attach_type: int


@dataclass(frozen=True, slots=True)
class TestRun:
    """Outcome of one BPF_PROG_TEST_RUN; ``duration_ns`` is the mean of its repeats."""

    __test__ = False

    verdict: int
    duration_ns: int


def call(command: Command, attr: ctypes.Structure, where: str) -> int:
    """Make one bpf(2) call and return what it returns.

    Raises:
        BpfError: The subclass that stands for the errno.
    """
    code = _call(command, attr)
    if code < 0:
        raise error(-code, f"bpf({command.name})", where)
    return code


def error(code: int, what: str, where: str) -> BpfError:
    """The exception for an errno."""
    kind, fix = _ERRORS.get(code, (BpfError, ""))
    return kind(f"{what}: {os.strerror(code)}", errno=code, where=where, fix=fix)


def _call(command: Command, attr: ctypes.Structure) -> int:
    """Return the call's result, or a negative errno."""
    again = 0
    while True:
        result: int = _libc.syscall(_NUMBER, int(command), ctypes.byref(attr), ctypes.sizeof(attr))
        if result >= 0:
            return result
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code == errno.EAGAIN and again < _EAGAIN_RETRIES:  # the verifier gives up when a signal is pending
            again += 1
            continue
        return -code


def _find_number() -> int:
    machine = platform.machine()
    if machine not in _SYSCALL_NUMBERS:
        raise BpfUnsupportedError(f"no bpf(2) number known for {machine!r}", fix="use one of: x86_64, aarch64")
    return _SYSCALL_NUMBERS[machine]


_NUMBER: Final = _find_number()


def map_create(kind: MapType, *, name: str, key_size: int, value_size: int, max_entries: int, flags: int = 0,
               inner_fd: int = 0) -> int:  # fmt: skip
    """Create a map and return its file descriptor (close-on-exec)."""
    attr = _MapCreate(kind, key_size, value_size, max_entries, flags, inner_fd, 0, name.encode()[:15])
    return call(Command.MAP_CREATE, attr, f"map {name}")


def map_info(fd: int) -> MapInfo:
    """What kind of map a descriptor is."""
    info = _MapInfo()
    _get_info(fd, info)
    return MapInfo(info.type, info.id, info.key_size, info.value_size, info.max_entries, info.map_flags,
                   info.name.decode(errors="replace"))  # fmt: skip


def link_info(fd: int) -> LinkInfo:
    """Which program a link runs, and where."""
    info = _LinkInfo()
    _get_info(fd, info)
    return LinkInfo(info.id, info.prog_id, info.ifindex, info.attach_type)


def program_id(fd: int) -> int:
    """The number of the program a descriptor is."""
    info = _ProgInfo()
    _get_info(fd, info)
    return int(info.id)


def _get_info(fd: int, info: ctypes.Structure) -> None:
    call(Command.OBJ_GET_INFO_BY_FD, _Info(fd, ctypes.sizeof(info), ctypes.addressof(info)), f"descriptor {fd}")


def map_lookup(fd: int, key: Any, value: Any, where: str) -> bool:
    """Fill ``value`` (a ctypes object) with what the map has under ``key``; False when it has nothing."""
    attr = _Elem(fd, 0, ctypes.addressof(key), ctypes.addressof(value), 0)
    code = _call(Command.MAP_LOOKUP_ELEM, attr)
    if code < 0 and code != -errno.ENOENT:
        raise error(-code, "bpf(MAP_LOOKUP_ELEM)", where)
    return code >= 0


def map_update(fd: int, key: Any, value: Any, where: str, flag: UpdateFlag = UpdateFlag.ANY) -> None:
    """Write one entry."""
    call(Command.MAP_UPDATE_ELEM, _Elem(fd, 0, ctypes.addressof(key), ctypes.addressof(value), flag), where)


def map_delete(fd: int, key: Any, where: str) -> bool:
    """Remove one entry; False when there was none."""
    code = _call(Command.MAP_DELETE_ELEM, _Elem(fd, 0, ctypes.addressof(key), 0, 0))
    if code < 0 and code != -errno.ENOENT:
        raise error(-code, "bpf(MAP_DELETE_ELEM)", where)
    return code >= 0


def map_next_key(fd: int, key: Any | None, following: Any, where: str) -> bool:
    """Fill ``following`` with the key after ``key`` (None: the first); False at the end."""
    attr = _Elem(fd, 0, 0 if key is None else ctypes.addressof(key), ctypes.addressof(following), 0)
    code = _call(Command.MAP_GET_NEXT_KEY, attr)
    if code < 0 and code != -errno.ENOENT:
        raise error(-code, "bpf(MAP_GET_NEXT_KEY)", where)
    return code >= 0


def map_batch(command: Command, fd: int, *, keys: Any, values: Any | None, count: int, cursor: Any | None = None,
              resume: bool = False) -> tuple[int, int]:  # fmt: skip
    """Run one batch operation. Returns how many entries it did, and 0 or the errno it stopped with."""
    attr = _Batch(
        in_batch=ctypes.addressof(cursor) if cursor is not None and resume else 0,
        out_batch=0 if cursor is None else ctypes.addressof(cursor),
        keys=ctypes.addressof(keys),
        values=0 if values is None else ctypes.addressof(values),
        count=count,
        map_fd=fd,
    )
    code = _call(command, attr)
    return int(attr.count), -min(code, 0)


def program_load(name: str, instructions: bytes, *, license: str = "GPL") -> int:
    """Load a classifier and return its descriptor.

    Raises:
        VerifierError: The verifier refused it; asked again with a log, which the error carries.
    """
    code_buffer = ctypes.create_string_buffer(instructions, len(instructions))
    license_buffer = ctypes.create_string_buffer(license.encode())
    attr = _ProgLoad(prog_type=ProgramType.SCHED_CLS, insn_cnt=len(instructions) // 8,
                     insns=ctypes.addressof(code_buffer), license=ctypes.addressof(license_buffer),
                     prog_name=name.encode()[:15])  # fmt: skip
    fd = _call(Command.PROG_LOAD, attr)
    if fd >= 0:
        return fd
    if fd in (-errno.EPERM, -errno.ENOSYS):
        raise error(-fd, "bpf(PROG_LOAD)", f"program {name}")
    log = ctypes.create_string_buffer(VERIFIER_LOG_BYTES)
    attr.log_level, attr.log_size, attr.log_buf = 1, VERIFIER_LOG_BYTES, ctypes.addressof(log)
    second = _call(Command.PROG_LOAD, attr)
    if second >= 0:
        return second
    text = log.value.decode(errors="replace")
    raise VerifierError(f"the verifier refused it: {os.strerror(-fd)}", errno=-fd, log=text, where=f"program {name}")


def program_test_run(fd: int, packet: bytes, context: Any | None = None, *, repeat: int = 1) -> TestRun:
    """Run a program on one packet; ``context`` is a struct __sk_buff the kernel accepts."""
    attr = _TestRun(prog_fd=fd, data_size_in=len(packet), repeat=repeat)
    buffer = ctypes.create_string_buffer(packet, len(packet))
    attr.data_in = ctypes.addressof(buffer)
    if context is not None:
        attr.ctx_in, attr.ctx_size_in = ctypes.addressof(context), ctypes.sizeof(context)
    call(Command.PROG_TEST_RUN, attr, "test run")
    return TestRun(ctypes.c_int32(attr.retval).value, attr.duration)


def pin(fd: int, path: str) -> None:
    """Keep an object alive under a path of a bpffs."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    call(Command.OBJ_PIN, _Obj(ctypes.addressof(name), fd, 0), path)


def get_pinned(path: str) -> int:
    """The descriptor of a pinned object.

    Raises:
        BpfNotFoundError: Nothing is pinned there.
    """
    name = ctypes.create_string_buffer(os.fsencode(path))
    return call(Command.OBJ_GET, _Obj(ctypes.addressof(name), 0, 0), path)


def link_create(program_fd: int, ifindex: int, attach_type: AttachType) -> int:
    """Attach a program at the head of a device's TCX chain; gone with its last descriptor unless pinned."""
    attr = _LinkCreate(program_fd, ifindex, attach_type, LINK_BEFORE)
    return call(Command.LINK_CREATE, attr, f"interface {ifindex}, {attach_type.name}")


def link_update(link_fd: int, program_fd: int) -> None:
    """Swap the program of a link; no packet sees neither or both."""
    call(Command.LINK_UPDATE, _LinkUpdate(link_fd, program_fd, 0, 0), f"link {link_fd}")


def link_detach(link_fd: int) -> None:
    """Take a link's program off its device, whoever else still holds the link."""
    call(Command.LINK_DETACH, _LinkDetach(link_fd), f"link {link_fd}")


def map_by_id(number: int) -> int:
    """The descriptor of a map known by its kernel number."""
    return call(Command.MAP_GET_FD_BY_ID, _Id(number, 0, 0), f"map number {number}")
