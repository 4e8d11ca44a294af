"""Another version and back under load; ``kubectl meshbridge`` for all nodes; and out again, down to the nodes.

The last file of this folder: when it has run, nothing of MeshBridge is in the cluster any more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import topology
from cluster import Cluster
from host import run
from installed import COMMAND, NAMESPACE, Installed
from kubectl import Kubectl, Object, wait_until
from workloads import NO_ANSWER, Load, address_of, ask, network_policy, pod, wait_for_code

NODE_1, NODE_2 = (each.name for each in topology.NODES)
SERVER, FRIEND, STRANGER = "server", "friend", "stranger"
ONLY_FRIENDS = {
    "podSelector": {"matchLabels": {"app": SERVER}},
    "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": FRIEND}}}]}],
}
LOAD_S = 150


@dataclass(frozen=True)
class Guarded:
    """A server that takes only its friend's connections, on another node than both who ask."""

    ns: str
    url: str
    address: str


@pytest.fixture
def guarded(installed: Installed, kubectl: Kubectl, make_namespace: Callable[..., str]) -> Guarded:
    ns = make_namespace("versions")
    kubectl.apply(
        network_policy("only-friends", ns, ONLY_FRIENDS), pod(SERVER, ns, ports=[8080], node=NODE_2),
        pod(FRIEND, ns, node=NODE_1), pod(STRANGER, ns, node=NODE_1),
    )  # fmt: skip
    kubectl("wait", "pod", "--all", "-n", ns, "--for=condition=Ready", "--timeout=60s", timeout_s=70)
    address = address_of(kubectl, SERVER, ns)
    found = Guarded(ns, f"http://{address}:8080/", address)
    wait_for_code(kubectl, ns, found.url, "200", FRIEND)
    return found


