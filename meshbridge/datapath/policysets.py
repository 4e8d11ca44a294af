"""Policy sets in the kernel's own bytes: packed from a PolicyMap, compared, and combined for a transition.

A set stays packed as long as the agent lives (20 bytes an entry); Python objects for each entry would cost ten times
that.
"""

from __future__ import annotations

import ctypes
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import or_
from typing import Final, NamedTuple

from meshbridge import abi
from meshbridge.identity.model import IpFamily
from meshbridge.policy.model import Direction, EndpointPolicy, Layer, LayerDefault, Origin, PolicyMap, Verdict

_FORMATS: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


def layout(cls: type[abi.AbiStruct], *, skip: int = 0) -> struct.Struct:
    """The struct module's form of an abi class in host order, without its first ``skip`` fields; arrays are bytes."""
    formats = []
    for name, kind in cls._fields_[skip:]:  # type: ignore[misc]
        size = ctypes.sizeof(kind)
        if name.startswith("pad"):
            formats.append(f"{size}x")
        else:
            formats.append(_FORMATS[size] if not hasattr(kind, "_length_") else f"{size}s")
    return struct.Struct("=" + "".join(formats))


SET_ID: Final = struct.Struct("=I")
KEY: Final = struct.Struct("=Q")
VALUE: Final = layout(abi.PolicyValue)
_DEFAULT: Final = layout(abi.PolicyLayerDefault)
DEFAULTS_BYTES: Final = _DEFAULT.size * len(Layer)
ENTRY_BYTES: Final = KEY.size + VALUE.size
_VERDICTS: Final = {
    Verdict.ALLOW: int(abi.PolicyVerdict.POLICY_ALLOW),
    Verdict.DENY: int(abi.PolicyVerdict.POLICY_DENY),
    Verdict.NEEDS_L7: int(abi.PolicyVerdict.POLICY_NEEDS_L7),
}
_DENY: Final = _VERDICTS[Verdict.DENY]
_ANY_IDENTITY: Final = int(abi.ReservedIdentity.IDENTITY_ANY)
_HOST: Final = int(abi.ReservedIdentity.IDENTITY_HOST)


class EntryKey(NamedTuple):
    """What a policy key says; ``packed`` is the kernel's form of it, see POLICY_KEY_… in abi.h."""

    identity: int
    port: int
    protocol: int
    prefix: int
    layer: int

    def packed(self) -> int:
        return (
            self.identity
            | self.port << abi.POLICY_KEY_PORT
            | self.protocol << abi.POLICY_KEY_PROTOCOL
            | self.prefix << abi.POLICY_KEY_PREFIX
            | self.layer << abi.POLICY_KEY_LAYER
            | 1 << abi.POLICY_KEY_USED
        )

    @classmethod
    def unpacked(cls, key: int) -> EntryKey:
        return cls(
            identity=key & 0xFFFFFFFF,
            port=key >> abi.POLICY_KEY_PORT & 0xFFFF,
            protocol=key >> abi.POLICY_KEY_PROTOCOL & 0xFF,
            prefix=key >> abi.POLICY_KEY_PREFIX & 0x1F,
            layer=key >> abi.POLICY_KEY_LAYER & 1,
        )


class EntryValue(NamedTuple):
    """A policy value in the order of ``struct policy_value``."""

    precedence: int
    rule_id: int
    verdict: int
    flags: int
    deny_reason: int


class LayerValue(NamedTuple):
    """What holds where no entry of the layer matches, in the order of ``struct policy_layer_default``."""

    prefixes: int
    any_prefixes: int
    rule_id: int
    verdict: int
    deny_reason: int
    flags: int


