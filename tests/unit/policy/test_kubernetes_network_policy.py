"""NetworkPolicy v1: who gets through. Rows follow CILIUM.md §b."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policycast import (
    AGENT,
    API,
    ICMP_ECHO,
    LEDGER,
    NODE,
    PRIVATE,
    REMOTE,
    WEB,
    WEB6,
    WORLD,
    WORLD6,
    allowed,
    decide,
    policies,
)

from meshbridge.identity.model import Workload
from meshbridge.policy.model import Direction
from meshbridge.policy.precedence import DropReason

HEAD = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: shop}
spec:
"""
SOURCES: dict[str, Workload | str] = {
    "web": WEB, "web6": WEB6, "ledger": LEDGER, "agent": AGENT, "node": NODE, "remote": REMOTE, "world": WORLD,
    "private": PRIVATE, "world6": WORLD6,
}  # fmt: skip
EVERYBODY = set(SOURCES)


def policy(text: str) -> str:
    return HEAD + "\n".join(f"  {line}" for line in text.strip().splitlines()) + "\n"


INGRESS = {
    "an empty podSelector isolates every pod of the namespace": ("podSelector: {}", {"node"}),
    "a selector of another pod does not concern this one": ("podSelector: {matchLabels: {app: web}}", EVERYBODY),
    "ingress [] allows nobody": ("podSelector: {}\ningress: []", {"node"}),
    "ingress [{}] allows everybody": ("podSelector: {}\ningress: [{}]", EVERYBODY),
    "from [] is anybody": ("podSelector: {}\ningress: [{from: []}]", EVERYBODY),
    "ports [] is any port": ("podSelector: {}\ningress: [{ports: []}]", EVERYBODY),
    "policyTypes Egress leaves ingress open": ("podSelector: {}\npolicyTypes: [Egress]", EVERYBODY),
    "ingress rules without the type have no effect": (
        "podSelector: {}\npolicyTypes: [Egress]\ningress: [{from: [{podSelector: {}}]}]", EVERYBODY),
    "podSelector alone is the own namespace": (
        "podSelector: {}\ningress: [{from: [{podSelector: {}}]}]", {"web", "web6", "node"}),
    "namespaceSelector {} is every pod": (
        "podSelector: {}\ningress: [{from: [{namespaceSelector: {}}]}]", {"web", "web6", "ledger", "agent", "node"}),
    "namespaceSelector by label": (
        "podSelector: {}\ningress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}]}]", {"ledger", "node"}),
    "a namespace's name is always a label": (
        "podSelector: {}\n"
        'ingress: [{from: [{namespaceSelector: {matchLabels: {"kubernetes.io/metadata.name": ops}}}]}]',
        {"agent", "node"}),
    "both in one element are both needed": (
        "podSelector: {}\n"
        "ingress: [{from: [{namespaceSelector: {matchLabels: {team: b}}, podSelector: {matchLabels: {app: web}}}]}]",
        {"node"}),
    "as two elements they are alternatives": (
        "podSelector: {}\n"
        "ingress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}, {podSelector: {matchLabels: {app: web}}}]}]",
        {"web", "web6", "ledger", "node"}),
    "NotIn on a namespace label includes those without it": (
        "podSelector: {}\n"
        "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: NotIn, values: [a]}]}}]}]",
        {"ledger", "agent", "node"}),
    "an ipBlock matches pods and nodes inside it": (
        "podSelector: {}\ningress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}]}]",
        {"web", "ledger", "agent", "private", "node"}),
    "an ipBlock with a node's address lets that node in": (
        "podSelector: {}\ningress: [{from: [{ipBlock: {cidr: 192.168.0.0/30}}]}]", {"node", "remote"}),
    "except takes pods out": (
        "podSelector: {}\ningress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.2.0.0/16]}}]}]",
        {"web", "agent", "private", "node"}),
    "an IPv6 block is IPv6 only": (
        "podSelector: {}\ningress: [{from: [{ipBlock: {cidr: '::/0'}}]}]", {"web6", "world6", "node"}),
    "every label counts, also those Cilium filters out": (
        "podSelector: {}\n"
        "ingress: [{from: [{podSelector: {matchExpressions: [{key: pod-template-hash, operator: Exists}]}}]}]",
        {"node"}),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), INGRESS.values(), ids=INGRESS.keys())
def test_who_reaches_the_pod(text: str, expected: set[str]) -> None:
    found = policies(policy(text))
    assert not found.refusals, found.refusals
    assert {name for name, source in SOURCES.items() if allowed(found, source, API)} == expected


PORTS = {
    "protocol defaults to TCP": ("[{port: 53}]", {("TCP", 53)}),
    "no port is every port of the protocol": ("[{protocol: UDP}]", {("UDP", 53), ("UDP", 8080)}),
    "endPort is inclusive": ("[{port: 53, endPort: 8080}]", {("TCP", 53), ("TCP", 8080)}),
    "a name is the pod's port of that name": ("[{port: http}]", {("TCP", 8080)}),
    "a name of another protocol is nothing": ("[{port: dns}]", set()),
    "an unknown name is nothing, never everything": ("[{port: nothing}]", set()),
    "SCTP": ("[{port: 53, protocol: SCTP}]", {("SCTP", 53)}),
}


@pytest.mark.parametrize(("ports", "expected"), PORTS.values(), ids=PORTS.keys())
def test_which_ports_are_open(ports: str, expected: set[tuple[str, int]]) -> None:
    found = policies(policy(f"podSelector: {{}}\ningress: [{{ports: {ports}}}]"))
    asked = [("TCP", 53), ("UDP", 53), ("SCTP", 53), ("TCP", 8080), ("UDP", 8080), ICMP_ECHO]
    assert {port for port in asked if allowed(found, WEB, API, port)} == expected


def test_egress_isolates_only_when_a_rule_is_written_or_the_type_named() -> None:
    assert allowed(policies(policy("podSelector: {}\negress: []")), API, WORLD, at=Direction.EGRESS)
    named = policies(policy("podSelector: {}\npolicyTypes: [Egress]"))
    assert not allowed(named, API, WORLD, at=Direction.EGRESS)
    written = policies(policy("podSelector: {}\negress: [{to: [{podSelector: {}}]}]"))
    assert allowed(written, API, WEB, at=Direction.EGRESS)
    assert not allowed(written, API, WORLD, at=Direction.EGRESS)


def test_policies_of_one_pod_add_up() -> None:
    other = policy("podSelector: {}\ningress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}]}]")
    found = policies(policy("podSelector: {}") + "---" + other.replace("name: p", "name: q"))
    assert allowed(found, LEDGER, API)
    assert not allowed(found, WEB, API)


def test_a_default_deny_names_the_policies_that_isolate() -> None:
    decision = decide(policies(policy("podSelector: {}")), WORLD, API, ("TCP", 80))
    assert decision.deny_reason == DropReason.POLICY
    assert [str(origin) for origin in decision.deciding.origins] == ["NetworkPolicy shop/p spec (policy.yaml:5)"]


def test_a_host_network_pod_is_selected_by_nothing() -> None:
    assert policies(policy("podSelector: {}")).selecting(replace(API, host_network=True)).network == ()
