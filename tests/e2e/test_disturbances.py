"""Traffic while parts come and go: what policy allows does not fail, what it denies is not let through, not once."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import topology
from cluster import Cluster
from host import Host
from installed import NAMESPACE, Installed
from kubectl import Kubectl, wait_until
from workloads import NO_ANSWER, Load, address_of, ask, network_policy, pod, wait_for_code

NODE_1, NODE_2 = (each.name for each in topology.NODES)
SERVER, FRIEND, STRANGER = "server", "friend", "stranger"
ONLY_FRIENDS = {
    "podSelector": {"matchLabels": {"app": SERVER}},
    "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": FRIEND}}}]}],
}
RESERVED = "var/lib/cni/networks/pods"


@dataclass(frozen=True)
class Guarded:
    """A server that takes only its friend's connections, on another node than both who ask."""

    ns: str
    url: str
    address: str
    kubectl: Kubectl

    def load(self, client: str, seconds: float) -> Load:
        return Load(self.kubectl, client, self.ns, self.address, 8080, seconds)


@pytest.fixture
def guarded(installed: Installed, kubectl: Kubectl, make_namespace: Callable[..., str]) -> Guarded:
    ns = make_namespace("guarded")
    kubectl.apply(
        network_policy("only-friends", ns, ONLY_FRIENDS), pod(SERVER, ns, ports=[8080], node=NODE_2),
        pod(FRIEND, ns, node=NODE_1), pod(STRANGER, ns, node=NODE_1),
    )  # fmt: skip
    kubectl("wait", "pod", "--all", "-n", ns, "--for=condition=Ready", "--timeout=60s", timeout_s=70)
    address = address_of(kubectl, SERVER, ns)
    found = Guarded(ns, f"http://{address}:8080/", address, kubectl)
    wait_for_code(kubectl, ns, found.url, "200", FRIEND)
    assert ask(kubectl, STRANGER, ns, found.url, timeout_s=2).code == NO_ANSWER
    return found


def roll(kubectl: Kubectl, what: str) -> None:
    kubectl("rollout", "restart", what, "-n", NAMESPACE)
    kubectl.roll_out(what, NAMESPACE)


def kill_agents(cluster: Cluster) -> None:
    """As the kernel would when memory runs out."""
    for host in cluster.nodes.values():
        host.run("pkill", "-KILL", "-f", "meshbridge agent")


@pytest.mark.parametrize("what", ["daemonset/meshbridge-agent", "deployment/meshbridge-controller"])
def test_a_rolling_restart_costs_nothing_and_opens_nothing(kubectl: Kubectl, guarded: Guarded, what: str) -> None:
    allowed, denied = (guarded.load(client, 60) for client in (FRIEND, STRANGER))
    roll(kubectl, what)
    assert allowed.left_s > 0, "the restart took longer than the load"
    through, refused = allowed.finish(), denied.finish()
    print(f"{what}: {through.answered} answered, {through.failed} failed; denied: {refused.failed} tries")
    assert through.failed == through.reconnected == 0, through.told
    assert through.new_answered > 100
    assert through.kept_answered > 100
    assert refused.answered == 0, refused.told
    assert refused.failed > 5


def test_agents_that_are_killed_leave_the_kernel_enforcing(
    cluster: Cluster, kubectl: Kubectl, guarded: Guarded
) -> None:
    allowed, denied = (guarded.load(client, 30) for client in (FRIEND, STRANGER))
    kill_agents(cluster)
    through, refused = allowed.finish(), denied.finish()
    assert through.failed == through.reconnected == 0, through.told
    assert refused.answered == 0, refused.told
    kubectl.roll_out("daemonset/meshbridge-agent", NAMESPACE)
    assert ask(kubectl, STRANGER, guarded.ns, guarded.url, timeout_s=2).code == NO_ANSWER


def test_the_api_server_away_for_a_minute(cluster: Cluster, kubectl: Kubectl, guarded: Guarded) -> None:
    allowed, denied = (guarded.load(client, 75) for client in (FRIEND, STRANGER))
    time.sleep(3)
    with cluster.without(cluster.control_plane, "kube-apiserver"):
        time.sleep(60)
    through, refused = allowed.finish(), denied.finish()
    assert through.failed == through.reconnected == 0, through.told
    assert refused.answered == 0, refused.told
    # And what changes afterwards is followed again.
    kubectl("label", "pod", STRANGER, "-n", guarded.ns, f"app={FRIEND}", "--overwrite")
    wait_for_code(kubectl, guarded.ns, guarded.url, "200", STRANGER, timeout_s=60)