@dataclass(frozen=True, slots=True)
class PackedSet:
    """One policy set without its number; equal when the kernel would answer and report alike.

    ``entries`` are key and value of each entry, sorted by key.
    """

    defaults: bytes
    entries: bytes

    @classmethod
    def of_content(cls, content: bytes) -> PackedSet:
        return cls(content[:DEFAULTS_BYTES], content[DEFAULTS_BYTES:])

    @property
    def content(self) -> bytes:
        """The whole set, as table POLICY_SETS takes and gives it."""
        return self.defaults + self.entries

    def __len__(self) -> int:
        return len(self.entries) // ENTRY_BYTES

    def by_identity(self) -> dict[int, dict[EntryKey, EntryValue]]:
        """The entries unpacked, grouped by peer identity; for the moment of a transition, not to be kept."""
        found: dict[int, dict[EntryKey, EntryValue]] = {}
        for key, value in unpack_entries(self.entries):
            found.setdefault(key.identity, {})[key] = value
        return found

    def layers(self) -> tuple[LayerValue, LayerValue]:
        network, mesh = (LayerValue(*fields) for fields in _DEFAULT.iter_unpack(self.defaults))
        return network, mesh

    def rule_ids(self) -> set[int]:
        """Every rule id that a packet judged by this set may report."""
        return {layer.rule_id for layer in self.layers()} | {value.rule_id for _, value in unpack_entries(self.entries)}


class RuleIds:
    """Rule ids for what verdicts come from: the same origins have the same number as long as they are in use.

    A number is never given to other origins, so an event that is read late still means what it meant. A new agent
    starts far enough above what it finds in the kernel that its numbers mean nothing to events of the agent before.
    """

    _KEPT = 1 << 16
    _GAP = 1 << 12

    def __init__(self, highest_seen: int = 0) -> None:
        self._next = highest_seen + 1 + (self._GAP if highest_seen else 0)
        self._ids: dict[tuple[Origin, ...], int] = {}
        self._origins: dict[int, tuple[Origin, ...]] = {}

    def number(self, origins: tuple[Origin, ...]) -> int:
        """The rule id of these origins; 0 for none."""
        if not origins:
            return 0
        known = self._ids.get(origins)
        if known is not None:
            self._origins[known] = self._origins.pop(known)  # the least recently asked for is forgotten first
            return known
        known = self._ids[origins] = self._next
        self._origins[known] = origins
        self._next += 1
        if len(self._origins) > self._KEPT:
            del self._ids[self._origins.pop(next(iter(self._origins)))]
        return known

    def origins(self, rule_id: int) -> tuple[Origin, ...]:
        """What a rule id of an event stands for; nothing for one of an earlier run or long forgotten."""
        return self._origins.get(rule_id, ())


def pack_map(policy: PolicyMap, rules: RuleIds) -> PackedSet:
    """The set that answers in the kernel as ``policy`` does in Python."""
    keys = (EntryKey(k.identity, k.port, k.protocol, k.prefix, k.layer) for k in policy.entries)
    entries = sorted(
        KEY.pack(key.packed())
        + VALUE.pack(
            entry.precedence,
            rules.number(entry.origins),
            _VERDICTS[entry.verdict],
            abi.PolicyFlags.POLICY_F_AUDIT if entry.audit else 0,
            entry.deny_reason,
        )
        for key, entry in zip(keys, policy.entries.values(), strict=True)
    )
    prefixes = _prefixes((key.identity, key.layer, key.prefix) for key in policy.entries)
    defaults = b"".join(_pack_default(policy.default(layer), prefixes[layer], rules) for layer in Layer)
    return PackedSet(defaults, b"".join(entries))


def pack_policy(policy: EndpointPolicy, rules: RuleIds) -> tuple[PackedSet, ...]:
    """The four sets of an endpoint, in the order of ``endpoint_value.policy_set``."""
    return tuple(pack_map(policy.map(direction, family), rules) for direction in Direction for family in IpFamily)


def read_sets(items: Iterable[tuple[bytes, bytes]]) -> dict[int, PackedSet]:
    """The sets of table POLICY_SETS, by number."""
    return {SET_ID.unpack(key)[0]: PackedSet.of_content(content) for key, content in items}


