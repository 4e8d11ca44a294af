"""Two nodes, their agents and the real controller: what one has seen of its pods, the other drops at the source."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from agent_harness import KEY, MESHBRIDGE, NodeHarness, Pod, inside, run
from test_agent_capture import ENVOY_PORT, bypasses, eventually, redirect, with_sidecar

from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.observe.flow import Flow, FlowKind
from meshbridge.policy.model import Direction

pytestmark = pytest.mark.root

ONLY_MONITORING = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: api, namespace: shop}
spec:
  selector: {matchLabels: {app: api}}
  action: ALLOW
  rules: [{from: [{source: {namespaces: [monitoring]}}]}]
"""
CLOSED = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec: {selector: {matchLabels: {app: api}}, action: DENY, rules: [{to: [{operation: {ports: ["8080"]}}]}]}
"""
ENVOY_UID = 1337
LINK4, LINK6 = ("10.99.0.1", "10.99.0.2"), ("fd99::1", "fd99::2")


@dataclass
class RealController:
    """``meshbridge controller`` on a directory of manifests; the harness starts and stops it as its own."""

    directory: Path
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.socket, self.manifests = self.directory / "controller.sock", self.directory / "manifests"
        self.manifests.mkdir()
        key = self.directory / "token.key"
        key.touch(0o600)
        key.write_bytes(KEY)

    def start(self) -> None:
        """Start it; the second node's harness finds it running."""
        if self.process is not None:
            return
        options = ["--manifests", str(self.manifests), "--listen", f"unix:{self.socket}"]
        options += ["--state-dir", str(self.directory / "state"), "--token-key", str(self.directory / "token.key")]
        with (self.directory / "controller.log").open("ab") as log:
            self.process = subprocess.Popen([MESHBRIDGE, "controller", *options], stdout=log, stderr=log)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
            self.process = None

    def put(self, name: str, *documents: Any) -> None:
        scratch = self.manifests / f".{name}"
        scratch.write_text(yaml.safe_dump_all(documents))
        scratch.replace(self.manifests / f"{name}.yaml")


@dataclass
class TwoNodes:
    """``a`` sends, ``b`` takes in; pods are told to the controller by ``tell``."""

    a: NodeHarness
    b: NodeHarness
    controller: RealController

    def tell(self, *pods: Pod) -> None:
        for pod in pods:
            self.controller.put(f"{pod.workload.namespace}-{pod.workload.name}", manifest(pod))
        for node in (self.a, self.b):
            keys = {pod.key for pod in node.pods.values()}
            eventually(lambda node=node, keys=keys: keys <= ready(node), within_s=15)

    def where(self, client: Pod, address: str, port: int, uid: int = 0) -> set[Direction]:
        """At which ends the kernel dropped a connection; none: it came through."""
        since = time.time_ns()
        if self.a.reaches(client.netns, address, port, uid=uid):
            return set()
        time.sleep(0.2)
        found = [flow for node in (self.a, self.b) for flow in drops(node, since, address, port)]
        return {flow.direction for flow in found if flow.direction is not None}


def ready(node: NodeHarness) -> set[str]:
    return {f"{state.namespace}/{state.pod}" for state in node.client.endpoints() if state.state == "ready"}


def drops(node: NodeHarness, since_ns: int, address: str, port: int) -> Iterable[Flow]:
    for flow in node.flows():
        to = (str(flow.destination.address), flow.destination.port)
        if flow.kind is FlowKind.DROP and flow.time_ns >= since_ns and to == (address, port):
            yield flow


def manifest(pod: Pod) -> dict[str, Any]:
    workload = pod.workload
    env = [{"name": name, "value": value} for name, value in workload.init_env.items()]
    init = [{"name": "istio-init", "args": list(workload.init_args or ()), "env": env}]
    metadata = {
        "namespace": workload.namespace, "name": workload.name, "uid": workload.uid,
        "labels": dict(workload.labels), "annotations": dict(workload.annotations),
    }  # fmt: skip
    spec = {
        "nodeName": workload.node, "initContainers": init,
        "containers": [{"name": "app"}, {"name": "istio-proxy", "args": ["proxy", "sidecar"]}],
    }  # fmt: skip
    status = {"phase": "Running", "podIPs": [{"ip": str(address)} for address in workload.addresses]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}


