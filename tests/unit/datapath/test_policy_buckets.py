"""Policy sets in buckets: what was put in is found by the two steps of abi.h, and room is given back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbridge import abi
from meshbridge.datapath.policysets import EntryKey, EntryValue, LayerValue, pack_entries, unpack_entries
from meshbridge.datapath.policytable import Arranged, Place, arrange, gaps, take
from meshbridge.datapath.syscall import BpfFullError

NOTHING = LayerValue(0, 0, 0, 0, 0, 0)
KEYS = st.builds(
    EntryKey,
    identity=st.integers(0, 2**32 - 1),
    port=st.integers(0, 0xFFFF),
    protocol=st.integers(0, 255),
    prefix=st.integers(0, abi.POLICY_PREFIX_ANY),
    layer=st.integers(0, 1),
)
MASK = 2**64 - 1


def packed(entries: Mapping[EntryKey, int]) -> bytes:
    values = {key: EntryValue(rank, rank + 1, 1, 0, 0) for key, rank in entries.items()}
    return pack_entries(values, (NOTHING, NOTHING)).entries


def look_up(arranged: Arranged, key: int) -> abi.PolicyValue | None:
    """As abi.h says."""
    seed, buckets, lines = arranged
    mixed = (key ^ seed) * abi.POLICY_HASH_FIRST & MASK
    mixed = (mixed ^ mixed >> 32) * abi.POLICY_HASH_SECOND & MASK
    for half in (mixed >> 32, mixed & 0xFFFFFFFF):
        bucket = abi.PolicyBucket.from_buffer_copy(lines[half * buckets >> 32])
        for slot in range(abi.POLICY_BUCKET_KEYS):
            if bucket.keys[slot] == key:
                number = bucket.values[slot]
                values = abi.PolicyValues.from_buffer_copy(lines[buckets + number // abi.POLICY_LINE_VALUES])
                return abi.PolicyValue.from_buffer_copy(values.values[number % abi.POLICY_LINE_VALUES])
        if not bucket.more:
            return None
    return None


@given(st.dictionaries(KEYS, st.integers(0, 2**31), min_size=1, max_size=60), KEYS)
def test_every_entry_is_found_and_no_other(entries: dict[EntryKey, int], other: EntryKey) -> None:
    arranged = arrange(packed(entries))
    for key, rank in entries.items():
        found = look_up(arranged, key.packed())
        assert found is not None
        assert (found.precedence, found.rule_id) == (rank, rank + 1)
    if other not in entries:
        assert look_up(arranged, other.packed()) is None


@given(KEYS)
def test_a_key_is_read_back_as_written(key: EntryKey) -> None:
    assert EntryKey.unpacked(key.packed()) == key
    assert key.packed() != 0


def test_ten_thousand_entries_of_one_rule_take_a_cache_line_for_four() -> None:
    entries = {EntryKey(256 + n // 10, 1000 + n % 10, 6, 16, 0): 1 for n in range(10_000)}
    arranged = arrange(packed(entries))
    assert (arranged.buckets, len(arranged.lines)) == (2_500, 2_501)
    assert all(len(line) == 64 for line in arranged.lines)
    assert all(look_up(arranged, key.packed()) for key in entries)


def test_more_values_than_can_be_numbered_are_refused() -> None:
    entries = {EntryKey(256 + n, 80, 6, 16, 0): n for n in range((1 << 16) + 1)}
    with pytest.raises(BpfFullError, match="65537 different values"):
        arrange(packed(entries))


def test_keys_chosen_to_crowd_together_are_arranged_all_the_same() -> None:
    """Ports of one rule that all have the same two buckets by the first seed."""

    def homes(port: int) -> tuple[int, int]:
        mixed = EntryKey(300, port, 6, 16, 0).packed() * abi.POLICY_HASH_FIRST & MASK
        mixed = (mixed ^ mixed >> 32) * abi.POLICY_HASH_SECOND & MASK
        return (mixed >> 32) * 8 >> 32, (mixed & 0xFFFFFFFF) * 8 >> 32

    crowd = [port for port in range(1, 65536) if homes(port) == (3, 7)][:30]
    assert len(crowd) == 30
    entries = {EntryKey(300, port, 6, 16, 0): port for port in crowd}
    arranged = arrange(packed(entries))
    assert arranged.seed != 0
    assert all(look_up(arranged, key.packed()) for key in entries)


def test_a_set_without_entries_takes_no_room() -> None:
    assert arrange(b"") == (0, 0, [])


def test_room_is_found_between_the_places_in_use() -> None:
    free = gaps([Place(0, 10, 3, 5), Place(0, 0, 2, 4), Place(0, 20, 0, 0)], 30)
    assert free == [(4, 10), (15, 30)]
    assert [take(free, 6), take(free, 1), take(free, 14)] == [4, 15, 16]
    with pytest.raises(BpfFullError, match="raise the size"):
        take(free, 1)


def test_entries_are_unpacked_as_they_were_packed() -> None:
    key = EntryKey(7, 80, 6, 16, 1)
    assert list(unpack_entries(packed({key: 5}))) == [(key, EntryValue(5, 6, 1, 0, 0))]
