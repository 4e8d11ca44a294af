"""Clusters as they should not be: the controller says what is wrong and where, loosens nothing, and goes on."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from api_server import ADMIN, NOBODY, REPLICAS, ApiServer, running_api_server, wait_for
from controllers import KEY, controller, installation, roles

from meshbridge.protos.agent_pb2 import Policy
from meshbridge.xds import types as xds
from meshbridge.xds.auth import mint_token, node_caller
from meshbridge.xds.client import ControllerClient, Update

NAMESPACE, NODE = "odd", "node-odd"
QUIET_S = 8
MANY = 5_000


def on_node(name: str, labels: dict[str, str], address: str, **container: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
        "spec": {"nodeName": NODE, "containers": [{"name": "app", "image": "i", **container}]},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    }  # fmt: skip


OBJECTS: list[dict[str, Any]] = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
    {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}},
    on_node("web", {"app": "web"}, "10.9.7.1"),
]


@pytest.fixture(scope="module")
def cluster(api_server: ApiServer) -> Iterator[ApiServer]:
    with installation(api_server, *OBJECTS) as server:
        yield server


def policy(name: str, spec: dict[str, Any], version: str = "networking.k8s.io/v1", kind: str = "NetworkPolicy") -> Any:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}


class Node:
    """What one node has been told, by the client that agents use."""

    def __init__(self, target: str, token_of: str = NODE) -> None:
        caller = node_caller(token_of)
        self.client = ControllerClient(target, NODE, lambda: mint_token(KEY, caller, now=datetime.now(UTC)))
        self.policies: dict[str, Policy] = {}
        self.endpoints: set[str] = set()

    def take(self, update: Update) -> None:
        for name, message in update.changed[xds.POLICY].items():
            assert isinstance(message, Policy)
            self.policies[name] = message
        for name in update.removed[xds.POLICY]:
            self.policies.pop(name, None)
        self.endpoints |= set(update.changed[xds.ENDPOINT])

    async def until(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        async with asyncio.timeout(timeout_s):
            async for update in self.client.updates():
                self.take(update)
                if condition():
                    return

    async def hears_nothing(self) -> None:
        with pytest.raises(TimeoutError):
            await self.until(lambda: True, QUIET_S)


def test_without_any_permission_it_tells_nobody_anything_and_says_what_it_may_not(
    cluster: ApiServer, tmp_path: Path
) -> None:
    with controller(cluster, tmp_path / "c", NOBODY, can_serve=False) as process:
        for kind in ("networkpolicies.networking.k8s.io", "pods", "authorizationpolicies.security.istio.io"):
            said = f"{kind}: may not be listed"
            wait_for(lambda said=said: any(text.startswith(said) for text in process.problems), said, 60)
        assert all("give the controller's role the verbs" in text for text in process.problems), process.problems
        asyncio.run(Node(process.target).hears_nothing())
        assert json.loads(process.get("/healthz")) == {"synced": False}
        asked = process.log.count("kind.unreadable")
        assert asked <= len(process.problems) + 5, "each is logged once, not at every attempt"
        bindings = [each for each in roles((NOBODY,)) if each["kind"].endswith("Binding")]
        for each in bindings:
            each["metadata"] = {**each["metadata"], "name": f"{each['metadata']['name']}-late"}
        cluster.create(*bindings)
        try:
            wait_for(lambda: process.serves, "it serves once it may, without a restart", 60)
            node = Node(process.target)
            asyncio.run(node.until(lambda: bool(node.endpoints)))
        finally:
            cluster.delete(*bindings)


def test_credentials_that_nobody_knows_are_a_problem_and_no_crash_loop(cluster: ApiServer, tmp_path: Path) -> None:
    with controller(cluster, tmp_path / "c", "stranger", can_serve=False) as process:
        wait_for(lambda: any("does not accept the credentials" in text for text in process.problems), "it is said")
        asyncio.run(Node(process.target).hears_nothing())
        assert process.process.poll() is None
        assert "Traceback" not in process.log


def test_an_agent_with_the_token_of_another_node_gets_nothing_and_both_sides_say_why(
    cluster: ApiServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with controller(cluster, tmp_path / "c") as process:
        asyncio.run(Node(process.target, "another").hears_nothing())
        said = "node.id 'node-odd' is not the token's; use 'another'"
        assert said in process.log
        assert said in capfd.readouterr().out
        assert 'meshbridge_xds_refused_calls_total{reason="permission_denied"}' in process.get("/metrics")


def test_five_thousand_policies_at_once(cluster: ApiServer, tmp_path: Path) -> None:
    """All of them reach the node, none is refused, and taking them away again leaves none."""
    spec = {"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": [{"podSelector": {}}]}]}
    policies = [policy(f"p{number}", spec) for number in range(MANY)]
    with controller(cluster, tmp_path / "c") as process, ThreadPoolExecutor(8) as threads:
        list(threads.map(cluster.create, policies))
        node = Node(process.target)
        asyncio.run(node.until(lambda: len(node.policies) == MANY))
        assert not process.problems
        path = f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies"
        assert cluster.call("DELETE", path)[0] == 200
        after = Node(process.target)
        wait_for(lambda: "meshbridge_controller_objects" in process.get("/metrics"), "it still answers")
        asyncio.run(after.until(lambda: bool(after.endpoints) and not after.policies))


def test_a_pod_with_200_ports(cluster: ApiServer, tmp_path: Path) -> None:
    ports = [{"name": f"p{number}", "containerPort": 10_000 + number} for number in range(200)]
    pod = on_node("ports", {"app": "ports"}, "10.9.7.2", ports=ports)
    pod["metadata"]["annotations"] = {
        "traffic.sidecar.istio.io/excludeInboundPorts": ",".join(str(port["containerPort"]) for port in ports)
    }
    with controller(cluster, tmp_path / "c") as process:
        cluster.create(pod)
        try:
            node = Node(process.target)
            asyncio.run(node.until(lambda: len(node.endpoints) == 2))
            assert not process.problems
        finally:
            cluster.delete(pod)


def test_an_object_as_big_as_etcd_takes_travels_whole_and_a_bigger_one_does_not_exist(
    cluster: ApiServer, tmp_path: Path
) -> None:
    def with_blocks(name: str, count: int) -> Any:
        blocks = [f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}/32" for n in range(count)]
        rule = {"from": [{"source": {"ipBlocks": blocks}}]}
        spec = {"selector": {"matchLabels": {"app": "web"}}, "action": "ALLOW", "rules": [rule]}
        return policy(name, spec, "security.istio.io/v1", "AuthorizationPolicy")

    big = with_blocks("big", 80_000)
    size = len(json.dumps(big))
    assert size > 1_300_000
    code, _ = cluster.call("POST", path := f"/apis/security.istio.io/v1/namespaces/{NAMESPACE}/authorizationpolicies",
                           with_blocks("bigger", 200_000))  # fmt: skip
    assert code in (413, 500), "the API server refuses what etcd does not take"
    with controller(cluster, tmp_path / "c") as process:
        assert cluster.call("POST", path, big)[0] == 201
        try:
            node = Node(process.target)
            asyncio.run(node.until(lambda: bool(node.policies)))
            (found,) = node.policies.values()
            assert json.loads(found.json)["spec"] == big["spec"]
        finally:
            cluster.delete(big)


def test_a_definition_of_an_unknown_version_refuses_its_objects_and_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    kinds = {"cilium.io/v99": {"CiliumNetworkPolicy": True}, "security.istio.io/v99": {"AuthorizationPolicy": True}}
    spec = {"endpointSelector": {}, "ingress": [{"fromEndpoints": [{"matchLabels": {"app": "x"}}]}]}
    with running_api_server(tmp_path / "server", kinds) as server, installation(server):
        server.create(*OBJECTS, policy("later", spec, "cilium.io/v99", "CiliumNetworkPolicy"))
        with controller(server, tmp_path / "c") as process:
            node = Node(process.target)
            asyncio.run(node.until(lambda: bool(node.policies) and bool(node.endpoints)))
            assert {found.api_version for found in node.policies.values()} == {"cilium.io/v99"}
            said = "cilium.io/v99 is not known to this version: read as v2"
            wait_for(lambda: any(said in text for text in process.problems), f"it is said: {process.problems}")
            newer = {**spec, "ingressBeyond": []}
            server.create(policy("newer", newer, "cilium.io/v99", "CiliumNetworkPolicy"))
            wait_for(
                lambda: any("ingressBeyond" in text for text in process.problems), "what is new is refused by name"
            )
            after = Node(process.target)
            asyncio.run(after.until(lambda: len(after.policies) == 2))


def api_calls(server: ApiServer) -> dict[str, int]:
    """How many requests the server has answered so far, by verb and resource; what we ask of it here included."""
    context = ssl.create_default_context(cafile=str(server.directory / "certs/apiserver.crt"))
    request = urllib.request.Request(f"{server.url}/metrics", headers={"Authorization": f"Bearer {ADMIN}"})
    found: dict[str, int] = {}
    with urllib.request.urlopen(request, timeout=30, context=context) as response:
        for line in response.read().decode().splitlines():
            if line.startswith("apiserver_request_total{"):
                labels = dict(part.split("=", 1) for part in line[line.index("{") + 1 : line.index("}")].split(","))
                key = f"{labels['verb']} {labels['resource']}".replace('"', "")
                found[key] = found.get(key, 0) + int(float(line.rsplit(" ", 1)[1]))
    return found


def test_a_change_of_a_pod_costs_the_api_server_no_call_of_a_controller(cluster: ApiServer, tmp_path: Path) -> None:
    """Two replicas follow by watches; what they ask for beside is the leader's lease."""
    changes = 30
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/web"
    with controller(cluster, tmp_path / "a", REPLICAS[0]) as a, controller(cluster, tmp_path / "b", REPLICAS[1]) as b:
        for process in (a, b):
            node = Node(process.target)
            asyncio.run(node.until(lambda node=node: bool(node.endpoints)))
        time.sleep(3)  # what there was to write is written
        before = api_calls(cluster)
        for number in range(changes):
            _, pod = cluster.call("GET", path)
            pod["metadata"]["labels"] = {"app": "web", "round": str(number)}
            assert cluster.call("PUT", path, pod)[0] == 200
        time.sleep(3)
        after = api_calls(cluster)
    calls = {key: n - before.get(key, 0) for key, n in after.items() if n != before.get(key, 0)}
    print(f"API calls of {changes} changes: {calls}")
    mine = {"GET pods": changes, "PUT pods": changes}
    others = {key: n for key, n in calls.items() if key not in mine and "leases" not in key and not key.endswith(" ")}
    assert {key: calls[key] for key in mine} == mine
    assert sum(others.values()) < changes / 3, others
