"""The kernel maps as typed Python mappings: created and pinned once, reused by whoever comes later.

They live in ``PIN_DIR/maps-v<ABI_VERSION>/``. A later layout gets a directory of its own, so the programs in force keep
their maps until the links are switched to programs that use the new ones (docs/adr/0001).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from meshbridge import abi
from meshbridge.datapath import syscall
from meshbridge.datapath.compiler import MapSpec
from meshbridge.datapath.syscall import BpfError, BpfNotFoundError, Command, MapType, UpdateFlag

DEFAULT_PIN_ROOT: Final = Path("/sys/fs/bpf/meshbridge")
BATCH: Final = 4096

K = TypeVar("K", bound=abi.AbiStruct)
V = TypeVar("V", bound=abi.AbiStruct)


class MapLayoutError(BpfError):
    """A pinned map is not what this version would create."""


@dataclass(frozen=True, slots=True)
class MapSizes:
    """Capacities of maps when they are created; None keeps what bpf/maps.h says. A pinned map keeps its own.

    ``conntrack_per_endpoint`` is the quota of flows of one pod, ``events`` the bytes of the ring (a power of two),
    ``policy`` counts cache lines of some four entries each.
    """

    endpoints: int | None = None
    endpoint_addresses: int | None = None
    ipcache: int | None = None
    ipcache_cidr: int | None = None
    policy: int | None = None
    policy_sets: int | None = None
    conntrack: int | None = None
    conntrack_per_endpoint: int | None = None
    fragments: int | None = None
    events: int | None = None


class Map(Generic[K, V]):
    """One kernel map. Reads and writes go straight to the kernel; keys and values are structures of abi.h."""

    def __init__(self, name: str, fd: int, key: type[K], value: type[V], *, batches: bool = True) -> None:
        self.name, self.fd, self.key_type, self.value_type = name, fd, key, value
        self._batches = batches

    def get(self, key: K) -> V | None:
        """The value under ``key``, or None."""
        value = self.value_type()
        return value if syscall.map_lookup(self.fd, key, value, self.name) else None

    def put(self, key: K, value: V, flag: UpdateFlag = UpdateFlag.ANY) -> None:
        """Write one entry; an entry that is there is replaced at once, never missing in between."""
        syscall.map_update(self.fd, key, value, self.name, flag)

    def delete(self, key: K) -> bool:
        """Remove one entry; False when there was none."""
        return syscall.map_delete(self.fd, key, self.name)

    def put_many(self, entries: Mapping[K, V] | Iterable[tuple[K, V]]) -> None:
        """Write all entries, in order, in as few calls as the kernel allows."""
        pairs = list(entries.items() if isinstance(entries, Mapping) else entries)
        for start in range(0, len(pairs), BATCH):
            part = pairs[start : start + BATCH]
            done = self._batch(Command.MAP_UPDATE_BATCH, [key for key, _ in part], [value for _, value in part])
            for key, value in part[done:]:
                self.put(key, value)

    def delete_many(self, keys: Iterable[K]) -> None:
        """Remove all keys; those that are not there do not matter."""
        wanted = list(keys)
        for start in range(0, len(wanted), BATCH):
            part = wanted[start : start + BATCH]
            done = self._batch(Command.MAP_DELETE_BATCH, part, None)
            for key in part[done:]:
                self.delete(key)

    def _batch(self, command: Command, keys: list[K], values: list[V] | None) -> int:
        """Try one batch; how many of its entries are done (the rest goes one by one, which also names the fault)."""
        if not self._batches or len(keys) < 2:
            return 0
        packed = (self.key_type * len(keys)).from_buffer_copy(b"".join(map(bytes, keys)))
        packed_values = None
        if values is not None:
            packed_values = (self.value_type * len(keys)).from_buffer_copy(b"".join(map(bytes, values)))
        done, code = syscall.map_batch(command, self.fd, keys=packed, values=packed_values, count=len(keys))
        if code == 0:
            return len(keys)
        return done if code in (errno.ENOENT, errno.E2BIG, errno.ENOSPC) else 0

    def items(self) -> Iterator[tuple[K, V]]:
        """Every entry. An entry written or removed meanwhile may or may not be among them; none comes twice."""
        yield from self.snapshot().items()

    def keys(self) -> list[K]:
        """Every key, as ``items``."""
        return list(self.snapshot())

    def snapshot(self) -> dict[K, V]:
        """Every entry as a dict."""
        if self._batches:
            with contextlib.suppress(_BatchUnsupported):
                return self._read_batches()
        return self._read_one_by_one()

    def __len__(self) -> int:
        return len(self.snapshot())

    def clear(self) -> None:
        """Remove every entry."""
        self.delete_many(self.keys())

    def _read_batches(self) -> dict[K, V]:
        found: dict[K, V] = {}
        cursor = ctypes.create_string_buffer(max(ctypes.sizeof(self.key_type), 8))
        size, resume = BATCH, False
        while True:
            keys, values = (self.key_type * size)(), (self.value_type * size)()
            count, code = syscall.map_batch(Command.MAP_LOOKUP_BATCH, self.fd, keys=keys, values=values, count=size,
                                            cursor=cursor, resume=resume)  # fmt: skip
            if code == errno.ENOSPC:  # one bucket holds more than a batch
                size *= 2
                continue
            if code not in (0, errno.ENOENT):
                raise _BatchUnsupported
            for key, value in zip(keys[:count], values[:count], strict=True):
                found[self.key_type.from_buffer_copy(key)] = self.value_type.from_buffer_copy(value)
            if code == errno.ENOENT:
                return found
            resume = True

    def _read_one_by_one(self) -> dict[K, V]:
        found: dict[K, V] = {}
        previous, key = None, self.key_type()
        while syscall.map_next_key(self.fd, previous, key, self.name):
            value = self.get(key)
            if key in found:  # the kernel starts over when the previous key was removed meanwhile
                break
            if value is not None:
                found[key] = value
            previous, key = key, self.key_type()
        return found


class _BatchUnsupported(Exception):
    """A signal between two ways of reading: this map type has no batch reads on this kernel."""


class PerCpuMap(Generic[K, V]):
    """A map with one value per CPU."""

    def __init__(self, name: str, fd: int, key: type[K], value: type[V]) -> None:
        self.name, self.fd, self.key_type, self.value_type = name, fd, key, value
        self._stride = (ctypes.sizeof(value) + 7) // 8 * 8

    def get(self, key: K) -> list[V] | None:
        """The values under ``key``, one per possible CPU, or None."""
        raw = ctypes.create_string_buffer(self._stride * POSSIBLE_CPUS)
        if not syscall.map_lookup(self.fd, key, raw, self.name):
            return None
        return [self.value_type.from_buffer_copy(raw, cpu * self._stride) for cpu in range(POSSIBLE_CPUS)]

    def put_all(self, key: K, value: V) -> None:
        """Write the same value for every CPU."""
        raw = ctypes.create_string_buffer(bytes(value).ljust(self._stride, b"\0") * POSSIBLE_CPUS)
        syscall.map_update(self.fd, key, raw, self.name)

    def items(self) -> Iterator[tuple[K, list[V]]]:
        """Every key with its values."""
        previous, key = None, self.key_type()
        while syscall.map_next_key(self.fd, previous, key, self.name):
            if (values := self.get(key)) is not None:
                yield key, values
            previous, key = key, self.key_type()


def _possible_cpus() -> int:
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1].split("-")[-1]
    return int(last) + 1


POSSIBLE_CPUS: Final = _possible_cpus()


class Index(abi.AbiStruct):
    """The key of an array."""

    _types: Mapping[str, Any] = {"number": ctypes.c_uint32}
    _fields_ = [("number", ctypes.c_uint32)]  # noqa: RUF012 - ctypes reads it


_LAYOUTS: Final[Mapping[str, tuple[type[abi.AbiStruct], type[abi.AbiStruct] | None]]] = {
    "endpoints": (abi.EndpointKey, abi.EndpointValue),
    "endpoint_addresses": (abi.EndpointAddressKey, abi.EndpointAddressValue),
    "ipcache": (abi.IpcacheKey, abi.IpcacheValue),
    "ipcache_cidr": (abi.IpcacheCidrKey, abi.IpcacheValue),
    "policy": (Index, abi.PolicyBucket),
    "policy_sets": (abi.PolicySetKey, abi.PolicySetValue),
    "conntrack": (Index, Index),
    "fragments": (abi.FragmentKey, abi.FragmentValue),
    "metrics": (abi.MetricKey, abi.MetricValue),
    "forwarded": (Index, abi.MetricValue),
    "event_limiter": (Index, abi.EventLimiter),
    "events": (Index, None),
}


class Conntrack:
    """The flow tables of all endpoints: one LRU map per incarnation, so that a pod only ever evicts its own flows.

    A table carries its incarnation in its name, so that whoever comes later finds it again. One process writes.
    """

    def __init__(self, fd: int, quota: int) -> None:
        self.fd, self.quota = fd, quota
        self._capacity = syscall.map_info(fd).max_entries
        self._written: dict[int, int] | None = None  # as tables(), from the first write on
        self._last = 0

    def create(self, incarnation: int) -> int:
        """Give an incarnation an empty table; one that is there stays, with its flows. Returns the table's index.

        Raises:
            BpfFullError: There are as many tables as the map can hold.
        """
        tables = self._writable()
        if incarnation in tables:
            return tables[incarnation]
        taken = set(tables.values())
        # In a circle, so that an index is used again as late as can be.
        circle = chain(range(self._last + 1, self._capacity), range(1, self._last + 1))
        index = next((number for number in circle if number not in taken), None)
        if index is None:
            raise syscall.error(errno.ENOSPC, "no room for another flow table", "conntrack")
        inner = new_flow_table(self.quota, incarnation)
        try:
            syscall.map_update(self.fd, Index(number=index), ctypes.c_uint32(inner), "conntrack")
        finally:
            os.close(inner)
        self._last = index
        tables[incarnation] = index
        return index

    def remove(self, incarnation: int) -> bool:
        """Forget all flows of an incarnation; its packets are dropped from now on. False when it had no table.

        The index may be another's next: packets that an endpoint's entry has sent to it must be done.
        """
        index = self._writable().pop(incarnation, None)
        return index is not None and syscall.map_delete(self.fd, Index(number=index), "conntrack")

    def tables(self) -> dict[int, int]:
        """Which incarnations have a table, and under which index."""
        found = {}
        for index in range(1, self._capacity):
            if (fd := self._open(index)) is not None:
                try:
                    found[_incarnation_of(syscall.map_info(fd).name)] = index
                finally:
                    os.close(fd)
        return found

    @contextlib.contextmanager
    def flows(self, incarnation: int) -> Iterator[Map[abi.ConntrackKey, abi.ConntrackValue]]:
        """The table of one incarnation, for the length of the block.

        Raises:
            BpfNotFoundError: It has none.
        """
        index = self.tables().get(incarnation)
        if index is None:
            raise BpfNotFoundError("no flow table", where=f"conntrack, incarnation {incarnation}")
        with self.flows_at(index) as flows:
            yield flows

    @contextlib.contextmanager
    def flows_at(self, index: int) -> Iterator[Map[abi.ConntrackKey, abi.ConntrackValue]]:
        """The table with this index, for the length of the block.

        Raises:
            BpfNotFoundError: There is none.
        """
        fd = self._open(index)
        if fd is None:
            raise BpfNotFoundError("no flow table", where=f"conntrack, index {index}")
        try:
            yield Map("conntrack", fd, abi.ConntrackKey, abi.ConntrackValue)
        finally:
            os.close(fd)

    def _writable(self) -> dict[int, int]:
        if self._written is None:
            self._written = self.tables()
            self._last = max(self._written.values(), default=0)
        return self._written

    def _open(self, index: int) -> int | None:
        number = ctypes.c_uint32()
        if not syscall.map_lookup(self.fd, Index(number=index), number, "conntrack"):
            return None
        return syscall.map_by_id(number.value)


_FLOW_TABLE: Final = "flows_"


def new_flow_table(quota: int, incarnation: int = 0) -> int:
    """An empty flow table that belongs to an incarnation by its name."""
    return syscall.map_create(
        MapType.LRU_HASH,
        name=f"{_FLOW_TABLE}{incarnation:08x}",
        key_size=ctypes.sizeof(abi.ConntrackKey),
        value_size=ctypes.sizeof(abi.ConntrackValue),
        max_entries=quota,
    )


def _incarnation_of(name: str) -> int:
    return int(name.removeprefix(_FLOW_TABLE), 16)


class Maps:
    """Every map of abi.h, open. ``close`` gives the descriptors back; what is pinned stays in force."""

    def __init__(self, descriptors: Mapping[str, int], quota: int) -> None:
        self.descriptors = dict(descriptors)
        fd = descriptors.__getitem__
        self.endpoints = Map("endpoints", fd("endpoints"), abi.EndpointKey, abi.EndpointValue)
        self.endpoint_addresses = Map("endpoint_addresses", fd("endpoint_addresses"), abi.EndpointAddressKey,
                                      abi.EndpointAddressValue)  # fmt: skip
        self.ipcache = Map("ipcache", fd("ipcache"), abi.IpcacheKey, abi.IpcacheValue)
        self.ipcache_cidr = Map("ipcache_cidr", fd("ipcache_cidr"), abi.IpcacheCidrKey, abi.IpcacheValue, batches=False)
        self.policy = Map("policy", fd("policy"), Index, abi.PolicyBucket)
        self.policy_sets = Map("policy_sets", fd("policy_sets"), abi.PolicySetKey, abi.PolicySetValue)
        self.conntrack = Conntrack(fd("conntrack"), quota)
        self.fragments = Map("fragments", fd("fragments"), abi.FragmentKey, abi.FragmentValue)
        self.metrics = PerCpuMap("metrics", fd("metrics"), abi.MetricKey, abi.MetricValue)
        self.forwarded = PerCpuMap("forwarded", fd("forwarded"), Index, abi.MetricValue)
        self.event_limiter = PerCpuMap("event_limiter", fd("event_limiter"), Index, abi.EventLimiter)
        self.events_fd = fd("events")

    def lost_events(self) -> int:
        """Events that were not sent and that no later event has told yet, over all CPUs."""
        return sum(limiter.lost for limiter in self.event_limiter.get(Index(number=0)) or [])

    def counters(self) -> dict[tuple[int, int], tuple[int, int]]:
        """``(reason, direction)`` → ``(packets, bytes)``, over all CPUs; reason 0 counts what was forwarded."""
        rows = {(key.reason, key.direction): values for key, values in self.metrics.items()}
        rows |= {(int(abi.DropReason.DROP_NONE), key.number): values for key, values in self.forwarded.items()}
        return {key: (sum(v.packets for v in values), sum(v.bytes for v in values)) for key, values in rows.items()}

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self.descriptors.values():
            os.close(fd)
        self.descriptors.clear()


def maps_directory(pin_dir: Path) -> Path:
    """Where the maps of this ABI are pinned for a node."""
    return pin_dir / f"maps-v{abi.ABI_VERSION}"


def open_maps(pin_dir: Path, specs: Mapping[str, MapSpec], sizes: MapSizes = MapSizes()) -> Maps:
    """Open a node's maps: those that are pinned as they are, the missing ones new and pinned.

    Raises:
        MapLayoutError: A pinned map has another type or layout than this version writes.
    """
    directory = maps_directory(pin_dir)
    _make_directory(directory)
    descriptors: dict[str, int] = {}
    try:
        for name in _LAYOUTS:
            descriptors[name] = _open_or_create(directory / name, specs, sizes)
    except BaseException:
        for fd in descriptors.values():
            os.close(fd)
        raise
    return Maps(descriptors, _quota(specs, sizes))


def open_pinned_maps(pin_dir: Path) -> Maps:
    """Open the maps of a node that is running, for reading.

    Raises:
        BpfNotFoundError: The node has none: no agent has run yet, or it has another ABI.
    """
    directory = maps_directory(pin_dir)
    descriptors: dict[str, int] = {}
    try:
        for name in _LAYOUTS:
            descriptors[name] = syscall.get_pinned(str(directory / name))
    except BaseException:
        for fd in descriptors.values():
            os.close(fd)
        raise
    return Maps(descriptors, 0)


def has_other_versions(pin_dir: Path) -> bool:
    """Whether there are maps of another ABI version, which programs in force may use."""
    return any(_other_versions(pin_dir))


def remove_other_versions(pin_dir: Path) -> list[str]:
    """Unpin the maps of other ABI versions; to be called once no link runs a program that uses them."""
    removed = []
    for directory in _other_versions(pin_dir):
        for pin in directory.iterdir():
            pin.unlink()
        directory.rmdir()
        removed.append(directory.name)
    return removed


def _other_versions(pin_dir: Path) -> list[Path]:
    return [found for found in sorted(pin_dir.glob("maps-v*")) if found != maps_directory(pin_dir)]


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as failure:
        raise syscall.error(failure.errno or errno.EIO, "cannot be made", str(directory)) from None


def _quota(specs: Mapping[str, MapSpec], sizes: MapSizes) -> int:
    return sizes.conntrack_per_endpoint or specs["conntrack_inner"].max_entries


def _open_or_create(pin: Path, specs: Mapping[str, MapSpec], sizes: MapSizes) -> int:
    name = pin.name
    spec = specs[name]
    _check_source(spec)
    with contextlib.suppress(BpfNotFoundError):
        fd = syscall.get_pinned(str(pin))
        try:
            _check_pinned(syscall.map_info(fd), spec, pin)
        except MapLayoutError:
            os.close(fd)
            raise
        return fd
    fd = create_map(spec, size=getattr(sizes, name, None), quota=_quota(specs, sizes))
    try:
        syscall.pin(fd, str(pin))
    except BpfError:
        os.close(fd)
        raise
    return fd


def create_map(spec: MapSpec, *, size: int | None = None, quota: int = 1) -> int:
    """A new map as declared, or of another size, unpinned. ``quota`` is the size of the tables of a map of maps."""
    ring = spec.type == MapType.RINGBUF  # BCC gives it sizes, the kernel wants none
    inner = new_flow_table(quota) if spec.type == MapType.ARRAY_OF_MAPS else 0
    try:
        return syscall.map_create(
            MapType(spec.type),
            name=spec.name,
            key_size=0 if ring else spec.key_size,
            value_size=0 if ring else spec.value_size,
            max_entries=size or spec.max_entries,
            flags=spec.flags,
            inner_fd=inner,
        )
    finally:
        if inner:
            os.close(inner)


def _check_source(spec: MapSpec) -> None:
    """The compiled source and Python read the same header; anything else is a broken installation."""
    key, value = _LAYOUTS[spec.name]
    if value is None:
        return
    expected = (ctypes.sizeof(key), ctypes.sizeof(value))
    if (spec.key_size, spec.value_size) != expected:
        raise MapLayoutError(
            f"compiled with key and value of {spec.key_size} and {spec.value_size} bytes, abi.h says "
            f"{expected[0]} and {expected[1]}",
            where=f"map {spec.name}",
            fix="reinstall meshbridge",
        )


def _check_pinned(info: syscall.MapInfo, spec: MapSpec, pin: Path) -> None:
    found = (info.type, info.key_size, info.value_size)
    sizes = (0, 0) if spec.type == MapType.RINGBUF else (spec.key_size, spec.value_size)
    if found != (spec.type, *sizes):
        raise MapLayoutError(
            f"is a map of type {info.type} with key {info.key_size} and value {info.value_size} bytes; this version "
            f"has type {spec.type}, {sizes[0]} and {sizes[1]} bytes",
            where=str(pin),
            fix="it was made by a development version with the same ABI_VERSION: detach the node and remove its pins",
        )


assert {field.name for field in fields(MapSizes)} - {"conntrack_per_endpoint"} <= set(_LAYOUTS)
