"""MeshBridge uninstalled: nothing of it is left, in the cluster or on the nodes, and traffic flows as before."""

from __future__ import annotations

from collections.abc import Callable

import topology
from cluster import Cluster
from installed import NAMESPACE, Installed
from kubectl import Kubectl
from workloads import NO_ANSWER, address_of, ask, network_policy, pod, wait_for_code

NODE_1, NODE_2 = (each.name for each in topology.NODES)
OURS = "app.kubernetes.io/part-of=meshbridge"
CLUSTER_WIDE = (
    "clusterroles,clusterrolebindings,mutatingwebhookconfigurations,validatingwebhookconfigurations,"
    "customresourcedefinitions"
)


def test_nothing_is_left(
    cluster: Cluster, installed: Installed, kubectl: Kubectl, make_namespace: Callable[..., str]
) -> None:
    ns = make_namespace("left")
    kubectl.apply(
        network_policy("closed", ns, {"podSelector": {"matchLabels": {"app": "server"}}, "ingress": []}),
        pod("server", ns, ports=[8080], node=NODE_2), pod("client", ns, node=NODE_1),
    )  # fmt: skip
    kubectl("wait", "pod", "--all", "-n", ns, "--for=condition=Ready", "--timeout=120s", timeout_s=130)
    url = f"http://{address_of(kubectl, 'server', ns)}:8080/"
    wait_for_code(kubectl, ns, url, NO_ANSWER, timeout_s=60)

    print(installed.meshbridge("uninstall", "--yes", timeout_s=300))

    assert not kubectl.exists("namespace", NAMESPACE)
    assert "meshbridge" not in kubectl("get", CLUSTER_WIDE, "-o", "name")
    for host in cluster.nodes.values():
        # Empty directories stay, being mount points of the pods that cleaned up; the kernel's own are *.debug.
        pinned = host.run("find", "/sys/fs/bpf", "-type", "f", "!", "-name", "*.debug").stdout
        left = host.run("find", "/run/meshbridge", "/opt/cni/bin", "-name", "*meshbridge*", "!", "-type", "d").stdout
        sockets = host.run("find", "/run/meshbridge", "-type", "s").stdout
        chained = host.run("cat", "/etc/cni/net.d/10-pods.conflist").stdout
        assert (pinned, left, sockets, "meshbridge" in chained) == ("", "", "", False), host.name
    assert ask(kubectl, "client", ns, url).code == "200"
    kubectl.apply(pod("new", ns, node=NODE_2, ports=[8080]))
    kubectl.wait_for_pods(ns, "app=new")
