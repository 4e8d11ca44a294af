"""What policies refer to travels with them: CIDR groups, Services with their endpoints, Cilium's settings."""

from __future__ import annotations

from ipaddress import ip_address

from google.protobuf.message import Message

from meshbridge.agent.view import NodeView
from meshbridge.controller.cluster import Cluster
from meshbridge.kube.objects import read_objects
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.selectors import CidrPeers, Selector
from meshbridge.protos import agent_pb2 as pb
from meshbridge.xds import types as xds
from meshbridge.xds.client import Update

CLUSTER = """
{apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: u1, labels: {app: web}}
spec: {nodeName: one}
status: {phase: Running, podIP: 10.1.0.1}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: p, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  egress:
  - toCIDRSet: [{cidrGroupRef: partners}]
  - toServices: [{k8sService: {serviceName: api, namespace: shop}}, {k8sService: {serviceName: old, namespace: shop}}]
"""
GROUP = """
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {name: partners}
spec: {externalCIDRs: [198.51.100.0/24]}
"""
SERVICES = """
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {tier: back}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: old, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: other, namespace: shop}
spec: {clusterIP: 10.96.0.3, selector: {tier: front}, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: old-1, namespace: shop, labels: {kubernetes.io/service-name: old}}
addressType: IPv4
endpoints: [{addresses: [203.0.113.5]}]
"""
CONFIG = """
apiVersion: v1
kind: ConfigMap
metadata: {name: cilium-config, namespace: kube-system}
data: {enable-policy: never}
"""


def applied(cluster: Cluster, text: str) -> set[str]:
    """The nodes that a change of these objects touches."""
    documents = read_objects(text.encode(), "a.yaml").documents
    return cluster.apply({document.key: (document,) for document in documents}).nodes


def rules_at_the_node(cluster: Cluster) -> PolicySet:
    """What the node makes of the resources it gets."""
    view = NodeView()
    policies: dict[str, Message] = {i.name: pb.Policy.FromString(i.resource.body) for i in cluster.policies_on("one")}
    view.apply(Update(1, {xds.POLICY: policies}, {}))
    return view.policy_set()


def test_a_node_knows_what_its_policies_refer_to() -> None:
    cluster = Cluster()
    applied(cluster, CLUSTER + "---" + GROUP + "---" + SERVICES)
    (by_group, by_service) = rules_at_the_node(cluster).network
    assert [str(peer.cidr) for peer in by_group.peers if isinstance(peer, CidrPeers)] == ["198.51.100.0/24"]
    cidrs = [peer for peer in by_service.peers if isinstance(peer, CidrPeers)]
    assert [peer.cidr.network_address for peer in cidrs] == [ip_address("203.0.113.5")]
    assert sum(isinstance(peer, Selector) for peer in by_service.peers) == 1
    names = {item.parsed.document.name for item in cluster.policies_on("one")}
    assert names == {"p", "partners", "api", "old", "old-1"}
    assert any("tier" in item.distinctions.labels.pod for item in cluster.policies_on("one"))


def test_a_change_of_what_is_referred_to_touches_the_node() -> None:
    cluster = Cluster()
    applied(cluster, CLUSTER)
    for text in (GROUP, SERVICES, CONFIG):
        assert applied(cluster, text) == {"one"}
    assert rules_at_the_node(cluster).cilium.enforcement == "never"
