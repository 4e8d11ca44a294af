"""The one compiler: policies × identities → what the kernel looks up, for one endpoint.

The kernel's maps, ``evaluate``, ``explain`` and the exports all read its output. It is a function of its arguments; the
``Compiler`` only keeps what two endpoints share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshbridge.identity.model import ContainerPort, Entity, IpFamily, Peer, Workload
from meshbridge.identity.numbering import FIRST_LOCAL
from meshbridge.policy.capture import Capture, PortClass, PortClasses
from meshbridge.policy.coverage import EVERY_PORT, UNKNOWN_LABELS, Coverage, Cut, Spot, coverage, denies_by_labels
from meshbridge.policy.lowering import MeshCompiler, MeshLayer
from meshbridge.policy.model import (
    ALLOWED,
    Anything,
    Direction,
    EndpointPolicy,
    Judge,
    Layer,
    LayerDefault,
    NetworkRule,
    Origin,
    PolicyEntry,
    PolicyKey,
    PolicyMap,
    Tier,
    Verdict,
)
from meshbridge.policy.peers import PeerIndex
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.precedence import DropReason, Strength, precedence
from meshbridge.policy.tiers import Tiers

_Spot = tuple[int, int, int, int]
"""identity, protocol, port, prefix: a PolicyKey of the layer at hand, cheap to build and to compare."""


def compile_endpoint(
    workload: Workload,
    policies: PolicySet,
    identities: Mapping[int, Peer],
    capture: Capture,
) -> EndpointPolicy:
    """Compile the policies that select one endpoint.

    A direction with any selecting rule that isolates drops what no entry allows. Deny beats allow in the tier of
    NetworkPolicies; in the tiers around it the first match decides. The order of objects never matters.
    """
    return Compiler(identities).endpoint(workload, policies, capture)


class Compiler:
    """Compiles endpoints against one set of identities; endpoints with equal policies get the same map object."""

    def __init__(
        self,
        identities: Mapping[int, Peer] | PeerIndex,
        destinations: Mapping[int, Mapping[IpFamily, PortClasses]] | None = None,
    ) -> None:
        """``destinations`` are the inbound port classes of identities whose policies are all known to whoever compiles,
        where all of an identity's pods share them; what leaves past Envoy is compensated towards these only."""
        self.index = identities if isinstance(identities, PeerIndex) else PeerIndex(identities)
        self._destinations = destinations or {}
        self._network: dict[object, _NetworkLayer] = {}
        self._maps: dict[object, tuple[MeshLayer, PolicyMap]] = {}
        self._mesh = MeshCompiler(self.index)

    def endpoint(
        self, workload: Workload, policies: PolicySet, capture: Capture, selected: PolicySet | None = None
    ) -> EndpointPolicy:
        """The maps of one endpoint, for each direction and address family.

        Args:
            selected: those of ``policies`` that select it, where they are known.
        """
        selected = policies.selecting(workload) if selected is None else selected
        return EndpointPolicy(
            {
                (direction, family): self.map(workload, policies, selected, capture, direction, family)
                for direction in Direction
                for family in IpFamily
            }
        )

    def map(
        self,
        workload: Workload,
        policies: PolicySet,
        selected: PolicySet,
        capture: Capture,
        direction: Direction,
        family: IpFamily,
    ) -> PolicyMap:
        """One map of an endpoint; ``selected`` are those of ``policies`` that select it."""
        rules = tuple(rule for rule in selected.network if rule.direction is direction)
        network = self._network_layer(rules, workload.ports, capture.judges, capture.inbound[family], direction)
        if direction is Direction.INGRESS:
            mesh = self._mesh.ingress(workload, selected, capture, family)
        else:
            bypasses = capture.outbound.get(family, ())
            mesh = self._mesh.egress(workload, policies, bypasses, family, self._destinations, capture.registry)
        return self._map(network, mesh)

    def _network_layer(
        self,
        rules: tuple[NetworkRule, ...],
        ports: tuple[ContainerPort, ...],
        judges: frozenset[Judge],
        classes: PortClasses,
        direction: Direction,
    ) -> _NetworkLayer:
        named = any(not isinstance(rule.ports, Anything) and any(p.name for p in rule.ports) for rule in rules)
        needs_l7 = any(rule.http for rule in rules)
        key = (
            rules,
            direction,
            ports if named and direction is Direction.INGRESS else None,
            (judges, classes) if needs_l7 else None,
        )
        layer = self._network.get(key)
        if layer is None:
            judged = classes if Judge.EXT_AUTHZ in judges and direction is Direction.INGRESS else None
            layer = self._network[key] = _compile_network(rules, self.index, ports, direction, judged)
        return layer

    def _map(self, network: _NetworkLayer, mesh: MeshLayer) -> PolicyMap:
        key = (id(network), id(mesh))
        known = self._maps.get(key)
        if known is None:
            entries = {**network.entries, **mesh.entries} if mesh.entries else network.entries
            # with its layer: an id is a key only as long as nothing else can get it
            known = self._maps[key] = (mesh, PolicyMap(entries, network.default, mesh.default))
        return known[1]


class _NetworkLayer:
    """Entries and default of the network family for one direction; held by the Compiler, so that its id is a key."""

    __slots__ = ("default", "entries")

    def __init__(self, entries: Mapping[PolicyKey, PolicyEntry], default: LayerDefault) -> None:
        self.entries, self.default = entries, default


