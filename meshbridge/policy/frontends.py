"""Egress towards the frontends of Services, whose address the kernel sees before it is translated.

Egress policy means the backend (a pod, at its own port). Which one a flow will get is not known at the source, so a
frontend passes only where every ready backend would.

Spec: DESIGN §5, "Services".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from meshbridge.policy.capture import REGISTRY_ONLY
from meshbridge.policy.evaluate import Decision, evaluate
from meshbridge.policy.model import Layer, Origin, PolicyEntry, PolicyKey, PolicyMap, Verdict
from meshbridge.policy.ports import PREFIX_ANY, PREFIX_PORT
from meshbridge.policy.precedence import ANYONE, DropReason

_ABOVE_ALL: Final = 0xFFFFFFFF
"""The frontend's own port means nothing to a policy, so no rule may decide by it."""

NOBODY: Final = 0xFFFFFFFF
"""The number of no peer: what holds for it holds for whoever no entry names."""


@dataclass(frozen=True, slots=True, order=True)
class Backend:
    """A ready backend of a Service port: the pod's identity and its own port."""

    identity: int
    port: int


@dataclass(frozen=True, slots=True, order=True)
class FrontendPort:
    """A port of a Service's address. Without backends nobody is known to answer: it may be anybody, at any port.

    ``outside``: the address is no ClusterIP, but one that a Service claims of those outside of the cluster.
    """

    protocol: int
    port: int
    backends: tuple[Backend, ...]
    outside: bool = False


def with_frontends(policy_map: PolicyMap, frontends: Mapping[int, Iterable[FrontendPort]]) -> PolicyMap:
    """An egress map that also answers for Services, by the identity number of each one's address.

    ``policy_map`` itself is returned where it restricts nothing. A port none of whose backends may be reached drops for
    their reason, one with some for ``service backends differ``, and one without known backends for that reason, unless
    policy lets the endpoint reach anybody at any port. What a rule denies of an outside address stays denied, whoever
    answers there: a Service must not open an address that somebody denied before it was claimed.
    """
    if not frontends or not restricts(policy_map):
        return policy_map
    judge = _Judge(policy_map)
    added = {}
    for number, ports in frontends.items():
        for port in ports:
            entry = judge.entry(number, port)
            if not judge.says(number, port, entry):
                added[PolicyKey(number, Layer.NETWORK, port.protocol, port.port, PREFIX_PORT)] = entry
    if not added:
        return policy_map
    entries = dict(sorted({**policy_map.entries, **added}.items()))
    return PolicyMap(entries, policy_map.network_default, policy_map.mesh_default)


def restricts(policy_map: PolicyMap) -> bool:
    """Whether anything is said about anybody; else Services need no entries."""
    unrestricted = all(policy_map.default(layer).verdict is Verdict.ALLOW for layer in Layer)
    return bool(policy_map.entries) or not unrestricted


class _Judge:
    """Decisions of one map. Peers it has no entry for are all alike, and so are judged once for each port."""

    def __init__(self, policy_map: PolicyMap) -> None:
        self._map = policy_map
        self._named = {key.identity for key in policy_map.entries}
        self._decided: dict[tuple[int, int, int], Decision] = {}
        self._open: dict[int, bool] = {}

    def entry(self, number: int, port: FrontendPort) -> PolicyEntry:
        """What a packet to the Service's port gets."""
        if port.outside:
            own = self._decide(number, port.protocol, port.port).network
            if own.deny_reason == DropReason.POLICY_DENY:
                return PolicyEntry(Verdict.DENY, _ABOVE_ALL, own.origins, own.deny_reason)
        if not port.backends:
            if self._is_open(port.protocol):
                return PolicyEntry(Verdict.ALLOW, _ABOVE_ALL, ())
            return PolicyEntry(Verdict.DENY, _ABOVE_ALL, self._restricting(), DropReason.NO_SERVICE_BACKENDS)
        return _entry([self._decide(b.identity, port.protocol, b.port) for b in sorted(set(port.backends))])

    def says(self, number: int, port: FrontendPort, entry: PolicyEntry) -> bool:
        """Whether the map gives that answer by itself."""
        decision = self._decide(number, port.protocol, port.port)
        if decision.passes:
            return decision.audited is None and entry.verdict is Verdict.ALLOW and decision.verdict is Verdict.ALLOW
        return (entry.deny_reason, entry.origins) == (decision.deny_reason, decision.deciding.origins)

    def _decide(self, identity: int, protocol: int, port: int) -> Decision:
        key = (identity if identity in self._named else NOBODY, protocol, port)
        decision = self._decided.get(key)
        if decision is None:
            decision = self._decided[key] = evaluate(self._map, *key)
        return decision

    def _is_open(self, protocol: int) -> bool:
        """Whether the endpoint may reach anybody at any port: nobody is denied, and somebody unknown is let through."""
        found = self._open.get(protocol)
        if found is None:
            closed = any(
                entry.verdict is not Verdict.ALLOW
                and not entry.audit
                and entry.origins != (REGISTRY_ONLY,)  # whoever is behind a Service is known to the registry
                and (key.prefix == PREFIX_ANY or key.protocol == protocol)
                for key, entry in self._map.entries.items()
            )
            found = self._open[protocol] = not closed and all(self._passes(layer, protocol) for layer in Layer)
        return found

    def _restricting(self) -> tuple[Origin, ...]:
        """The policies that isolate, else the rules that deny."""
        found = {origin for layer in Layer for origin in self._map.default(layer).origins}
        if not found:
            found = {o for entry in self._map.entries.values() if entry.verdict is Verdict.DENY for o in entry.origins}
        return tuple(sorted(found))

    def _passes(self, layer: Layer, protocol: int) -> bool:
        if self._map.default(layer).verdict is Verdict.ALLOW:
            return True
        every_port = ((0, PREFIX_ANY), (protocol, 0))
        return any(PolicyKey(ANYONE, layer, of, 0, prefix) in self._map.entries for of, prefix in every_port)


def _entry(decisions: list[Decision]) -> PolicyEntry:
    denied = [decision for decision in decisions if not decision.passes]
    audited = [decision.audited for decision in decisions if decision.audited is not None]
    if audited and not denied:
        told = tuple(sorted({origin for layer in audited for origin in layer.origins}))
        return PolicyEntry(Verdict.DENY, _ABOVE_ALL, told, audited[0].deny_reason, audit=True)
    origins = _origins(denied or decisions)
    if not denied:
        return PolicyEntry(Verdict.ALLOW, _ABOVE_ALL, origins)
    reasons = {decision.deny_reason for decision in denied}
    differ = len(denied) < len(decisions) or len(reasons) > 1
    reason = DropReason.SERVICE_BACKENDS_DIFFER if differ else reasons.pop()
    return PolicyEntry(Verdict.DENY, _ABOVE_ALL, origins, reason)


def _origins(decisions: Iterable[Decision]) -> tuple[Origin, ...]:
    return tuple(sorted({origin for decision in decisions for origin in decision.deciding.origins}))
