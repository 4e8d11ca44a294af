"""Which conditions of a network rule a flow does not meet, and which rules would change what happens to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from meshbridge.identity.model import ContainerPort, Entity, Peer
from meshbridge.policy.attributes import Request
from meshbridge.policy.coverage import UNKNOWN_LABELS, denies_by_labels
from meshbridge.policy.httpmatch import http_rule_matches
from meshbridge.policy.mesh import Condition
from meshbridge.policy.model import Anything, Direction, HttpMatch, NetworkRule, Origin, PortMatch, Verdict
from meshbridge.policy.parse.ports import LAST_PORT, PROTOCOLS
from meshbridge.policy.selectors import (
    IS_NODE,
    IS_POD,
    CidrPeers,
    ClusterPeers,
    EntityPeers,
    LabelSource,
    Operator,
    PeerSelector,
    Requirement,
    Selector,
    is_node,
    label_of,
)
from meshbridge.policy.tiers import deciding

_ICMP: Final = frozenset({1, 58})
_NAMES: Final = {number: name for name, number in {**PROTOCOLS, "ICMP": 1, "ICMPv6": 58}.items()}
_LABELS: Final = {
    LabelSource.NAMESPACE: "namespace",
    LabelSource.SERVICE_ACCOUNT: "service account",
    LabelSource.CLUSTER: "cluster",
}


class Side(StrEnum):
    """Whose a condition is."""

    SOURCE = "source"
    DESTINATION = "destination"
    FLOW = "flow"
    REQUEST = "request"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A condition that a flow does not meet: what the rule wants, what there is, and the condition itself."""

    of: Side
    wants: str
    has: str
    condition: Requirement | PeerSelector | tuple[PortMatch, ...] | Condition | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class Near:
    """A rule that would change a verdict to ``verdict``, but for ``mismatches``; the fewer, the nearer.

    ``isolates``: it would not let the flow through or stop it itself, but its policy would select the endpoint, and
    then what no rule allows is denied. ``depends`` are further conditions that nobody can tell from what is said.
    """

    origin: Origin
    verdict: Verdict
    mismatches: tuple[Mismatch, ...]
    isolates: bool = False
    depends: tuple[str, ...] = ()

    @property
    def distance(self) -> tuple[int, int, bool, Origin]:
        """Nearest first: the fewest conditions; of these, those of policies that select the endpoint already."""
        return (len(self.mismatches), len(self.depends), self.isolates, self.origin)


@dataclass(frozen=True, slots=True)
class NetworkFlow:
    """A flow as the network policies at one end see it. ``ports`` are the container ports of the destination."""

    direction: Direction
    subject: Peer
    peer: Peer
    protocol: int
    port: int
    ports: tuple[ContainerPort, ...] = ()
    localhost: bool = False

    @property
    def sides(self) -> tuple[Side, Side]:
        """Which end is the one that policies select, and which its peer."""
        ingress = self.direction is Direction.INGRESS
        return (Side.DESTINATION, Side.SOURCE) if ingress else (Side.SOURCE, Side.DESTINATION)


def near_network(rules: Iterable[NetworkRule], flow: NetworkFlow) -> list[Near]:
    """The rules that would change the verdict of network policies on a flow if they matched it, nearest first.

    Args:
        rules: All there are, not only those that select the endpoint.
    """
    mine = [rule for rule in rules if rule.direction is flow.direction]
    misses = [(rule, subject_mismatches(rule, flow), _other_mismatches(rule, flow)) for rule in mine]
    matching = [rule for rule, subject, others in misses if not subject and others == ()]
    isolated = any(rule.default_deny for rule, subject, _ in misses if not subject)
    now = _verdict(matching, flow, isolated=isolated)
    found: dict[Origin, Near] = {}
    for rule, subject, others in misses:
        if not satisfiable(rule.subject) or (not subject and others == ()):
            continue
        for mismatches, isolates in ((subject, True), ((*subject, *others) if others is not None else (), False)):
            if not mismatches:
                continue
            then = _verdict(
                matching if isolates else [*matching, rule], flow, isolated=isolated or rule.default_deny
            )  # fmt: skip
            if then is not now:
                near = Near(rule.origin, then, tuple(mismatches), isolates)
                held = found.get(rule.origin)
                if held is None or near.distance < held.distance:
                    found[rule.origin] = near
    return sorted(found.values(), key=lambda near: near.distance)


