"""ClusterNetworkPolicy and its forerunners, AdminNetworkPolicy and BaselineAdminNetworkPolicy: refused as a whole.

Their tiers are in the model, their rules are not read yet. Ignoring them would let through what they deny, so whom they
select is isolated in the directions they name.

Spec: CILIUM.md §c.
"""

from __future__ import annotations

from meshbridge.policy.model import Direction, Document
from meshbridge.policy.parse.labels import kubernetes_requirements
from meshbridge.policy.parse.parsed import Parsed, Reach, refused_network
from meshbridge.policy.parse.reader import Invalid, Reader
from meshbridge.policy.selectors import IS_POD, LabelSource, Requirement, Selector

CLUSTER_POLICY_KINDS = ("ClusterNetworkPolicy", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy")

_LISTS = {"ingress": Direction.INGRESS, "egress": Direction.EGRESS}


def parse_cluster_network_policy(document: Document) -> Parsed:
    """A refusal that isolates the subject, and denies everybody in a direction with a Deny rule."""
    fix = "write it as a CiliumClusterwideNetworkPolicy or as NetworkPolicies"
    error = Invalid("spec", f"{document.kind} is not enforced by this version", fix)
    return refused_network(document, error, [_reach(document)])


def _reach(document: Document) -> Reach:
    both = frozenset(Direction)
    spec = document.data.get("spec")
    if not isinstance(spec, dict):
        return Reach(Selector.of([IS_POD]), both, both)
    named = frozenset(direction for name, direction in _LISTS.items() if spec.get(name))
    denies = frozenset(direction for name, direction in _LISTS.items() if _may_deny(spec.get(name)))
    try:
        requirements = _subject(Reader(spec.get("subject"), "spec.subject"))
    except Invalid:
        requirements = []
    return Reach(Selector.of([*requirements, IS_POD]), named, denies)


def _may_deny(rules: object) -> bool:
    if not isinstance(rules, list):
        return rules is not None
    return any(not isinstance(rule, dict) or rule.get("action") not in ("Accept", "Allow", "Pass") for rule in rules)


def _subject(at: Reader) -> list[Requirement]:
    fields = at.fields("namespaces", "pods")
    if "pods" in fields:
        parts = fields["pods"].fields("namespaceSelector", "podSelector")
        found = kubernetes_requirements(parts["podSelector"]) if "podSelector" in parts else []
        if "namespaceSelector" in parts:
            found += kubernetes_requirements(parts["namespaceSelector"], LabelSource.NAMESPACE_LABEL)
        return found
    if "namespaces" in fields:
        return kubernetes_requirements(fields["namespaces"], LabelSource.NAMESPACE_LABEL)
    return []
