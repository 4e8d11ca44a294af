"""The mesh's verdict into kernel entries, in two directions that must never be mixed up (ISTIO.md §0).

On a captured port Envoy judges again, so what is uncertain passes; on an excluded port nobody does, so it is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import ClassVar, Self

from meshbridge.identity.model import Entity, IpAddress, IpFamily, IpNetwork, Peer, ProxyClass, Workload
from meshbridge.policy.baseline import UNDECIDED, Flow, Guard, MeshVerdict, Principal, mesh_verdict
from meshbridge.policy.capture import (
    LAST_PORT,
    REGISTRY_ONLY,
    AppProtocol,
    Capture,
    EgressRegistry,
    OutboundBypass,
    PortClass,
    PortClasses,
)
from meshbridge.policy.mesh import Attribute, EffectiveMtls, effective_mtls
from meshbridge.policy.model import (
    ALLOWED,
    Anything,
    Judge,
    Layer,
    LayerDefault,
    Origin,
    PolicyEntry,
    PolicyKey,
    Verdict,
)
from meshbridge.policy.parse.ports import PROTOCOLS
from meshbridge.policy.peers import PeerIndex
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.ports import range_prefixes
from meshbridge.policy.precedence import ANYONE, DropReason, MeshRank

_TCP = PROTOCOLS["TCP"]
_ENVOY_ONLY = frozenset({Judge.ENVOY})
_WITH_OWN_PRINCIPAL = frozenset(
    {ProxyClass.SIDECAR, ProxyClass.AMBIENT, ProxyClass.PROXYLESS, ProxyClass.GATEWAY, ProxyClass.WAYPOINT}
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the kernel does with a flow in the mesh layer. ``audit``: a DENY that is told, and passes."""

    verdict: Verdict = Verdict.ALLOW
    origins: tuple[Origin, ...] = ()
    deny_reason: int = 0
    judge: Judge | None = None
    audit: bool = False


PASS = Outcome()
"""No mesh policy has a say."""


def lower_captured(baseline: MeshVerdict, judges: frozenset[Judge]) -> Outcome:
    """Only a certain DENY drops; what is uncertain passes to Envoy, unless nobody is there to judge it."""
    match baseline.verdict:
        case Verdict.DENY:
            return Outcome(Verdict.DENY, baseline.origins, baseline.deny_reason)
        case Verdict.NEEDS_L7 if Judge.ENVOY in judges:
            return Outcome(Verdict.NEEDS_L7, baseline.origins, 0, Judge.ENVOY)
        case Verdict.NEEDS_L7:
            return Outcome(Verdict.DENY, baseline.origins, DropReason.NO_L7_JUDGE)
        case Verdict.ALLOW:
            return Outcome(Verdict.ALLOW, baseline.origins)


def lower_excluded(baseline: MeshVerdict) -> Outcome:
    """Only a certain ALLOW passes: nobody judges this flow again."""
    if baseline.verdict is Verdict.ALLOW:
        return Outcome(Verdict.ALLOW, baseline.origins)
    return Outcome(Verdict.DENY, baseline.origins, DropReason.COMPENSATION)


def own_principal(peer: Peer) -> Principal | str | None:
    """The one name a peer can have where only its address speaks for it (DESIGN §2, "Principals").

    An address that several claim may be any of them, so nothing is certain that a name decides.
    """
    if Entity.UNMANAGED in peer.entities:
        return UNDECIDED
    if not peer.is_pod or peer.masqueraded or peer.proxy not in _WITH_OWN_PRINCIPAL:
        return None
    return f"spiffe://{peer.trust_domain}/ns/{peer.namespace}/sa/{peer.service_account}"


@dataclass(frozen=True, slots=True)
class MeshLayer:
    """The mesh family's share of a policy map."""

    EMPTY: ClassVar[Self]

    entries: Mapping[PolicyKey, PolicyEntry] = field(default_factory=dict, hash=False)
    default: LayerDefault = ALLOWED


