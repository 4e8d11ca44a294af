"""What the kernel answers by a packed set, looked up in the set itself: for whoever holds no PolicyMap any more."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

from meshbridge import abi
from meshbridge.datapath.policysets import ENTRY_BYTES, KEY, VALUE, EntryKey, EntryValue, LayerValue, PackedSet
from meshbridge.policy.model import Layer

_PASSING: Final = frozenset({int(abi.PolicyVerdict.POLICY_ALLOW), int(abi.PolicyVerdict.POLICY_NEEDS_L7)})
_ANYONE: Final = int(abi.ReservedIdentity.IDENTITY_ANY)
_PREFIXES: Final = (*range(abi.POLICY_PREFIX_PORT, -1, -1), abi.POLICY_PREFIX_ANY)
_FALLBACKS: Final = {
    Layer.NETWORK: (int(abi.DropReason.DROP_POLICY), int(abi.DropReason.DROP_POLICY_DENY)),
    Layer.MESH: (int(abi.DropReason.DROP_MESH_POLICY), int(abi.DropReason.DROP_MESH_POLICY_DENY)),
}
"""The reason where entry or default name none: without an entry, and with one."""


@dataclass(frozen=True, slots=True)
class SetAnswers:
    """Asks one set as judge_layer and settle of bpf/pod.c do; the node's own processes are not asked for."""

    packed: PackedSet
    _layers: tuple[LayerValue, LayerValue] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_layers", self.packed.layers())

    def drop_reason(self, identity: int, protocol: int, port: int) -> int:
        """``enum drop_reason`` of a new flow with a peer; 0: it passes, if only because its drop is audited."""
        return self._layer(Layer.NETWORK, identity, protocol, port) or self._layer(Layer.MESH, identity, protocol, port)

    def _layer(self, layer: Layer, identity: int, protocol: int, port: int) -> int:
        default = self._layers[layer]
        found: EntryValue | None = None
        for prefix in _PREFIXES:
            for peer, used in ((identity, default.prefixes), (_ANYONE, default.any_prefixes)):
                if not used >> prefix & 1:
                    continue
                entry = self._entry(_key(peer, layer, prefix, protocol, port))
                if entry is not None and (found is None or entry.precedence > found.precedence):
                    found = entry
        decided = found or default
        if decided.verdict in _PASSING or decided.flags & abi.PolicyFlags.POLICY_F_AUDIT:
            return 0
        return decided.deny_reason or _FALLBACKS[layer][found is not None]

    def _entry(self, key: EntryKey) -> EntryValue | None:
        entries, wanted = self.packed.entries, KEY.pack(key.packed())
        places = range(0, len(entries), ENTRY_BYTES)
        at = bisect_left(places, wanted, key=lambda start: entries[start : start + KEY.size]) * ENTRY_BYTES
        if entries[at : at + KEY.size] != wanted:
            return None
        return EntryValue(*VALUE.unpack_from(entries, at + KEY.size))


def _key(peer: int, layer: Layer, prefix: int, protocol: int, port: int) -> EntryKey:
    if prefix == abi.POLICY_PREFIX_ANY:
        return EntryKey(peer, 0, 0, prefix, layer)
    return EntryKey(peer, port & (0xFFFF0000 >> prefix) & 0xFFFF, protocol, prefix, layer)
