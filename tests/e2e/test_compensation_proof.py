"""A pod waits for the proof of what stands in for its Envoy: with a real kubelet, a real injector and the webhook."""

from __future__ import annotations

from collections.abc import Callable

import topology
from installed import Installed
from kubectl import Kubectl, Object, wait_until
from workloads import NO_ANSWER, address_of, ask, pod, service, wait_for_code

NODE_1, NODE_2 = (each.name for each in topology.NODES)
GATE = "meshbridge.io/compensated"
EXCLUDED = {"traffic.sidecar.istio.io/excludeInboundPorts": "8080"}


def conditions(kubectl: Kubectl, ns: str, kind: str = "pod", name: str = "server") -> dict[str, Object]:
    found = kubectl.get(kind, name, ns).get("status", {}).get("conditions", [])
    return {condition["type"]: condition for condition in found}


def test_a_pod_is_ready_once_its_compensation_is_proved(
    installed: Installed, kubectl: Kubectl, make_namespace: Callable[..., str]
) -> None:
    ns, other = make_namespace("proved", injected=True), make_namespace("stranger", injected=True)
    kubectl.apply(
        {
            "apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy",
            "metadata": {"name": "server", "namespace": ns},
            "spec": {"selector": {"matchLabels": {"app": "server"}}, "proof": True, "readinessGate": True,
                     "accept": ["encryption"], "reason": "a test"},
        },
        {
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "strict", "namespace": ns}, "spec": {"mtls": {"mode": "STRICT"}},
        },
        {
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "own", "namespace": ns},
            "spec": {"rules": [{"from": [{"source": {"namespaces": [ns]}}]}]},
        },
        service("server", ns, {"http": 8080}),
        pod("client", ns, node=NODE_1), pod("client", other, node=NODE_1),
    )  # fmt: skip
    for each in (ns, other):
        kubectl("wait", "pod", "--all", "-n", each, "--for=condition=Ready", "--timeout=120s", timeout_s=130)
    kubectl.apply(pod("server", ns, ports=[8080], node=NODE_2, annotations=EXCLUDED))
    gates = [gate["conditionType"] for gate in kubectl.get("pod", "server", ns)["spec"].get("readinessGates", [])]
    assert gates == [GATE], "the webhook gives it"
    kubectl("wait", "pod", "server", "-n", ns, "--for=condition=Ready", "--timeout=120s", timeout_s=130)
    found = conditions(kubectl, ns)
    assert (found[GATE]["status"], found[GATE]["reason"]) == ("True", "Proved"), found[GATE]
    assert found["Ready"]["status"] == "True"

    def policy_says() -> bool:
        said = conditions(kubectl, ns, "bypasspolicy").get("Enforced", {})
        return (said.get("status"), said.get("reason")) == ("True", "Proved")

    wait_until(policy_says, "the policy's status says that it is proved", 60)
    (told,) = [
        condition for each in installed.json_on_node(NODE_2, "endpoint", "list")
        if (each["namespace"], each["pod"]) == (ns, "server")
        for condition in each["conditions"] if condition["type"] == "Enforced"
    ]  # fmt: skip
    assert told["status"] is True, told
    url = f"http://{address_of(kubectl, 'server', ns)}:8080/"
    wait_for_code(kubectl, ns, url, "200")
    assert ask(kubectl, "client", other, url, timeout_s=2).code == NO_ANSWER