def _compile_network(
    rules: Iterable[NetworkRule],
    index: PeerIndex,
    ports: tuple[ContainerPort, ...],
    direction: Direction,
    judged: PortClasses | None,
) -> _NetworkLayer:
    tiers = Tiers.of(rules)
    covered = {rule: coverage(rule, index, ports, direction) for rule in tiers.rules}
    found = _Entries(judged)
    for step, rule in enumerate(tiers.baseline):
        found.claim(rule, covered[rule], Tier.BASELINE, step)
    for rule in tiers.normal:
        found.claim(rule, covered[rule], Tier.NORMAL, 0)
    if tiers.isolating and direction is Direction.INGRESS:
        found.put([(_own_node(index), [EVERY_PORT])], precedence(Tier.DEFAULT, 0, Strength.ALLOW), ())
    step = 0
    for rule in tiers.admin:
        if rule.passes:
            step = _pass_on(rule, tiers, covered, found, index, step)
        else:
            found.claim(rule, covered[rule], Tier.ADMIN, step)
        step += 1
    if not tiers.isolating:
        return _NetworkLayer(found.entries(), ALLOWED)
    return _NetworkLayer(found.entries(), LayerDefault(Verdict.DENY, tiers.isolating, DropReason.POLICY))


def _pass_on(
    rule: NetworkRule,
    tiers: Tiers,
    covered: Mapping[NetworkRule, Coverage],
    found: _Entries,
    index: PeerIndex,
    step: int,
) -> int:
    """Write what the tiers below say of all that ``rule`` covers, from ``step`` on; the last step that took.

    The kernel stops at the highest entry, so it cannot go on to them by itself.
    """
    passed = covered[rule]
    cut = Cut(passed)
    if denies_by_labels(rule):
        unknown = cut.both([(index.numbers(index.matching(UNKNOWN_LABELS)), [EVERY_PORT])])
        found.put(unknown, precedence(Tier.ADMIN, step, Strength.DENY), (rule.origin,))
    for below in tiers.normal:
        found.claim(below, cut.both(covered[below]), Tier.ADMIN, step)
    for below in tiers.baseline:
        step += 1
        found.claim(below, cut.both(covered[below]), Tier.ADMIN, step)
    step += 1
    if tiers.isolating:
        found.put(passed, precedence(Tier.ADMIN, step, Strength.ISOLATED), tiers.isolating)
    else:
        found.put(passed, precedence(Tier.ADMIN, step, Strength.ALLOW), (rule.origin,))
    return step


class _Entries:
    """Entries of the network layer as they come together: of equal keys the higher precedence stays."""

    def __init__(self, judged: PortClasses | None) -> None:
        self._judged = judged
        self._best: dict[_Spot, tuple[int, set[Origin]]] = {}

    def claim(self, rule: NetworkRule, covered: Coverage, tier: Tier, step: int) -> None:
        """The verdict of ``rule`` for part of what it covers."""
        for numbers, spots in covered:
            for spot in spots:
                rank = precedence(tier, step, _strength(rule, spot[1], spot[2], self._judged))
                self._put(numbers, spot, rank, (rule.origin,))

    def put(self, covered: Coverage, rank: int, origins: tuple[Origin, ...]) -> None:
        for numbers, spots in covered:
            for spot in spots:
                self._put(numbers, spot, rank, origins)

    def _put(self, numbers: Iterable[int], spot: Spot, rank: int, origins: tuple[Origin, ...]) -> None:
        for number in numbers:
            held = self._best.get((number, *spot))
            if held is None or held[0] < rank:
                self._best[number, *spot] = (rank, set(origins))
            elif held[0] == rank:
                held[1].update(origins)

    def entries(self) -> dict[PolicyKey, PolicyEntry]:
        """By key, in its order; entries that say the same are one object."""
        shared: dict[tuple[int, frozenset[Origin]], PolicyEntry] = {}
        found = {}
        for (number, protocol, port, prefix), (rank, origins) in sorted(self._best.items()):
            signature = (rank, frozenset(origins))
            entry = shared.get(signature)
            if entry is None:
                entry = shared[signature] = _entry(rank, tuple(sorted(origins)))
            found[PolicyKey(number, Layer.NETWORK, protocol, port, prefix)] = entry
        return found


def _own_node(index: PeerIndex) -> list[int]:
    """This node's addresses that some policy CIDR contains: the kernel knows only the reserved number as localhost."""
    return [
        number
        for number, peer in index.identities.items()
        if Entity.HOST in peer.entities and not peer.masqueraded and number >= FIRST_LOCAL
    ]


def _strength(rule: NetworkRule, port: int, prefix: int, judged: PortClasses | None) -> Strength:
    if rule.verdict is Verdict.DENY:
        return Strength.DENY
    if not rule.http:
        return Strength.ALLOW
    last = port if prefix > 16 else port | (0xFFFF >> prefix)
    if judged is not None and all(
        part.port_class is PortClass.CAPTURED for part in judged.ranges if part.first <= last and port <= part.last
    ):
        return Strength.NEEDS_L7
    return Strength.UNJUDGED


def _entry(rank: int, origins: tuple[Origin, ...]) -> PolicyEntry:
    match Strength(rank & 0xFF):
        case Strength.DENY:
            return PolicyEntry(Verdict.DENY, rank, origins, DropReason.POLICY_DENY)
        case Strength.ALLOW:
            return PolicyEntry(Verdict.ALLOW, rank, origins)
        case Strength.NEEDS_L7:
            return PolicyEntry(Verdict.NEEDS_L7, rank, origins, judge=Judge.EXT_AUTHZ)
        case Strength.UNJUDGED:
            return PolicyEntry(Verdict.DENY, rank, origins, DropReason.NO_L7_JUDGE)
        case Strength.ISOLATED:
            return PolicyEntry(Verdict.DENY, rank, origins, DropReason.POLICY)