def test_a_reused_address_never_inherits(cluster: Cluster, kubectl: Kubectl, guarded: Guarded) -> None:
    """A friend goes, and a stranger gets its address, again and again; each asks from its first moment on."""
    ns, node = guarded.ns, cluster.nodes[NODE_1]
    kubectl.delete("pod", FRIEND, ns)
    kubectl.apply(pod(FRIEND, ns, node=NODE_1))
    kubectl.wait_for_pods(ns, f"app={FRIEND}")
    address = address_of(kubectl, FRIEND, ns)
    for turn in range(3):
        wait_for_code(kubectl, ns, guarded.url, "200", FRIEND)
        kubectl.delete("pod", FRIEND, ns)
        hand_out_next(node, address)
        name = f"{STRANGER}-{turn}"
        asking = f"curl -s -m 1 -o /dev/null -w '%{{http_code}}\\n' {guarded.url}"
        kubectl.apply(
            pod(name, ns, node=NODE_1, command=["sh", "-c", f"for i in $(seq 15); do {asking}; done; sleep inf"])
        )
        kubectl.wait_for_pods(ns, f"app={name}")
        assert address_of(kubectl, name, ns) == address
        assert answers_seen(kubectl, name, ns, 15) == {NO_ANSWER}
        kubectl.delete("pod", name, ns)
        hand_out_next(node, address)
        kubectl.apply(pod(FRIEND, ns, node=NODE_1))
        kubectl.wait_for_pods(ns, f"app={FRIEND}")
        assert address_of(kubectl, FRIEND, ns) == address


def answers_seen(kubectl: Kubectl, pod: str, ns: str, count: int) -> set[str]:
    """What a pod's requests were answered, of which it makes so many and prints the code of each."""
    wait_until(lambda: kubectl("logs", pod, "-n", ns).count("\n") >= count, f"{pod} has asked", 60)
    return set(kubectl("logs", pod, "-n", ns).split())


def hand_out_next(node: Host, address: str) -> None:
    """Have the node's IPAM give this address to its next pod, as soon as it is free: it goes on after the last one."""
    reserved = node.root / RESERVED
    wait_until(lambda: not (reserved / address).exists(), f"{address} is free", 30)
    (reserved / "last_reserved_ip.0").write_text(str(ipaddress.ip_address(address) - 1))


def test_a_policy_that_goes_and_comes_back(kubectl: Kubectl, guarded: Guarded) -> None:
    for _ in range(2):
        kubectl.delete("networkpolicy", "only-friends", guarded.ns)
        wait_for_code(kubectl, guarded.ns, guarded.url, "200", STRANGER)
        kubectl.apply(network_policy("only-friends", guarded.ns, ONLY_FRIENDS))
        wait_for_code(kubectl, guarded.ns, guarded.url, NO_ANSWER, STRANGER, timeout_s=60)
        assert ask(kubectl, FRIEND, guarded.ns, guarded.url).code == "200"


def test_a_node_that_reboots_opens_nothing(
    cluster: Cluster, installed: Installed, kubectl: Kubectl, guarded: Guarded
) -> None:
    """Everything of ours on the node is gone, bpffs is empty, and pods start before the agent or after it."""
    denied = guarded.load(STRANGER, 60)
    cluster.reboot(NODE_2)
    kubectl.roll_out("daemonset/meshbridge-agent", NAMESPACE)
    refused = denied.finish()
    assert refused.answered == 0, refused.told
    kubectl("wait", "pod", "--all", "-n", guarded.ns, "--for=condition=Ready", "--timeout=120s", timeout_s=130)
    url = f"http://{address_of(kubectl, SERVER, guarded.ns)}:8080/"
    wait_for_code(kubectl, guarded.ns, url, "200", FRIEND)
    assert ask(kubectl, STRANGER, guarded.ns, url, timeout_s=2).code == NO_ANSWER
    [status] = installed.json_on_node(NODE_2, "status")
    assert not status["degraded"], status["problems"]  # no pod was attached late
