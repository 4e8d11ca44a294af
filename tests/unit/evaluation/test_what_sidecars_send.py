"""What a sidecar knows and sends, and whether the other end takes it: the registry kinds in answers.

The ids are the sentences of Istio's behaviour (DestinationRule, Sidecar, ServiceEntry, MeshConfig, the 2×2 of halves).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_flow_questions import BASE, STRICT, dumped

from meshbridge.evaluation.batch import answer_lines
from meshbridge.evaluation.cluster import Cluster
from meshbridge.evaluation.question import parse_question
from meshbridge.kube.objects import read_objects
from meshbridge.policy.mesh import DEFAULT_MESH

ONLY = replace(DEFAULT_MESH, registry_only=True)
BY_HAND = replace(DEFAULT_MESH, auto_mtls=False)
SCRAPED = """
---
apiVersion: v1
kind: Service
metadata: {name: scraped, namespace: shop}
spec: {clusterIP: 10.96.0.2, selector: {app: api}, ports: [{name: http-metrics, port: 9090}]}
---
apiVersion: v1
kind: Service
metadata: {name: plain, namespace: ops}
spec: {clusterIP: 10.96.0.3, selector: {app: plain}, ports: [{name: tcp, port: 7000}]}
"""
DISABLED = """
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: without, namespace: shop}
spec: {mtls: {mode: DISABLE}}
"""


def rule(host: str, policy: str, namespace: str = "shop", more: str = "") -> str:
    return f"""
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: r, namespace: {namespace}}}
spec: {{host: {host}, trafficPolicy: {policy}{more}}}
"""


def scope(spec: str, namespace: str = "shop") -> str:
    return f"""
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{name: default, namespace: {namespace}}}
spec: {spec}
"""


def entry(ports: str, addresses: str = "[]", more: str = "", namespace: str = "shop") -> str:
    return f"""
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: outside, namespace: {namespace}}}
spec: {{hosts: [api.example.com], addresses: {addresses}, ports: {ports}, resolution: NONE{more}}}
"""


def ask(text: str, mesh: Any = DEFAULT_MESH, **flow: Any) -> dict[str, Any]:
    cluster = Cluster(read_objects((BASE + text).encode(), "m.yaml").documents, mesh)
    ((record, answered),) = [
        (line.record, line.answered)
        for line in answer_lines(cluster, [dumped({"src": "shop/web", "dst": "shop/api", "port": 8080, **flow})])
    ]
    assert answered, record
    return record


OFF, MUTUAL = "{tls: {mode: DISABLE}}", "{tls: {mode: ISTIO_MUTUAL}}"
OF_80 = "{portLevelSettings: [{port: {number: 80}, tls: {mode: DISABLE}}]}"
OF_81 = OF_80.replace("80", "81")
HTTPS = "[{number: 443, name: tls, protocol: TLS}]"
WORLD = {"dst": "203.0.113.7", "port": 443}

SENT: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "mutual TLS by itself to what demands it": (STRICT, DEFAULT_MESH, {}, "NEEDS_L7"),
    "to a port that the destination excludes the application gets a TLS hello": (
        SCRAPED, DEFAULT_MESH, {"port": 9090}, "DENY"),
    "also by the Service's address": (SCRAPED, DEFAULT_MESH, {"dst": "10.96.0.2", "port": 9090}, "DENY"),
    "not where the question says plaintext": (
        SCRAPED, DEFAULT_MESH, {"port": 9090, "peer_principal": None}, "ALLOW"),
    "nor where a DestinationRule switches TLS off": (
        SCRAPED + rule("scraped", OFF), DEFAULT_MESH, {"port": 9090}, "ALLOW"),
    "nor where PeerAuthentication does": (SCRAPED + DISABLED, DEFAULT_MESH, {"port": 9090}, "ALLOW"),
    "nor where mutual TLS is not automatic": (SCRAPED, BY_HAND, {"port": 9090}, "ALLOW"),
    "nor where no Service leads to the port": ("", DEFAULT_MESH, {"port": 9090}, "ALLOW"),
    "a name in the question is mutual TLS": (
        "", DEFAULT_MESH, {"port": 9090, "peer_principal": "cluster.local/ns/shop/sa/web"}, "DENY"),
    "plaintext by DestinationRule to what demands mutual TLS": (
        STRICT + rule("api", OFF), DEFAULT_MESH, {}, "DENY"),
    "of one port": (STRICT + rule("api", OF_80), DEFAULT_MESH, {}, "DENY"),
    "of another port": (STRICT + rule("api", OF_81), DEFAULT_MESH, {}, "NEEDS_L7"),
    "a port's settings do not inherit the rule's": (
        STRICT + rule("api", "{tls: {mode: DISABLE}, portLevelSettings: [{port: {number: 80}, loadBalancer: {}}]}"),
        DEFAULT_MESH, {}, "NEEDS_L7"),
    "a rule of another host": (STRICT + rule("other", OFF), DEFAULT_MESH, {}, "NEEDS_L7"),
    "a rule by its whole name from the root namespace": (
        STRICT + rule("api.shop.svc.cluster.local", OFF, "istio-system"), DEFAULT_MESH, {}, "DENY"),
    "a rule for all hosts of the mesh": (
        STRICT + rule('"*.local"', OFF, "istio-system"), DEFAULT_MESH, {}, "DENY"),
    "a rule of a namespace that is nobody's": (
        STRICT + rule("api.shop.svc.cluster.local", OFF, "ops"), DEFAULT_MESH, {}, "NEEDS_L7"),
    "a rule that is not exported": (
        STRICT + rule("api.shop.svc.cluster.local", OFF, "istio-system", ", exportTo: [ops]"), DEFAULT_MESH, {},
        "NEEDS_L7"),
    "a rule for other clients": (
        STRICT + rule("api", OFF, more=", workloadSelector: {matchLabels: {app: x}}"), DEFAULT_MESH, {}, "NEEDS_L7"),
    "mutual TLS by rule to a pod without a sidecar": (
        SCRAPED + rule("plain.ops.svc.cluster.local", MUTUAL), DEFAULT_MESH, {"dst": "ops/plain", "port": 7000},
        "DENY"),
    "plaintext by itself to a pod without a sidecar": (
        SCRAPED, DEFAULT_MESH, {"dst": "ops/plain", "port": 7000}, "ALLOW"),
    "past the source's sidecar to what demands mutual TLS": (
        STRICT, DEFAULT_MESH, {"src": "shop/api", "dst": "shop/web", "port": 6379}, "DENY"),
    "past it to what takes both": ("", DEFAULT_MESH, {"src": "shop/api", "dst": "shop/web", "port": 6379}, "ALLOW"),
    "what a Sidecar leaves out is sent plaintext": (
        STRICT + scope("{egress: [{hosts: ['istio-system/*']}]}"), DEFAULT_MESH, {}, "DENY"),
    "what it names is known": (STRICT + scope("{egress: [{hosts: ['./*']}]}"), DEFAULT_MESH, {}, "NEEDS_L7"),
    "by name": (
        STRICT + scope("{egress: [{hosts: ['shop/api.shop.svc.cluster.local']}]}"), DEFAULT_MESH, {}, "NEEDS_L7"),
    "of one port only": (
        STRICT + scope("{egress: [{port: {number: 81}, hosts: ['*/*']}]}"), DEFAULT_MESH, {}, "DENY"),
    "the Sidecar of other workloads": (
        STRICT + scope("{workloadSelector: {labels: {app: x}}, egress: [{hosts: ['~/*']}]}"), DEFAULT_MESH, {},
        "NEEDS_L7"),
    "the mesh's Sidecar": (STRICT + scope("{egress: [{hosts: ['~/*']}]}", "istio-system"), DEFAULT_MESH, {}, "DENY"),
    "the world, where anything goes": ("", DEFAULT_MESH, WORLD, "ALLOW"),
    "the world, where only the registry goes": ("", ONLY, WORLD, "DENY"),
    "past the source's sidecar nobody asks a registry": (
        "", ONLY, {"src": "shop/api", "dst": "203.0.113.7", "port": 6379}, "ALLOW"),
    "a pod without a sidecar asks no registry": ("", ONLY, {**WORLD, "src": "ops/plain"}, "ALLOW"),
    "what a ServiceEntry names": (entry(HTTPS, "[203.0.113.0/24]"), ONLY, WORLD, "ALLOW"),
    "another port of it": (entry(HTTPS, "[203.0.113.0/24]"), ONLY, {**WORLD, "port": 80}, "DENY"),
    "another address": (entry(HTTPS, "[198.51.100.1]"), ONLY, WORLD, "DENY"),
    "a ServiceEntry without addresses is at all of them": (entry(HTTPS), ONLY, WORLD, "ALLOW"),
    "a ServiceEntry for another namespace": (
        entry(HTTPS, more=", exportTo: ['.']", namespace="ops"), ONLY, WORLD, "DENY"),
    "a Service is in the registry": ("", ONLY, {"dst": "10.96.0.1", "port": 80}, "ALLOW"),
    "a pod behind one is": ("", ONLY, {}, "ALLOW"),
    "a pod that no Service leads to is not": ("", ONLY, {"port": 9999}, "DENY"),
    "a Sidecar says otherwise than the mesh": (
        scope("{outboundTrafficPolicy: {mode: ALLOW_ANY}}"), ONLY, WORLD, "ALLOW"),
    "and the other way round": (scope("{outboundTrafficPolicy: {mode: REGISTRY_ONLY}}"), DEFAULT_MESH, WORLD, "DENY"),
    "UDP is no business of sidecars": ("", ONLY, {**WORLD, "protocol": "UDP"}, "ALLOW"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "mesh", "flow", "expected"), SENT.values(), ids=SENT.keys())
def test_the_verdict(text: str, mesh: Any, flow: dict[str, Any], expected: str) -> None:
    answer = ask(text, mesh, **flow)
    assert answer["verdict"] == expected, answer
    assert answer["kernel"] == "PASS", "the kernel does not know what sidecars send"


def test_the_reason_names_the_object_and_says_what_to_do() -> None:
    (reason,) = ask(STRICT + rule("api", OFF))["reasons"]
    assert (reason["kind"], reason["policy"], reason["file"]) == ("DestinationRule", "shop/r", "m.yaml")
    assert reason["line"] > 0
    assert "demands mutual TLS (STRICT)" in reason["text"]


def test_the_order_of_objects_never_matters() -> None:
    rules = [rule("api", OFF), rule('"*.shop.svc.cluster.local"', MUTUAL).replace("name: r", "name: s")]
    assert ask(STRICT + rules[0] + rules[1])["verdict"] == ask(STRICT + rules[1] + rules[0])["verdict"] == "DENY"


def test_who_is_at_an_address_is_named_where_a_workload_entry_says_so() -> None:
    entry = """
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, namespace: shop}
spec: {address: 203.0.113.7, serviceAccount: vm}
"""
    found = Cluster(read_objects((BASE + entry).encode(), "m.yaml").documents)
    question = parse_question({"src": "203.0.113.7", "dst": "shop/api", "port": 8080})
    assert found.source(question).name == "203.0.113.7 (WorkloadEntry shop/vm)"
