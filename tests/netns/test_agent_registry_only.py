"""REGISTRY_ONLY on two real nodes with the real controller: past its Envoy a pod reaches what the registry knows."""

from __future__ import annotations

from typing import Any

import pytest
from agent_harness import Pod
from test_agent_capture import ENVOY_PORT, eventually, redirect, with_sidecar
from test_agent_exclusions import ENVOY_UID, SOURCE, TwoNodes, nodes

from meshbridge.observe.flow import FlowKind
from meshbridge.policy.capture import REGISTRY_ONLY
from meshbridge.policy.precedence import DropReason

__all__ = ["nodes"]
pytestmark = pytest.mark.root

MESH_CONFIG = {
    "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
    "data": {"mesh": "outboundTrafficPolicy: {mode: REGISTRY_ONLY}"},
}  # fmt: skip
HEADLESS = {
    "apiVersion": "v1", "kind": "Service", "metadata": {"name": "api", "namespace": "shop"},
    "spec": {"clusterIP": "None", "selector": {"app": "api"}, "ports": [{"port": 9090}]},
}  # fmt: skip
ALLOW_ANY = {
    "apiVersion": "networking.istio.io/v1", "kind": "Sidecar", "metadata": {"name": "web", "namespace": "shop"},
    "spec": {"workloadSelector": {"labels": {"app": "web"}}, "outboundTrafficPolicy": {"mode": "ALLOW_ANY"}},
}  # fmt: skip


def entry(pod: Pod) -> dict[str, Any]:
    return {
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": "job", "namespace": "shop"},
        "spec": {
            "hosts": ["job.example.com"], "resolution": "STATIC",
            "ports": [{"number": 9090, "name": "p", "protocol": "TCP"}],
            "endpoints": [{"address": pod.ipv4}],
        },
    }  # fmt: skip


@pytest.fixture
def pods(nodes: TwoNodes) -> tuple[Pod, Pod, Pod]:
    api, job = with_sidecar(nodes.b, "shop", "api"), with_sidecar(nodes.b, "shop", "job")
    web = with_sidecar(nodes.a, "shop", "web", excludeOutboundPorts="9090")
    for pod in (api, job, web):
        redirect(pod)
    for pod in (api, job):
        nodes.b.listen(pod, ENVOY_PORT)
    nodes.controller.put("mesh", MESH_CONFIG)
    nodes.controller.put("services", HEADLESS)
    nodes.tell(api, job, web)
    return api, job, web


def test_an_excluded_port_reaches_the_registry_and_nobody_else(nodes: TwoNodes, pods: tuple[Pod, Pod, Pod]) -> None:
    api, job, web = pods
    for known, unknown in ((api.ipv4, job.ipv4), (api.ipv6, job.ipv6)):
        eventually(lambda unknown=unknown: nodes.where(web, unknown, 9090) == SOURCE)
        assert nodes.where(web, known, 9090) == set()
        assert nodes.where(web, unknown, 8080, ENVOY_UID) == set(), "what its Envoy sends is its Envoy's to judge"
    drop = [flow for flow in nodes.a.flows() if flow.kind is FlowKind.DROP][-1]
    assert (drop.reason, drop.rules) == (DropReason.COMPENSATION, (REGISTRY_ONLY,))

    nodes.controller.put("entry", entry(job))
    eventually(lambda: nodes.where(web, job.ipv4, 9090) == set())
    assert nodes.where(web, job.ipv6, 9090) == SOURCE, "the entry has its IPv4 address only"
    nodes.controller.put("services")
    eventually(lambda: nodes.where(web, api.ipv4, 9090) == SOURCE)
    nodes.controller.put("sidecar", ALLOW_ANY)
    for address in (api.ipv4, api.ipv6, job.ipv6):
        eventually(lambda address=address: nodes.where(web, address, 9090) == set())
