"""The kernel's lookup in Python: one packet against a compiled map, with exactly the kernel's precedence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from meshbridge.policy.model import Judge, Layer, Origin, PolicyEntry, PolicyKey, PolicyMap, Verdict
from meshbridge.policy.ports import PREFIX_ANY, PREFIX_PORT, masked
from meshbridge.policy.precedence import ANYONE, DropReason

_EVERY_PREFIX: Final = range(PREFIX_ANY + 1)


@dataclass(frozen=True, slots=True)
class LayerDecision:
    """What one layer says. ``key`` None: no entry matched and the layer's default decided.

    ``localhost``: nothing but coming from the pod's own node lets it in. ``audit``: its DENY is told, and passes.
    """

    layer: Layer
    verdict: Verdict
    origins: tuple[Origin, ...]
    deny_reason: int = 0
    judge: Judge | None = None
    key: PolicyKey | None = None
    localhost: bool = False
    audit: bool = False

    @property
    def enforced(self) -> Verdict:
        """The verdict as far as it is acted on."""
        return Verdict.ALLOW if self.audit else self.verdict


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on a new flow: the stricter of both layers, and what each of them said."""

    network: LayerDecision
    mesh: LayerDecision

    @property
    def verdict(self) -> Verdict:
        return min(self.network.enforced, self.mesh.enforced)

    @property
    def audited(self) -> LayerDecision | None:
        """The layer that would have dropped what passes because its deny is only told."""
        denying = (layer for layer in (self.network, self.mesh) if layer.audit)
        return next(denying, None) if self.passes else None

    @property
    def deciding(self) -> LayerDecision:
        """The layer whose verdict holds; the network's when both say the same."""
        return self.mesh if self.mesh.enforced < self.network.enforced else self.network

    @property
    def deny_reason(self) -> int:
        """``enum drop_reason`` of a drop, 0 of a pass."""
        return self.deciding.deny_reason if self.verdict is Verdict.DENY else 0

    @property
    def passes(self) -> bool:
        """Whether the kernel lets the packet through; NEEDS_L7 is only ever compiled where somebody judges L7."""
        return self.verdict is not Verdict.DENY


def evaluate(policy_map: PolicyMap, identity: int, protocol: int, port: int, *, localhost: bool = False) -> Decision:
    """Decide a new flow from or to a peer.

    Args:
        identity: The peer's number.
        protocol: IPPROTO_*.
        port: The destination port at the pod; the type of an ICMP message.
        localhost: The packet comes from a process of the pod's own node: where no network entry matches it passes.
    """
    return Lookup(policy_map, dict.fromkeys(Layer, _EVERY_PREFIX)).decide(identity, protocol, port, localhost=localhost)


@dataclass(frozen=True, slots=True)
class Lookup:
    """A map to ask many times: as the kernel does, only prefix lengths in use are probed."""

    policy_map: PolicyMap
    prefixes: Mapping[Layer, Iterable[int]]

    @classmethod
    def of(cls, policy_map: PolicyMap) -> Lookup:
        used: dict[Layer, set[int]] = {layer: set() for layer in Layer}
        for key in policy_map.entries:
            used[key.layer].add(key.prefix)
        return cls(policy_map, {layer: tuple(sorted(prefixes)) for layer, prefixes in used.items()})

    def decide(self, identity: int, protocol: int, port: int, *, localhost: bool = False) -> Decision:
        """The same as ``evaluate``."""
        network, mesh = self.prefixes[Layer.NETWORK], self.prefixes[Layer.MESH]
        return Decision(
            _layer(self.policy_map, Layer.NETWORK, network, identity, protocol, port, localhost=localhost),
            _layer(self.policy_map, Layer.MESH, mesh, identity, protocol, port, localhost=False),
        )


def _layer(
    policy_map: PolicyMap,
    layer: Layer,
    prefixes: Iterable[int],
    identity: int,
    protocol: int,
    port: int,
    *,
    localhost: bool,
) -> LayerDecision:
    best: tuple[int, int, int] | None = None
    found: tuple[PolicyKey, PolicyEntry] | None = None
    for peer in dict.fromkeys((identity, ANYONE)):
        for prefix in prefixes:
            if prefix == PREFIX_ANY:
                key = PolicyKey(peer, layer, 0, 0, PREFIX_ANY)
            else:
                key = PolicyKey(peer, layer, protocol, masked(port, prefix), prefix)
            entry = policy_map.entries.get(key)
            if entry is None:
                continue
            longer = -1 if prefix == PREFIX_ANY else min(prefix, PREFIX_PORT)
            rank = (entry.precedence, longer, 1 if peer != ANYONE else 0)
            if best is None or rank > best:
                best, found = rank, (key, entry)
    if found is not None:
        key, entry = found
        own_node = layer is Layer.NETWORK and not entry.origins
        return LayerDecision(
            layer, entry.verdict, entry.origins, entry.deny_reason, entry.judge, key, own_node, entry.audit
        )
    default = policy_map.default(layer)
    if localhost and default.verdict is Verdict.DENY:
        return LayerDecision(layer, Verdict.ALLOW, (), localhost=True)
    reason = default.deny_reason or int(DropReason.POLICY if layer is Layer.NETWORK else DropReason.MESH_POLICY)
    return LayerDecision(layer, default.verdict, default.origins, reason if default.verdict is Verdict.DENY else 0)
