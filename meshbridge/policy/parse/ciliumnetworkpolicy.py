"""CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy into network rules.

Spec: CILIUM.md §a. What cannot be enforced exactly is refused, never approximated.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshbridge.identity.model import Entity
from meshbridge.policy.model import Direction, Document, NetworkRule, Notice, Verdict
from meshbridge.policy.parse.ciliumrules import RuleParser
from meshbridge.policy.parse.labels import NAMESPACE_KEY, cilium_requirements, node_requirements
from meshbridge.policy.parse.parsed import Parsed, Reach, contradiction_notices, refused_network
from meshbridge.policy.parse.reader import Invalid, Reader
from meshbridge.policy.selectors import IS_POD, LabelSource, Requirement, Selector, in_namespace

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


@dataclass(frozen=True, slots=True)
class _Scope:
    """Where a policy lives: its own namespace, or None when it is clusterwide."""

    document: Document
    namespace: str | None

    def requirements(self, at: Reader) -> list[Requirement]:
        """What an endpointSelector asks for; a namespaced policy stays in its namespace whatever that says."""
        return cilium_requirements(at, in_own_namespace=self.namespace is not None)

    def subject(self, requirements: list[Requirement]) -> Selector:
        """Endpoints are pods."""
        return Selector.of([*requirements, IS_POD if self.namespace is None else in_namespace(self.namespace)])


def parse_cilium_network_policy(document: Document) -> Parsed:
    """Every rule of ``spec`` and ``specs``; refused as a whole when one part is not understood."""
    scope = _Scope(document, None if document.kind == CLUSTERWIDE else document.namespace)
    notices: list[Notice] = []
    try:
        rules: list[NetworkRule] = []
        for spec in _specs(document):
            rules += _rules_of_spec(spec, scope, notices)
    except Exception as raised:
        error = Invalid.of(raised)
        return refused_network(document, error, _reaches(document, scope))
    return Parsed(document, network=tuple(rules), notices=tuple(notices))


def _specs(document: Document) -> list[Reader]:
    spec, specs = document.data.get("spec"), document.data.get("specs")
    if spec is None and specs is None:
        Reader(document.data, "").refuse("has neither spec nor specs", "write the rule under spec")
    found = [Reader(spec, "spec")] if spec is not None else []
    return found + (Reader(specs, "specs").items() if specs is not None else [])


def _rules_of_spec(spec: Reader, scope: _Scope, notices: list[Notice]) -> list[NetworkRule]:
    fields = spec.fields(*_RULE_FIELDS)
    if ("endpointSelector" in fields) == ("nodeSelector" in fields):
        spec.refuse("has not one of endpointSelector and nodeSelector", "write endpointSelector: {} for all endpoints")
    of_nodes = "nodeSelector" in fields
    requirements: list[Requirement] = []
    if of_nodes:
        at = fields["nodeSelector"]
        if scope.namespace is not None:
            at.refuse("selects nodes, which are in no namespace", f"write a {CLUSTERWIDE}")
        node_requirements(at)
        notices.append(
            Notice(scope.document, "has no effect: it is about nodes and selects no pod", at.path, code="MB0506")
        )
    else:
        requirements = scope.requirements(fields["endpointSelector"])
        notices += _subject_notices(fields["endpointSelector"], requirements, scope)
    lists = {name: fields[name].items() for name in _LISTS if name in fields}
    if not any(lists.values()):
        spec.refuse("has no rule", f"fill at least one of: {', '.join(_LISTS)}")
    default_deny = _default_deny(fields.get("enableDefaultDeny"))
    subject = scope.subject(requirements)
    about_init = any(r.source is LabelSource.RESERVED and r.key == Entity.INIT for r in requirements)
    rules = []
    for name, elements in lists.items():
        direction, verdict = _LISTS[name]
        parser = RuleParser(
            scope.document, scope.namespace, subject, about_init, direction, verdict, default_deny[direction], notices
        )
        for element in elements:
            rules += parser.rules(element)
    return [] if of_nodes else rules


def _subject_notices(at: Reader, written: list[Requirement], scope: _Scope) -> list[Notice]:
    found = list(contradiction_notices(scope.document, [(at.path, scope.subject(written))]))
    labels = at.value.get("matchLabels") or {}
    if scope.namespace is not None and labels.get(f"k8s:{NAMESPACE_KEY}", scope.namespace) != scope.namespace:
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


def _reaches(document: Document, scope: _Scope) -> list[Reach]:
    """What a refused policy may concern, read as far as it can be read."""
    both = frozenset(Direction)
    raw: list[object] = [document.data["spec"]] if document.data.get("spec") is not None else []
    specs = document.data.get("specs")
    if isinstance(specs, list):
        raw += specs
    elif specs is not None or not raw:
        return [Reach(scope.subject([]), both, both)]
    return [reach for spec in raw if (reach := _reach(spec, scope)) is not None]


def _reach(spec: object, scope: _Scope) -> Reach | None:
    both = frozenset(Direction)
    if not isinstance(spec, dict):
        return Reach(scope.subject([]), both, both)
    if "nodeSelector" in spec and "endpointSelector" not in spec and scope.namespace is None:
        return None
    directions = frozenset(direction for name, (direction, _) in _LISTS.items() if name in spec)
    denies = frozenset(direction for name, (direction, verdict) in _LISTS.items() if name in spec and not verdict)
    if not all(field in _RULE_FIELDS for field in spec):
        directions = both
    try:
        selector = scope.subject(scope.requirements(Reader(spec.get("endpointSelector"), "endpointSelector")))
    except Invalid:
        selector = scope.subject([])
    return Reach(selector, directions, denies)
