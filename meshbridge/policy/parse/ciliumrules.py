"""One element of ``ingress``, ``ingressDeny``, ``egress`` or ``egressDeny`` of a Cilium policy.

Spec: CILIUM.md §a; Cilium 1.20, pkg/policy/api/rule_validation.go and pkg/policy/utils/parserules.go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

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
    Verdict,
)
from meshbridge.policy.parse.cidrs import cidr_peers
from meshbridge.policy.parse.httprules import http_matches
from meshbridge.policy.parse.labels import (
    cilium_requirements,
    group_requirements,
    mentions,
    mentions_unknown_source,
    node_requirements,
    service_requirements,
)
from meshbridge.policy.parse.parsed import contradiction_notices, origin_of
from meshbridge.policy.parse.ports import cilium_ports, icmp_types
from meshbridge.policy.parse.reader import Reader, shown
from meshbridge.policy.selectors import (
    IS_POD,
    CidrGroupReference,
    CidrPeers,
    ClusterPeers,
    EntityPeers,
    LabelSource,
    Operator,
    PeerSelector,
    Reference,
    Requirement,
    Selector,
    ServiceReference,
    in_namespace,
)

_Peers = Anything | tuple[PeerSelector | Reference, ...]
_Ports = tuple[Anything | tuple[PortMatch, ...], tuple[HttpMatch, ...]]

_EMPTY_IS_NOBODY: Final = ("Endpoints", "Nodes", "Entities", "CIDR", "CIDRSet")
_UNENFORCED: Final = {
    "Requires": "was removed from Cilium in 1.19, where the policy got wider without it",
    "Groups": "derives addresses from a cloud's API, which is not asked here",
    "FQDNs": "needs a DNS proxy, which does not exist here",
}
_PROXIED: Final = {
    "terminatingTLS": "needs Cilium's proxy, which does not exist here; Istio's does mTLS",
    "originatingTLS": "needs Cilium's proxy, which does not exist here; use a DestinationRule",
    "serverNames": "needs a proxy that reads the SNI, which does not exist here",
    "listener": "needs a listener of Cilium's proxy, which does not exist here",
}
_ENTITIES: Final = {
    entity.value: frozenset({entity})
    for entity in (
        Entity.WORLD, Entity.WORLD_IPV4, Entity.WORLD_IPV6, Entity.HOST, Entity.REMOTE_NODE, Entity.KUBE_APISERVER,
        Entity.HEALTH, Entity.INIT, Entity.UNMANAGED, Entity.INGRESS,
    )
}  # fmt: skip
_REMOTE_NODE: Final = Requirement(LabelSource.RESERVED, Entity.REMOTE_NODE, Operator.EXISTS)


@dataclass(frozen=True, slots=True)
class RuleParser:
    """Reads the elements of one list of one spec.

    ``namespace`` is the policy's own, None of a clusterwide one. ``about_init``: the subject asks for
    ``reserved:init``; such endpoints have no namespace, so in a clusterwide policy their peers need none either.
    """

    document: Document
    namespace: str | None
    subject: Selector
    about_init: bool
    direction: Direction
    verdict: Verdict
    default_deny: bool
    notices: list[Notice]

    def rules(self, element: Reader) -> list[NetworkRule]:
        """A rule for every set of ports that the element names.

        Raises:
            Invalid: A part of it is not understood, or not enforced.
        """
        way = "from" if self.direction is Direction.INGRESS else "to"
        readers = self._readers()
        fields = element.fields(*(f"{way}{kind}" for kind in readers), "toPorts", "icmps", "authentication")
        if "authentication" in fields:
            self._authentication(fields["authentication"])
        ports = self._ports(element, fields)
        written = {kind: fields[f"{way}{kind}"] for kind in readers if f"{way}{kind}" in fields}
        filled = [kind for kind, at in written.items() if at.items()]
        for kind in filled:
            if kind in _UNENFORCED:
                readers[kind](written[kind])
        if len(filled) > 1:
            element.refuse(f"has {' and '.join(way + kind for kind in filled)}", "write a rule for each")
        peers: _Peers = ()
        if any(kind in _EMPTY_IS_NOBODY and kind not in filled for kind in written):
            for kind in filled:
                readers[kind](written[kind])
        elif filled:
            peers = readers[filled[0]](written[filled[0]])
        elif ports:
            peers = ANY
        selectors, references = _divided(peers)
        return [
            NetworkRule(
                self.subject,
                self.direction,
                self.verdict,
                selectors,
                matches,
                origin_of(self.document, element.path),
                self.default_deny,
                http=http,
                references=references,
            )
            for matches, http in ports or [(ANY, ())]
        ]

    def _readers(self) -> dict[str, Callable[[Reader], _Peers]]:
        readers: dict[str, Callable[[Reader], _Peers]] = {
            "Endpoints": lambda at: tuple(self._endpoints(item) for item in at.items()),
            "Nodes": lambda at: tuple(self._nodes(item) for item in at.items()),
            "Entities": _entities,
            "CIDR": lambda at: tuple(_world(item) for item in at.items()),
            "CIDRSet": lambda at: tuple(_cidr_set(item) for item in at.items()),
        }
        if self.direction is Direction.EGRESS:
            readers["Services"] = self._services
            readers["FQDNs"] = _unenforced("FQDNs")
        readers["Groups"] = _unenforced("Groups")
        readers["Requires"] = _unenforced("Requires")
        return readers

    def _authentication(self, at: Reader) -> None:
        if self.verdict is Verdict.DENY:
            at.refuse("a deny rule takes no authentication", "delete it")
        mode = at.fields("mode").get("mode")
        if mode is None or mode.text(["disabled", "required", "test-always-fail"]) != "disabled":
            at.refuse("mutual authentication by Cilium is not enforced", "use PeerAuthentication")

    def _endpoints(self, at: Reader) -> Selector:
        requirements = cilium_requirements(at)
        if mentions(requirements, LabelSource.RESERVED):
            if mentions_unknown_source(requirements):
                at.refuse("labels of reserved and of other sources in one selector", "use fromCIDR or fromEntities")
        else:
            added = []
            if not mentions(requirements, LabelSource.NAMESPACE):
                if self.namespace is None:
                    added += [] if self.about_init else [IS_POD]
                elif not mentions(requirements, LabelSource.NAMESPACE_LABEL):
                    added.append(in_namespace(self.namespace))
            if not mentions(requirements, LabelSource.CLUSTER):
                # The own cluster's: "NotIn [pay]" means the pods of other namespaces and not the world.
                added.append(IS_POD)
            requirements += added
        return self._checked(at, Selector.of(requirements))

    def _nodes(self, at: Reader) -> Selector:
        """Other nodes by their labels; the pod's own is ``host``, which none of these rules means."""
        return self._checked(at, Selector.of([*node_requirements(at), _REMOTE_NODE]))

    def _checked(self, at: Reader, selector: Selector) -> Selector:
        self.notices.extend(contradiction_notices(self.document, [(at.path, selector)]))
        return selector

    def _services(self, at: Reader) -> _Peers:
        if self.verdict is Verdict.DENY:
            at.refuse("Cilium finds no Services for a deny rule", "write egressDeny with toEndpoints or toCIDRSet")
        return tuple(_service(item) for item in at.items())

    def _ports(self, element: Reader, fields: dict[str, Reader]) -> list[_Ports]:
        types = fields["icmps"].items() if "icmps" in fields else []
        elements = fields["toPorts"].items() if "toPorts" in fields else []
        if types and elements:
            element.refuse("has toPorts and icmps", "write two rules")
        found: list[_Ports] = [(self._some(item, icmp_types(item)), ()) for item in types]
        for item in elements:
            parts = item.fields("ports", *(("rules", *_PROXIED) if self.verdict is Verdict.ALLOW else ()))
            for name, why in _PROXIED.items():
                if name in parts:
                    parts[name].refuse(f"{name} {why}", "delete it")
            ports = cilium_ports(parts["ports"], self.document, self.notices) if "ports" in parts else ()
            self._some(item, ports)
            found.append((ports, http_matches(parts["rules"], ports) if "rules" in parts else ()))
        return found

    def _some(self, at: Reader, ports: tuple[PortMatch, ...]) -> tuple[PortMatch, ...]:
        if not ports:
            text = "matches nothing: it names no port; leave toPorts and icmps out for all of them"
            self.notices.append(Notice(self.document, text, at.path, code="MB0501"))
        return ports


