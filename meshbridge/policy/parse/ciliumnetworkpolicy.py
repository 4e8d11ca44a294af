"""CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy into network rules.

Spec: CILIUM.md §a. What cannot be enforced exactly is refused, never approximated.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshbridge.identity.model import DEFAULT_CLUSTER, Entity
from meshbridge.policy.model import (
    ANY,
    Anything,
    Direction,
    Document,
    HttpMatch,
    NetworkRule,
    Notice,
    PortMatch,
    Tier,
    Verdict,
)
from meshbridge.policy.parse.cidrs import cidr_peers
from meshbridge.policy.parse.httprules import http_matches
from meshbridge.policy.parse.labels import cilium_requirements, mentions
from meshbridge.policy.parse.parsed import Parsed, Reach, contradiction_notices, origin_of, refused_network
from meshbridge.policy.parse.ports import cilium_ports, icmp_types
from meshbridge.policy.parse.reader import Invalid, Reader, shown
from meshbridge.policy.selectors import (
    IS_POD,
    CidrPeers,
    ClusterPeers,
    EntityPeers,
    LabelSource,
    PeerSelector,
    Requirement,
    Selector,
    in_namespace,
)

CLUSTERWIDE = "CiliumClusterwideNetworkPolicy"

_RULE_FIELDS = (
    "endpointSelector",
    "nodeSelector",
    "ingress",
    "ingressDeny",
    "egress",
    "egressDeny",
    "enableDefaultDeny",
    "labels",
    "description",
    "log",
)
_LISTS = {
    "ingress": (Direction.INGRESS, Verdict.ALLOW),
    "ingressDeny": (Direction.INGRESS, Verdict.DENY),
    "egress": (Direction.EGRESS, Verdict.ALLOW),
    "egressDeny": (Direction.EGRESS, Verdict.DENY),
}
_UNENFORCED = {
    "Requires": "was removed from Cilium in 1.19, where the policy got wider without it",
    "Nodes": "selects nodes by labels, which are not known here",
    "Groups": "derives addresses from a cloud's API, which is not asked here",
    "Services": "is not enforced; select the backends by their labels with toEndpoints",
    "FQDNs": "needs a DNS proxy, which does not exist here",
}
_ENTITIES = {
    "world": frozenset({Entity.WORLD}),
    "world-ipv4": frozenset({Entity.WORLD_IPV4}),
    "world-ipv6": frozenset({Entity.WORLD_IPV6}),
    "host": frozenset({Entity.HOST}),
    "remote-node": frozenset({Entity.REMOTE_NODE}),
    "kube-apiserver": frozenset({Entity.KUBE_APISERVER}),
    "health": frozenset({Entity.HEALTH}),
    "init": frozenset({Entity.INIT}),
    "unmanaged": frozenset({Entity.UNMANAGED}),
    "ingress": frozenset({Entity.INGRESS}),
}


@dataclass(frozen=True, slots=True)
class _Scope:
    """Where a policy lives: its own namespace, or None when it is clusterwide."""

    document: Document
    namespace: str | None

    def subject(self, requirements: list[Requirement]) -> Selector:
        """Endpoints are pods; a namespaced policy stays in its namespace whatever its selector says."""
        if self.namespace is None:
            return Selector.of([*requirements, IS_POD])
        own = [r for r in requirements if r.source is not LabelSource.NAMESPACE]
        return Selector.of([*own, in_namespace(self.namespace)])

    def everything(self) -> Selector:
        return Selector.of([IS_POD if self.namespace is None else in_namespace(self.namespace)])


def parse_cilium_network_policy(document: Document) -> Parsed:
    """Every rule of ``spec`` and ``specs``; refused as a whole when one part is not understood."""
    scope = _Scope(document, None if document.kind == CLUSTERWIDE else document.namespace)
    notices: list[Notice] = []
    try:
        rules: list[NetworkRule] = []
        for spec in _specs(document):
            rules += _rules_of_spec(spec, scope, notices)
    except Invalid as error:
        return refused_network(document, error, _reaches(document, scope))
    return Parsed(document, network=tuple(rules), notices=tuple(notices))


def _specs(document: Document) -> list[Reader]:
    root = Reader(document.data, "")
    found = []
    if document.data.get("spec") is not None:
        found.append(Reader(document.data["spec"], "spec"))
    if document.data.get("specs") is not None:
        found += Reader(document.data["specs"], "specs").items(at_least=1)
    if not found:
        root.refuse("has neither spec nor specs", "write the rule under spec")
    return found


def _rules_of_spec(spec: Reader, scope: _Scope, notices: list[Notice]) -> list[NetworkRule]:
    fields = spec.fields(*_RULE_FIELDS)
    if "nodeSelector" in fields:
        fields["nodeSelector"].refuse("host policies are not enforced", "use endpointSelector")
    if "endpointSelector" not in fields:
        spec.refuse("has no endpointSelector", "write endpointSelector: {} for all endpoints")
    written = cilium_requirements(fields["endpointSelector"])
    subject = scope.subject(written)
    notices += _subject_notices(fields["endpointSelector"], written, subject, scope)
    lists = {name: fields[name].items() for name in _LISTS if name in fields}
    if not any(lists.values()):
        spec.refuse("has no rule", f"fill at least one of: {', '.join(_LISTS)}")
    default_deny = _default_deny(fields.get("enableDefaultDeny"))
    rules = []
    for name, elements in lists.items():
        direction, verdict = _LISTS[name]
        for element in elements:
            parser = _RuleParser(scope, direction, verdict, subject, default_deny[direction], notices)
            rules += parser.rules(element)
    return rules


def _subject_notices(at: Reader, written: list[Requirement], subject: Selector, scope: _Scope) -> list[Notice]:
    found = list(contradiction_notices(scope.document, [(at.path, subject)]))
    if scope.namespace is not None and mentions(written, LabelSource.NAMESPACE):
        text = f"the namespace in it is ignored: the policy applies in its own namespace {scope.namespace!r}"
        found.append(Notice(scope.document, text, at.path, code="MB0406"))
    found += [
        Notice(
            scope.document, f"label {r.key!r} is not part of identities, so nothing ever has it", at.path, code="MB0407"
        )
        for r in written
        if r.source is LabelSource.ABSENT
    ]
    return found


def _default_deny(at: Reader | None) -> dict[Direction, bool]:
    fields = at.fields("ingress", "egress") if at else {}
    return {
        direction: fields[name].boolean() if name in fields else True
        for name, direction in (("ingress", Direction.INGRESS), ("egress", Direction.EGRESS))
    }


@dataclass(frozen=True, slots=True)
class _RuleParser:
    """One element of ingress, ingressDeny, egress or egressDeny."""

    scope: _Scope
    direction: Direction
    verdict: Verdict
    subject: Selector
    default_deny: bool
    notices: list[Notice]

    @property
    def prefix(self) -> str:
        return "from" if self.direction is Direction.INGRESS else "to"

    def rules(self, element: Reader) -> list[NetworkRule]:
        for name in element.mapping():
            self._refuse_unenforced(element, name)
        kinds = [f"{self.prefix}{kind}" for kind in ("Endpoints", "Entities", "CIDR", "CIDRSet")]
        fields = element.fields(*kinds, "toPorts", "icmps")
        peers = self._peers(element, fields, kinds)
        if "toPorts" in fields and "icmps" in fields and fields["toPorts"].items() and fields["icmps"].items():
            element.refuse("has toPorts and icmps", "write two rules")
        found = []
        for ports, http in self._ports(fields):
            found.append(
                NetworkRule(
                    self.subject,
                    self.direction,
                    self.verdict,
                    peers,
                    ports,
                    origin_of(self.scope.document, element.path),
                    self.default_deny,
                    Tier.NORMAL,
                    0,
                    http,
                )
            )
        return found

    def _refuse_unenforced(self, element: Reader, name: str) -> None:
        at = Reader(element.value[name], f"{element.path}.{name}")
        if name == "authentication":
            at.refuse("mutual authentication by Cilium is not enforced", "use PeerAuthentication")
        for kind, why in _UNENFORCED.items():
            if name == f"{self.prefix}{kind}":
                at.refuse(f"{name} {why}", "write the rule with endpoints, entities or CIDRs")

    def _peers(
        self, element: Reader, fields: dict[str, Reader], kinds: list[str]
    ) -> Anything | tuple[PeerSelector, ...]:
        written = [kind for kind in kinds if kind in fields]
        if len(written) > 1:
            element.refuse(f"has {' and '.join(written)}", "write a rule for each")
        if not written:
            limited = any(name in fields and fields[name].items() for name in ("toPorts", "icmps"))
            return ANY if limited else ()
        kind, at = written[0].removeprefix(self.prefix), fields[written[0]]
        if kind == "Endpoints":
            return tuple(self._endpoints(item) for item in at.items())
        if kind == "Entities":
            return self._entities(at)
        return tuple(_cidr(item, as_set=kind == "CIDRSet") for item in at.items())

    def _endpoints(self, at: Reader) -> Selector:
        requirements = cilium_requirements(at)
        if not mentions(requirements, LabelSource.RESERVED):
            namespaced = mentions(requirements, LabelSource.NAMESPACE) or mentions(
                requirements, LabelSource.NAMESPACE_LABEL
            )
            # Also where a namespace is asked for: "NotIn [pay]" means the other namespaces, not the world.
            requirements.append(IS_POD)
            if self.scope.namespace is not None and not namespaced:
                requirements.append(in_namespace(self.scope.namespace))
        selector = Selector.of(requirements)
        self.notices.extend(contradiction_notices(self.scope.document, [(at.path, selector)]))
        return selector

    def _entities(self, at: Reader) -> Anything | tuple[PeerSelector, ...]:
        found: list[PeerSelector] = []
        every = False
        for item in at.items():
            name = item.text()
            if name == "all":
                every = True
            elif name in ("cluster", "cluster-mesh"):
                found.append(ClusterPeers(DEFAULT_CLUSTER if name == "cluster" else ""))
            elif name in _ENTITIES:
                found.append(EntityPeers(_ENTITIES[name]))
            elif name != "none":
                known = ", ".join(["all", "cluster", *_ENTITIES, "none"])
                item.refuse(f"unknown entity {shown(name)}", f"use one of: {known}")
        return ANY if every else tuple(found)

    def _ports(self, fields: dict[str, Reader]) -> list[tuple[Anything | tuple[PortMatch, ...], tuple[HttpMatch, ...]]]:
        if "icmps" in fields and (elements := fields["icmps"].items()):
            return [(tuple(match for element in elements for match in icmp_types(element)), ())]
        elements = fields["toPorts"].items() if "toPorts" in fields else []
        if not elements:
            return [(ANY, ())]
        allowed = ("ports", "rules") if self.verdict is Verdict.ALLOW else ("ports",)
        found = []
        for element in elements:
            parts = element.fields(*allowed)
            ports = cilium_ports(parts["ports"], self.scope.document, self.notices) if "ports" in parts else ANY
            found.append((ports, http_matches(parts["rules"], ports) if "rules" in parts else ()))
        return found


def _cidr(at: Reader, *, as_set: bool) -> CidrPeers:
    if not as_set:
        return CidrPeers(at.network(bare_address=True), in_cluster=False)
    fields = at.fields("cidr", "except", "cidrGroupRef", "cidrGroupSelector")
    for name in ("cidrGroupRef", "cidrGroupSelector"):
        if name in fields:
            fields[name].refuse("CiliumCIDRGroups are not read", "write the CIDRs")
    return cidr_peers(at, fields, in_cluster=False)


def _reaches(document: Document, scope: _Scope) -> list[Reach]:
    """What a refused policy may concern, read as far as it can be read."""
    both = frozenset(Direction)
    raw: list[object] = [document.data["spec"]] if document.data.get("spec") is not None else []
    specs = document.data.get("specs")
    if isinstance(specs, list):
        raw += specs
    elif specs is not None or not raw:
        return [Reach(scope.everything(), both, both)]
    return [reach for spec in raw if (reach := _reach(spec, scope)) is not None]


def _reach(spec: object, scope: _Scope) -> Reach | None:
    both = frozenset(Direction)
    if not isinstance(spec, dict):
        return Reach(scope.everything(), both, both)
    if "nodeSelector" in spec and "endpointSelector" not in spec and scope.namespace is None:
        return None
    directions = frozenset(direction for name, (direction, _) in _LISTS.items() if name in spec)
    denies = frozenset(direction for name, (direction, verdict) in _LISTS.items() if name in spec and not verdict)
    if not all(field in _RULE_FIELDS for field in spec):
        directions = both
    try:
        selector = scope.subject(cilium_requirements(Reader(spec.get("endpointSelector"), "endpointSelector")))
    except Invalid:
        selector = scope.everything()
    return Reach(selector, directions, denies)
