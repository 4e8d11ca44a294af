"""Policies and rules that concern nobody: misspelt labels, namespaces that are not there, ports nobody names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Final

from meshbridge.analysis.finding import Finding, finding, place_of
from meshbridge.analysis.scene import Scene, label_text
from meshbridge.policy.mesh import Attribute, AuthorizationPolicy, Condition, PeerAuthentication, RequestAuthentication
from meshbridge.policy.model import Anything, Direction, NetworkRule, Origin, Severity
from meshbridge.policy.parse.ports import PROTOCOLS
from meshbridge.policy.selectors import NAMESPACE_NAME_LABEL, LabelSource, Operator, Selector

_ALWAYS_THERE: Final = frozenset({"default", "kube-system", "kube-public", "kube-node-lease"})
_HASHES: Final = frozenset({"pod-template-hash", "controller-revision-hash", "pod-template-generation"})
_MeshPolicy = AuthorizationPolicy | PeerAuthentication | RequestAuthentication


def selecting_nothing(scene: Scene) -> Iterator[Finding]:
    """Policies that select no pod."""
    if not scene.workloads:
        return
    peers = [pods.pod.peer() for pods in scene.pods]
    subjects = {
        (_place(scene, rule.origin), rule.subject): None
        for rule in scene.policies.network
        if rule.origin.rule != "refused"
    }
    for place, selector in subjects:
        if not scene.compiler.index.matching(selector) and not selector.contradiction():
            yield _nothing(scene, "MB0401", place, "selects no pod", selector, selector.namespaces)
    for policy in _mesh_policies(scene):
        if policy.selector is None or policy.selector.contradiction() or _is_attached(policy):
            continue
        root = policy.namespace == scene.mesh.root_namespace
        where = None if root and not isinstance(policy, PeerAuthentication) else (policy.namespace,)
        if where is None and not policy.selector.requirements:
            continue
        if not any((root or p.namespace == policy.namespace) and policy.selector.matches(p) for p in peers):
            yield _nothing(scene, "MB0401", policy.origin, "selects no pod", policy.selector, where)


def _mesh_policies(scene: Scene) -> Iterator[_MeshPolicy]:
    yield from scene.policies.authorization
    yield from scene.policies.peer_authentication
    yield from scene.policies.request_authentication


def _is_attached(policy: _MeshPolicy) -> bool:
    return not isinstance(policy, PeerAuthentication) and bool(policy.targets)


def _nothing(
    scene: Scene, code: str, origin: Origin, what: str, selector: Selector, namespaces: tuple[str, ...] | None
) -> Finding:
    """With the label that was perhaps meant; only told where no pod is known that could have been."""
    labels = [
        label_text(r.key, r.values)
        for r in selector.requirements
        if r.source is LabelSource.POD and r.operator is Operator.IN
    ]
    where = f" in namespace {' or '.join(namespaces)}" if namespaces else ""
    text = f"{what}: no pod{where} has {' and '.join(labels)}" if labels else f"{what}: there is no pod{where}"
    fix = ""
    for label in labels:
        near = scene.close_to(label, namespaces)
        if near and near != label:
            fix = f"did you mean {near}?"
            break
    known = not namespaces or not scene.inhabited.isdisjoint(namespaces)
    if not known:
        text = f"{text}; none of the files has a pod of that namespace"
    return finding(code, origin, text, fix=fix, severity=None if known else Severity.INFO)


def peers_that_are_nobody(scene: Scene) -> Iterator[Finding]:
    """Rules whose peers are no pod that is known."""
    if not scene.workloads:
        return
    index = scene.compiler.index
    for rule, selector in _peer_selectors(scene.policies.network):
        if index.matching(selector) or selector.contradiction():
            continue
        if any(r.source in (LabelSource.RESERVED, LabelSource.ABSENT) for r in selector.requirements):
            continue
        namespaces = _named_namespaces(selector)
        if namespaces and any(_unknown_namespace(scene, namespace) for namespace in namespaces):
            continue
        yield _nothing(scene, "MB0402", rule.origin, "names peers that are nobody", selector, namespaces)
    accounts = {(w.namespace, w.service_account) for w in scene.workloads}
    for origin, principal in _principals(scene):
        _, ns, namespace, sa, account = principal
        if (ns, sa) != ("ns", "sa") or "*" in principal[2] + principal[4] or _unknown_namespace(scene, namespace):
            continue
        if namespace in scene.inhabited and (namespace, account) not in accounts:
            near = difflib.get_close_matches(account, [name for place, name in accounts if place == namespace], 1)
            fix = f"did you mean {near[0]}?" if near else ""
            text = f"names peers that are nobody: no pod of namespace {namespace} runs as service account {account}"
            yield finding("MB0402", origin, text, fix=fix)


def _peer_selectors(rules: Iterable[NetworkRule]) -> dict[tuple[NetworkRule, Selector], None]:
    return {
        (rule, selector): None
        for rule in rules
        if not isinstance(rule.peers, Anything)
        for selector in rule.peers
        if isinstance(selector, Selector)
    }


def _named_namespaces(selector: Selector) -> tuple[str, ...] | None:
    """The namespaces it names, by their name or by the label with their name."""
    for requirement in selector.requirements:
        by_label = requirement.source is LabelSource.NAMESPACE_LABEL and requirement.key == NAMESPACE_NAME_LABEL
        if requirement.operator is Operator.IN and (by_label or requirement.source is LabelSource.NAMESPACE):
            return requirement.values
    return None


def _principals(scene: Scene) -> Iterator[tuple[Origin, list[str]]]:
    for origin, condition in _source_conditions(scene):
        if condition.attribute is Attribute.PRINCIPALS:
            for value in (*condition.values, *condition.not_values):
                parts = value.removeprefix("spiffe://").split("/")
                if len(parts) == 5:
                    yield origin, parts


def _source_conditions(scene: Scene) -> Iterator[tuple[Origin, Condition]]:
    for policy in scene.policies.authorization:
        for rule in policy.rules:
            for condition in rule.all_conditions:
                yield rule.origin, condition


def absent_namespaces(scene: Scene) -> Iterator[Finding]:
    """Namespaces that policies name and that do not exist."""
    if not scene.workloads and not scene.knows_namespaces:
        return
    named: dict[tuple[Origin, str], None] = {}
    for rule, selector in _peer_selectors(scene.policies.network):
        for namespace in _named_namespaces(selector) or ():
            if namespace != rule.origin.namespace:
                named[rule.origin, namespace] = None
    for origin, condition in _source_conditions(scene):
        if condition.attribute is Attribute.NAMESPACES:
            for value in (*condition.values, *condition.not_values):
                named[origin, value] = None
    for origin, parts in _principals(scene):
        if parts[1] == "ns":
            named[origin, parts[2]] = None
    for origin, namespace in named:
        if not _unknown_namespace(scene, namespace):
            continue
        near = difflib.get_close_matches(namespace, sorted(scene.namespaces), 1)
        fix = f"did you mean {near[0]}?" if near else ""
        if scene.knows_namespaces:
            yield finding("MB0403", origin, f"namespace {namespace!r} does not exist", fix=fix)
        else:
            text = f"none of the files has anything of namespace {namespace!r}"
            yield finding("MB0403", origin, text, fix=fix, severity=Severity.INFO)


def _unknown_namespace(scene: Scene, namespace: str) -> bool:
    there = scene.namespaces | _ALWAYS_THERE | {scene.mesh.root_namespace}
    return "*" not in namespace and namespace not in there


def absent_port_names(scene: Scene) -> Iterator[Finding]:
    """Rules by the name of a port that no pod they concern has."""
    index = scene.compiler.index
    by_number = {pods.number: pods for pods in scene.pods}
    for rule in dict.fromkeys(scene.policies.network):
        names = [] if isinstance(rule.ports, Anything) else [match for match in rule.ports if match.name]
        if not names:
            continue
        concerned = index.numbers(index.matching(rule.subject))
        if rule.direction is Direction.EGRESS:
            masks = () if isinstance(rule.peers, Anything) else rule.peers
            concerned = list(by_number) if isinstance(rule.peers, Anything) else []
            for selector in masks:
                concerned += index.numbers(index.matching(selector))
        pods = [by_number[number] for number in concerned if number in by_number]
        declared = {(port.name, PROTOCOLS.get(port.protocol)) for each in pods for port in each.pod.ports if port.name}
        by_name: dict[str, list[int]] = {}
        for match in names:
            by_name.setdefault(match.name, []).append(match.protocol)
        for name, protocols in by_name.items():
            if not pods or any((name, protocol) in declared for protocol in protocols):
                continue
            held = sorted({port for port, _ in declared})
            near = difflib.get_close_matches(name, held, 1)
            other = "with another protocol" if name in held else f"by the name {name!r}"
            fix = f"did you mean {near[0]}?" if near and near[0] != name else ""
            text = f"none of the pods it concerns has a port {other}; they have {', '.join(held) or 'no named port'}"
            yield finding("MB0404", rule.origin, text, fix=fix)


def hashes(scene: Scene) -> Iterator[Finding]:
    """Selectors by labels that the next rollout changes."""
    selectors: dict[tuple[Origin, Selector], None] = {}
    for rule in scene.policies.network:
        selectors[_place(scene, rule.origin), rule.subject] = None
        for peers in () if isinstance(rule.peers, Anything) else rule.peers:
            if isinstance(peers, Selector):
                selectors[rule.origin, peers] = None
    for policy in _mesh_policies(scene):
        if policy.selector is not None:
            selectors[policy.origin, policy.selector] = None
    for origin, selector in selectors:
        for requirement in selector.requirements:
            if requirement.source is LabelSource.POD and requirement.key in _HASHES:
                yield finding("MB0408", origin, f"selects by {requirement.key}, which the next rollout changes")


def _place(scene: Scene, origin: Origin) -> Origin:
    """The object that a rule stands in."""
    document = scene.document(origin)
    return place_of(document) if document is not None else origin
