"""Flows to API servers, and to Services without a selector: what their EndpointSlices list is what is judged."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshbridge.evaluation.batch import answer_lines
from meshbridge.evaluation.cluster import Cluster
from meshbridge.kube.objects import read_objects

CLUSTER = """
apiVersion: v1
kind: Node
metadata: {name: one}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: two, containers: [{name: app}]}
status: {podIP: 10.1.0.1}
---
apiVersion: v1
kind: Service
metadata: {name: kubernetes, namespace: default}
spec: {clusterIP: 10.96.0.1, ports: [{name: https, port: 443, targetPort: 6443}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kubernetes, namespace: default, labels: {kubernetes.io/service-name: kubernetes}}
addressType: IPv4
endpoints: [{addresses: [192.168.0.1, 203.0.113.9]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  egress: [{toEntities: [ENTITY], toPorts: [{ports: [{port: "6443", protocol: TCP}]}]}]
"""
FLOWS: dict[str, tuple[str, str, int, str]] = {
    "through the Service": ("kube-apiserver", "10.96.0.1", 443, "ALLOW"),
    "one on a node": ("kube-apiserver", "192.168.0.1", 6443, "ALLOW"),
    "one outside": ("kube-apiserver", "203.0.113.9", 6443, "ALLOW"),
    "another port": ("kube-apiserver", "203.0.113.9", 22, "DENY"),
    "another address": ("kube-apiserver", "203.0.113.8", 6443, "DENY"),
    "a rule for the world, and one of two is a node": ("world", "10.96.0.1", 443, "DENY"),
    "a rule for the world, and the one outside": ("world", "203.0.113.9", 6443, "ALLOW"),
}


@pytest.mark.parametrize(("entity", "to", "port", "verdict"), FLOWS.values(), ids=FLOWS.keys())
def test_flows_to_api_servers(entity: str, to: str, port: int, verdict: str) -> None:
    documents = read_objects(CLUSTER.replace("ENTITY", entity).encode(), "a.yaml").documents
    flow: dict[str, Any] = {"src": "shop/web", "dst": to, "port": port}
    (line,) = answer_lines(Cluster(documents), [json.dumps(flow).encode()])
    assert line.record["network"] == verdict, line.record