def unpack_entries(entries: bytes) -> Iterator[tuple[EntryKey, EntryValue]]:
    for start in range(0, len(entries), ENTRY_BYTES):
        key = EntryKey.unpacked(KEY.unpack_from(entries, start)[0])
        yield key, EntryValue(*VALUE.unpack_from(entries, start + KEY.size))


def pack_entries(entries: Mapping[EntryKey, EntryValue], defaults: tuple[LayerValue, LayerValue]) -> PackedSet:
    """A set of these entries; ``defaults`` say what holds without one, which prefixes there are is found out."""
    prefixes = _prefixes((key.identity, key.layer, key.prefix) for key in entries)
    layers = (
        default._replace(prefixes=used.one_peer, any_prefixes=used.any_peer)
        for default, used in zip(defaults, prefixes, strict=True)
    )
    return PackedSet(
        b"".join(_DEFAULT.pack(*layer) for layer in layers),
        b"".join(sorted(KEY.pack(key.packed()) + VALUE.pack(*value) for key, value in entries.items())),
    )


def differing(one: PackedSet, other: PackedSet, identities: Iterable[int]) -> set[int]:
    """Those of ``identities`` for which the sets may answer differently."""
    if one == other:
        return set()
    left, right = one.by_identity(), other.by_identity()
    if _outcomes(one) != _outcomes(other) or left.get(_ANY_IDENTITY) != right.get(_ANY_IDENTITY):
        return set(identities)
    return {identity for identity in identities if left.get(identity) != right.get(identity)}


def with_peers(base: PackedSet, towards: PackedSet, added: Set[int], replaced: Set[int]) -> PackedSet:
    """What ``base`` says, but of some peers what ``towards`` says; ``base`` itself where that is the same.

    Of anyone, and of whoever no entry names, both say the same.

    Args:
        added: peers of which ``base`` says nothing.
        replaced: peers of which it may.
    """
    held = {entry for entry in _split(base.entries) if _identity(entry) in replaced} if replaced else set()
    wanted = {entry for entry in _split(towards.entries) if _identity(entry) in added | replaced}
    if held == wanted:
        return base
    if held <= wanted:
        entries = _inserted(base.entries, sorted(wanted - held))
        used = [_prefixes_of(wanted), [_Prefixes(layer.prefixes, layer.any_prefixes) for layer in base.layers()]]
    else:
        entries = b"".join(sorted([*(entry for entry in _split(base.entries) if entry not in held), *wanted]))
        used = [_prefixes_of(_split(entries))]
    layers = (
        layer._replace(
            prefixes=reduce(or_, (prefixes.one_peer for prefixes in found)),
            any_prefixes=reduce(or_, (prefixes.any_peer for prefixes in found)),
        )
        for layer, *found in zip(base.layers(), *used, strict=True)
    )
    return PackedSet(b"".join(_DEFAULT.pack(*layer) for layer in layers), entries)


def _inserted(entries: bytes, added: Sequence[bytes]) -> bytes:
    """Sorted entries with others, sorted too."""
    parts = []
    start = 0
    for entry in added:
        places = range(start, len(entries), ENTRY_BYTES)
        end = start + ENTRY_BYTES * bisect_left(places, entry, key=lambda at: entries[at : at + ENTRY_BYTES])
        parts += [entries[start:end], entry]
        start = end
    return b"".join([*parts, entries[start:]])


def _split(entries: bytes) -> Iterator[bytes]:
    return (entries[start : start + ENTRY_BYTES] for start in range(0, len(entries), ENTRY_BYTES))


def _identity(entry: bytes) -> int:
    identity: int = KEY.unpack_from(entry)[0] & 0xFFFFFFFF
    return identity