def near_http(rules: Iterable[NetworkRule], flow: NetworkFlow, request: Request) -> list[Near]:
    """The HTTP rules that cover a flow and do not match its request, nearest first."""
    found: dict[Origin, Near] = {}
    for rule in rules:
        if rule.http and rule.direction is flow.direction and mismatches_of(rule, flow) == ():
            for match in rule.http:
                near = Near(rule.origin, Verdict.ALLOW, tuple(_http_mismatches(match, request)))
                held = found.get(rule.origin)
                if near.mismatches and (held is None or near.distance < held.distance):
                    found[rule.origin] = near
    return sorted(found.values(), key=lambda near: near.distance)


def _http_mismatches(match: HttpMatch, request: Request) -> Iterator[Mismatch]:
    """The fields of ``rules.http``, each asked alone."""
    for name in ("method", "path", "host"):
        wanted, sent = getattr(match, name), getattr(request, name)
        if not http_rule_matches(HttpMatch(**{name: wanted}), request):
            yield Mismatch(Side.REQUEST, f"{name} {wanted}", f"has {sent}")
    for name, value in match.headers:
        if not http_rule_matches(HttpMatch(headers=((name, value),)), request):
            sent = request.header(name)
            wanted = f"header {name}" if value is None else f"header {name}: {value}"
            yield Mismatch(Side.REQUEST, wanted, f"has {name}: {sent}" if sent is not None else "has no such header")


def verdict_without(rules: Iterable[NetworkRule], origins: Iterable[Origin], flow: NetworkFlow) -> Verdict:
    """The verdict of network policies if some of the rules were not there."""
    without = set(origins)
    left = [rule for rule in rules if rule.direction is flow.direction and rule.origin not in without]
    selecting = [rule for rule in left if not subject_mismatches(rule, flow)]
    matching = [rule for rule in selecting if _other_mismatches(rule, flow) == ()]
    return _verdict(matching, flow, isolated=any(rule.default_deny for rule in selecting))


def mismatches_of(rule: NetworkRule, flow: NetworkFlow) -> tuple[Mismatch, ...] | None:
    """What of a rule does not match, none if it does; None: it matches nobody, whatever is changed but itself."""
    others = _other_mismatches(rule, flow)
    return None if others is None else (*subject_mismatches(rule, flow), *others)


def subject_mismatches(rule: NetworkRule, flow: NetworkFlow) -> tuple[Mismatch, ...]:
    return requirement_mismatches(rule.subject, flow.subject, flow.sides[0])


def requirement_mismatches(selector: Selector, peer: Peer, side: Side) -> tuple[Mismatch, ...]:
    """The requirements of a selector that a peer does not meet."""
    return tuple(_requirements(selector, peer, side))


def satisfiable(selector: Selector) -> bool:
    """Whether a peer could have labels that a selector picks: every pod has a namespace and a service account."""
    must_exist = (Operator.IN, Operator.EXISTS)
    of_pods = any(r.source is LabelSource.NAMESPACE and r.operator in must_exist for r in selector.requirements)
    return not selector.contradiction() and not any(
        (r.source is LabelSource.ABSENT and r.operator in must_exist)
        or (of_pods and r.source in _LABELS and r.operator is Operator.DOES_NOT_EXIST)
        for r in selector.requirements
    )


def _verdict(covering: Sequence[NetworkRule], flow: NetworkFlow, *, isolated: bool) -> Verdict:
    rules = deciding(covering, isolated=isolated)
    if not rules:
        return Verdict.DENY if isolated and not flow.localhost else Verdict.ALLOW
    if any(rule.verdict is Verdict.DENY for rule in rules):
        return Verdict.DENY
    return Verdict.NEEDS_L7 if all(rule.http for rule in rules) else Verdict.ALLOW


def _other_mismatches(rule: NetworkRule, flow: NetworkFlow) -> tuple[Mismatch, ...] | None:
    peers: tuple[Mismatch, ...] | None = ()
    if not isinstance(rule.peers, Anything):
        if denies_by_labels(rule) and UNKNOWN_LABELS.matches(flow.peer):
            peers = ()
        else:
            alternatives = [found for each in rule.peers if (found := _peer(each, flow)) is not None]
            peers = min(alternatives, key=lambda found: (len(found), [m.wants for m in found]), default=None)
    ports = _port(rule.ports, flow)
    return None if peers is None or ports is None else (*peers, *ports)


def _peer(selector: PeerSelector, flow: NetworkFlow) -> tuple[Mismatch, ...] | None:
    side, peer = flow.sides[1], flow.peer
    match selector:
        case Selector():
            return requirement_mismatches(selector, peer, side) if satisfiable(selector) else None
        case EntityPeers() | ClusterPeers():
            if selector.matches(peer):
                return ()
            return (Mismatch(side, _entities(selector), f"is {kind_of(peer)}", selector),)
        case CidrPeers():
            return tuple(_cidr(selector, peer, side))


