"""Whole policy sets in the kernel: their entries in cache lines of one array, and a header that says where (bpf/abi.h).

The lines of a set are written into a range that no header names, then its header; when the header is gone, the range
is free again. So whoever is killed in between leaves nothing behind that counts.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from meshbridge import abi
from meshbridge.datapath import syscall
from meshbridge.datapath.maps import Maps
from meshbridge.datapath.policysets import DEFAULTS_BYTES, ENTRY_BYTES, KEY, SET_ID
from meshbridge.datapath.rawtables import Item, KernelTable

_SLOTS: Final = int(abi.POLICY_BUCKET_KEYS)
_BUCKET: Final = struct.Struct(f"={_SLOTS}Q{_SLOTS}HH2x")
_VALUE_BYTES: Final = ENTRY_BYTES - KEY.size
_VALUES_BYTES: Final = abi.POLICY_LINE_VALUES * _VALUE_BYTES
_VALUES: Final = struct.Struct(f"={_VALUES_BYTES}s16x")
_MOST_VALUES: Final = 1 << 16
_PLACE: Final = struct.Struct("=QIII4x")
_KEYS_PER_BUCKET: Final = 4  # on average; one entry in twenty is in its second bucket then
_SEED: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
_MOVES: Final = 256


class Place(NamedTuple):
    """Where a set's lines are, and what its keys are hashed with; the end of ``struct policy_set_value``."""

    seed: int
    first: int
    buckets: int
    lines: int


class Arranged(NamedTuple):
    """A set's entries as lines of the map: ``buckets`` of keys, then values."""

    seed: int
    buckets: int
    lines: list[bytes]