def _prefixes_of(entries: Iterable[bytes]) -> tuple[_Prefixes, _Prefixes]:
    keys = (EntryKey.unpacked(KEY.unpack_from(entry)[0]) for entry in entries)
    return _prefixes((key.identity, key.layer, key.prefix) for key in keys)


def overlay(base: PackedSet, answers: Mapping[int, tuple[PackedSet, int]], *, admits_host: bool = False) -> PackedSet:
    """``base``, except that peer ``i`` is answered as ``answers[i] = (set, j)`` answers ``j``.

    What the base says of any peer stays below: precedences are renumbered, the overlaid ones above all others.

    Args:
        admits_host: the node's own processes pass where no entry matches, as the kernel lets them in by itself.
    """
    grouped = base.by_identity()
    for identity in answers:
        grouped.pop(identity, None)
    unpacked = {id(source): source.by_identity() for source, _ in answers.values()}
    merged = {
        identity: (_merged(unpacked[id(source)], wanted), source.layers())
        for identity, (source, wanted) in answers.items()
    }
    ranks = _ranks(value for entries in grouped.values() for value in entries.values())
    upper = _ranks(value for entries, _ in merged.values() for value in entries.values())
    result = {
        key: value._replace(precedence=ranks[value.precedence])
        for entries in grouped.values()
        for key, value in entries.items()
    }
    floor = len(ranks) + 1
    for identity, (entries, layers) in merged.items():
        for layer, default in enumerate(layers):
            key = EntryKey(identity, 0, 0, abi.POLICY_PREFIX_ANY, layer)
            verdict = default.verdict
            if admits_host and answers[identity][1] == _HOST and layer == Layer.NETWORK and verdict == _DENY:
                verdict = _VERDICTS[Verdict.ALLOW]
            result[key] = EntryValue(floor, default.rule_id, verdict, default.flags, default.deny_reason)
        for key, value in entries.items():
            result[key._replace(identity=identity)] = value._replace(precedence=floor + 1 + upper[value.precedence])
    return pack_entries(result, base.layers())


class _Prefixes(NamedTuple):
    """Bits of the prefix lengths that a layer's entries use: those for one peer, those for any."""

    one_peer: int
    any_peer: int


def _prefixes(places: Iterable[tuple[int, int, int]]) -> tuple[_Prefixes, _Prefixes]:
    """By layer, of (identity, layer, prefix) of every entry."""
    found = [[0, 0], [0, 0]]
    for identity, layer, prefix in places:
        found[layer][identity == _ANY_IDENTITY] |= 1 << prefix
    return _Prefixes(*found[0]), _Prefixes(*found[1])


def _outcomes(packed: PackedSet) -> list[LayerValue]:
    # the bitmaps only say where entries are
    return [layer._replace(prefixes=0, any_prefixes=0) for layer in packed.layers()]


def _pack_default(default: LayerDefault, used: _Prefixes, rules: RuleIds) -> bytes:
    verdict = _VERDICTS[default.verdict]
    return _DEFAULT.pack(*used, rules.number(default.origins), verdict, default.deny_reason, 0)


def _merged(groups: Mapping[int, Mapping[EntryKey, EntryValue]], identity: int) -> dict[EntryKey, EntryValue]:
    """What a set holds for one peer, its own entries and those for any peer, as entries for any peer."""
    found: dict[EntryKey, EntryValue] = {}
    for key, value in chain(
        groups.get(_ANY_IDENTITY, {}).items(), groups.get(identity, {}).items() if identity != _ANY_IDENTITY else ()
    ):
        key = key._replace(identity=_ANY_IDENTITY)
        # On a tie of precedence at the same prefix the specific identity decides; it comes second.
        if key not in found or value.precedence >= found[key].precedence:
            found[key] = value
    return found


def _ranks(values: Iterable[EntryValue]) -> dict[int, int]:
    return {precedence: rank for rank, precedence in enumerate(sorted({value.precedence for value in values}))}
