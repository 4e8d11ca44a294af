"""The maps the reconciler writes, as plain bytes: no structure is built for an entry that only passes through."""

from __future__ import annotations

import ctypes
import errno
import platform
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any, Final, Protocol

from meshbridge.datapath import syscall
from meshbridge.datapath.maps import BATCH, Map, Maps
from meshbridge.datapath.syscall import Command

Item = tuple[bytes, bytes]

_MEMBARRIER_NUMBERS: Final = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356}
_MEMBARRIER_CMD_GLOBAL: Final = 1


class TableName(StrEnum):
    """The maps that follow the desired state."""

    ENDPOINTS = "endpoints"
    ADDRESSES = "endpoint_addresses"
    IPCACHE = "ipcache"
    IPCACHE_CIDR = "ipcache_cidr"
    POLICY = "policy"
    POLICY_SETS = "policy_sets"


class Table(Protocol):
    """One map; what a call wrote is in force when it returns."""

    def read(self) -> Iterable[Item]:
        """Every entry."""

    def put(self, items: Sequence[Item]) -> None:
        """Write entries in this order; one that is there is replaced at once."""

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove entries in this order; one that is not there does not matter."""


class KernelTable:
    """A Table that is a BPF map; batches where the kernel has them."""

    def __init__(self, target: Map[Any, Any]) -> None:
        self._map = target
        self._key_bytes, self._value_bytes = ctypes.sizeof(target.key_type), ctypes.sizeof(target.value_type)

    def read(self) -> Iterator[Item]:
        cursor = ctypes.create_string_buffer(max(self._key_bytes, 8))
        size, resume = BATCH, False
        while True:
            keys = ctypes.create_string_buffer(size * self._key_bytes)
            values = ctypes.create_string_buffer(size * self._value_bytes)
            count, code = syscall.map_batch(
                Command.MAP_LOOKUP_BATCH,
                self._map.fd,
                keys=keys,
                values=values,
                count=size,
                cursor=cursor,
                resume=resume,
            )
            if code == errno.ENOSPC:  # one bucket holds more than a batch
                size *= 2
                continue
            if code not in (0, errno.ENOENT):
                # Of the map types in use only the LPM trie has no batch reads.
                yield from ((bytes(key), bytes(value)) for key, value in self._map.items())
                return
            yield from zip(_cut(keys, self._key_bytes, count), _cut(values, self._value_bytes, count), strict=True)
            if code == errno.ENOENT:
                return
            resume = True

    def put(self, items: Sequence[Item]) -> None:
        for start in range(0, len(items), BATCH):
            part = items[start : start + BATCH]
            done = self._batch(Command.MAP_UPDATE_BATCH, [key for key, _ in part], [value for _, value in part])
            for key, value in part[done:]:
                self._map.put(self._map.key_type.from_buffer_copy(key), self._map.value_type.from_buffer_copy(value))

    def delete(self, keys: Sequence[bytes]) -> None:
        for start in range(0, len(keys), BATCH):
            part = keys[start : start + BATCH]
            for key in part[self._batch(Command.MAP_DELETE_BATCH, part, None) :]:
                self._map.delete(self._map.key_type.from_buffer_copy(key))

    def _batch(self, command: Command, keys: Sequence[bytes], values: Sequence[bytes] | None) -> int:
        """Try one batch; how many it did. The rest goes one by one, which also names the fault."""
        if len(keys) < 2:
            return 0
        packed = ctypes.create_string_buffer(b"".join(keys), len(keys) * self._key_bytes)
        packed_values = None
        if values is not None:
            packed_values = ctypes.create_string_buffer(b"".join(values), len(keys) * self._value_bytes)
        done, code = syscall.map_batch(command, self._map.fd, keys=packed, values=packed_values, count=len(keys))
        if code == 0:
            return len(keys)
        return done if code in (errno.ENOENT, errno.E2BIG, errno.ENOSPC) else 0


def kernel_tables(maps: Maps) -> dict[TableName, Table]:
    """The tables of open maps."""
    return {name: KernelTable(getattr(maps, name.value)) for name in TableName}


def wait_for_packets() -> None:
    """Return when every packet that was being judged at the time of the call has its verdict.

    A packet looks up its endpoint's set, then identities, then entries; between two steps that must not meet in one
    packet there has to be a grace period. ``membarrier`` waits for one, as no other call from user space promises.
    """
    number = _MEMBARRIER_NUMBERS.get(platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    if number is None or libc.syscall(number, _MEMBARRIER_CMD_GLOBAL, 0, 0) != 0:
        raise syscall.error(ctypes.get_errno() or errno.ENOSYS, "membarrier(2)", "grace period")


def _cut(buffer: ctypes.Array[ctypes.c_char], size: int, count: int) -> Iterator[bytes]:
    raw = bytes(memoryview(buffer)[: size * count])
    return (raw[start : start + size] for start in range(0, size * count, size))
