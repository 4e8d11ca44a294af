"""What parsing one object yields, and what follows from an object that could not be parsed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from meshbridge.identity.model import Workload
from meshbridge.policy.cilium import CiliumSettings
from meshbridge.policy.mesh import AuthorizationPolicy, PeerAuthentication, RequestAuthentication
from meshbridge.policy.model import (
    ANY,
    Direction,
    Document,
    Layer,
    NetworkRule,
    Notice,
    Origin,
    Refusal,
    Severity,
    Tier,
    Verdict,
)
from meshbridge.policy.parse.cluster import CidrGroup, EndpointSlice, Namespace, Node, Service, ServiceAccount
from meshbridge.policy.parse.reader import Invalid
from meshbridge.policy.registry import RegistryObject
from meshbridge.policy.selectors import IS_POD, Selector, in_namespace

_BEFORE_ALL = -1
"""A priority that no object has."""

_MAY_DENY: Final = {
    "NetworkPolicy": (Tier.NORMAL, False),
    "CiliumNetworkPolicy": (Tier.NORMAL, True),
    "CiliumClusterwideNetworkPolicy": (Tier.NORMAL, True),
    "ClusterNetworkPolicy": (Tier.ADMIN, True),
    "AdminNetworkPolicy": (Tier.ADMIN, True),
    "BaselineAdminNetworkPolicy": (Tier.BASELINE, True),
}
"""Kinds of network policies: their tier, and whether they can deny what others allow."""

ClusterObject = Workload | Namespace | Node | Service | ServiceAccount | EndpointSlice | CidrGroup


@dataclass(frozen=True, slots=True)
class Parsed:
    """Everything one document says. ``refusals`` not empty: it is not in force as written, only as refused.

    ``cilium`` is set where it is Cilium's own configuration.
    """

    document: Document
    network: tuple[NetworkRule, ...] = ()
    authorization: tuple[AuthorizationPolicy, ...] = ()
    peer_authentication: tuple[PeerAuthentication, ...] = ()
    request_authentication: tuple[RequestAuthentication, ...] = ()
    objects: tuple[ClusterObject, ...] = ()
    registry: tuple[RegistryObject, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notices: tuple[Notice, ...] = ()
    cilium: CiliumSettings | None = None


@dataclass(frozen=True, slots=True)
class Reach:
    """What a refused network object may concern: whom it selects, in which directions, and where it may deny.

    It denies in its ``tier``, before every rule there that is understood.
    """

    selector: Selector
    directions: frozenset[Direction]
    denies: frozenset[Direction] = frozenset()
    tier: Tier = Tier.NORMAL


def refused_network(document: Document, error: Invalid, reaches: Iterable[Reach]) -> Parsed:
    """A refused network object isolates what it selects; where it may deny somebody it denies everybody.

    Isolation alone would loosen a deny rule: another policy's allow would win where the deny should have.
    """
    reaches = tuple(reaches)
    refusal = Refusal(
        document,
        error.reason,
        error.path,
        error.fix,
        Layer.NETWORK,
        tuple(reach.selector for reach in reaches),
        frozenset(direction for reach in reaches for direction in reach.directions),
    )
    rules = []
    for reach in reaches:
        for direction in sorted(reach.directions):
            if direction not in reach.denies:
                rules.append(NetworkRule(reach.selector, direction, Verdict.ALLOW, (), ANY, refusal.origin))
                continue
            isolates = reach.tier is Tier.NORMAL
            rules.append(
                NetworkRule(
                    reach.selector, direction, Verdict.DENY, ANY, ANY, refusal.origin, isolates, reach.tier, _BEFORE_ALL
                )
            )
    return Parsed(document, network=tuple(rules), refusals=(refusal,))


def refused_mesh(document: Document, error: Invalid, selector: Selector, *, may_deny: bool = True) -> Parsed:
    """A refused mesh object is NEEDS_L7 for what it may select: Envoy judges captured ports, excluded ones close.

    One that is attached to a gateway or a Service selects no sidecar, whatever else is wrong with it.
    """
    spec = document.data.get("spec")
    targeted = (
        isinstance(spec, dict) and "selector" not in spec and bool(spec.get("targetRef") or spec.get("targetRefs"))
    )
    selectors = () if targeted else (selector,)
    refusal = Refusal(
        document, error.reason, error.path, error.fix, Layer.MESH, selectors, frozenset(Direction), may_deny
    )
    return Parsed(document, refusals=(refusal,))


def refused_by_source(parsed: Parsed) -> Parsed:
    """What holds of an object whose ``Document.fault`` is set: refused, with the reach of what it says."""
    if parsed.refusals:
        return parsed
    document = parsed.document
    error = Invalid("", document.fault, "keep one definition")
    if parsed.network:
        reaches: dict[tuple[Selector, Tier], tuple[set[Direction], set[Direction]]] = {}
        for rule in parsed.network:
            directions, denies = reaches.setdefault((rule.subject, rule.tier), (set(), set()))
            directions.add(rule.direction)
            if rule.verdict is Verdict.DENY or rule.passes:
                denies.add(rule.direction)
        return refused_network(
            document,
            error,
            [Reach(s, frozenset(named), frozenset(denies), t) for (s, t), (named, denies) in reaches.items()],
        )
    selectors = [policy.selector for policy in parsed.authorization if not policy.targets]
    selectors += [policy.selector for policy in parsed.request_authentication if not policy.targets]
    selectors += [policy.selector or Selector() for policy in parsed.peer_authentication]
    refusal = Refusal(document, error.reason, error.path, error.fix, Layer.MESH, tuple(selectors))
    return Parsed(document, refusals=(refusal,))


def refused_unread(document: Document, error: Invalid) -> Parsed:
    """An object of which not even the reach can be told concerns every pod that it could: of its namespace, or all."""
    both = frozenset(Direction)
    if document.kind in _MAY_DENY:
        everybody = Selector.of([in_namespace(document.namespace)] if document.namespace else [IS_POD])
        tier, denies = _MAY_DENY[document.kind]
        return refused_network(document, error, [Reach(everybody, both, both if denies else frozenset(), tier)])
    if document.api_version.startswith("security.istio.io/"):
        return refused_mesh(document, error, Selector())
    refusal = Refusal(document, error.reason, error.path, error.fix, Layer.NETWORK, (), frozenset())
    return Parsed(document, refusals=(refusal,))


def spec_of(document: Document) -> object:
    """The spec of a mesh object, where none at all is an empty one."""
    spec = document.data.get("spec")
    return {} if spec is None else spec


def origin_of(document: Document, path: str) -> Origin:
    """The rule at ``path`` of an object, as drops and explanations name it."""
    source = document.source
    return Origin(document.kind, document.namespace, document.name, path, source.file, source.line(path))


def contradiction_notices(document: Document, selectors: Iterable[tuple[str, Selector]]) -> tuple[Notice, ...]:
    """One error for each (path, selector) that can pick nobody: valid, in force as written, hardly meant."""
    return tuple(
        Notice(document, f"selects nothing: {why}; change one of the requirements", path, Severity.ERROR, "MB0405")
        for path, selector in selectors
        if (why := selector.contradiction())
    )
