"""Whom a pod sees behind what a node does to packets, and what policy makes of it: real kube-proxy, real packets.

Each row is one connection to a pod that only friends may reach: from where, by which way, whom the kernel took for its
source, and whether it got there. docs/node-traffic.md has the same rows in words.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from api_server import ADMIN, REPO, ApiServer, wait_for

sys.path.insert(0, str(REPO / "tests/netns"))
from agent_harness import GATEWAY4, NodeHarness, Pod, inside, run

from meshbridge.datapath.redirect import in_namespace
from meshbridge.observe.flow import Flow, FlowVerdict
from meshbridge.observe.monitor import monitor_lines
from meshbridge.policy.model import Direction
from meshbridge.protos import agent_pb2

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

PORT, PODS = 8080, "10.79.0.0/24"
NODE, OUTSIDE = "172.31.79.1", "172.31.79.2"
CLUSTER_IP, CLUSTER_NODE_PORT = "10.96.7.1", 30081
LOCAL_IP, LOCAL_NODE_PORT = "10.96.7.2", 30082
FRIENDS = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends, namespace: shop}
spec:
  podSelector: {matchLabels: {app: server}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
"""
ALSO = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: also, namespace: shop}
spec:
  podSelector: {matchLabels: {app: server}}
  policyTypes: [Ingress]
  ingress: [{from: [%s]}]
"""
ONLY_SERVERS = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-servers, namespace: shop}
spec:
  podSelector: {matchLabels: {app: friend}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: server}}}]}]
"""


@dataclass
class Scene:
    """A node with kube-proxy, three pods, and somebody outside."""

    node: NodeHarness
    server: Pod
    friend: Pod
    stranger: Pod
    outside: str

    def netns(self, name: str) -> str:
        pods = {"server": self.server, "friend": self.friend, "stranger": self.stranger}
        return pods[name].netns if name in pods else self.node.netns if name == "node" else self.outside

    def connect(self, who: str, address: str, port: int) -> tuple[bool, str]:
        """Whether it got there, and whom the server's own hook took for the source."""
        before = len(self.node.flows())
        reached = self.node.reaches(self.netns(who), address, port)
        time.sleep(0.2)
        flows = [flow for flow in self.node.flows()[before:] if self._arrives(flow)]
        return reached, _seen(flows[0]) if flows else NOBODY

    def _arrives(self, flow: Flow) -> bool:
        to = flow.destination
        return flow.direction is Direction.INGRESS and (str(to.address), to.port) == (self.server.ipv4, PORT)


def _seen(flow: Flow) -> str:
    source = flow.source
    return f"{source.namespace}/{source.pod}" if source.pod else ",".join(source.entities) or str(source.address)


def service(name: str, address: str, node_port: int, policy: str) -> list[dict[str, Any]]:
    metadata = {"name": name, "namespace": "default"}
    port = {"name": "http", "protocol": "TCP", "port": 80, "targetPort": PORT, "nodePort": node_port}
    spec = {"type": "NodePort", "clusterIP": address, "externalTrafficPolicy": policy, "ports": [port]}
    return [{"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}]


def endpoint_slice(name: str, pod: Pod, node: str) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
        "ports": [{"name": "http", "protocol": "TCP", "port": PORT}],
        "endpoints": [{"addresses": [pod.ipv4], "nodeName": node, "conditions": {"ready": True, "serving": True}}],
    }  # fmt: skip


class Relay:
    """An API server on the loopback of another network namespace, at the same port."""

    def __init__(self, netns: str, port: int) -> None:
        self._port = port
        self._listening = in_namespace(f"/run/netns/{netns}", lambda: socket.create_server(("127.0.0.1", port)))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        with suppress(OSError):
            other.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listening.close()


@pytest.fixture(scope="module", params=["iptables", "nftables"])
def scene(
    request: pytest.FixtureRequest, api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("node")
    node = NodeHarness(directory, subnet=79).open()
    objects: list[dict[str, Any]] = []
    proxy: subprocess.Popen[bytes] | None = None
    relay: Relay | None = None
    try:
        node.start_agent()
        server, friend, stranger = (node.add_pod("shop", name, app=name) for name in ("server", "friend", "stranger"))
        outside = f"{node.prefix}-outside"
        _uplink(node.netns, outside)
        objects += [
            *service("cluster", CLUSTER_IP, CLUSTER_NODE_PORT, "Cluster"), endpoint_slice("cluster", server, node.name),
            *service("local", LOCAL_IP, LOCAL_NODE_PORT, "Local"), endpoint_slice("local", server, node.name),
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name}, "spec": {"podCIDRs": [PODS]},
             "status": {"addresses": [{"type": "InternalIP", "address": NODE}]}},
        ]  # fmt: skip
        api_server.create(*objects)
        relay = Relay(node.netns, int(api_server.url.rpartition(":")[2]))
        proxy = _kube_proxy(node, api_server, str(request.param), directory)
        for name, address in (("cluster", CLUSTER_IP), ("local", LOCAL_IP)):
            node.services[f"default/{name}"] = agent_pb2.Service(
                namespace="default", name=name, addresses=[ip_address(address).packed],
                ports=[agent_pb2.ServicePort(protocol="TCP", port=80, backends=[
                    agent_pb2.ServiceBackends(port=PORT, addresses=[ip_address(server.ipv4).packed])])],
            )  # fmt: skip
        node.listen(server, PORT)
        node.sync()
        for address, port in ((CLUSTER_IP, 80), (NODE, LOCAL_NODE_PORT)):
            wait_for(lambda a=address, p=port: node.reaches(outside if p != 80 else friend.netns, a, p),
                     f"kube-proxy has written its rules, see {directory}", 60)  # fmt: skip
        node.apply(FRIENDS)
        node.sync()
        yield Scene(node, server, friend, stranger, outside)
    finally:
        if proxy is not None:
            proxy.kill()
            proxy.wait()
        if relay is not None:
            relay.close()
        api_server.delete(*objects)
        node.close()


