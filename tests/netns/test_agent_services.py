"""Egress to a Service's address on a real node: the kernel judges before the address becomes a pod's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from agent_harness import NodeHarness, Pod, inside, run, running_node

from meshbridge.observe.flow import FlowKind
from meshbridge.observe.monitor import monitor_lines
from meshbridge.protos import agent_pb2

pytestmark = pytest.mark.root

VIP4, VIP6, OUTSIDE = "10.96.0.1", "fd96::1", "203.0.113.5"
WEB_TO_API = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  egress:
  - toEndpoints: [{matchLabels: {app: api}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
"""
WEB_TO_WORLD = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  egress:
  - toEntities: [world]
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeHarness]:
    with running_node(tmp_path) as harness:
        yield harness


def proxy(node: NodeHarness, pod: Pod) -> None:
    """What kube-proxy does: port 80 of the Service's addresses is the pod's 8080."""
    for command, vip, target in (
        ("iptables", VIP4, f"{pod.ipv4}:8080"),
        ("iptables", OUTSIDE, f"{pod.ipv4}:8080"),
        ("ip6tables", VIP6, f"[{pod.ipv6}]:8080"),
    ):
        rule = ("-d", vip, "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination", target)
        run(*inside(node.netns, command, "-w", "-t", "nat", "-A", "PREROUTING", *rule))


def tell(node: NodeHarness, *backends: Pod) -> None:
    addresses = [address.packed for pod in backends for address in pod.workload.addresses]
    behind = [agent_pb2.ServiceBackends(port=8080, addresses=addresses)] if backends else []
    node.services["shop/api"] = agent_pb2.Service(
        namespace="shop", name="api", addresses=[ip_address(vip).packed for vip in (VIP4, VIP6)],
        outside_addresses=[ip_address(OUTSIDE).packed],
        ports=[agent_pb2.ServicePort(protocol="TCP", port=80, backends=behind)],
    )  # fmt: skip
    node.sync()


def reaches_both(node: NodeHarness, pod: Pod) -> set[bool]:
    return {node.reaches(pod.netns, vip, 80) for vip in (VIP4, VIP6)}


def why(node: NodeHarness, pod: Pod) -> str:
    """What ``monitor`` says of the last packet of the pod that was dropped on its way to the Service."""
    time.sleep(0.1)
    flows = [
        flow for flow in node.flows()
        if flow.kind is FlowKind.DROP and flow.source.pod == pod.workload.name and flow.destination.port == 80
    ]  # fmt: skip
    assert flows[-1].destination.labels[-1] == "service:shop/api"
    return "\n".join(monitor_lines(flows[-1], verbose=True))


def test_a_service_is_judged_by_the_pods_behind_it(node: NodeHarness) -> None:
    api, web, db, free = (node.add_pod("shop", name) for name in ("api", "web", "db", "free"))
    node.listen(api, 8080)
    proxy(node, api)
    node.apply(WEB_TO_API)
    tell(node, api)
    assert reaches_both(node, web) == {True}, "policy names the pod and its own port, not the Service's"
    assert node.reaches(web.netns, api.ipv4, 8080)
    assert not node.reaches(web.netns, db.ipv4, 8080)

    tell(node, api, db)
    assert reaches_both(node, web) == {False}
    assert "Service backends differ" in why(node, web)

    tell(node)
    assert reaches_both(node, web) == {False}
    assert "No service backends known" in why(node, web)
    assert reaches_both(node, free) == {True}, "whose egress nothing restricts depends on no Service"

    tell(node, api)
    assert reaches_both(node, web) == {True}
    node.apply(WEB_TO_WORLD)
    node.sync()
    assert reaches_both(node, web) == {False}, "a Service's address is not the world"
    assert "CiliumNetworkPolicy shop/web" in why(node, web)
    del node.services["shop/api"]
    node.sync()
    assert reaches_both(node, web) == {True}, "without the Service the address is the world's"


NOT_OUTSIDE = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  egress: [{toEntities: [all]}]
  egressDeny: [{toCIDR: [203.0.113.0/24]}]
"""


def test_a_service_opens_no_outside_address_that_a_policy_denies(node: NodeHarness) -> None:
    api, web = (node.add_pod("shop", name) for name in ("api", "web"))
    node.listen(api, 8080)
    proxy(node, api)
    tell(node, api)
    assert node.reaches(web.netns, OUTSIDE, 80)
    node.apply(NOT_OUTSIDE)
    node.sync()
    assert not node.reaches(web.netns, OUTSIDE, 80)
    assert reaches_both(node, web) == {True}, "the Service's own addresses are judged by its backends alone"
