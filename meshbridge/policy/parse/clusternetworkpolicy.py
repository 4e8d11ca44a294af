"""ClusterNetworkPolicy, and AdminNetworkPolicy and BaselineAdminNetworkPolicy from which it was made.

A rule with a peer of a kind nobody here knows is no reason to refuse the object: its owner says what holds then. An
Accept matches nothing, a Deny or a Pass denies everybody.

Spec: CILIUM.md §c; network-policy-api v0.2, apis/v1alpha1 and apis/v1alpha2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from meshbridge.policy.model import (
    ANY,
    Anything,
    Direction,
    Document,
    NetworkRule,
    Notice,
    PortMatch,
    Severity,
    Tier,
    Verdict,
)
from meshbridge.policy.parse.clusterports import cluster_ports, cluster_protocols
from meshbridge.policy.parse.labels import kubernetes_requirements
from meshbridge.policy.parse.parsed import Parsed, Reach, contradiction_notices, origin_of, refused_network
from meshbridge.policy.parse.reader import Invalid, Reader, shown
from meshbridge.policy.selectors import (
    IS_NODE,
    IS_POD,
    CidrPeers,
    LabelSource,
    PeerSelector,
    Requirement,
    Selector,
)

BASELINE_ADMIN: Final = "BaselineAdminNetworkPolicy"

_TIERS = {"Admin": Tier.ADMIN, "Baseline": Tier.BASELINE}
_LISTS = {Direction.INGRESS: ("ingress", "from"), Direction.EGRESS: ("egress", "to")}
_LAST_PRIORITY = 1000
_EXAMPLES = {"tier": "Admin", "priority": "0..1000", "subject": "{namespaces: {}} for all pods"}
_LONGEST_NAME = 100
_MOST_NETWORKS = 25
_DOMAIN = re.compile(r"(\*\.)?([A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?\.)+[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?\.?")
_LONGEST_DOMAIN = 255


@dataclass(frozen=True, slots=True)
class _Dialect:
    """What the kinds differ in: fields beside subject and rules, names of the actions, and the longest list."""

    fields: tuple[str, ...]
    allow: str
    most: int
    passes: bool = True
    protocols: bool = False

    @property
    def actions(self) -> tuple[str, ...]:
        return (self.allow, "Deny", "Pass") if self.passes else (self.allow, "Deny")

    @property
    def ports(self) -> tuple[str, ...]:
        return ("protocols", "ports") if self.protocols else ("ports",)

    def peers(self, direction: Direction) -> tuple[str, ...]:
        if direction is Direction.INGRESS:
            return ("namespaces", "pods")
        named = ("domainNames",) if self.passes else ()
        return ("namespaces", "pods", "nodes", "networks", *named)


_DIALECTS: Final[Mapping[str, _Dialect]] = {
    "ClusterNetworkPolicy": _Dialect(("tier", "priority"), "Accept", 25, protocols=True),
    "AdminNetworkPolicy": _Dialect(("priority",), "Allow", 100),
    BASELINE_ADMIN: _Dialect((), "Allow", 100, passes=False),
}
CLUSTER_POLICY_KINDS: Final = tuple(_DIALECTS)


def parse_cluster_network_policy(document: Document) -> Parsed:
    """One policy; refused as a whole when one part is not understood, but for the kind of a peer."""
    notices: list[Notice] = []
    try:
        rules = _rules(document, notices)
    except Exception as raised:
        error = Invalid.of(raised)
        return refused_network(document, error, [_reach(document)])
    return Parsed(document, network=tuple(rules), notices=tuple(notices))


def _rules(document: Document, notices: list[Notice]) -> list[NetworkRule]:
    dialect = _DIALECTS[document.kind]
    spec = Reader(document.data.get("spec"), "spec")
    fields = spec.fields(*dialect.fields, "subject", "ingress", "egress")
    for required in (*dialect.fields, "subject"):
        if required not in fields:
            spec.refuse(f"has no {required}", f"write {required}: {_EXAMPLES[required]}")
    if document.kind == BASELINE_ADMIN and document.name != "default":
        Reader(document.name, "metadata.name").refuse(
            f"{shown(document.name)} is not the one there can be", "name it default"
        )
    tier, priority = _rank(document.kind, fields)
    subject = Selector.of([*_subject(fields["subject"]), IS_POD])
    notices += contradiction_notices(document, [("spec.subject", subject)])
    found = []
    for direction, (name, _) in _LISTS.items():
        read = _RuleReader(document, dialect, direction, notices)
        for order, element in enumerate(_at_most(fields[name], dialect.most) if name in fields else ()):
            origin = replace(origin_of(document, element.path), tier=tier.name.capitalize())
            denying = NetworkRule(
                subject, direction, Verdict.DENY, ANY, ANY, origin,
                default_deny=False, tier=tier, priority=priority, order=order,
            )  # fmt: skip
            found.append(read.rule(element, denying))
    return found


def _rank(kind: str, fields: Mapping[str, Reader]) -> tuple[Tier, int]:
    """The tier and the priority in it; a BaselineAdminNetworkPolicy comes after whatever has a priority."""
    tier = _TIERS[fields["tier"].text(_TIERS)] if "tier" in fields else Tier.ADMIN
    if kind == BASELINE_ADMIN:
        return Tier.BASELINE, _LAST_PRIORITY + 1
    return tier, fields["priority"].integer(0, _LAST_PRIORITY)


@dataclass(frozen=True, slots=True)
class _RuleReader:
    """Reads the rules of one direction of one object."""

    document: Document
    dialect: _Dialect
    direction: Direction
    notices: list[Notice]

    def rule(self, at: Reader, denying: NetworkRule) -> NetworkRule:
        """The rule at ``at``, made of one that denies everybody, which it stays when its peers are not known."""
        dialect, (_, peers_name) = self.dialect, _LISTS[self.direction]
        fields = at.fields("name", "action", peers_name, *dialect.ports)
        if "action" not in fields:
            at.refuse("has no action", f"write one of: {', '.join(dialect.actions)}")
        if peers_name not in fields:
            at.refuse(f"has no {peers_name}", f"write {peers_name}: [{{namespaces: {{}}}}] for all pods")
        if "name" in fields and len(fields["name"].text()) > _LONGEST_NAME:
            fields["name"].refuse(f"is longer than {_LONGEST_NAME} characters", "shorten it")
        action = fields["action"].text(dialect.actions)
        items = _some(fields[peers_name], dialect.most)
        kinds = [self._kind(item) for item in items]
        peers = [self._peers(item, kind, action) for item, kind in zip(items, kinds, strict=True) if kind]
        ports = self._ports(fields, kinds)
        if "" in kinds:
            unknown = items[kinds.index("")]
            holds = "matches nothing" if action == dialect.allow else "denies everybody"
            known = ", ".join(dialect.peers(self.direction))
            text = f"is a kind of peer that is not known here, so the {action} rule {holds}; use one of: {known}"
            self.notices.append(Notice(self.document, text, unknown.path, Severity.ERROR, "MB0511"))
            return replace(denying, verdict=Verdict.ALLOW, peers=()) if action == dialect.allow else denying
        return replace(
            denying,
            verdict=Verdict.DENY if action == "Deny" else Verdict.ALLOW,
            peers=tuple(peer for several in peers for peer in several),
            ports=ports,
            passes=action == "Pass",
        )

    def _kind(self, at: Reader) -> str:
        """The field that says what kind of peer it is; empty when it is none of those that are known."""
        given = at.mapping()
        if len(given) > 1:
            at.refuse(f"says {' and '.join(map(shown, sorted(given)[:3]))} at once", "write an element for each")
        return next((name for name in given if name in self.dialect.peers(self.direction)), "")

    def _peers(self, at: Reader, kind: str, action: str) -> tuple[PeerSelector, ...]:
        value = at.mapping()[kind]
        if kind == "networks":
            networks = [item.network(bare_address=False) for item in _some(value, _MOST_NETWORKS)]
            return tuple(CidrPeers(network) for network in networks)
        if kind == "domainNames":
            return self._domains(value, action)
        if kind == "nodes":
            selector = Selector.of([*kubernetes_requirements(value, LabelSource.NODE), IS_NODE])
        elif kind == "pods":
            selector = Selector.of([*_pods(value), IS_POD])
        else:
            selector = Selector.of([*kubernetes_requirements(value, LabelSource.NAMESPACE_LABEL), IS_POD])
        self.notices.extend(contradiction_notices(self.document, [(at.path, selector)]))
        return (selector,)

    def _domains(self, at: Reader, action: str) -> tuple[PeerSelector, ...]:
        if action != self.dialect.allow:
            at.refuse(f"domain names in a {action} rule", f"write networks, or use them to {self.dialect.allow}")
        for item in _some(at, _MOST_NETWORKS):
            name = item.text()
            if len(name) > _LONGEST_DOMAIN or not _DOMAIN.fullmatch(name):
                item.refuse(f"{shown(name)} is no domain name", "write kubernetes.io or *.kubernetes.io")
        text = f"is not enforced, so these names {self.dialect.allow.lower()} nothing; write networks"
        self.notices.append(Notice(self.document, text, at.path, Severity.ERROR, "MB0512"))
        return ()

    def _ports(self, fields: Mapping[str, Reader], kinds: list[str]) -> Anything | tuple[PortMatch, ...]:
        given = [name for name in self.dialect.ports if name in fields]
        if not given:
            return ANY
        if len(given) > 1:
            fields[given[1]].refuse("stands beside protocols", "move its elements there")
        at = fields[given[0]]
        items = _at_most(at, self.dialect.most, at_least=1)
        read = cluster_protocols if given[0] == "protocols" else cluster_ports
        found = tuple(match for item in items for match in read(item))
        without_names = [kind for kind in kinds if kind in ("nodes", "networks", "domainNames")]
        if without_names and any(match.name for match in found):
            at.refuse(
                f"names a port, but {without_names[0]} have no named ports", "write its number, or a rule of its own"
            )
        return found


def _at_most(at: Reader, most: int, at_least: int = 0) -> list[Reader]:
    items = at.items(at_least)
    if len(items) > most:
        at.refuse(f"{len(items)} elements are more than {most}", "write several rules or policies")
    return items


def _some(at: Reader, most: int) -> list[Reader]:
    items = _at_most(at, most)
    if not items:
        at.refuse("the list is empty", "add an element")
    return items


def _subject(at: Reader) -> list[Requirement]:
    fields = at.fields("namespaces", "pods")
    if len(fields) != 1:
        at.refuse("must say namespaces or pods", "write one of them, e.g. namespaces: {} for all pods")
    if "pods" in fields:
        return _pods(fields["pods"])
    return kubernetes_requirements(fields["namespaces"], LabelSource.NAMESPACE_LABEL)


def _pods(at: Reader) -> list[Requirement]:
    fields = at.fields("namespaceSelector", "podSelector")
    if "podSelector" not in fields:
        at.refuse("has no podSelector", "write podSelector: {} for all pods")
    found = kubernetes_requirements(fields["podSelector"])
    if "namespaceSelector" in fields:
        found += kubernetes_requirements(fields["namespaceSelector"], LabelSource.NAMESPACE_LABEL)
    return found


def _reach(document: Document) -> Reach:
    """What a refused policy may concern, read as far as it can be read.

    A Pass may have handed to other policies what they deny, so a direction with one is closed as with a Deny.
    """
    both = frozenset(Direction)
    spec = document.data.get("spec")
    baseline = document.kind == BASELINE_ADMIN or (isinstance(spec, dict) and spec.get("tier") == "Baseline")
    tier = Tier.BASELINE if baseline else Tier.ADMIN
    if not isinstance(spec, dict):
        return Reach(Selector.of([IS_POD]), both, both, tier)
    dialect = _DIALECTS[document.kind]
    named = frozenset(direction for direction, (name, _) in _LISTS.items() if spec.get(name))
    denies = frozenset(direction for direction, (name, _) in _LISTS.items() if _may_deny(spec.get(name), dialect.allow))
    if not all(name in (*dialect.fields, "subject", "ingress", "egress") for name in spec):
        named = both
    try:
        requirements = _subject(Reader(spec.get("subject"), "spec.subject"))
    except Invalid:
        requirements = []
    return Reach(Selector.of([*requirements, IS_POD]), named, denies, tier)


def _may_deny(rules: object, allow: str) -> bool:
    if not isinstance(rules, list):
        return rules is not None
    return any(not isinstance(rule, dict) or rule.get("action") != allow for rule in rules)