def _uplink(node: str, outside: str) -> None:
    run("ip", "netns", "add", outside)
    run("ip", "-n", node, "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", outside)
    run("ip", "-n", node, "addr", "add", f"{NODE}/24", "dev", "up0")
    run("ip", "-n", node, "link", "set", "up0", "up")
    run("ip", "-n", outside, "addr", "add", f"{OUTSIDE}/24", "dev", "eth0")
    run("ip", "-n", outside, "link", "set", "eth0", "up")
    run("ip", "-n", outside, "link", "set", "lo", "up")
    run("ip", "-n", outside, "route", "add", "default", "via", NODE)
    run("ip", "-n", node, "route", "add", "default", "via", OUTSIDE)


def _kube_proxy(node: NodeHarness, server: ApiServer, mode: str, directory: Path) -> subprocess.Popen[bytes]:
    built = subprocess.check_output([REPO / "scripts/third-party", "--path", "kubernetes"], text=True).strip()
    options = [
        f"{built}/bin/kube-proxy", f"--kubeconfig={server.kubeconfig(ADMIN)}", f"--hostname-override={node.name}",
        f"--proxy-mode={mode}", f"--cluster-cidr={PODS}", "--healthz-bind-address=127.0.0.1:10256",
        "--metrics-bind-address=127.0.0.1:10249", "--conntrack-max-per-core=0", "--conntrack-min=0",
        "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s", "--iptables-sync-period=1s",
    ]  # fmt: skip
    with (directory / "kube-proxy.log").open("wb") as log:
        return subprocess.Popen(inside(node.netns, *options), stdout=log, stderr=log)


SERVER, HOST, WORLD, NOBODY = "server", "host", "world,world-ipv4", "nobody"

FRIENDS_ONLY: dict[str, tuple[str, str, int, bool, str]] = {
    "a process of the node": ("node", SERVER, PORT, True, HOST),
    "a process of the node, by the Service": ("node", CLUSTER_IP, 80, True, HOST),
    "a process of the node, by the NodePort": ("node", NODE, CLUSTER_NODE_PORT, True, HOST),
    "a friend": ("friend", SERVER, PORT, True, "shop/friend"),
    "a friend, by the Service": ("friend", CLUSTER_IP, 80, True, "shop/friend"),
    "a stranger": ("stranger", SERVER, PORT, False, "shop/stranger"),
    "a stranger, by the Service": ("stranger", CLUSTER_IP, 80, False, "shop/stranger"),
    "a friend, by a NodePort with externalTrafficPolicy Cluster": ("friend", NODE, CLUSTER_NODE_PORT, False, HOST),
    "a friend, by a NodePort with Local": ("friend", NODE, LOCAL_NODE_PORT, True, "shop/friend"),
    "a stranger, by a NodePort with Local": ("stranger", NODE, LOCAL_NODE_PORT, False, "shop/stranger"),
    "somebody outside": ("outside", SERVER, PORT, False, WORLD),
    "somebody outside, by a NodePort with Cluster": ("outside", NODE, CLUSTER_NODE_PORT, False, HOST),
    "somebody outside, by a NodePort with Local": ("outside", NODE, LOCAL_NODE_PORT, False, WORLD),
    "the pod itself": (SERVER, SERVER, PORT, True, NOBODY),
    "the pod itself, by its own Service": (SERVER, CLUSTER_IP, 80, False, HOST),
}
"""From where, to what, whether it gets there, and who is seen by the server's hook; NOBODY: nothing comes to it."""