def _requirements(selector: Selector, peer: Peer, side: Side) -> Iterator[Mismatch]:
    missed = [requirement for requirement in selector.requirements if not requirement.matches(peer)]
    of_nodes = IS_NODE in selector.requirements
    kind, is_of_kind = ("a node", is_node(peer)) if of_nodes else ("a pod", peer.is_pod)
    if not is_of_kind and any(r.source is not LabelSource.RESERVED for r in missed):
        # Whoever is no pod has none of a pod's labels: one thing is wrong with it, not several.
        wanted = " and ".join(_wanted(r) for r in missed if r not in (IS_POD, IS_NODE))
        yield Mismatch(side, f"{kind} with {wanted}" if wanted else kind, f"is {kind_of(peer)}", selector)
        return
    for requirement in missed:
        value = label_of(peer, requirement.source, requirement.key)
        name = _label(requirement)
        yield Mismatch(side, _wanted(requirement), f"has {name}={value}" if value is not None else f"has no {name}",
                       requirement)  # fmt: skip


def _label(requirement: Requirement) -> str:
    match requirement.source:
        case LabelSource.NAMESPACE_LABEL:
            return f"namespace label {requirement.key}"
        case LabelSource.RESERVED:
            return f"entity {requirement.key}"
        case source:
            return _LABELS.get(source, requirement.key)


def _wanted(requirement: Requirement) -> str:
    if requirement == IS_POD:
        return "a pod"
    name, values = _label(requirement), ", ".join(requirement.values)
    match requirement.operator:
        case Operator.IN:
            return f"{name}={values}" if len(requirement.values) == 1 else f"{name} in ({values})"
        case Operator.NOT_IN:
            return f"{name} not in ({values})"
        case Operator.EXISTS:
            return f"any {name}"
        case Operator.DOES_NOT_EXIST:
            return f"no {name}"


def _entities(selector: EntityPeers | ClusterPeers) -> str:
    if isinstance(selector, ClusterPeers):
        return f"a member of cluster {selector.cluster}" if selector.cluster else "a member of any cluster"
    return " or ".join(sorted(selector.entities))


def kind_of(peer: Peer) -> str:
    """What a peer is, in a word or two: a pod by its namespace, else its entities."""
    if peer.is_pod:
        return f"a pod of {peer.namespace}"
    if peer.service:
        return f"the address of Service {peer.service}"
    named = sorted(peer.entities - {Entity.WORLD_IPV4, Entity.WORLD_IPV6}) or sorted(peer.entities)
    return " and ".join(named) or "nobody that is known"


def _cidr(selector: CidrPeers, peer: Peer, side: Side) -> Iterator[Mismatch]:
    if not selector.matches(replace(peer, networks=frozenset({selector.cidr}))):
        yield Mismatch(side, "an address outside of the cluster", f"is {kind_of(peer)}", selector)
    if selector.cidr not in peer.networks:
        yield Mismatch(side, f"an address in {selector.cidr}", "has another", selector)
    excepted = [network for network in selector.excepts if network in peer.networks]
    if excepted:
        names = ", ".join(map(str, excepted))
        yield Mismatch(side, f"an address outside of {names}", "has one inside", selector)


def _port(ports: Anything | tuple[PortMatch, ...], flow: NetworkFlow) -> tuple[Mismatch, ...] | None:
    if isinstance(ports, Anything) or any(_is_port(match, flow) for match in ports):
        return ()
    wanted = list(dict.fromkeys(_port_name(match) for match in ports))
    if not wanted:
        return None
    has = f"is {_port_name(PortMatch(flow.protocol, flow.port, flow.port))}"
    return (Mismatch(Side.FLOW, " or ".join(wanted), has, ports),)


def _is_port(match: PortMatch, flow: NetworkFlow) -> bool:
    if match.name:
        return any(
            port.name == match.name and port.port == flow.port
            and PROTOCOLS.get(port.protocol) == match.protocol == flow.protocol
            for port in flow.ports
        )  # fmt: skip
    return match.protocol == flow.protocol and match.first <= flow.port <= match.last


def _port_name(match: PortMatch) -> str:
    protocol = _NAMES.get(match.protocol, f"protocol {match.protocol}")
    if match.name:
        return f"{protocol} port {match.name}"
    if (match.first, match.last) == (0, LAST_PORT):
        return protocol
    what = f"{protocol} type" if match.protocol in _ICMP else protocol
    return f"{what} {match.first}" if match.first == match.last else f"{what} {match.first}-{match.last}"
