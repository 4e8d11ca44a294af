"""NetworkPolicy (networking.k8s.io/v1) into network rules.

Spec: CILIUM.md §b; Kubernetes, "The two sorts of pod isolation".
"""

from __future__ import annotations

from meshbridge.policy.model import ANY, Anything, Direction, Document, NetworkRule, Notice, Verdict
from meshbridge.policy.parse.cidrs import cidr_peers
from meshbridge.policy.parse.labels import kubernetes_requirements
from meshbridge.policy.parse.parsed import Parsed, Reach, contradiction_notices, origin_of, refused_network
from meshbridge.policy.parse.ports import kubernetes_ports
from meshbridge.policy.parse.reader import Invalid, Reader
from meshbridge.policy.selectors import IS_POD, CidrPeers, LabelSource, PeerSelector, Selector, in_namespace

_TYPES = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}
_LISTS = {Direction.INGRESS: ("ingress", "from"), Direction.EGRESS: ("egress", "to")}


def parse_network_policy(document: Document) -> Parsed:
    """One policy; refused as a whole when one part is not understood."""
    notices: list[Notice] = []
    try:
        rules = _rules(document, notices)
    except Exception as raised:
        error = Invalid.of(raised)
        return refused_network(document, error, [_reach(document)])
    return Parsed(document, network=tuple(rules), notices=tuple(notices))


def _rules(document: Document, notices: list[Notice]) -> list[NetworkRule]:
    spec = Reader(document.data.get("spec"), "spec")
    fields = spec.fields("podSelector", "policyTypes", "ingress", "egress")
    if "podSelector" not in fields:
        spec.refuse("has no podSelector", "write podSelector: {} for all pods of the namespace")
    subject = Selector.of([*kubernetes_requirements(fields["podSelector"]), in_namespace(document.namespace)])
    notices += contradiction_notices(document, [("spec.podSelector", subject)])
    directions = _directions(fields)
    found = []
    for direction, (name, peers_name) in _LISTS.items():
        elements = fields[name].items() if name in fields else []
        parsed = [_rule(element, peers_name, subject, direction, document, notices) for element in elements]
        if direction in directions:
            # Isolates, also where the list has no elements.
            found.append(NetworkRule(subject, direction, Verdict.ALLOW, (), ANY, origin_of(document, "spec")))
            found += parsed
        elif elements:
            text = f"has no effect: {name} rules without policyTypes: [{name.capitalize()}]"
            notices.append(Notice(document, text, f"spec.{name}", code="MB0506"))
    return found


def _directions(fields: dict[str, Reader]) -> frozenset[Direction]:
    if "policyTypes" in fields and (items := fields["policyTypes"].items()):
        return frozenset(_TYPES[item.text(_TYPES)] for item in items)
    if "egress" in fields and fields["egress"].items():
        return frozenset(Direction)
    return frozenset({Direction.INGRESS})


def _rule(
    at: Reader,
    peers_name: str,
    subject: Selector,
    direction: Direction,
    document: Document,
    notices: list[Notice],
) -> NetworkRule:
    fields = at.fields(peers_name, "ports")
    items = fields[peers_name].items() if peers_name in fields else []
    peers: Anything | tuple[PeerSelector, ...] = ANY
    if items:
        peers = tuple(_peer(item, document, notices) for item in items)
    ports = kubernetes_ports(fields["ports"]) if "ports" in fields else ANY
    origin = origin_of(document, at.path)
    return NetworkRule(subject, direction, Verdict.ALLOW, peers, ports, origin, default_deny=False)


def _peer(at: Reader, document: Document, notices: list[Notice]) -> PeerSelector:
    fields = at.fields("podSelector", "namespaceSelector", "ipBlock")
    if "ipBlock" in fields:
        if len(fields) > 1:
            at.refuse("ipBlock stands beside a selector", "write two elements")
        return _ip_block(fields["ipBlock"])
    if not fields:
        at.refuse("is empty", "write podSelector, namespaceSelector or ipBlock")
    requirements = kubernetes_requirements(fields["podSelector"]) if "podSelector" in fields else []
    if "namespaceSelector" in fields:
        requirements += kubernetes_requirements(fields["namespaceSelector"], LabelSource.NAMESPACE_LABEL)
        requirements.append(IS_POD)
    else:
        requirements.append(in_namespace(document.namespace))
    selector = Selector.of(requirements)
    notices += contradiction_notices(document, [(at.path, selector)])
    return selector


def _ip_block(at: Reader) -> CidrPeers:
    fields = at.fields("cidr", "except")
    return cidr_peers(at, fields, in_cluster=True)


def _reach(document: Document) -> Reach:
    """What a refused policy may concern, read as far as it can be read; a NetworkPolicy never denies."""
    both = frozenset(Direction)
    spec = document.data.get("spec")
    everything = Selector.of([in_namespace(document.namespace)])
    if not isinstance(spec, dict):
        return Reach(everything, both)
    try:
        requirements = kubernetes_requirements(Reader(spec.get("podSelector"), "podSelector"))
        selector = Selector.of([*requirements, in_namespace(document.namespace)])
    except Invalid:
        selector = everything
    types = spec.get("policyTypes")
    if isinstance(types, list) and types and all(isinstance(t, str) and t in _TYPES for t in types):
        return Reach(selector, frozenset(_TYPES[t] for t in types))
    if types or not all(key in ("podSelector", "policyTypes", "ingress", "egress") for key in spec):
        return Reach(selector, both)
    return Reach(selector, both if spec.get("egress") else frozenset({Direction.INGRESS}))
