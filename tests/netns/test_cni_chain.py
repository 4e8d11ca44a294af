"""Pods whose network Debian's own CNI plugins make, with ours at the end of the chain and a real agent behind it.

Judged by packets: a sniffer in the pod's namespace from before it has an interface sees whatever gets in.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_harness import NodeHarness, Pod, inside, run
from cni_runtime import SHIM, CniRefused, Runtime, chain, missing

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

ALLOW_FRIEND = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends, namespace: shop}
spec:
  podSelector: {}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
"""
FIRST, PORT = "10.99.0.10", 8080


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeHarness]:
    if reason := missing():
        if os.environ.get("CI"):
            pytest.fail(f"cannot run in CI: {reason}", pytrace=False)
        pytest.skip(reason)
    harness = NodeHarness(tmp_path, subnet=78).open()
    try:
        yield harness
    finally:
        harness.close()


class Sniffer:
    """Counts the IPv4 packets from an address that come into a namespace, on whatever interface there will be.

    Between the plugin that makes the interface and ours the namespace is on the network, with no process in it: what
    comes then is counted apart, by ``so_far``.
    """

    def __init__(self, netns: str, source: str) -> None:
        code = (
            "import socket,signal,sys\n"
            "s=socket.socket(socket.AF_PACKET,socket.SOCK_DGRAM,socket.htons(0x0800))\n"
            f"a=socket.inet_aton({source!r});n=[0]\n"
            "signal.signal(signal.SIGTERM,lambda *_:(print(n[0],flush=True),sys.exit(0)))\n"
            "def told(*_): print(n[0],flush=True);n[0]=0\n"
            "signal.signal(signal.SIGUSR1,told)\n"
            "print('up',flush=True)\n"
            "while True:\n"
            " p,f=s.recvfrom(65535)\n"
            " n[0]+=p[12:16]==a and f[2]!=socket.PACKET_OUTGOING\n"
        )
        self._process = subprocess.Popen(inside(netns, sys.executable, "-S", "-c", code), stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"up\n"

    def so_far(self) -> int:
        """The count, which begins anew."""
        self._process.send_signal(signal.SIGUSR1)
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def count(self) -> int:
        self._process.terminate()
        out, _ = self._process.communicate(timeout=10)
        return int(out)


class Flood:
    """UDP to an address, five hundred packets a second, before anybody has it and after."""

    def __init__(self, netns: str, address: str) -> None:
        code = (
            "import socket,time\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
            "while True:\n"
            f" try: s.sendto(b'x',({address!r},{PORT}))\n"
            " except OSError: pass\n"
            " time.sleep(0.002)\n"
        )
        self._process = subprocess.Popen(inside(netns, sys.executable, "-S", "-c", code))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def state(node: NodeHarness, pod: Pod) -> tuple[str, str]:
    found = [each for each in node.client.endpoints() if each.uid == pod.workload.uid]
    return (found[0].state, found[0].message) if found else ("none", "")


def runtime(node: NodeHarness, directory: Path, kind: str = "ptp", *, hooked: bool = True, **more: object) -> Runtime:
    return Runtime(node, chain(directory, kind, node.cni_socket, hooked=hooked, **more))


def denied_then_friend(node: NodeHarness, pods: Runtime, told: Callable[[], object]) -> tuple[int, Pod, Pod, Pod]:
    """A stranger floods the address that the next pod will get; its packets in it since ADD returned, and all three."""
    stranger = node.add_pod("shop", "stranger", app="stranger")
    friend = node.add_pod("shop", "friend", app="friend")
    node.apply(ALLOW_FRIEND)
    server = pods.sandbox("shop", "server", app="server")
    told()
    sniffer, flood = Sniffer(server.netns, stranger.ipv4), Flood(stranger.netns, FIRST)
    try:
        time.sleep(0.2)
        server = pods.plug(server)
        sniffer.so_far()
        time.sleep(0.5)
    finally:
        flood.stop()
    return sniffer.count(), server, stranger, friend


def test_the_first_packet_of_a_denied_source_never_passes(node: NodeHarness, tmp_path: Path) -> None:
    """The controller knows of the pod, as its kubelet does, and not yet of its address."""
    node.start_agent()
    pods = runtime(node, tmp_path)
    got, server, stranger, friend = denied_then_friend(node, pods, node.sync)
    assert got == 0
    assert state(node, server) == ("ready", ""), "policy was there when ADD returned"
    assert str(server.workload.addresses[0]) == FIRST
    node.listen(server, PORT)
    assert node.reaches(friend.netns, FIRST, PORT)
    assert not node.reaches(stranger.netns, FIRST, PORT)
    pods.told(server)
    node.sync()
    assert node.reaches(friend.netns, FIRST, PORT)
    assert not node.reaches(stranger.netns, FIRST, PORT)
    assert node.reaches(server.netns, friend.ipv4, 9) is False, "nobody listens there"


def test_without_the_plugin_it_passes(node: NodeHarness, tmp_path: Path) -> None:
    """That the measurement can fail."""
    node.start_agent()
    got, *_ = denied_then_friend(node, runtime(node, tmp_path, hooked=False), node.sync)
    assert got > 20


def test_a_pod_that_the_controller_does_not_know_is_closed(node: NodeHarness, tmp_path: Path) -> None:
    node.start_agent()
    pods = runtime(node, tmp_path)
    node.add_pod("shop", "friend", app="friend")
    node.sync()
    server = pods.sandbox("shop", "server", app="server")
    node.pods.pop(server.key)
    started = time.monotonic()
    server = pods.plug(server)
    assert 4 < time.monotonic() - started < 9, "ADD waits for a while, and no longer"
    assert state(node, server)[0] == "waiting-for-policy"
    friend = node.pods["shop/friend"]
    node.listen(server, PORT)
    assert not node.reaches(friend.netns, FIRST, PORT)
    pods.told(server)
    node.sync()
    assert node.reaches(friend.netns, FIRST, PORT)


def test_a_static_pod_is_enforced_once_its_mirror_is_told(node: NodeHarness, tmp_path: Path) -> None:
    """The kubelet's UID of it is the hash of its manifest; the API server's is another."""
    node.start_agent()
    node.apply(ALLOW_FRIEND)
    friend, stranger = node.add_pod("shop", "friend", app="friend"), node.add_pod("shop", "stranger", app="stranger")
    node.sync()
    pods = runtime(node, tmp_path)
    static = pods.sandbox("shop", "server", app="server")
    node.pods.pop(static.key)
    static = pods.plug(static)
    node.listen(static, PORT)
    assert not node.reaches(friend.netns, FIRST, PORT)
    mirror = {"kubernetes.io/config.mirror": static.workload.uid}
    workload = replace(static.workload, uid="mirror", annotations=mirror, addresses=())
    node.pods[static.key] = replace(static, workload=workload)
    node.sync()
    assert node.reaches(friend.netns, FIRST, PORT)
    assert not node.reaches(stranger.netns, FIRST, PORT)
    pods.unplug(static)
    run("ip", "netns", "del", static.netns)


def test_without_an_agent_no_pod_gets_a_network_but_every_one_can_go(node: NodeHarness, tmp_path: Path) -> None:
    node.start_agent()
    pods = runtime(node, tmp_path)
    before = pods.start_pod("shop", "before")
    node.kill_agent()
    links = run("ip", "-n", node.netns, "-o", "link")
    with pytest.raises(CniRefused) as refused:
        pods.start_pod("shop", "after")
    assert refused.value.plugin == "meshbridge-cni"
    assert refused.value.error["code"] == 11
    assert "agent of this node does not answer" in refused.value.error["msg"]
    assert run("ip", "-n", node.netns, "-o", "link") == links, "the runtime could delete what it had made"
    pods.unplug(before)
    node.start_agent()
    pods.start_pod("shop", "again")


def test_a_chain_that_makes_no_veth_fails(node: NodeHarness, tmp_path: Path) -> None:
    node.start_agent()
    run("ip", "-n", node.netns, "link", "add", "up0", "type", "veth", "peer", "name", "up1")
    run("ip", "-n", node.netns, "link", "set", "up0", "up")
    pods = runtime(node, tmp_path, "macvlan", master="up0", mode="bridge")
    with pytest.raises(CniRefused, match="no veth of this node leads to eth0") as refused:
        pods.start_pod("shop", "server")
    assert refused.value.error["code"] == 100


def test_ours_alone_fails_and_says_where_it_belongs(node: NodeHarness, tmp_path: Path) -> None:
    node.start_agent()
    pods = Runtime(node, chain(tmp_path, "ptp", node.cni_socket)[1:])
    with pytest.raises(CniRefused, match="there is no prevResult"):
        pods.start_pod("shop", "server")


def test_pods_of_one_bridge_are_apart(node: NodeHarness, tmp_path: Path) -> None:
    """All veths are ports of one bridge, with hairpin: frames go from one to the other without a route."""
    node.start_agent()
    node.apply(ALLOW_FRIEND)
    pods = runtime(node, tmp_path, "bridge", bridge="cni0", isGateway=True, hairpinMode=True)
    made = []
    for name in ("server", "friend", "stranger"):
        pod = pods.sandbox("shop", name, app=name)
        node.sync()
        made.append(pods.plug(pod))
        assert state(node, made[-1]) == ("ready", "")
    server, friend, stranger = made
    node.listen(server, PORT)
    address = str(server.workload.addresses[0])
    assert node.reaches(friend.netns, address, PORT)
    assert not node.reaches(stranger.netns, address, PORT)
    assert node.reaches(node.netns, address, PORT), "the node itself, as a kubelet's probe"
    for pod in made:
        pods.told(pod)
    node.sync()
    assert node.reaches(friend.netns, address, PORT)
    assert not node.reaches(stranger.netns, address, PORT)


def test_every_interface_of_a_pod_is_enforced(node: NodeHarness, tmp_path: Path) -> None:
    """A second network with our plugin, and a third without, which is found when it comes up."""
    node.start_agent()
    node.apply(ALLOW_FRIEND)
    stranger = node.add_pod("shop", "stranger", app="stranger")
    pods = runtime(node, tmp_path)
    server = pods.sandbox("shop", "server", app="server")
    node.sync()
    server = pods.told(pods.plug(server))
    second = Runtime(node, chain(tmp_path, "ptp", node.cni_socket, subnet="10.98.0", default_route=False), "second")
    server = pods.told(second.plug(server, "net1"))
    third = Runtime(
        node, chain(tmp_path, "ptp", node.cni_socket, subnet="10.97.0", default_route=False, hooked=False), "third"
    )
    server = pods.told(third.plug(server, "net2"))
    node.sync()
    node.listen(server, PORT)
    assert len(server.workload.addresses) == 3

    def hooked() -> list[tuple[str, str]]:
        return [(e.state, e.message[:13]) for e in node.client.endpoints() if e.uid == server.workload.uid]

    node.wait(lambda _: len(hooked()) == 3, "three interfaces")
    assert sorted(hooked()) == [("ready", ""), ("ready", ""), ("ready", "attached late")]
    for address in server.workload.addresses:
        assert not node.reaches(stranger.netns, str(address), PORT), address


def test_an_interface_that_cannot_be_hooked_is_listed(node: NodeHarness, tmp_path: Path) -> None:
    """A second network by macvlan, without our plugin; interfaces that stay within the pod are nobody's business."""
    node.start_agent()
    run("ip", "-n", node.netns, "link", "add", "up0", "type", "veth", "peer", "name", "up1")
    run("ip", "-n", node.netns, "link", "set", "up0", "up")
    pods = runtime(node, tmp_path)
    server = pods.sandbox("shop", "server", app="server")
    node.sync()
    server = pods.told(pods.plug(server))
    node.sync()
    run("ip", "-n", server.netns, "link", "add", "docker0", "type", "bridge")
    run("ip", "-n", server.netns, "link", "set", "docker0", "up")
    run("ip", "-n", server.netns, "link", "add", "in0", "type", "veth", "peer", "name", "in1")
    run("ip", "-n", server.netns, "link", "set", "in0", "up")
    time.sleep(0.3)
    assert state(node, server) == ("ready", "")
    second = chain(tmp_path, "macvlan", node.cni_socket, subnet="10.98.0", default_route=False, hooked=False,
                   master="up0", mode="bridge")  # fmt: skip
    Runtime(node, second, "second").plug(server, "net1")
    node.wait(lambda _: "nothing is enforced on its net1" in state(node, server)[1], "net1 is told of")
    (endpoint,) = [e for e in node.client.endpoints() if e.uid == server.workload.uid]
    assert [(c.type, c.status, c.reason) for c in endpoint.conditions] == [("Degraded", True, "InterfaceNotHooked")]


def test_an_address_that_another_pod_had_inherits_nothing(node: NodeHarness, tmp_path: Path) -> None:
    """The first pod may reach the server, and is deleted; nobody has told of that when the second gets its address."""
    node.start_agent()
    node.apply(ALLOW_FRIEND)
    server = node.add_pod("shop", "server", app="server")
    node.listen(server, PORT)
    pods = Runtime(node, chain(tmp_path, "ptp", node.cni_socket, last=10))
    first = pods.sandbox("shop", "first", app="friend")
    node.sync()
    first = pods.told(pods.plug(first))
    node.sync()
    assert node.reaches(first.netns, server.ipv4, PORT)
    held = node.stream(first.netns, server.ipv4, PORT)
    pods.unplug(first)
    run("ip", "netns", "del", first.netns)
    second = pods.sandbox("shop", "second", app="stranger")
    sniffer = Sniffer(server.netns, FIRST)
    second = pods.plug(second)  # the controller has told of neither: the first still has the address
    assert second.workload.addresses == first.workload.addresses
    assert not node.reaches(second.netns, server.ipv4, PORT)
    node.sync()  # of the second without an address, and of the first with it
    assert not node.reaches(second.netns, server.ipv4, PORT)
    node.pods.pop(first.key)
    pods.told(second)
    node.sync()
    assert not node.reaches(second.netns, server.ipv4, PORT)
    assert sniffer.count() == 0
    held.finish()


def test_check_and_garbage_collection(node: NodeHarness, tmp_path: Path) -> None:
    node.start_agent()
    pods = runtime(node, tmp_path)
    one, two = pods.sandbox("shop", "one"), pods.sandbox("shop", "two")
    node.sync()
    one, two = pods.plug(one), pods.plug(two)
    pods.check(one)
    pods.collect([one])
    states = {pod.workload.name: [bytes(a) for e in node.client.endpoints() if e.uid == pod.workload.uid
                                  for a in e.addresses] for pod in (one, two)}  # fmt: skip
    assert states == {"one": [one.workload.addresses[0].packed], "two": []}
    node.kill_agent()
    subprocess.run(inside(node.netns, *node.cleanup_command()), check=True, capture_output=True)
    node.start_agent()
    with pytest.raises(CniRefused, match="does not run MeshBridge's programs"):
        pods.check(one)


def test_a_pod_that_was_there_before_is_attached_late_and_says_so(node: NodeHarness, tmp_path: Path) -> None:
    pods = runtime(node, tmp_path, hooked=False)
    server = pods.told(pods.start_pod("shop", "server", app="server"))
    node.apply(ALLOW_FRIEND)
    stranger = node.add_pod("shop", "stranger", announce=False, app="stranger")
    node.listen(server, PORT)
    assert node.reaches(stranger.netns, FIRST, PORT)
    node.start_agent()
    node.sync()
    node.wait(lambda status: "attached late" in " ".join(status.problems), "the status says so")
    (endpoint,) = [e for e in node.client.endpoints() if e.uid == server.workload.uid]
    assert endpoint.state == "ready"
    assert [(c.type, c.status, c.reason) for c in endpoint.conditions] == [("Degraded", True, "AttachedLate")]
    assert not node.reaches(stranger.netns, FIRST, PORT)


def test_the_agent_joins_the_nodes_chain_and_leaves_it_at_the_end(node: NodeHarness, tmp_path: Path) -> None:
    """As a runtime has it: the first file of the directory, and programs where it looks for them."""
    (tmp_path / "net.d").mkdir()
    (tmp_path / "bin").mkdir()
    path = tmp_path / "net.d/10-pods.conflist"
    given = {"cniVersion": "1.0.0", "name": "pods", "plugins": chain(tmp_path, "ptp", node.cni_socket, hooked=False)}
    path.write_text(json.dumps(given))
    node.options = ("--cni-conf-dir", f"{tmp_path}/net.d", "--cni-bin-dir", f"{tmp_path}/bin",
                    "--cni-plugin", str(SHIM))  # fmt: skip

    def plugins() -> list[dict[str, Any]]:
        return json.loads(path.read_text())["plugins"]  # type: ignore[no-any-return]

    node.start_agent()
    node.wait(lambda status: not status.problems and len(plugins()) == 2, "our plugin is the last")
    path.write_text(json.dumps(given))
    node.wait(lambda _: len(plugins()) == 2, "and again, after somebody wrote the file anew")
    node.apply(ALLOW_FRIEND)
    stranger = node.add_pod("shop", "stranger", app="stranger")
    pods = Runtime(node, plugins(), shim=tmp_path / "bin/meshbridge-cni")
    server = pods.sandbox("shop", "server", app="server")
    node.sync()
    server = pods.plug(server)
    assert state(node, server) == ("ready", "")
    node.listen(server, PORT)
    assert not node.reaches(stranger.netns, FIRST, PORT)
    node.kill_agent(signal.SIGTERM)
    assert len(plugins()) == 2, "an agent that is replaced leaves no pod unguarded"
    said = run(*inside(node.netns, *node.cleanup_command()))
    assert "taken out of 1 CNI configurations" in said
    assert json.loads(path.read_text()) == given
    assert list((tmp_path / "bin").iterdir()) == []
    assert node.reaches(stranger.netns, FIRST, PORT)
