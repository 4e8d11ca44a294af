"""The one compiler: policies × identities → what the kernel looks up, for one endpoint.

The kernel's maps, ``evaluate``, ``explain`` and the exports all read its output. It is a function of its arguments; the
``Compiler`` only keeps what two endpoints share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshbridge.identity.model import ContainerPort, Entity, IpFamily, Peer, Workload
from meshbridge.identity.numbering import FIRST_LOCAL
from meshbridge.policy.capture import Capture, PortClass, PortClasses
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
    PortMatch,
    Tier,
    Verdict,
)
from meshbridge.policy.parse.ports import PROTOCOLS
from meshbridge.policy.peers import PeerIndex
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.ports import PREFIX_ANY, range_prefixes
from meshbridge.policy.precedence import ANYONE, DropReason, Strength, precedence
from meshbridge.policy.selectors import EntityPeers, Selector

_UNKNOWN_LABELS = EntityPeers(frozenset({Entity.UNMANAGED}))

_Spot = tuple[int, int, int, int]
"""identity, protocol, port, prefix: a PolicyKey of the layer at hand, cheap to build and to compare."""


def compile_endpoint(
    workload: Workload,
    policies: PolicySet,
    identities: Mapping[int, Peer],
    capture: Capture,
) -> EndpointPolicy:
    """Compile the policies that select one endpoint.

    A direction with any selecting network rule is isolated: what no entry allows is dropped. Deny beats allow in its
    tier, and the order of rules and objects never matters.
    """
    return Compiler(identities).endpoint(workload, policies, capture)


class Compiler:
    """Compiles endpoints against one set of identities; endpoints with equal policies get the same map object."""

    def __init__(
        self,
        identities: Mapping[int, Peer],
        destinations: Mapping[int, Mapping[IpFamily, PortClasses]] | None = None,
    ) -> None:
        """``destinations`` are the inbound port classes of identities whose policies are all known to whoever compiles,
        where all of an identity's pods share them; what leaves past Envoy is compensated towards these only."""
        self.index = PeerIndex(identities)
        self._destinations = destinations or {}
        self._network: dict[object, _NetworkLayer] = {}
        self._maps: dict[object, tuple[MeshLayer, PolicyMap]] = {}
        self._mesh = MeshCompiler(self.index)

    def endpoint(self, workload: Workload, policies: PolicySet, capture: Capture) -> EndpointPolicy:
        """The maps of one endpoint, for each direction and address family."""
        selected = policies.selecting(workload)
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
            mesh = self._mesh.egress(workload, policies, bypasses, family, self._destinations)
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
    isolating: set[Origin] = set()
    best: dict[_Spot, tuple[int, set[Origin]]] = {}
    for rule in rules:
        if rule.default_deny:
            isolating.add(rule.origin)
        for numbers, spots in _spots(rule, index, ports, direction):
            for protocol, port, prefix in spots:
                rank = precedence(rule.tier, rule.priority, _strength(rule, port, prefix, judged))
                for number in numbers:
                    spot = (number, protocol, port, prefix)
                    held = best.get(spot)
                    if held is None or held[0] < rank:
                        best[spot] = (rank, {rule.origin})
                    elif held[0] == rank:
                        held[1].add(rule.origin)
    if isolating and direction is Direction.INGRESS:
        rank = precedence(Tier.DEFAULT, 0, Strength.ALLOW)
        for number in _own_node(index):
            best.setdefault((number, 0, 0, PREFIX_ANY), (rank, set()))
    shared: dict[tuple[int, frozenset[Origin]], PolicyEntry] = {}
    entries = {}
    for (number, protocol, port, prefix), (rank, origins) in sorted(best.items()):
        signature = (rank, frozenset(origins))
        entry = shared.get(signature)
        if entry is None:
            entry = shared[signature] = _entry(rank, tuple(sorted(origins)))
        entries[PolicyKey(number, Layer.NETWORK, protocol, port, prefix)] = entry
    if not isolating:
        return _NetworkLayer(entries, ALLOWED)
    return _NetworkLayer(entries, LayerDefault(Verdict.DENY, tuple(sorted(isolating)), DropReason.POLICY))


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


_Spots = list[tuple[int, int, int]]


def _spots(
    rule: NetworkRule, index: PeerIndex, ports: tuple[ContainerPort, ...], direction: Direction
) -> list[tuple[list[int], _Spots]]:
    """(identity numbers, (protocol, port, prefix)s) that the rule covers; each number with every one of its spots."""
    if isinstance(rule.peers, Anything):
        numbers, everybody = [ANYONE], True
    else:
        mask = 0
        for selector in rule.peers:
            mask |= index.matching(selector)
        if denies_by_labels(rule):
            mask |= index.matching(_UNKNOWN_LABELS)
        numbers, everybody = index.numbers(mask), False
    if not numbers:
        return []
    if isinstance(rule.ports, Anything):
        return [(numbers, [(0, 0, PREFIX_ANY)])]
    numbered = [match for match in rule.ports if not match.name]
    names = [match for match in rule.ports if match.name]
    found = [(numbers, _numbered_spots(numbered))] if numbered else []
    if names and direction is Direction.INGRESS:
        found.append((numbers, _named_spots(names, ports)))
    elif names:
        for number, peer in index.identities.items() if everybody else ((n, index.identities[n]) for n in numbers):
            if spots := _named_spots(names, peer.ports):
                found.append(([number], spots))
    return found


def denies_by_labels(rule: NetworkRule) -> bool:
    """Whether a rule denies peers by what their labels are: whoever's labels nobody knows may be one of them.

    So an address that two pods claim, or a pod that cannot be read, gets past no deny.
    """
    return (
        rule.verdict is Verdict.DENY
        and not isinstance(rule.peers, Anything)
        and any(isinstance(selector, Selector) for selector in rule.peers)
    )


def _numbered_spots(matches: Iterable[PortMatch]) -> _Spots:
    return [
        (match.protocol, port, prefix) for match in matches for port, prefix in range_prefixes(match.first, match.last)
    ]


def _named_spots(names: Iterable[PortMatch], ports: Iterable[ContainerPort]) -> _Spots:
    """A name stands for the container ports of that name and protocol; without any it matches nothing."""
    return [
        (name.protocol, port.port, 16)
        for name in names
        for port in ports
        if port.name == name.name and PROTOCOLS.get(port.protocol) == name.protocol
    ]