def plugin(cluster: Cluster, *arguments: str) -> str:
    """What ``kubectl meshbridge`` prints, found by kubectl as it finds any plugin."""
    environment = {
        "KUBECONFIG": str(cluster.kubeconfig), "HOME": str(cluster.directory),
        "PATH": f"{COMMAND.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    }  # fmt: skip
    command = cluster.control_plane.in_network(COMMAND.parent / "kubectl", "meshbridge", *arguments)
    return run(command, where="kubectl meshbridge", timeout_s=60, env=environment).stdout


def images(kubectl: Kubectl) -> set[str]:
    pods = [each for each in kubectl.items("pods", NAMESPACE) if "deletionTimestamp" not in each["metadata"]]
    return {container["image"] for each in pods for container in each["spec"]["containers"]}


def test_before_and_after_an_installation_nothing_stands_in_the_way(installed: Installed) -> None:
    findings = json.loads(installed.meshbridge("check", "-o", "json"))
    assert {each["outcome"] for each in findings} <= {"ok", "warn"}, findings
    status = json.loads(installed.meshbridge("status", "--cluster", "-o", "json"))
    assert (status["well"], status["problems"]) == (True, []), status
    for node in (NODE_1, NODE_2):
        on_node = json.loads(installed.on_node(node, "check", "--this-node", "-o", "json"))
        found = {each["what"]: each["outcome"] for each in on_node}
        assert found.pop("cgroup") in ("ok", "warn")  # the machine's, whatever it has
        assert set(found.values()) == {"ok"}, on_node
        assert "meshbridge-cni" in next(each["text"] for each in on_node if each["what"] == "CNI")


def test_the_plugin_asks_all_nodes_or_one(cluster: Cluster, kubectl: Kubectl, guarded: Guarded) -> None:
    listed = json.loads(plugin(cluster, "endpoint", "list", "-n", guarded.ns, "-o", "json"))
    assert {(each["node"], each["pod"]) for each in listed} == {
        (NODE_1, FRIEND), (NODE_1, STRANGER), (NODE_2, SERVER),
    }  # fmt: skip
    one = json.loads(plugin(cluster, "endpoint", "list", "--node", NODE_2, "-n", guarded.ns, "-o", "json"))
    assert [each["pod"] for each in one] == [SERVER]
    assert ask(kubectl, STRANGER, guarded.ns, guarded.url, timeout_s=2).code == NO_ANSWER
    drops: list[Object] = []

    def dropped() -> bool:
        text = plugin(cluster, "observe", "-A", "-n", guarded.ns, "--verdict", "DROPPED", "-o", "json")
        drops[:] = [json.loads(line) for line in text.splitlines()]
        return bool(drops)

    wait_until(dropped, "the drop is observed", 20)
    assert {each["flow"]["destination"]["pod_name"] for each in drops} == {SERVER}
    assert plugin(cluster, "status").count("meshbridge") >= 4


def test_another_version_and_back_under_load_loses_nothing_and_opens_nothing(
    cluster: Cluster, installed: Installed, kubectl: Kubectl, guarded: Guarded
) -> None:
    """The other version is the same program under another name, with another argument and one object less."""
    (this,) = images(kubectl)
    other = f"{this}-other"
    for host in cluster.nodes.values():
        host.run("ctr", "-n", "k8s.io", "images", "tag", "--force", this, other)
    allowed, denied = (
        Load(kubectl, client, guarded.ns, guarded.address, 8080, LOAD_S) for client in (FRIEND, STRANGER)
    )
    for image, options in ((other, ("--no-fixes", "--deny-refused")), (this, ())):
        installed.install(image, *options)
        assert images(kubectl) == {image}
        assert kubectl.exists("clusterrole", "meshbridge-fixes") is (image == this)
    assert allowed.left_s > 0, "changing versions took longer than the load"
    through, refused = allowed.finish(), denied.finish()
    print(f"versions: {through.answered} answered, {through.failed} failed; denied: {refused.failed} tries")
    assert through.failed == through.reconnected == 0, through.told
    assert refused.answered == 0, refused.told
    assert refused.failed > 5


def test_uninstalled_nothing_is_left_in_the_cluster_or_on_a_node(
    cluster: Cluster, installed: Installed, kubectl: Kubectl, guarded: Guarded
) -> None:
    assert ask(kubectl, STRANGER, guarded.ns, guarded.url, timeout_s=2).code == NO_ANSWER
    said = installed.meshbridge("uninstall", "--yes", "--timeout", "180", timeout_s=240)
    print(said)
    assert not kubectl.exists("namespace", NAMESPACE)
    for kind in ("crd", "clusterrole", "clusterrolebinding", "validatingwebhookconfiguration",
                 "mutatingwebhookconfiguration"):  # fmt: skip
        left = [
            each["metadata"]["name"] for each in kubectl.items(kind, selector="app.kubernetes.io/part-of=meshbridge")
        ]
        assert [name for name in left if "meshbridge.io" in name] == [], kind
    for name, host in cluster.nodes.items():
        pinned = host.run("find", "/sys/fs/bpf", "-mindepth", "1", "-path", "*meshbridge*").stdout
        assert pinned.strip() in ("", "/sys/fs/bpf/meshbridge"), f"{name}: {pinned}"
        conflists = host.run("sh", "-c", "cat /etc/cni/net.d/*").stdout
        assert "meshbridge" not in conflists, f"{name}: {conflists}"
        assert host.run("test", "-e", "/opt/cni/bin/meshbridge-cni", check=False).returncode != 0, name
    # nothing enforces any more, and pods start as they did before
    assert ask(kubectl, STRANGER, guarded.ns, guarded.url, timeout_s=5).code == "200"
    kubectl.apply(pod("later", guarded.ns, node=NODE_2))
    kubectl("wait", "pod", "later", "-n", guarded.ns, "--for=condition=Ready", "--timeout=60s", timeout_s=70)
    assert "nothing of MeshBridge is installed" in run_uninstall(cluster)


def run_uninstall(cluster: Cluster) -> str:
    environment = {"KUBECONFIG": str(cluster.kubeconfig), "HOME": str(cluster.directory), "PATH": "/usr/bin:/bin"}
    command = cluster.control_plane.in_network(COMMAND, "uninstall", "--yes")
    return run(command, where="meshbridge", timeout_s=60, env=environment).stderr
