"""Peers of Cilium's policies that other objects say, and the settings that change what all of them mean."""

from __future__ import annotations

import policycast
import pytest
from policycast import AGENT, API, LEDGER, NODE, PRIVATE, REMOTE, WEB, WEB6, WORLD, WORLD6, allowed, policies

from meshbridge.identity.model import Entity, Peer, Workload
from meshbridge.policy.model import Anything, Direction

CNP = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: p, namespace: shop}
spec: {endpointSelector: {matchLabels: {app: api}}, %s}
---
"""
GROUPS = """
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {name: office, labels: {site: north}}
spec: {externalCIDRs: [203.0.113.0/24]}
---
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {name: private, labels: {site: south}}
spec: {externalCIDRs: [10.0.0.0/8]}
---
"""
CONFIG = """
apiVersion: v1
kind: ConfigMap
metadata: {name: cilium-config, namespace: %s}
data: {%s}
---
"""
SERVICES = """
apiVersion: v1
kind: Service
metadata: {name: ledger, namespace: pay, labels: {team: b}}
spec: {selector: {app: ledger}}
---
apiVersion: v1
kind: Service
metadata: {name: old, namespace: shop}
spec: {}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: old-1, namespace: shop, labels: {kubernetes.io/service-name: old}}
addressType: IPv4
endpoints: [{addresses: [203.0.113.7, 10.1.0.1]}]
---
"""
EVERYBODY: dict[str, Workload | str] = {
    "web": WEB, "web6": WEB6, "ledger": LEDGER, "agent": AGENT, "node": NODE, "remote": REMOTE, "world": WORLD,
    "private": PRIVATE, "world6": WORLD6,
}  # fmt: skip
WITH_GROUPS = {
    "a group by name": ("{cidrGroupRef: office}", {"world"}),
    "a group that is not there is nobody": ("{cidrGroupRef: nowhere}", set()),
    "a group never means pods": ("{cidrGroupRef: private}", {"private"}),
    "except cuts pieces out of a group": ("{cidrGroupRef: office, except: [203.0.113.0/29]}", set()),
    "groups by label": ("{cidrGroupSelector: {matchLabels: {site: north}}}", {"world"}),
    "groups that have a label": (
        "{cidrGroupSelector: {matchExpressions: [{key: site, operator: Exists}]}}", {"world", "private"}),
    "a selector that only excludes means all of the world outside of those groups": (
        "{cidrGroupSelector: {matchExpressions: [{key: site, operator: NotIn, values: [south]}]}}",
        {"world", "world6"}),
    "an address needs all of the labels": (
        "{cidrGroupSelector: {matchLabels: {site: north}, matchExpressions: "
        "[{key: site, operator: In, values: [south]}]}}", set()),
}  # fmt: skip


def reaching(text: str, at: Workload = API) -> set[str]:
    found = policies(text)
    return {name for name, source in EVERYBODY.items() if allowed(found, source, at)}


def reached(text: str) -> set[str]:
    found = policies(text)
    return {name for name, peer in EVERYBODY.items() if allowed(found, API, peer, at=Direction.EGRESS)}


@pytest.mark.parametrize(("element", "expected"), WITH_GROUPS.values(), ids=WITH_GROUPS.keys())
def test_whom_a_cidr_group_lets_in(element: str, expected: set[str]) -> None:
    assert reaching(CNP % f"ingress: [{{fromCIDRSet: [{element}]}}]" + GROUPS) == expected | {"node"}


def test_a_refused_group_lets_nobody_in_and_keeps_everybody_out() -> None:
    bad = GROUPS.replace("203.0.113.0/24", "203.0.113.300/24")
    assert reaching(CNP % "ingress: [{fromCIDRSet: [{cidrGroupRef: office}]}]" + bad) == {"node"}
    denying = "ingress: [{fromEntities: [all]}], ingressDeny: [{fromCIDRSet: [{cidrGroupRef: office}]}]"
    assert reaching(CNP % denying + bad) == set()


WITH_SERVICES = {
    "the pods that a Service selects": ("k8sService: {serviceName: ledger, namespace: pay}", {"ledger"}),
    "any namespace where none is said": ("k8sService: {serviceName: ledger}", {"ledger"}),
    "Services by label": ("k8sServiceSelector: {selector: {matchLabels: {team: b}}}", {"ledger"}),
    "without a selector its addresses, but no pods": ("k8sService: {serviceName: old, namespace: shop}", {"world"}),
    "one that is not there is nobody, also with ports": ("k8sService: {serviceName: gone}", set()),
}


@pytest.mark.parametrize(("service", "expected"), WITH_SERVICES.values(), ids=WITH_SERVICES.keys())
@pytest.mark.parametrize("ports", ["", ", toPorts: [{ports: [{port: '8080'}]}]"], ids=["any port", "a port"])
def test_whom_a_rule_by_services_reaches(service: str, ports: str, expected: set[str]) -> None:
    assert reached(CNP % f"egress: [{{toServices: [{{{service}}}]{ports}}}]" + SERVICES) == expected


NODES = {
    "other nodes, never the pod's own": ("{}", {"remote"}),
    "by a label of the node": ("{matchLabels: {zone: a}}", {"remote"}),
    "by a label it does not have": ("{matchLabels: {zone: b}}", set()),
    "without a label": ("{matchExpressions: [{key: role, operator: DoesNotExist}]}", {"remote"}),
    "labels of pods are not theirs": ("{matchLabels: {app: web}}", set()),
}


@pytest.mark.parametrize(("selector", "expected"), NODES.values(), ids=NODES.keys())
def test_whom_a_rule_by_nodes_lets_in(selector: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    node = Peer(labels={"zone": "a"}, entities=frozenset({Entity.REMOTE_NODE}))
    monkeypatch.setitem(policycast.OTHERS, REMOTE, node)
    assert reaching(CNP % f"ingress: [{{fromNodes: [{selector}]}}]") == expected | {"node"}


OPEN = set(EVERYBODY)
MODES = {
    "default: no rule, no isolation": ("enable-policy: default", "egress: [{}]", OPEN),
    "always: no rule is isolation, for the own node too": ("enable-policy: always", "egress: [{}]", set()),
    "always: with a rule for ingress the own node gets in": ("enable-policy: always", "ingress: [{}]", {"node"}),
    "never: nothing is enforced, denies neither": (
        "enable-policy: never", "ingressDeny: [{fromEntities: [all]}]", OPEN),
    "CIDRs match pods where the mode says so": (
        "policy-cidr-match-mode: pods", "ingress: [{fromCIDR: [10.1.0.0/16]}]", {"web", "node"}),
    "CIDRs match nodes where the mode says so": (
        "policy-cidr-match-mode: nodes", "ingress: [{fromCIDR: [192.168.0.0/16]}]", {"node", "remote"}),
    "but not by a CIDR of everything": (
        "policy-cidr-match-mode: nodes", "ingress: [{fromCIDR: [0.0.0.0/0]}]", {"node", "world", "private"}),
    "both": (
        'policy-cidr-match-mode: "nodes,pods"', "ingress: [{fromCIDR: [0.0.0.0/0]}]",
        OPEN - {"web6", "world6"}),
    "the cluster's own name": (
        "cluster-name: prod",
        "ingress: [{fromEndpoints: [{matchLabels: {io.cilium.k8s.policy.cluster: prod}}]}]",
        {"web", "web6", "node"}),
}  # fmt: skip


@pytest.mark.parametrize(("setting", "rule", "expected"), MODES.values(), ids=MODES.keys())
def test_what_cilium_config_changes(setting: str, rule: str, expected: set[str]) -> None:
    assert reaching(CNP % rule + CONFIG % ("kube-system", setting)) == expected


def test_a_config_map_of_that_name_elsewhere_switches_nothing_off() -> None:
    assert reaching(CNP % "ingress: [{}]" + CONFIG % ("shop", "enable-policy: never")) == {"node"}


def test_an_unknown_mode_is_refused_and_leaves_the_default() -> None:
    text = CNP % "ingress: [{}]" + CONFIG % ("kube-system", "enable-policy: sometimes")
    (refusal,) = policies(text).refusals
    assert "data.enable-policy: unknown value 'sometimes'" in str(refusal)
    assert reaching(text) == {"node"}


def test_a_selector_of_many_labels_over_nested_cidrs_costs_no_more_than_these() -> None:
    nested = ", ".join(f"203.0.112.0/{length}" for length in range(20, 33))
    asked = ", ".join(f"{{key: l{n}, operator: Exists}}" for n in range(9))
    labels = ", ".join(f'l{n}: ""' for n in range(9))
    group = f"""
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {{name: deep, labels: {{{labels}}}}}
spec: {{externalCIDRs: [{nested}, "2001:db8::/32"]}}
---
"""
    found = policies(
        group + CNP % f"ingress: [{{fromCIDRSet: [{{cidrGroupSelector: {{matchExpressions: [{asked}]}}}}]}}]"
    )
    (rule,) = found.network
    assert not isinstance(rule.peers, Anything)
    assert len(rule.peers) == len(set(rule.peers)) == 14
