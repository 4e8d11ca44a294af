"""What MeshBridge does not do is said where one looks: an Event, a pod that does not start."""

from __future__ import annotations

import json
from collections.abc import Callable

import topology
from installed import NAMESPACE, Installed
from kubectl import Kubectl, wait_until
from workloads import pod

NODE_1, _ = (each.name for each in topology.NODES)


def test_a_policy_that_is_refused_says_so_when_described(
    installed: Installed, kubectl: Kubectl, make_namespace: Callable[..., str]
) -> None:
    ns = make_namespace("refused")
    kubectl.apply({
        "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "names", "namespace": ns},
        "spec": {"endpointSelector": {}, "egress": [{"toFQDNs": [{"matchName": "example.com"}]}]},
    })  # fmt: skip

    def described() -> str:
        return kubectl("describe", "ciliumnetworkpolicy", "names", "-n", ns)

    wait_until(lambda: "toFQDNs" in described().partition("Events:")[2], "an Event names toFQDNs", 60, described)


def test_no_pod_starts_while_the_agent_is_away(
    installed: Installed, kubectl: Kubectl, make_namespace: Callable[..., str]
) -> None:
    """So none is ever without enforcement; and it starts by itself when the agent is back."""
    ns = make_namespace("closed")

    def select(value: str | None) -> None:
        patch = {"spec": {"template": {"spec": {"nodeSelector": {"e2e": value}}}}}
        kubectl("patch", "daemonset/meshbridge-agent", "-n", NAMESPACE, "-p", json.dumps(patch))

    def agents() -> int:
        return len(kubectl.items("pods", NAMESPACE, "app.kubernetes.io/component=agent"))

    select("nowhere")
    try:
        wait_until(lambda: agents() == 0, "the agents are gone", 60)
        kubectl.apply(pod("late", ns, node=NODE_1, ports=[8080]))
        refused = "FailedCreatePodSandBox"
        wait_until(
            lambda: refused in kubectl("get", "events", "-n", ns), "the pod's network is refused", 60,
            lambda: kubectl.state(ns),
        )  # fmt: skip
        assert "meshbridge" in kubectl("get", "events", "-n", ns, "-o", "yaml")
        assert not kubectl.get("pod", "late", ns)["status"].get("podIP")
    finally:
        select(None)
        kubectl.roll_out("daemonset/meshbridge-agent", NAMESPACE)
    kubectl.wait_for_pods(ns, "app=late")
    [status] = installed.json_on_node(NODE_1, "status")
    assert not any(f"{ns}/late" in each for each in status["problems"]), status["problems"]  # not attached late
