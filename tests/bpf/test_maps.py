"""The typed maps over the real kernel: batches, pins that survive, layouts that are refused, sizes."""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from harness import CACHE, PIN_ROOT, SMALL, remove_pins

from meshbridge import abi
from meshbridge.datapath import maps as maps_module
from meshbridge.datapath import syscall
from meshbridge.datapath.compiler import compile_programs
from meshbridge.datapath.loader import open_datapath
from meshbridge.datapath.maps import (
    Index,
    MapLayoutError,
    Maps,
    MapSizes,
    maps_directory,
    open_maps,
    open_pinned_maps,
    remove_other_versions,
)
from meshbridge.datapath.policysets import SET_ID, EntryKey, EntryValue, LayerValue, pack_entries
from meshbridge.datapath.policytable import PolicyTable

COUNT = 10_000


@pytest.fixture
def pin_dir() -> Iterator[Path]:
    path = PIN_ROOT / f"mbdp-maps-{os.getpid()}"
    yield path
    remove_pins(path)


NO_DEFAULT = LayerValue(0, 0, 0, 0, 0, 0)


def fresh(pin_dir: Path, sizes: MapSizes = SMALL) -> Maps:
    return open_maps(pin_dir, compile_programs(CACHE).maps, sizes)


def key(number: int) -> abi.IpcacheKey:
    return abi.IpcacheKey(address=number.to_bytes(16, "big"))


def test_many_entries_are_written_read_and_removed(pin_dir: Path) -> None:
    maps = fresh(pin_dir)
    entries = {key(number): abi.IpcacheValue(identity=number) for number in range(COUNT)}
    maps.ipcache.put_many(entries)
    assert maps.ipcache.snapshot() == entries
    assert dict(maps.ipcache.items()) == entries
    assert maps.ipcache.get(key(77)) == abi.IpcacheValue(identity=77)
    maps.ipcache.delete_many([key(number) for number in range(0, 2 * COUNT, 2)])
    assert {found.address[15] % 2 for found in maps.ipcache.keys()} == {1}  # noqa: SIM118 - not a dict
    assert len(maps.ipcache) == COUNT // 2
    assert not maps.ipcache.delete(key(0))
    maps.ipcache.clear()
    assert len(maps.ipcache) == 0
    maps.close()


def test_prefixes_are_written_read_and_removed(pin_dir: Path) -> None:
    maps = fresh(pin_dir)
    entries = {
        abi.IpcacheCidrKey(prefix_bits=128 - bits, address=bytes(12) + (number << bits).to_bytes(4, "big")):
            abi.IpcacheValue(identity=number)
        for bits in (0, 8) for number in range(1, 500)
    }  # fmt: skip
    maps.ipcache_cidr.put_many(entries)
    assert maps.ipcache_cidr.snapshot() == entries
    maps.ipcache_cidr.clear()
    assert maps.ipcache_cidr.snapshot() == {}
    maps.close()


def test_a_flag_keeps_or_demands_what_is_there(pin_dir: Path) -> None:
    maps = fresh(pin_dir)
    with pytest.raises(syscall.BpfNotFoundError):
        maps.ipcache.put(key(1), abi.IpcacheValue(), syscall.UpdateFlag.EXIST)
    maps.ipcache.put(key(1), abi.IpcacheValue(identity=5), syscall.UpdateFlag.NOEXIST)
    with pytest.raises(syscall.BpfExistsError):
        maps.ipcache.put(key(1), abi.IpcacheValue(), syscall.UpdateFlag.NOEXIST)
    maps.close()


def test_a_full_map_says_so(pin_dir: Path) -> None:
    maps = fresh(pin_dir, replace(SMALL, ipcache=10))
    with pytest.raises(syscall.BpfFullError, match=r"ipcache.*raise the size"):
        maps.ipcache.put_many({key(number): abi.IpcacheValue() for number in range(100)})
    assert len(maps.ipcache) == 10
    maps.close()