MeshLayer.EMPTY = MeshLayer()


@dataclass(frozen=True, slots=True)
class _Segment:
    """Ports that no condition tells apart."""

    first: int
    last: int
    port_class: PortClass
    protocol: AppProtocol
    audit: bool = False

    @property
    def size(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class _Source:
    """All that a mesh policy can ask of a source; sources equal in it share their verdicts."""

    networks: frozenset[IpNetwork] = frozenset()
    principal: Principal | str | None = UNDECIDED
    own_node: bool = False


class MeshCompiler:
    """Compiles the mesh layer against one set of identities; equal guards and captures share one value."""

    def __init__(self, index: PeerIndex) -> None:
        self._index = index
        self._layers: dict[object, MeshLayer] = {}
        self._guards: dict[int, tuple[PolicySet, Guard]] = {}

    def ingress(self, workload: Workload, selected: PolicySet, capture: Capture, family: IpFamily) -> MeshLayer:
        """The layer for flows to ``workload``; ``selected`` are the policies that select it."""
        classes = capture.inbound[family]
        if not any(part.port_class in (PortClass.CAPTURED, PortClass.EXCLUDED) for part in classes.ranges):
            return MeshLayer.EMPTY
        guard = guard_of(workload, selected)
        addresses = tuple(sorted((a for a in workload.addresses if IpFamily.of(a) is family), key=int))
        key = (
            guard.policies,
            guard.mtls.mode,
            guard.mtls.origin,
            tuple(sorted(guard.mtls.ports.items())),
            _modes(guard.mtls_past_envoy),
            tuple(refusal.origin for refusal in guard.refusals),
            guard.mesh,
            classes,
            capture.judges,
            tuple(sorted(capture.protocols.items())),
            addresses if _asks_address(guard) else (),
            tuple(workload.probe_ports),
            capture.audited,
        )
        layer = self._layers.get(key)
        if layer is None:
            audited = tuple((ports.first, ports.last) for ports in capture.audited if ports.family is family)
            layer = self._layers[key] = self._compile(workload, guard, capture, classes, addresses, audited)
        return layer

    def egress(
        self,
        workload: Workload,
        policies: PolicySet,
        bypasses: Sequence[OutboundBypass],
        family: IpFamily,
        destinations: Mapping[int, Mapping[IpFamily, PortClasses]],
        registry: EgressRegistry | None = None,
    ) -> MeshLayer:
        """What destinations' own lowering would drop, dropped where ``workload`` sends it past its own Envoy.

        On a port that the destination captures, only that is dropped which it drops for every way the flow may have
        come: through Envoy, as plaintext, with another name. On one that it excludes too, its kernel judges by address,
        so the sender has its own name there. So this only subtracts, and only where both ends' policies are known.

        Args:
            policies: All that are known, not only those that select ``workload``.
            destinations: The port classes of those identities whose policies are *all* among ``policies``, and whose
                labels tell which: with one ALLOW policy missing, what that allows would be dropped.
            registry: Under REGISTRY_ONLY: whatever it does not know is dropped as well.
        """
        if not bypasses:
            return MeshLayer.EMPTY
        sender = replace(workload.peer(), trust_domain=policies.mesh.trust_domain)
        addresses = tuple(address for address in workload.addresses if IpFamily.of(address) is family)
        entries = self._unregistered(bypasses, registry) if registry is not None else {}
        for number, peer in self._index.identities.items():
            classes = destinations.get(number, {}).get(family)
            ports = _ports_towards(peer, bypasses)
            if classes is None or not peer.is_pod or not ports:
                continue
            guard = self._guard(number, peer, policies)
            networks = frozenset(n for n in guard.networks if any(address in n for address in addresses))
            source = _Source(networks, own_principal(sender))
            for segment in _segments(guard, classes, {}, frozenset()):
                if segment.port_class is PortClass.EXCLUDED and _asks_address(guard):
                    # which of its addresses is meant only the destination knows, and what is uncertain passes here
                    segment = replace(segment, port_class=PortClass.CAPTURED)
                outcome = _outcome(guard, _ENVOY_ONLY, segment, source, (), frozenset())
                if outcome.verdict is Verdict.DENY:
                    for audit, where in ports.items():
                        entry = PolicyEntry(
                            Verdict.DENY, MeshRank.PEER, outcome.origins, DropReason.COMPENSATION, audit=audit
                        )
                        for port, prefix in _prefixes_within(segment, where):
                            entries[PolicyKey(number, Layer.MESH, _TCP, port, prefix)] = entry
        return MeshLayer(dict(sorted(entries.items()))) if entries else MeshLayer.EMPTY

    def _unregistered(
        self, bypasses: Sequence[OutboundBypass], registry: EgressRegistry
    ) -> dict[PolicyKey, PolicyEntry]:
        """Nobody whom the registry does not know is reached past Envoy; entries for destinations rank above these."""
        entries: dict[PolicyKey, PolicyEntry] = {}
        bypasses = [bypass for bypass in bypasses if bypass.registered]
        known = PolicyEntry(Verdict.ALLOW, MeshRank.SOME_PORTS, ())
        anywhere = _by_audit([bypass for bypass in bypasses if isinstance(bypass.networks, Anything)])
        by_name = [(port, port) for port in registry.by_name]

        def drop(number: int, ports: Mapping[bool, _Ranges]) -> None:
            for audit, where in ports.items():
                rank = MeshRank.EVERYWHERE if number == ANYONE else MeshRank.SOME_PORTS
                entry = PolicyEntry(Verdict.DENY, rank, (REGISTRY_ONLY,), DropReason.COMPENSATION, audit=audit)
                entries.update(dict.fromkeys(_keys(number, _without(where, by_name)), entry))

        drop(ANYONE, anywhere)
        for number, peer in self._index.identities.items():
            if peer.registered or peer.service or not peer.networks.isdisjoint(registry.networks):
                for where in anywhere.values():
                    entries.update(dict.fromkeys(_keys(number, _without(where, by_name)), known))
            elif (ports := _ports_towards(peer, bypasses)) != anywhere:
                drop(number, ports)
        return entries

    def _guard(self, number: int, peer: Peer, policies: PolicySet) -> Guard:
        held = self._guards.get(number)
        if held is None or held[0] is not policies:
            held = self._guards[number] = (policies, guard_of_peer(peer, policies.selecting(peer)))
        return held[1]

    def _compile(
        self,
        workload: Workload,
        guard: Guard,
        capture: Capture,
        classes: PortClasses,
        addresses: tuple[IpAddress, ...],
        audited: Sequence[tuple[int, int]],
    ) -> MeshLayer:
        probes = _probe_ports(workload)
        segments = _segments(guard, classes, capture.protocols, probes, audited)
        relevant = guard.networks
        compensates = any(segment.port_class is PortClass.EXCLUDED for segment in segments)

        @cache
        def outcome_at(segment: _Segment, source: _Source) -> Outcome:
            return _outcome(guard, capture.judges, segment, source, addresses, probes)

        def outcomes(source: _Source) -> tuple[Outcome, ...]:
            # by name only where nobody judges again: names are many
            unnamed = _Source(source.networks)
            return tuple(outcome_at(s, source if s.port_class is PortClass.EXCLUDED else unnamed) for s in segments)

        unknown = _Source(principal=None if compensates else UNDECIDED)
        by_source = self._sources(relevant, compensates)
        everyone = outcomes(unknown)
        entries: dict[PolicyKey, PolicyEntry] = {}
        if any(outcome != PASS for outcome in everyone):
            _emit(entries, [ANYONE], segments, everyone, MeshRank.EVERYWHERE, MeshRank.SOME_PORTS)
        for source, mask in by_source.items():
            specific = outcomes(source)
            if specific != everyone:
                numbers = self._index.numbers(mask)
                _emit(entries, numbers, segments, specific, MeshRank.PEER, MeshRank.PEER_SOME_PORTS)
        return MeshLayer(dict(sorted(entries.items()))) if entries else MeshLayer.EMPTY

    def _sources(self, networks: Iterable[IpNetwork], compensates: bool) -> dict[_Source, int]:
        """The masks of the identities that are the same source."""
        found = dict(self._index.grouped(_named_source if compensates else _any_source))
        for network in networks:
            inside = self._index.inside(network)
            for source, mask in list(found.items()):
                if mask & inside:
                    found[replace(source, networks=source.networks | {network})] = mask & inside
                    found[source] = mask & ~inside
        return {source: mask for source, mask in found.items() if mask}


def _any_source(_peer: Peer) -> _Source:
    """Any of them may present any name."""
    return _Source()


def _named_source(peer: Peer) -> _Source:
    return _Source(principal=own_principal(peer), own_node=Entity.HOST in peer.entities and not peer.masqueraded)


def guard_of(workload: Workload, selected: PolicySet) -> Guard:
    """What the mesh's policies among ``selected`` mean for one workload."""
    return guard_of_peer(workload.peer(), selected)


def guard_of_peer(peer: Peer, selected: PolicySet) -> Guard:
    """The same for a pod of which no more than this is known."""
    modes = selected.peer_authentication
    own = tuple(policy for policy in modes if not policy.for_bypass)
    return Guard(
        selected.authorization,
        effective_mtls(modes, peer, selected.mesh),
        tuple(refusal for refusal in selected.refusals if refusal.layer is Layer.MESH),
        selected.mesh,
        effective_mtls(own, peer, selected.mesh) if len(own) < len(modes) else None,
    )


def _modes(mtls: EffectiveMtls | None) -> object:
    """All of it, to compare by."""
    return None if mtls is None else (mtls.mode, mtls.origin, tuple(sorted(mtls.ports.items())))


def _asks_address(guard: Guard) -> bool:
    """Whether by which of its own addresses a pod is reached can make a difference."""
    return any(
        condition.attribute is Attribute.DESTINATION_IP for rule in guard.rules for condition in rule.all_conditions
    )


_Ranges = Sequence[tuple[int, int]]


def _ports_towards(peer: Peer, bypasses: Sequence[OutboundBypass]) -> dict[bool, _Ranges]:
    """The destination ports on which a peer is reached past Envoy, by whether they are audited."""
    return _by_audit(
        [b for b in bypasses if isinstance(b.networks, Anything) or not peer.networks.isdisjoint(b.networks)]
    )


def _by_audit(bypasses: Sequence[OutboundBypass]) -> dict[bool, _Ranges]:
    """The ports of bypasses; what one of them enforces no other audits."""
    enforced, audited = ([(b.first, b.last) for b in bypasses if b.audit is audit] for audit in (False, True))
    found: dict[bool, _Ranges] = {False: enforced, True: _without(audited, enforced)}
    return {audit: ranges for audit, ranges in found.items() if ranges}


def _without(ranges: _Ranges, taken: _Ranges) -> _Ranges:
    left = list(ranges)
    for first, last in taken:
        parts = [((low, min(high, first - 1)), (max(low, last + 1), high)) for low, high in left]
        left = [(low, high) for pair in parts for low, high in pair if low <= high]
    return left


def _keys(number: int, ranges: _Ranges) -> Iterator[PolicyKey]:
    for first, last in ranges:
        for port, prefix in range_prefixes(first, last):
            yield PolicyKey(number, Layer.MESH, _TCP, port, prefix)


def _prefixes_within(segment: _Segment, ports: _Ranges) -> Iterator[tuple[int, int]]:
    for first, last in ports:
        yield from range_prefixes(max(first, segment.first), min(last, segment.last))


def _outcome(
    guard: Guard,
    judges: frozenset[Judge],
    segment: _Segment,
    source: _Source,
    addresses: tuple[IpAddress, ...],
    probes: frozenset[int],
) -> Outcome:
    match segment.port_class:
        case PortClass.CAPTURED:
            flow = Flow(source.networks, segment.first, UNDECIDED, addresses)
            return lower_captured(mesh_verdict(guard, flow, segment.protocol), judges)
        case PortClass.EXCLUDED:
            if source.own_node and segment.first in probes:
                return PASS
            principal = source.principal
            flow = Flow(source.networks, segment.first, principal, addresses)
            outcome = lower_excluded(mesh_verdict(guard.past_envoy, flow, segment.protocol))
            return replace(outcome, audit=segment.audit and outcome.verdict is Verdict.DENY)
        case _:
            return PASS


def _probe_ports(workload: Workload) -> frozenset[int]:
    named = {port.name: port.port for port in workload.ports if port.name}
    numbers = (named.get(port) if isinstance(port, str) else port for port in workload.probe_ports)
    return frozenset(number for number in numbers if number is not None)


def _segments(
    guard: Guard,
    classes: PortClasses,
    protocols: Mapping[int, AppProtocol],
    probes: frozenset[int],
    audited: Sequence[tuple[int, int]] = (),
) -> list[_Segment]:
    single = set(protocols) | set(guard.mtls.ports) | set(guard.past_envoy.mtls.ports) | probes
    for rule in guard.rules:
        for condition in rule.all_conditions:
            if condition.attribute is Attribute.PORTS:
                single.update(int(value) for value in (*condition.values, *condition.not_values))
    starts = {port for first in single for port in (first, first + 1)} | {part.first for part in classes.ranges}
    starts |= {port for first, last in audited for port in (first, last + 1)}
    ordered = sorted(start for start in starts if 0 <= start <= LAST_PORT)
    found = []
    for first, following in zip(ordered, [*ordered[1:], LAST_PORT + 1], strict=True):
        audit = any(start <= first <= end for start, end in audited)
        protocol = protocols.get(first, AppProtocol.AUTO)
        found.append(_Segment(first, following - 1, classes.at(first), protocol, audit))
    return found


def _emit(
    entries: dict[PolicyKey, PolicyEntry],
    numbers: Sequence[int],
    segments: Sequence[_Segment],
    outcomes: Sequence[Outcome],
    everywhere: MeshRank,
    some_ports: MeshRank,
) -> None:
    """Write the outcome that covers most ports once, and the others over it."""
    sizes: dict[Outcome, int] = {}
    for segment, outcome in zip(segments, outcomes, strict=True):
        sizes[outcome] = sizes.get(outcome, 0) + segment.size
    base = max(sizes, key=lambda outcome: sizes[outcome])
    made = {outcome: _entry(outcome, everywhere if outcome == base else some_ports) for outcome in sizes}
    for number in numbers:
        entries[PolicyKey(number, Layer.MESH, _TCP, 0, 0)] = made[base]
        for first, last, outcome in _runs(segments, outcomes):
            if outcome != base:
                for port, prefix in range_prefixes(first, last):
                    entries[PolicyKey(number, Layer.MESH, _TCP, port, prefix)] = made[outcome]


def _runs(segments: Sequence[_Segment], outcomes: Sequence[Outcome]) -> list[tuple[int, int, Outcome]]:
    runs: list[tuple[int, int, Outcome]] = []
    for segment, outcome in zip(segments, outcomes, strict=True):
        if runs and runs[-1][2] == outcome:
            runs[-1] = (runs[-1][0], segment.last, outcome)
        else:
            runs.append((segment.first, segment.last, outcome))
    return runs


def _entry(outcome: Outcome, rank: MeshRank) -> PolicyEntry:
    return PolicyEntry(outcome.verdict, rank, outcome.origins, outcome.deny_reason, outcome.judge, outcome.audit)
