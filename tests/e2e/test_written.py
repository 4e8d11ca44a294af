"""What MeshBridge writes into the cluster: conditions that agents fill, a report, a fix that mends; nothing is left."""

from __future__ import annotations

from collections.abc import Callable

import topology
from installed import Installed
from kubectl import Kubectl, wait_until
from workloads import pod, service, wait_for_code

NODE_1, NODE_2 = (each.name for each in topology.NODES)
URL = "http://server:8080/"


def test_a_bypass_is_accepted_fixed_proved_reported_and_forgotten(
    installed: Installed, kubectl: Kubectl, make_namespace: Callable[..., str]
) -> None:
    """From 503 to 200 and back, with nothing applied but a BypassPolicy."""
    ns = make_namespace("written", injected=True)
    excluded = {"traffic.sidecar.istio.io/excludeInboundPorts": "8080"}
    policy = {
        "apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy", "metadata": {"name": "plain", "namespace": ns},
        "spec": {
            "fix": "apply", "proof": True, "reason": "a test",
            "accept": ["encryption", "identity", "l7", "telemetry"],
        },
    }  # fmt: skip
    kubectl.apply(
        service("server", ns, {"http": 8080}), pod("server", ns, ports=[8080], node=NODE_2, annotations=excluded),
        pod("client", ns, node=NODE_1),
    )  # fmt: skip
    kubectl("wait", "pod", "--all", "-n", ns, "--for=condition=Ready", "--timeout=120s", timeout_s=130)
    wait_for_code(kubectl, ns, URL, "503")
    assert not kubectl.items("destinationrules.networking.istio.io", ns)

    kubectl.apply(policy)
    wait_for_code(kubectl, ns, URL, "200")
    for condition in ("Accepted", "Programmed", "Enforced"):
        kubectl("wait", "bypasspolicy/plain", "-n", ns, f"--for=condition={condition}", "--timeout=60s", timeout_s=70)
    (made,) = kubectl.items("destinationrules.networking.istio.io", ns)
    assert [owner["name"] for owner in made["metadata"]["ownerReferences"]] == ["plain"]
    (report,) = kubectl.items("bypassreports.meshbridge.io", ns)
    assert (report["metadata"]["name"], report["status"]["ports"], report["status"]["accepted"]) == (
        "server", "8080", True,
    )  # fmt: skip
    assert "8080" in kubectl("get", "bypassreports", "-n", ns)

    kubectl.delete("bypasspolicy", "plain", ns)
    wait_for_code(kubectl, ns, URL, "503")
    assert not kubectl.items("destinationrules.networking.istio.io", ns)
    kubectl.delete("pod", "server", ns)
    wait_until(lambda: not kubectl.items("bypassreports.meshbridge.io", ns), "the report goes with its pod", 60)
    kubectl.delete("namespace", ns, wait=False)
    wait_until(lambda: not kubectl.exists("namespace", ns), "nothing of ours keeps the namespace", 90)


def test_a_refused_policy_is_visible_with_describe(
    installed: Installed, kubectl: Kubectl, make_namespace: Callable[..., str]
) -> None:
    ns = make_namespace("refused")
    kubectl.apply(
        {
            "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "odd", "namespace": ns},
            "spec": {"endpointSelector": {}, "egress": [{"toFQDNs": [{"matchName": "example.com"}]}]},
        }
    )  # fmt: skip

    def said() -> str:
        return kubectl("describe", "ciliumnetworkpolicies.cilium.io/odd", "-n", ns).partition("Events:")[2]

    wait_until(lambda: "Refused" in said() and "toFQDNs" in said(), "it says why it is refused", 60, said)