def test_pinned_maps_are_taken_over_with_their_content(pin_dir: Path) -> None:
    first = fresh(pin_dir)
    first.ipcache.put(key(1), abi.IpcacheValue(identity=5))
    first.conntrack.create(8)
    index = first.conntrack.create(9)
    assert first.conntrack.remove(8)
    first.close()
    second = fresh(pin_dir, MapSizes(ipcache=5))
    assert second.ipcache.get(key(1)) == abi.IpcacheValue(identity=5)
    assert second.conntrack.tables() == {9: index}
    assert second.conntrack.create(9) == index
    reader = open_pinned_maps(pin_dir)
    assert reader.ipcache.get(key(1)) == abi.IpcacheValue(identity=5)
    reader.close()
    second.close()


def test_a_node_without_maps_is_told_apart(pin_dir: Path) -> None:
    with pytest.raises(syscall.BpfNotFoundError):
        open_pinned_maps(pin_dir)


def test_a_pin_of_another_layout_is_refused_and_left_alone(pin_dir: Path) -> None:
    fresh(pin_dir).close()
    pin = maps_directory(pin_dir) / "policy"
    pin.unlink()
    fd = syscall.map_create(syscall.MapType.HASH, name="policy", key_size=20, value_size=99, max_entries=1)
    syscall.pin(fd, str(pin))
    os.close(fd)
    with pytest.raises(MapLayoutError, match=r"policy: is a map of type 1 with key 20 and value 99 bytes.*remove"):
        fresh(pin_dir)
    assert pin.exists()


