"""Kernel maps as plain bytes: no structure is built for an entry that only passes through."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from meshbridge.datapath import syscall
from meshbridge.datapath.maps import BATCH, Map
from meshbridge.datapath.syscall import Command

Item = tuple[bytes, bytes]
Buffer = ctypes.Array[ctypes.c_char]


class KernelTable:
    """A BPF map as a Table (tables.py); batches where the kernel has them."""

    def __init__(self, target: Map[Any, Any]) -> None:
        self._map = target
        self._key_bytes, self._value_bytes = ctypes.sizeof(target.key_type), ctypes.sizeof(target.value_type)

    def read(self) -> Iterator[Item]:
        cursor = ctypes.create_string_buffer(max(self._key_bytes, 8))
        size, resume = BATCH, False
        while True:
            keys, values, count, code = self._lookup(size, cursor, resume=resume)
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

    def read_range(self, first: int, count: int) -> Iterator[bytes]:
        """So many values of an array, from an index on."""
        cursor, resume = ctypes.create_string_buffer(struct.pack("=I", (first - 1) % (1 << 32)), 8), first > 0
        while count:
            size = min(count, BATCH)
            _, values, read, code = self._lookup(size, cursor, resume=resume)
            if code or read != size:
                raise syscall.error(code or errno.EIO, "bpf(MAP_LOOKUP_BATCH)", self._map.name)
            yield from _cut(values, self._value_bytes, size)
            count -= size
            resume = True

    def _lookup(self, size: int, cursor: Buffer, *, resume: bool) -> tuple[Buffer, Buffer, int, int]:
        """One batch read: keys, values, how many of them, and errno."""
        keys = ctypes.create_string_buffer(size * self._key_bytes)
        values = ctypes.create_string_buffer(size * self._value_bytes)
        count, code = syscall.map_batch(
            Command.MAP_LOOKUP_BATCH, self._map.fd, keys=keys, values=values, count=size, cursor=cursor, resume=resume
        )
        return keys, values, count, code

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


def _cut(buffer: Buffer, size: int, count: int) -> Iterator[bytes]:
    raw = bytes(memoryview(buffer)[: size * count])
    return (raw[start : start + size] for start in range(0, size * count, size))