class PolicyTable:
    """Table POLICY_SETS: set number → the set's content (PackedSet). One process writes.

    A set is not changed in its place: a new one under its number gets other lines, then the number changes over.
    """

    def __init__(self, maps: Maps) -> None:
        self._lines, self._headers = KernelTable(maps.policy), KernelTable(maps.policy_sets)
        self._capacity = syscall.map_info(maps.policy.fd).max_entries
        self._places: dict[bytes, Place] | None = None  # from the first write on

    def read(self) -> Iterator[Item]:
        for key, header in self._headers.read():
            place = Place(*_PLACE.unpack_from(header, DEFAULTS_BYTES))
            lines = list(self._lines.read_range(place.first, place.lines))
            yield key, header[:DEFAULTS_BYTES] + b"".join(sorted(_entries(lines, place.buckets)))

    def put(self, items: Sequence[Item]) -> None:
        """Write whole sets; nothing of any of them is in force unless there is room for all.

        Raises:
            BpfFullError: There is not.
        """
        known = self._known()
        free = gaps(known.values(), self._capacity)
        lines: list[Item] = []
        headers: list[Item] = []
        places: dict[bytes, Place] = {}
        for key, content in items:
            seed, buckets, arranged = arrange(content[DEFAULTS_BYTES:])
            place = places[key] = Place(seed, take(free, len(arranged)), buckets, len(arranged))
            lines += ((SET_ID.pack(number), line) for number, line in enumerate(arranged, place.first))
            headers.append((key, content[:DEFAULTS_BYTES] + _PLACE.pack(*place)))
        self._places = None  # read back, should a write fail
        self._lines.put(lines)
        self._headers.put(headers)
        self._places = known | places

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove sets. The next that are written may take their room: no packet may be reading them any more."""
        known, self._places = self._known(), None
        self._headers.delete(keys)
        gone = set(keys)
        self._places = {key: place for key, place in known.items() if key not in gone}

    def _known(self) -> dict[bytes, Place]:
        if self._places is None:
            headers = self._headers.read()
            self._places = {key: Place(*_PLACE.unpack_from(header, DEFAULTS_BYTES)) for key, header in headers}
        return self._places


def arrange(entries: bytes) -> Arranged:
    """The lines of packed entries (key and value; no key twice).

    Raises:
        BpfFullError: More different values than a bucket can number.
    """
    starts = range(0, len(entries), ENTRY_BYTES)
    keys = [KEY.unpack_from(entries, start)[0] for start in starts]
    numbers: dict[bytes, int] = {}
    values = [numbers.setdefault(entries[start + KEY.size : start + ENTRY_BYTES], len(numbers)) for start in starts]
    if len(numbers) > _MOST_VALUES:
        raise syscall.error(errno.E2BIG, f"{len(numbers)} different values in one policy set", "map policy")
    buckets, attempt = None, 0
    while buckets is None:
        # Keys that crowd together by one seed do not by another, and more buckets make it easier each time.
        seed = attempt * _SEED & _MASK
        count = -(-len(keys) * (4 + attempt) // (4 * _KEYS_PER_BUCKET))
        homes = [_homes(key ^ seed, count) for key in keys]
        buckets = _fill(homes, count)
        attempt += 1
    crowded = {homes[entry][0] for number, held in enumerate(buckets) for entry in held if homes[entry][0] != number}
    lines = []
    for number, held in enumerate(buckets):
        rest = (0,) * (_SLOTS - len(held))
        row = (*(keys[entry] for entry in held), *rest, *(values[entry] for entry in held), *rest)
        lines.append(_BUCKET.pack(*row, number in crowded))
    packed = b"".join(numbers)
    lines += (_VALUES.pack(packed[start : start + _VALUES_BYTES]) for start in range(0, len(packed), _VALUES_BYTES))
    return Arranged(seed, count, lines)


def _homes(key: int, count: int) -> tuple[int, int]:
    """The two buckets an entry may be in, as find_entry() in pod.c computes them."""
    mixed = key * abi.POLICY_HASH_FIRST & _MASK
    mixed = (mixed ^ mixed >> 32) * abi.POLICY_HASH_SECOND & _MASK
    return (mixed >> 32) * count >> 32, (mixed & 0xFFFFFFFF) * count >> 32


def _fill(homes: Sequence[tuple[int, int]], count: int) -> list[list[int]] | None:
    """Which entries each bucket holds; None when some entry finds no room.

    An entry whose buckets are both full takes the place of another, which goes to its own other bucket, and so on.
    """
    buckets: list[list[int]] = [[] for _ in range(count)]
    for entry, (first, second) in enumerate(homes):
        if len(buckets[first]) < _SLOTS:
            buckets[first].append(entry)
        elif len(buckets[second]) < _SLOTS:
            buckets[second].append(entry)
        elif not _make_room(buckets, homes, entry):
            return None
    return buckets


def _make_room(buckets: list[list[int]], homes: Sequence[tuple[int, int]], entry: int) -> bool:
    at = homes[entry][0]
    for move in range(_MOVES):
        held = buckets[at]
        held[move % _SLOTS], entry = entry, held[move % _SLOTS]
        first, second = homes[entry]
        at = second if at == first else first
        if len(buckets[at]) < _SLOTS:
            buckets[at].append(entry)
            return True
    return False


def _entries(lines: Sequence[bytes], buckets: int) -> Iterator[bytes]:
    values = b"".join(_VALUES.unpack(line)[0] for line in lines[buckets:])
    for line in lines[:buckets]:
        fields = _BUCKET.unpack(line)
        for key, number in zip(fields[:_SLOTS], fields[_SLOTS:], strict=False):
            if key:
                yield KEY.pack(key) + values[number * _VALUE_BYTES : (number + 1) * _VALUE_BYTES]


def gaps(places: Iterable[Place], capacity: int) -> list[tuple[int, int]]:
    """What no place covers, as (start, end)."""
    found, at = [], 0
    for place in sorted(places, key=lambda place: place.first):
        if place.lines:
            if place.first > at:
                found.append((at, place.first))
            at = place.first + place.lines
    return [*found, (at, capacity)]


def take(free: list[tuple[int, int]], count: int) -> int:
    """The start of so many lines in a row, which are free no more.

    Raises:
        BpfFullError: There are not so many.
    """
    for position, (start, end) in enumerate(free):
        if end - start >= count:
            free[position] = (start + count, end)
            return start
    raise syscall.error(errno.ENOSPC, f"no room for {count} lines", "map policy")
