"""``meshbridge uninstall`` in a real API server with Kubernetes' own controllers; nodes and kubelets are the test's."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from api_server import ADMIN, REPO, ApiServer, definition, path_of, running_api_server, wait_for
from click.testing import CliRunner, Result

from meshbridge.cli import cli

SYSTEM = "meshbridge-system"
NODES = ("node-1", "node-2")
OURS = "labelSelector=app.kubernetes.io%2Fpart-of%3Dmeshbridge"
LISTS = (
    "/api/v1/namespaces", "/api/v1/pods", "/api/v1/secrets", "/api/v1/services", "/apis/apps/v1/daemonsets",
    "/apis/apps/v1/deployments", "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
    "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
    "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
)  # fmt: skip


@dataclass
class Nodes:
    """Nodes that do what they are told: pods bound by their affinity run and are ready at once, but for ``broken``."""

    server: ApiServer
    broken: set[str] = field(default_factory=set)
    cleaned: dict[str, list[str]] = field(default_factory=dict)
    """The arguments of every first container that ran on a node."""
    stop: threading.Event = field(default_factory=threading.Event)

    def loop(self) -> None:
        while not self.stop.wait(0.2):
            with suppress(OSError, AssertionError, KeyError):
                for pod in self.server.call("GET", f"/api/v1/namespaces/{SYSTEM}/pods")[1].get("items", []):
                    self.serve(pod)

    def serve(self, pod: dict[str, Any]) -> None:
        path = f"/api/v1/namespaces/{SYSTEM}/pods/{pod['metadata']['name']}"
        if pod["metadata"].get("deletionTimestamp"):
            self.server.call("DELETE", f"{path}?gracePeriodSeconds=0")
            return
        node = pod["spec"].get("nodeName")
        if not node:
            affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {})
            terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
            names = [v for t in terms for m in t.get("matchFields", []) for v in m["values"]] or [NODES[0]]
            target = {"apiVersion": "v1", "kind": "Node", "name": names[0]}
            metadata = {"name": pod["metadata"]["name"]}
            self.server.call("POST", f"{path}/binding", {
                "apiVersion": "v1", "kind": "Binding", "metadata": metadata, "target": target})  # fmt: skip
        elif node not in self.broken and pod["status"].get("phase") != "Running":
            for first in pod["spec"].get("initContainers", []):
                self.cleaned.setdefault(node, []).extend(first["args"])
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
            self.server.call("PUT", f"{path}/status", {**pod, "status": {"phase": "Running", "conditions": [ready]}})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server of this module's own: Kubernetes' controllers act on everything in it."""
    from api_server import missing

    if reason := missing():
        pytest.skip(reason)
    built = subprocess.check_output([REPO / "scripts/third-party", "--path", "kubernetes"], text=True).strip()
    directory = tmp_path_factory.mktemp("uninstalling")
    with running_api_server(directory, {}) as server:
        command = [
            "nice", f"{built}/bin/kube-controller-manager", "--kubeconfig", server.kubeconfig(ADMIN),
            "--controllers=daemonset-controller,namespace-controller,garbage-collector-controller",
            "--leader-elect=false", "--secure-port=0", "--use-service-account-credentials=false",
        ]  # fmt: skip
        with (directory / "controller-manager.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for name in NODES:
                labels = {"kubernetes.io/os": "linux"}
                server.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
            yield server
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def nodes(server: ApiServer) -> Iterator[Nodes]:
    found = Nodes(server)
    thread = threading.Thread(target=found.loop, daemon=True)
    thread.start()
    yield found
    found.broken.clear()
    run(server, "uninstall", "--yes", "--timeout", "60")
    found.stop.set()
    thread.join(10)


def run(server: ApiServer, *options: str) -> Result:
    return CliRunner().invoke(cli, [*options, "--kubeconfig", str(server.kubeconfig(ADMIN))])


def installed(server: ApiServer, *options: str) -> None:
    result = run(server, "install", *options)
    assert result.exit_code == 0, (result.output, result.exception)

    def agents() -> int:
        status = server.call("GET", f"/apis/apps/v1/namespaces/{SYSTEM}/daemonsets/meshbridge-agent")[1]["status"]
        return int(status.get("numberReady", 0))

    wait_for(lambda: agents() == len(NODES), "agents run on every node")


def left(server: ApiServer) -> list[str]:
    found = [(path, server.call("GET", f"{path}?{OURS}")[1]["items"]) for path in LISTS]
    return [f"{path} {each['metadata']['name']}" for path, items in found for each in items]


def policy(name: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default"}
    return {"apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy", "metadata": metadata, "spec": {}}


def test_every_node_cleans_up_and_nothing_of_it_is_left(server: ApiServer, nodes: Nodes) -> None:
    installed(server)
    before = server.call("GET", "/apis/apps/v1/namespaces/meshbridge-system/daemonsets/meshbridge-agent")[1]
    arguments = before["spec"]["template"]["spec"]["containers"][0]["args"]
    result = run(server, "uninstall", "--yes", "--timeout", "60")
    assert result.exit_code == 0, (result.output, result.exception)
    assert left(server) == []
    assert nodes.cleaned == {node: [*arguments, "--cleanup"] for node in NODES}
    said = result.output.splitlines()
    first_hook = next(n for n, line in enumerate(said) if "WebhookConfiguration" in line)
    cleaned = next(n for n, line in enumerate(said) if "nodes cleaned up: 2 of 2" in line)
    rights = next(n for n, line in enumerate(said) if "ClusterRole" in line)
    assert first_hook < cleaned < rights
    again = run(server, "uninstall", "--yes")
    assert (again.exit_code, "nothing of MeshBridge is installed" in again.output) == (0, True)


def test_a_node_that_does_not_clean_up_is_named_and_a_second_attempt_goes_on(server: ApiServer, nodes: Nodes) -> None:
    installed(server)
    nodes.broken.add("node-2")
    refused = run(server, "uninstall", "--yes", "--timeout", "6")
    assert refused.exit_code == 1
    assert "node node-2" in str(refused.exception)
    assert "--without-nodes" in str(refused.exception)
    assert any("clusterroles" in each for each in left(server)), "the rest waits for the nodes"
    nodes.broken.clear()
    result = run(server, "uninstall", "--yes", "--timeout", "60")
    assert result.exit_code == 0, (result.output, result.exception)
    assert (left(server), set(nodes.cleaned)) == ([], set(NODES))


def test_without_nodes_it_goes_on_and_says_so(server: ApiServer, nodes: Nodes) -> None:
    installed(server)
    nodes.broken.add("node-2")
    result = run(server, "uninstall", "--yes", "--timeout", "6", "--without-nodes")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Warning" in result.output
    assert left(server) == []


def test_users_objects_are_named_and_those_of_other_kinds_stay(server: ApiServer, nodes: Nodes) -> None:
    installed(server, "--with-crds", "cilium.io")
    hook = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/bypass.meshbridge.io"
    server.call("DELETE", hook)  # nobody answers for it here
    server.create(policy("lost"))
    cnp = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "spec": {"endpointSelector": {}},
           "metadata": {"name": "users", "namespace": "default"}}  # fmt: skip
    server.create(cnp)
    dry = run(server, "uninstall", "--dry-run")
    assert "BypassPolicy default/lost" in dry.output
    assert "ciliumnetworkpolicies.cilium.io: stays: 1 objects of users" in dry.output
    assert left(server) != []
    result = run(server, "uninstall", "--yes", "--timeout", "60")
    assert result.exit_code == 0, (result.output, result.exception)
    kept = f"{path_of(cnp)}/users"
    assert server.call("GET", kept)[0] == 200
    assert [each.rpartition(" ")[2] for each in left(server)] == ["ciliumnetworkpolicies.cilium.io"]
    server.call("DELETE", kept)
    server.delete(definition("cilium.io/v2", "CiliumNetworkPolicy", namespaced=True))


def test_definitions_stay_when_asked_with_everybodys_policies(server: ApiServer, nodes: Nodes) -> None:
    installed(server)
    server.call("DELETE", "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/bypass.meshbridge.io")
    server.create(policy("kept"))
    result = run(server, "uninstall", "--yes", "--keep-crds", "--timeout", "60")
    assert result.exit_code == 0, (result.output, result.exception)
    assert server.call("GET", f"{path_of(policy('kept'))}/kept")[0] == 200
    assert {each.split(" ")[0] for each in left(server)} == {"/apis/apiextensions.k8s.io/v1/customresourcedefinitions"}


def test_a_stranger_in_the_namespace_keeps_it(server: ApiServer, nodes: Nodes) -> None:
    installed(server)
    stranger = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "theirs", "namespace": SYSTEM},
                "spec": {"containers": [{"name": "c", "image": "i"}]}}  # fmt: skip
    server.create(stranger)
    result = run(server, "uninstall", "--yes", "--timeout", "60")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "pod theirs in it are not MeshBridge's" in result.output
    assert left(server) == [f"/api/v1/namespaces {SYSTEM}"]
    server.delete(stranger)


def test_nothing_goes_without_a_yes(server: ApiServer, nodes: Nodes) -> None:
    installed(server)
    asked = CliRunner().invoke(cli, ["uninstall", "--kubeconfig", str(server.kubeconfig(ADMIN))], input="n\n")
    assert asked.exit_code == 1
    assert any("daemonsets" in each for each in left(server))
