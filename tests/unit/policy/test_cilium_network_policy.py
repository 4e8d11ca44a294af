"""CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy: who gets through. Rows follow CILIUM.md §a."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from policycast import AGENT, API, ICMP_ECHO, LEDGER, NODE, PRIVATE, REMOTE, WEB, WEB6, WORLD, WORLD6, allowed, policies

from meshbridge.identity.model import Entity, IpFamily, Peer, Workload
from meshbridge.identity.numbering import number_peers
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import compile_endpoint
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.model import Direction, Verdict

CNP = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: p, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
"""
CCNP = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: p}
spec:
  endpointSelector: {matchLabels: {app: api}}
"""
SOURCES: dict[str, Workload | str] = {
    "web": WEB, "web6": WEB6, "ledger": LEDGER, "agent": AGENT, "node": NODE, "remote": REMOTE, "world": WORLD,
    "private": PRIVATE, "world6": WORLD6,
}  # fmt: skip
EVERYBODY = set(SOURCES)
PODS = {"web", "web6", "ledger", "agent"}


def rules(kind: str, text: str) -> str:
    return kind + "\n".join(f"  {line}" for line in text.strip().splitlines()) + "\n"


INGRESS = {
    "a direction that is not touched stays open": (CNP, "egress: [{}]", EVERYBODY),
    "ingress [{}] isolates and allows nothing but the own node": (CNP, "ingress: [{}]", {"node"}),
    "fromEndpoints [] selects nothing": (CNP, "ingress: [{fromEndpoints: []}]", {"node"}),
    "fromEndpoints [] with toPorts selects nothing": (
        CNP, 'ingress: [{fromEndpoints: [], toPorts: [{ports: [{port: "8080"}]}]}]', {"node"}),
    "fromEntities [] selects nothing": (CNP, "ingress: [{fromEntities: []}]", {"node"}),
    "fromCIDR [] selects nothing": (CNP, "ingress: [{fromCIDR: []}]", {"node"}),
    "fromCIDRSet [] selects nothing": (CNP, "ingress: [{fromCIDRSet: []}]", {"node"}),
    "fromEndpoints [{}] in a CNP is the policy's namespace": (
        CNP, "ingress: [{fromEndpoints: [{}]}]", {"web", "web6", "node"}),
    "fromEndpoints [{}] in a CCNP is every pod, not nodes nor the world": (
        CCNP, "ingress: [{fromEndpoints: [{}]}]", PODS | {"node"}),
    "toPorts without peers is anybody": (CNP, 'ingress: [{toPorts: [{ports: [{port: "8080"}]}]}]', EVERYBODY),
    "another port is not that port": (CNP, 'ingress: [{toPorts: [{ports: [{port: "8081"}]}]}]', {"node"}),
    "an element of toPorts without ports matches no port": (CNP, "ingress: [{toPorts: [{}]}]", {"node"}),
    "toPorts [] is as if it were not written": (CNP, "ingress: [{toPorts: []}]", {"node"}),
    "also for the rule's peers": (CNP, "ingress: [{fromEntities: [world], toPorts: [{ports: []}]}]", {"node"}),
    "a label without prefix means a pod of the namespace": (
        CNP, "ingress: [{fromEndpoints: [{matchLabels: {app: web}}]}]", {"web", "web6", "node"}),
    "a label with k8s: means the same": (
        CNP, 'ingress: [{fromEndpoints: [{matchLabels: {"k8s:app": web}}]}]', {"web", "web6", "node"}),
    "a namespace label lifts the own namespace": (
        CNP, 'ingress: [{fromEndpoints: [{matchLabels: {"k8s:io.kubernetes.pod.namespace": pay}}]}]',
        {"ledger", "node"}),
    "NotIn on the namespace means every other namespace": (
        CNP,
        "ingress: [{fromEndpoints: [{matchExpressions: "
        '[{key: "k8s:io.kubernetes.pod.namespace", operator: NotIn, values: [pay]}]}]}]',
        {"web", "web6", "agent", "node"}),
    "a label of namespaces spans them": (
        CNP, 'ingress: [{fromEndpoints: [{matchLabels: {"k8s:io.cilium.k8s.namespace.labels.team": b}}]}]',
        {"ledger", "node"}),
    "a service account is a label": (
        CCNP, 'ingress: [{fromEndpoints: [{matchLabels: {"io.cilium.k8s.policy.serviceaccount": robot}}]}]',
        {"agent", "node"}),
    "NotIn also holds where the label is absent": (
        CCNP, "ingress: [{fromEndpoints: [{matchExpressions: [{key: version, operator: NotIn, values: [v1]}]}]}]",
        {"ledger", "agent", "node"}),
    "DoesNotExist never reaches the world in a CCNP": (
        CCNP, "ingress: [{fromEndpoints: [{matchExpressions: [{key: version, operator: DoesNotExist}]}]}]",
        {"ledger", "agent", "node"}),
    "Exists": (
        CCNP, "ingress: [{fromEndpoints: [{matchExpressions: [{key: version, operator: Exists}]}]}]",
        {"web", "web6", "node"}),
    "requirements of one selector are all needed": (
        CCNP, "ingress: [{fromEndpoints: [{matchLabels: {app: web, version: v2}}]}]", {"node"}),
    "elements of the list are alternatives": (
        CCNP, "ingress: [{fromEndpoints: [{matchLabels: {app: web}}, {matchLabels: {app: agent}}]}]",
        {"web", "web6", "agent", "node"}),
    "a reserved label switches namespace defaulting off": (
        CNP, 'ingress: [{fromEndpoints: [{matchLabels: {"reserved:remote-node": ""}}]}]', {"remote", "node"}),
    "entity all": (CNP, "ingress: [{fromEntities: [all]}]", EVERYBODY),
    "entity world is neither pods nor nodes": (
        CNP, "ingress: [{fromEntities: [world]}]", {"world", "private", "world6", "node"}),
    "entity world-ipv6": (CNP, "ingress: [{fromEntities: [world-ipv6]}]", {"world6", "node"}),
    "entity cluster is pods and nodes": (CNP, "ingress: [{fromEntities: [cluster]}]", PODS | {"node", "remote"}),
    "entity host": (CNP, "ingress: [{fromEntities: [host]}]", {"node"}),
    "entity remote-node": (CNP, "ingress: [{fromEntities: [remote-node]}]", {"remote", "node"}),
    "entity none": (CNP, "ingress: [{fromEntities: [none]}]", {"node"}),
    "0.0.0.0/0 is the world only": (CNP, "ingress: [{fromCIDR: [0.0.0.0/0]}]", {"world", "private", "node"}),
    "a CIDR does not match pods inside it": (CNP, "ingress: [{fromCIDR: [10.0.0.0/8]}]", {"private", "node"}),
    "a bare address is itself": (CNP, "ingress: [{fromCIDR: [203.0.113.7]}]", {"world", "node"}),
    "except cuts its own entry": (
        CNP, "ingress: [{fromCIDRSet: [{cidr: 0.0.0.0/0, except: [10.0.0.0/8]}]}]", {"world", "node"}),
    "except is no deny: another entry may allow it again": (
        CNP, "ingress: [{fromCIDRSet: [{cidr: 0.0.0.0/0, except: [10.0.0.0/8]}, {cidr: 10.9.0.0/16}]}]",
        {"world", "private", "node"}),
    "ingressDeny alone isolates too": (CNP, "ingressDeny: [{fromEndpoints: [{matchLabels: {app: web}}]}]", {"node"}),
    "a deny beats an allow of a port": (
        CNP,
        'ingress: [{toPorts: [{ports: [{port: "8080"}]}]}]\n'
        "ingressDeny: [{fromEndpoints: [{matchLabels: {app: web}}]}]",
        EVERYBODY - {"web", "web6"}),
    "a deny of a port beats an allow of a peer": (
        CNP, 'ingress: [{fromEntities: [all]}]\ningressDeny: [{toPorts: [{ports: [{port: "8000", endPort: 9000}]}]}]',
        set()),
    "a deny of the world beats the allow of a narrower CIDR": (
        CNP, "ingress: [{fromCIDR: [10.9.9.9/32]}]\ningressDeny: [{fromEntities: [world]}]", {"node"}),
    "a deny of the host refuses the own node": (
        CNP, "ingress: [{fromEntities: [all]}]\ningressDeny: [{fromEntities: [host]}]", EVERYBODY - {"node"}),
    "enableDefaultDeny false does not isolate": (CNP, "enableDefaultDeny: {ingress: false}\ningress: [{}]", EVERYBODY),
    "enableDefaultDeny false keeps denies": (
        CNP, "enableDefaultDeny: {ingress: false}\ningressDeny: [{fromEntities: [world]}]",
        PODS | {"node", "remote"}),
    "a label Cilium filters out is on nobody": (
        CCNP, "ingress: [{fromEndpoints: [{matchLabels: {pod-template-hash: x}}]}]", {"node"}),
    "DoesNotExist on a filtered label is on everybody": (
        CCNP, "ingress: [{fromEndpoints: [{matchExpressions: [{key: pod-template-hash, operator: DoesNotExist}]}]}]",
        PODS | {"node"}),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "expected"), INGRESS.values(), ids=INGRESS.keys())
def test_who_reaches_the_pod(kind: str, text: str, expected: set[str]) -> None:
    found = policies(rules(kind, text))
    assert not found.refusals, found.refusals
    assert {name for name, source in SOURCES.items() if allowed(found, source, API)} == expected


PORTS = {
    "missing protocol is TCP, UDP and SCTP, never ICMP": (
        'ingress: [{toPorts: [{ports: [{port: "53"}]}]}]', {("TCP", 53), ("UDP", 53), ("SCTP", 53)}),
    "port 0 without protocol is every port, but no ICMP": (
        'ingress: [{toPorts: [{ports: [{port: "0"}]}]}]',
        {("TCP", 53), ("UDP", 53), ("SCTP", 53), ("TCP", 8080), ("UDP", 8080)}),
    "port 0 with a protocol is all its ports": (
        'ingress: [{toPorts: [{ports: [{port: "0", protocol: TCP}]}]}]', {("TCP", 53), ("TCP", 8080)}),
    "a range is inclusive": (
        'ingress: [{toPorts: [{ports: [{port: "53", endPort: 8080, protocol: UDP}]}]}]', {("UDP", 53), ("UDP", 8080)}),
    "a named port is the pod's own of that protocol": (
        "ingress: [{toPorts: [{ports: [{port: http}]}]}]", {("TCP", 8080)}),
    "a named port of another protocol matches nothing": (
        "ingress: [{toPorts: [{ports: [{port: dns, protocol: TCP}]}]}]", set()),
    "an undefined name matches nothing": ("ingress: [{toPorts: [{ports: [{port: nothing}]}]}]", set()),
    "endPort beside a name has no effect": (
        "ingress: [{toPorts: [{ports: [{port: dns, endPort: 65535}]}]}]", {("UDP", 53)}),
    "icmps lets the type in": ("ingress: [{icmps: [{fields: [{type: 8}]}]}]", {ICMP_ECHO}),
    "icmps by name": ("ingress: [{icmps: [{fields: [{type: EchoRequest, family: IPv4}]}]}]", {ICMP_ECHO}),
    "icmps of the other family is another protocol": (
        "ingress: [{icmps: [{fields: [{type: 8, family: IPv6}]}]}]", set()),
    "peers without ports is everything": (
        "ingress: [{fromEntities: [all]}]",
        {("TCP", 53), ("UDP", 53), ("SCTP", 53), ("TCP", 8080), ("UDP", 8080), ICMP_ECHO}),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), PORTS.values(), ids=PORTS.keys())
def test_which_ports_are_open(text: str, expected: set[tuple[str, int]]) -> None:
    found = policies(rules(CNP, text))
    asked = [("TCP", 53), ("UDP", 53), ("SCTP", 53), ("TCP", 8080), ("UDP", 8080), ICMP_ECHO]
    assert {port for port in asked if allowed(found, WEB, API, port)} == expected


def test_a_named_port_in_egress_is_each_destination_pods_own() -> None:
    text = rules(CNP, "egress: [{toEntities: [all], toPorts: [{ports: [{port: http}]}]}]")
    found = policies(text.replace("app: api", "app: web"))
    assert allowed(found, WEB, API, ("TCP", 8080), at=Direction.EGRESS)
    assert not allowed(found, WEB, API, ("TCP", 80), at=Direction.EGRESS)
    assert allowed(found, WEB, LEDGER, ("TCP", 80), at=Direction.EGRESS)
    assert not allowed(found, WEB, LEDGER, ("TCP", 8080), at=Direction.EGRESS)
    assert not allowed(found, WEB, WORLD, ("TCP", 80), at=Direction.EGRESS)


def test_egress_to_the_own_node_is_not_implied() -> None:
    found = policies(rules(CNP, "egress: [{}]"))
    assert not allowed(found, API, NODE, at=Direction.EGRESS)


def test_a_policy_stays_in_its_namespace_whatever_its_selector_says() -> None:
    text = rules(CNP, "ingress: [{}]").replace("{app: api}", '{app: api, "k8s:io.kubernetes.pod.namespace": pay}')
    found = policies(text)
    assert not allowed(found, WEB, API)
    assert any("own namespace 'shop'" in str(notice) for notice in found.notices)


def test_spec_and_specs_are_all_in_force() -> None:
    text = (
        CNP
        + """\
  ingress: [{fromEndpoints: [{matchLabels: {app: web}}]}]