def judged(scene: Scene, rows: dict[str, tuple[str, str, int, bool, str]]) -> dict[str, tuple[bool, str]]:
    return {
        name: scene.connect(who, scene.server.ipv4 if address == SERVER else address, port)
        for name, (who, address, port, *_) in rows.items()
    }


def test_who_is_seen_and_what_becomes_of_it(scene: Scene) -> None:
    assert judged(scene, FRIENDS_ONLY) == {name: row[3:] for name, row in FRIENDS_ONLY.items()}


def test_a_drop_behind_a_masquerade_says_that_it_was_the_nodes_address(scene: Scene) -> None:
    before = len(scene.node.flows())
    assert not scene.node.reaches(scene.outside, NODE, CLUSTER_NODE_PORT)
    time.sleep(0.2)
    (drop, *_) = [flow for flow in scene.node.flows()[before:] if flow.verdict is FlowVerdict.DROPPED]
    assert drop.source.address == ip_address(GATEWAY4), "the address that kube-proxy masquerades with"
    assert "NetworkPolicy shop/friends" in "\n".join(monitor_lines(drop, verbose=True))


BLOCKS: dict[str, tuple[str, dict[str, tuple[str, str, int, bool, str]]]] = {
    "the outside's addresses": (
        f"{{ipBlock: {{cidr: {OUTSIDE}/32}}}}",
        {
            "by a NodePort with Local": ("outside", NODE, LOCAL_NODE_PORT, True, WORLD),
            "by a NodePort with Cluster": ("outside", NODE, CLUSTER_NODE_PORT, False, HOST),
            "and nobody else": ("stranger", SERVER, PORT, False, "shop/stranger"),
        },
    ),
    "the node's address": (
        f"{{ipBlock: {{cidr: {GATEWAY4}/32}}}}",
        {
            "by a NodePort with Cluster": ("outside", NODE, CLUSTER_NODE_PORT, True, HOST),
            "by a NodePort with Local": ("outside", NODE, LOCAL_NODE_PORT, False, WORLD),
            "the pod itself, by its own Service": (SERVER, CLUSTER_IP, 80, True, HOST),
            "and nobody else": ("stranger", SERVER, PORT, False, "shop/stranger"),
        },
    ),
}


@pytest.mark.parametrize(("block", "rows"), BLOCKS.values(), ids=BLOCKS.keys())
def test_an_ip_block_means_the_address_that_arrives(
    scene: Scene, block: str, rows: dict[str, tuple[str, str, int, bool, str]]
) -> None:
    scene.node.apply(ALSO % block)
    scene.node.sync()
    try:
        assert judged(scene, rows) == {name: row[3:] for name, row in rows.items()}
    finally:
        scene.node.policies = {name: d for name, d in scene.node.policies.items() if d.name == "friends"}
        scene.node.sync()


def test_egress_means_the_pods_behind_a_service_and_the_node_behind_a_node_port(scene: Scene) -> None:
    """A host-network pod is its node, to whoever calls it."""
    listening = subprocess.Popen(
        inside(scene.node.netns, sys.executable, "-m", "http.server", "9090"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: _answers(scene.node, scene.stranger.netns), "somebody listens in the node's network")
        scene.node.apply(ONLY_SERVERS)
        scene.node.sync()
        rows = {
            "the pod": ("friend", SERVER, PORT, True, "shop/friend"),
            "its Service": ("friend", CLUSTER_IP, 80, True, "shop/friend"),
            "its NodePort, which is the node": ("friend", NODE, LOCAL_NODE_PORT, False, NOBODY),
        }  # fmt: skip
        assert judged(scene, rows) == {name: row[3:] for name, row in rows.items()}
        assert not _answers(scene.node, scene.friend.netns)
        assert _answers(scene.node, scene.stranger.netns)
    finally:
        listening.kill()
        listening.wait()
        scene.node.policies = {name: d for name, d in scene.node.policies.items() if d.name == "friends"}
        scene.node.sync()


def _answers(node: NodeHarness, netns: str) -> bool:
    code = f"import socket,sys\ns=socket.create_connection(({NODE!r},9090),0.6)\n"
    return subprocess.run(inside(netns, sys.executable, "-S", "-c", code), stderr=subprocess.DEVNULL).returncode == 0
