"""Policy sets in the kernel's own bytes: packed from a PolicyMap, compared, and combined for a transition.

A set stays packed as long as the agent lives (24 bytes an entry); Python objects for each entry would cost ten times
that.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
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
_KEY: Final = layout(abi.PolicyKey, skip=1)
_VALUE: Final = layout(abi.PolicyValue)
_DEFAULT: Final = layout(abi.PolicyLayerDefault)
_ENTRY_BYTES: Final = _KEY.size + _VALUE.size
_IDENTITY: Final = struct.Struct("=I")
_VERDICTS: Final = {
    Verdict.ALLOW: int(abi.PolicyVerdict.POLICY_ALLOW),
    Verdict.DENY: int(abi.PolicyVerdict.POLICY_DENY),
    Verdict.NEEDS_L7: int(abi.PolicyVerdict.POLICY_NEEDS_L7),
}
_DENY: Final = _VERDICTS[Verdict.DENY]
_ANY_IDENTITY: Final = int(abi.ReservedIdentity.IDENTITY_ANY)
_HOST: Final = int(abi.ReservedIdentity.IDENTITY_HOST)


class EntryKey(NamedTuple):
    """A policy key without its set id, in the order of ``struct policy_key``."""

    identity: int
    port: int
    protocol: int
    prefix: int
    layer: int


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

    def __len__(self) -> int:
        return len(self.entries) // _ENTRY_BYTES

    def items(self, set_id: int) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values for map ``policy`` under this number."""
        prefix = SET_ID.pack(set_id)
        for start in range(0, len(self.entries), _ENTRY_BYTES):
            middle = start + _KEY.size
            yield prefix + self.entries[start:middle], self.entries[middle : start + _ENTRY_BYTES]

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
    entries = sorted(
        _KEY.pack(key.identity, key.port, key.protocol, key.prefix, key.layer)
        + _VALUE.pack(
            entry.precedence,
            rules.number(entry.origins),
            _VERDICTS[entry.verdict],
            abi.PolicyFlags.POLICY_F_AUDIT if entry.audit else 0,
            entry.deny_reason,
        )
        for key, entry in policy.entries.items()
    )
    prefixes = dict.fromkeys(Layer, 0)
    for key in policy.entries:
        prefixes[key.layer] |= 1 << key.prefix
    defaults = b"".join(_pack_default(policy.default(layer), prefixes[layer], rules) for layer in Layer)
    return PackedSet(defaults, b"".join(entries))


def pack_policy(policy: EndpointPolicy, rules: RuleIds) -> tuple[PackedSet, ...]:
    """The four sets of an endpoint, in the order of ``endpoint_value.policy_set``."""
    return tuple(pack_map(policy.map(direction, family), rules) for direction in Direction for family in IpFamily)


def read_sets(
    defaults: Iterable[tuple[bytes, bytes]], entries: Iterable[tuple[bytes, bytes]]
) -> tuple[dict[int, PackedSet], dict[int, PackedSet]]:
    """The sets in maps ``policy_sets`` and ``policy``: the whole ones, and leftovers that have only entries."""
    grouped: dict[int, list[bytes]] = {}
    for key, value in entries:
        grouped.setdefault(SET_ID.unpack_from(key)[0], []).append(key[SET_ID.size :] + value)
    joined = {set_id: b"".join(sorted(items)) for set_id, items in grouped.items()}
    whole = {SET_ID.unpack(key)[0]: PackedSet(value, joined.pop(SET_ID.unpack(key)[0], b"")) for key, value in defaults}
    return whole, {set_id: PackedSet(b"", blob) for set_id, blob in joined.items()}


def unpack_entries(entries: bytes) -> Iterator[tuple[EntryKey, EntryValue]]:
    for start in range(0, len(entries), _ENTRY_BYTES):
        key = EntryKey(*_KEY.unpack_from(entries, start))
        yield key, EntryValue(*_VALUE.unpack_from(entries, start + _KEY.size))


def differing(one: PackedSet, other: PackedSet, identities: Iterable[int]) -> set[int]:
    """Those of ``identities`` for which the sets may answer differently."""
    if one == other:
        return set()
    left, right = one.by_identity(), other.by_identity()
    if _outcomes(one) != _outcomes(other) or left.get(_ANY_IDENTITY) != right.get(_ANY_IDENTITY):
        return set(identities)
    return {identity for identity in identities if left.get(identity) != right.get(identity)}


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
    return _packed(result, base.layers())


def _outcomes(packed: PackedSet) -> list[LayerValue]:
    return [layer._replace(prefixes=0) for layer in packed.layers()]  # the bitmap only says where entries are


def _pack_default(default: LayerDefault, prefixes: int, rules: RuleIds) -> bytes:
    return _DEFAULT.pack(prefixes, rules.number(default.origins), _VERDICTS[default.verdict], default.deny_reason, 0)


def _packed(entries: Mapping[EntryKey, EntryValue], defaults: tuple[LayerValue, LayerValue]) -> PackedSet:
    prefixes = [0, 0]
    for key in entries:
        prefixes[key.layer] |= 1 << key.prefix
    layers = (default._replace(prefixes=used) for default, used in zip(defaults, prefixes, strict=True))
    return PackedSet(
        b"".join(_DEFAULT.pack(*layer) for layer in layers),
        b"".join(sorted(_KEY.pack(*key) + _VALUE.pack(*value) for key, value in entries.items())),
    )


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