specs:
- endpointSelector: {matchLabels: {app: api}}
  ingress: [{fromEntities: [remote-node]}]
"""
    )
    found = policies(text)
    passing = {name for name, source in SOURCES.items() if allowed(found, source, API)}
    assert passing == {"web", "web6", "remote", "node"}


def test_rules_come_with_file_line_and_path() -> None:
    (rule,) = policies(rules(CNP, "ingress:\n- fromEntities: [all]")).network
    assert str(rule.origin) == "CiliumNetworkPolicy shop/p spec.ingress[0] (policy.yaml:8)"


@pytest.mark.parametrize("networks", [(), ("10.1.0.0/16",)], ids=["in no CIDR", "in a CIDR of a policy"])
def test_a_deny_by_labels_stops_whoever_has_labels_nobody_knows(networks: tuple[str, ...]) -> None:
    text = rules(CNP, "ingress: [{fromEntities: [all]}]\ningressDeny: [{fromEndpoints: [{matchLabels: {app: web}}]}]")
    contested, ledger = ip_address("10.1.0.9"), LEDGER.addresses[0]
    holders = {contested: Peer(entities=frozenset({Entity.UNMANAGED})), ledger: LEDGER.peer()}
    numbering = number_peers(holders, map(ip_network, networks))
    policy = compile_endpoint(API, policies(text), numbering.identities, Capture.none())
    ingress = policy.map(Direction.INGRESS, IpFamily.IPV4)
    assert evaluate(ingress, numbering.addresses[contested].identity, 6, 8080).verdict is Verdict.DENY
    assert evaluate(ingress, numbering.addresses[ledger].identity, 6, 8080).verdict is Verdict.ALLOW