def _divided(peers: _Peers) -> tuple[Anything | tuple[PeerSelector, ...], tuple[Reference, ...]]:
    if isinstance(peers, Anything):
        return peers, ()
    return (
        tuple(peer for peer in peers if not isinstance(peer, Reference)),
        tuple(peer for peer in peers if isinstance(peer, Reference)),
    )


def _unenforced(kind: str) -> Callable[[Reader], _Peers]:
    def refuse(at: Reader) -> _Peers:
        name = at.path.rpartition(".")[2]
        at.refuse(f"{name} {_UNENFORCED[kind]}", "write the rule with endpoints, entities or CIDRs")

    return refuse


def _entities(at: Reader) -> _Peers:
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
            known = ", ".join(["all", "cluster", "cluster-mesh", *_ENTITIES, "none"])
            item.refuse(f"unknown entity {shown(name)}", f"use one of: {known}")
    return ANY if every else tuple(found)


def _world(at: Reader) -> CidrPeers:
    return CidrPeers(at.network(bare_address=True), pods=False, nodes=False)


def _cidr_set(at: Reader) -> CidrPeers | CidrGroupReference:
    fields = at.fields("cidr", "except", "cidrGroupRef", "cidrGroupSelector")
    ways = [name for name in ("cidr", "cidrGroupRef", "cidrGroupSelector") if name in fields]
    if len(ways) > 1:
        at.refuse(f"has {' and '.join(ways)}", "write an element for each")
    if not ways or ways[0] == "cidr":
        return cidr_peers(at, fields, in_cluster=False)
    excepts = fields["except"].items() if "except" in fields else []
    cut = tuple(sorted((item.network(bare_address=False) for item in excepts), key=str))
    if ways[0] == "cidrGroupRef":
        name = fields["cidrGroupRef"].text()
        if not name:
            fields["cidrGroupRef"].refuse("is empty", "write the name of a CiliumCIDRGroup")
        return CidrGroupReference(name, excepts=cut)
    return CidrGroupReference("", tuple(group_requirements(fields["cidrGroupSelector"])), cut)


def _service(at: Reader) -> ServiceReference:
    fields = at.fields("k8sService", "k8sServiceSelector")
    if len(fields) != 1:
        at.refuse("has not one of k8sService and k8sServiceSelector", "write an element for each Service")
    if "k8sService" in fields:
        parts = fields["k8sService"].fields("serviceName", "namespace")
        name = parts["serviceName"].text() if "serviceName" in parts else ""
        if not name:
            fields["k8sService"].refuse("has no serviceName", "write the name of a Service")
        return ServiceReference(parts["namespace"].text() if "namespace" in parts else "", name)
    parts = fields["k8sServiceSelector"].fields("selector", "namespace")
    if "selector" not in parts:
        fields["k8sServiceSelector"].refuse("has no selector", "write labels of Services under selector")
    requirements = tuple(service_requirements(parts["selector"]))
    return ServiceReference(parts["namespace"].text() if "namespace" in parts else "", "", requirements)