def connect(a: NodeHarness, b: NodeHarness) -> None:
    """A link between the nodes, and each other's pods behind it."""
    run("ip", "-n", a.netns, "link", "add", "mblink", "type", "veth", "peer", "name", "mblink", "netns", b.netns)
    for node, other, own, via in ((a, b, 0, 1), (b, a, 1, 0)):
        run("ip", "-n", node.netns, "addr", "add", f"{LINK4[own]}/24", "dev", "mblink")
        run("ip", "-n", node.netns, "addr", "add", f"{LINK6[own]}/64", "dev", "mblink", "nodad")
        run("ip", "-n", node.netns, "link", "set", "mblink", "up")
        run("ip", "-n", node.netns, "route", "add", f"10.{other.subnet}.0.0/24", "via", LINK4[via])
        run("ip", "-n", node.netns, "-6", "route", "add", f"fd{other.subnet}::/64", "via", LINK6[via])


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    controller = RealController(tmp_path)
    made = []
    try:
        for subnet, name in ((77, "a"), (78, "b")):
            directory = tmp_path / name
            directory.mkdir()
            harness = NodeHarness(directory, name=f"mbexc{os.getpid() % 100000}{name}", subnet=subnet)
            harness.controller = controller  # type: ignore[assignment]  # as much of it as is used here
            made.append(harness)
        for harness in made:
            harness.open()
        a, b = made
        connect(a, b)
        for harness in made:
            harness.start_agent()
        yield TwoNodes(a, b, controller)
    finally:
        for harness in made:
            with suppress(Exception):
                harness.close()
        controller.stop()


def reannotated(node: NodeHarness, pod: Pod, **annotations: str) -> Pod:
    """The pod's redirect rules as if it had been made with these annotations; the specification as it was."""
    given = {a.TRAFFIC + key: value for key, value in annotations.items()}
    run(*inside(pod.netns, "nft", "flush", "ruleset"))
    changed = replace(pod, workload=replace(pod.workload, init_args=a.render_init_args(given, MeshDefaults())))
    redirect(changed)
    return changed


SOURCE, DESTINATION = {Direction.EGRESS}, {Direction.INGRESS}


def test_what_an_excluded_destination_refuses_is_dropped_at_the_source(nodes: TwoNodes) -> None:
    api = with_sidecar(nodes.b, "shop", "api", excludeInboundPorts="9090")
    web = with_sidecar(nodes.a, "shop", "web", excludeOutboundPorts="9090")
    scraper = with_sidecar(nodes.a, "monitoring", "scraper", excludeOutboundPorts="9090")
    for pod in (api, web, scraper):
        redirect(pod)
    for port in (9090, ENVOY_PORT):
        nodes.b.listen(api, port)
    nodes.controller.put("policy", *yaml.safe_load_all(ONLY_MONITORING))
    nodes.tell(api, web, scraper)
    for address in (api.ipv4, api.ipv6):
        eventually(lambda address=address: nodes.where(web, address, 9090) == SOURCE)
        assert nodes.where(scraper, address, 9090) == set(), "by its own name it is let in"
        assert nodes.where(web, address, 8080) == set(), "the destination captures it, so its Envoy judges"

    rows = [r for r in bypasses(nodes.a)["bypasses"] if (r["pod"], r["direction"]) == (web.key, "egress")]
    assert {name for row in rows for name in row["compensation"]["refused"]} == {"shop/api:9090"}

    # The destination's rules take the port back: its Envoy judges it again, and the source lets it go there.
    reannotated(nodes.b, api)
    took = eventually(lambda: nodes.where(web, api.ipv4, 9090) == set())
    print(f"captured again → open at the source: {took:.2f} s, of which up to 2.1 s to the next look at the rules")
    reannotated(nodes.b, api, excludeInboundPorts="9090")
    eventually(lambda: nodes.where(web, api.ipv4, 9090) == SOURCE)

    # A controller that is away, and one that has just come back, change nothing.
    nodes.controller.stop()
    assert nodes.where(web, api.ipv4, 9090) == SOURCE
    nodes.controller.start()
    for node in (nodes.a, nodes.b):
        node.wait(lambda status: status.controller_connected, "the controller again")
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert nodes.where(web, api.ipv4, 9090) in (SOURCE, DESTINATION), "never let in"
    assert nodes.where(web, api.ipv4, 9090) == SOURCE


def test_an_excluded_range_that_no_policy_names_is_compensated(nodes: TwoNodes) -> None:
    api = with_sidecar(nodes.b, "shop", "api")
    near = with_sidecar(nodes.a, "shop", "near", excludeOutboundIPRanges="10.78.0.0/24")
    far = with_sidecar(nodes.a, "shop", "far", excludeOutboundIPRanges="10.42.0.0/16")
    for pod in (api, near, far):
        redirect(pod)
    nodes.b.listen(api, ENVOY_PORT)
    nodes.controller.put("policy", *yaml.safe_load_all(CLOSED))
    nodes.tell(api, near, far)
    eventually(lambda: nodes.where(near, api.ipv4, 8080) == SOURCE)
    eventually(lambda: nodes.where(near, api.ipv4, 9090) == set())
    assert nodes.where(far, api.ipv4, 8080, ENVOY_UID) == DESTINATION, "only its Envoy sends there"