def test_another_abi_has_maps_of_its_own_until_they_are_removed(pin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fresh(pin_dir)
    old.ipcache.put(key(1), abi.IpcacheValue(identity=5))
    monkeypatch.setattr(maps_module.abi, "ABI_VERSION", abi.ABI_VERSION + 1)
    new = fresh(pin_dir)
    assert len(new.ipcache) == 0
    assert old.ipcache.get(key(1)) is not None
    assert remove_other_versions(pin_dir) == [f"maps-v{abi.ABI_VERSION - 1}"]
    assert [path.name for path in pin_dir.iterdir()] == [f"maps-v{abi.ABI_VERSION}"]
    old.close()
    new.close()


def test_every_endpoint_has_a_flow_table_of_the_size_asked_for(pin_dir: Path) -> None:
    maps = fresh(pin_dir, replace(SMALL, conntrack_per_endpoint=128))
    for incarnation in (1, 2):
        maps.conntrack.create(incarnation)
    with maps.conntrack.flows(1) as flows:
        flows.put(abi.ConntrackKey(protocol=6), abi.ConntrackValue(revision=3))
        assert syscall.map_info(flows.fd).max_entries == 128
    maps.conntrack.create(1)
    with maps.conntrack.flows(1) as flows, maps.conntrack.flows(2) as others:
        assert (len(flows), len(others)) == (1, 0)
    assert maps.conntrack.remove(1)
    assert not maps.conntrack.remove(1)
    with pytest.raises(syscall.BpfNotFoundError), maps.conntrack.flows(1):
        pass
    maps.close()


def test_no_two_incarnations_share_a_flow_table_and_one_too_many_is_refused(pin_dir: Path) -> None:
    maps = fresh(pin_dir, replace(SMALL, conntrack=6))
    given = {incarnation: maps.conntrack.create(incarnation) for incarnation in range(1, 6)}
    assert sorted(given.values()) == [1, 2, 3, 4, 5], "index 0 is nobody's"
    with pytest.raises(syscall.BpfFullError, match="flow table"):
        maps.conntrack.create(6)
    assert maps.conntrack.remove(2)
    assert maps.conntrack.create(7) == given[2]
    assert maps.conntrack.tables() == {i: n for i, n in given.items() if i != 2} | {7: given[2]}
    maps.close()


def test_the_index_of_a_flow_table_is_used_again_as_late_as_can_be(pin_dir: Path) -> None:
    maps = fresh(pin_dir, replace(SMALL, conntrack=6))
    first, second = maps.conntrack.create(1), maps.conntrack.create(2)
    maps.conntrack.remove(1)
    assert maps.conntrack.create(3) not in (first, second)
    maps.close()


def test_policy_sets_come_and_go_in_little_room_and_none_in_use_is_overwritten(pin_dir: Path) -> None:
    maps = fresh(pin_dir, replace(SMALL, policy=96))
    rng = random.Random(5)
    expected: dict[bytes, bytes] = {}
    refused = 0
    for number in range(400):
        table = PolicyTable(maps)  # as after a kill: it knows only what the kernel holds
        key = SET_ID.pack(rng.randrange(1, 12))
        if rng.random() < 0.4:
            table.delete([key])
            expected.pop(key, None)
        else:
            ports = rng.sample(range(65536), rng.randrange(80))
            entries = {EntryKey(300, port, 6, 16, 0): EntryValue(port % 9, number, 1, 0, 0) for port in ports}
            content = pack_entries(entries, (NO_DEFAULT, NO_DEFAULT)).content
            try:
                table.put([(key, content)])
                expected[key] = content
            except syscall.BpfFullError:
                refused += 1
        assert dict(table.read()) == dict(PolicyTable(maps).read()) == expected
    assert 0 < refused < 300
    maps.close()


def test_per_cpu_values_add_up(pin_dir: Path) -> None:
    maps = fresh(pin_dir)
    maps.event_limiter.put_all(Index(number=0), abi.EventLimiter(lost=3))
    assert maps.lost_events() == 3 * maps_module.POSSIBLE_CPUS
    maps.metrics.put_all(abi.MetricKey(reason=133, direction=1), abi.MetricValue(packets=2, bytes=100))
    counters = maps.counters()
    assert counters[133, 1] == (2 * maps_module.POSSIBLE_CPUS, 100 * maps_module.POSSIBLE_CPUS)
    assert counters[0, 0] == counters[0, 1] == (0, 0)
    maps.close()


def test_programs_are_loaded_once_for_the_same_code_and_maps(pin_dir: Path) -> None:
    with open_datapath(pin_dir, cache=CACHE) as first:
        loaded = {syscall.program_id(first.from_pod), syscall.program_id(first.to_pod)}
    with open_datapath(pin_dir, cache=CACHE) as second:
        assert {syscall.program_id(second.from_pod), syscall.program_id(second.to_pod)} == loaded
    (maps_directory(pin_dir) / "policy").unlink()
    with open_datapath(pin_dir, cache=CACHE) as third:
        assert not {syscall.program_id(third.from_pod), syscall.program_id(third.to_pod)} & loaded
    assert len(list((pin_dir / "programs").iterdir())) == 2


def test_no_descriptor_is_left_behind(pin_dir: Path) -> None:
    fresh(pin_dir).close()
    before = len(os.listdir("/proc/self/fd"))
    with open_datapath(pin_dir, cache=CACHE):
        pass
    (maps_directory(pin_dir) / "policy").unlink()
    fd = syscall.map_create(syscall.MapType.HASH, name="policy", key_size=4, value_size=4, max_entries=1)
    syscall.pin(fd, str(maps_directory(pin_dir) / "policy"))
    os.close(fd)
    with pytest.raises(MapLayoutError):
        fresh(pin_dir)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_the_verifier_refuses_is_shown_by_its_last_lines_and_kept_whole() -> None:
    uninitialised = struct.pack("<BBhi", 0xBF, 0x50, 0, 0)
    code = uninitialised + struct.pack("<BBhi", 0x95, 0, 0, 0)
    with pytest.raises(syscall.VerifierError, match="R5 !read_ok") as refused:
        syscall.program_load("mbdp_bad", code)
    assert "R5 !read_ok" in refused.value.log
    assert refused.value.where == "program mbdp_bad"


def test_a_call_the_kernel_refuses_says_what_and_where() -> None:
    with pytest.raises(syscall.BpfError, match=r"map mbdp: bpf\(MAP_CREATE\)"):
        syscall.map_create(syscall.MapType.HASH, name="mbdp", key_size=0, value_size=4, max_entries=1)
    with pytest.raises(syscall.BpfError, match="No such file"):
        syscall.get_pinned(f"{PIN_ROOT}/nothing")
    with pytest.raises(syscall.BpfError):
        syscall.map_update(-1, ctypes.c_uint32(), ctypes.c_uint32(), "m")
