"""Services without a selector, and the one behind which API servers are: their slices say who answers."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from meshbridge.controller.cluster import Cluster
from meshbridge.identity.model import Entity
from meshbridge.kube.objects import read_objects
from meshbridge.protos import agent_pb2
from meshbridge.xds.messages import service_of

KUBERNETES = """
apiVersion: v1
kind: Service
metadata: {name: kubernetes, namespace: default}
spec: {clusterIP: 10.96.0.1, ports: [{name: https, port: 443, targetPort: 6443}]}
---
"""
NODE = """
apiVersion: v1
kind: Node
metadata: {name: one}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}
---
"""
POD = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: u}
spec: {nodeName: one, containers: [{name: app}]}
status: {phase: Running, podIPs: [{ip: 10.1.0.1}]}
---
"""


def piece(name: str, *addresses: str, service: str = "kubernetes", namespace: str = "default") -> str:
    return f"""
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: {namespace}, labels: {{kubernetes.io/service-name: {service}}}}}
addressType: IPv4
endpoints: [{{addresses: [{", ".join(addresses)}]}}]
---
"""


def apply(cluster: Cluster, *texts: str) -> None:
    documents = read_objects("".join(texts).encode(), "a.yaml").documents
    cluster.apply({document.key: (document,) for document in documents})


def remove(cluster: Cluster, text: str) -> None:
    cluster.apply({document.key: () for document in read_objects(text.encode(), "a.yaml").documents})


def entities(cluster: Cluster, address: str) -> frozenset[Entity] | None:
    holder = cluster.addresses.holder(ip_address(address))
    return None if holder is None else holder.peer.entities


def backends(cluster: Cluster, name: str) -> set[tuple[str, int]]:
    message = agent_pb2.Service.FromString(cluster.service_book.resources[name].body)
    return {(str(address), port) for entry in service_of(message).ports for address, port in entry.backends}


def test_api_servers_are_those_behind_default_kubernetes_wherever_they_run() -> None:
    cluster = Cluster()
    apply(cluster, KUBERNETES, NODE, piece("a", "192.168.0.1", "203.0.113.9"))
    assert backends(cluster, "default/kubernetes") == {("192.168.0.1", 6443), ("203.0.113.9", 6443)}
    assert entities(cluster, "192.168.0.1") == {Entity.REMOTE_NODE, Entity.KUBE_APISERVER}
    assert entities(cluster, "203.0.113.9") == {Entity.WORLD, Entity.WORLD_IPV4, Entity.KUBE_APISERVER}


def test_an_address_that_another_slice_still_lists_stays_an_api_server() -> None:
    cluster = Cluster()
    apply(cluster, KUBERNETES, NODE, piece("a", "192.168.0.1"), piece("b", "192.168.0.1", "203.0.113.9"))
    remove(cluster, piece("a", "192.168.0.1"))
    assert Entity.KUBE_APISERVER in (entities(cluster, "192.168.0.1") or ())
    apply(cluster, piece("b", "203.0.113.9"))
    assert entities(cluster, "192.168.0.1") == {Entity.REMOTE_NODE}
    remove(cluster, piece("b", "203.0.113.9"))
    assert entities(cluster, "203.0.113.9") is None
    assert backends(cluster, "default/kubernetes") == set()


@pytest.mark.parametrize(
    "other",
    [piece("x", "10.1.0.1"), piece("x", "10.1.0.1", service="db", namespace="shop")],
    ids=["of default/kubernetes", "of any Service"],
)
def test_a_slice_takes_no_labels_from_a_pod(other: str) -> None:
    cluster = Cluster()
    apply(cluster, KUBERNETES, POD, other)
    holder = cluster.addresses.holder(ip_address("10.1.0.1"))
    assert holder is not None
    assert (holder.name, holder.peer.entities) == ("web", frozenset())


def test_only_default_kubernetes_makes_api_servers() -> None:
    cluster = Cluster()
    service = KUBERNETES.replace("namespace: default", "namespace: shop").replace("10.96.0.1", "10.96.0.2")
    apply(cluster, service, piece("x", "203.0.113.9", namespace="shop"))
    assert entities(cluster, "203.0.113.9") == {Entity.WORLD, Entity.WORLD_IPV4}
    assert backends(cluster, "shop/kubernetes") == {("203.0.113.9", 6443)}


def test_behind_a_service_with_a_selector_are_its_pods_whatever_slices_say() -> None:
    cluster = Cluster()
    service = KUBERNETES.replace("ports:", "selector: {app: api}, ports:")
    apply(cluster, service, piece("x", "203.0.113.9"))
    assert backends(cluster, "default/kubernetes") == set()
