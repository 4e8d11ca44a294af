"""What `kubectl describe` shows of objects that are not ours, on a real API server."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import ADMIN, REPLICAS, ApiServer, path_of, wait_for
from controllers import agent, controller, installation

from meshbridge.xds.nodereport import ConditionStatus, NodeReport, PodCondition

NAMESPACE = "told"
POD = {
    "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": NAMESPACE},
    "spec": {"nodeName": "node-t", "containers": [{"name": "app", "image": "i"}]},
    "status": {"phase": "Running", "podIP": "10.9.1.1", "podIPs": [{"ip": "10.9.1.1"}]},
}  # fmt: skip
OBJECTS: list[dict[str, Any]] = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
    {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-t"}},
    POD,
]
ODD = {"endpointSelector": {}, "egress": [{"toFQDNs": [{"matchName": "example.com"}]}]}


@pytest.fixture(scope="module")
def cluster(api_server: ApiServer) -> Iterator[ApiServer]:
    with installation(api_server, *OBJECTS) as server:
        yield server


def cilium(name: str, spec: dict[str, Any], kind: str = "CiliumNetworkPolicy") -> dict[str, Any]:
    metadata = {"name": name, **({"namespace": NAMESPACE} if kind == "CiliumNetworkPolicy" else {})}
    return {"apiVersion": "cilium.io/v2", "kind": kind, "metadata": metadata, "spec": spec}


def events(server: ApiServer, name: str, namespace: str = NAMESPACE) -> list[dict[str, Any]]:
    """As `kubectl describe` asks for them."""
    selector = f"involvedObject.name={name}"
    _, found = server.call("GET", f"/api/v1/namespaces/{namespace}/events?fieldSelector={selector}")
    listed: list[dict[str, Any]] = found["items"]
    return listed


def event_writes(server: ApiServer, name: str) -> int:
    refs = [event["objectRef"] for event in server.writes() if event["user"]["username"] in REPLICAS]
    return len([ref for ref in refs if ref["resource"] == "events" and ref.get("name", name).startswith(name)])


def test_a_refused_policy_has_one_event_that_is_counted_up(cluster: ApiServer, tmp_path: Path) -> None:
    policy = cilium("odd", ODD)
    fine = {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "fine", "namespace": NAMESPACE}, "spec": {"podSelector": {}},
    }  # fmt: skip
    path = f"/apis/cilium.io/v2/namespaces/{NAMESPACE}/ciliumnetworkpolicies/odd"
    cluster.create(policy)
    with controller(cluster, tmp_path / "a"):
        wait_for(lambda: len(events(cluster, "odd")) == 1, "it has an event", 40)
        (event,) = events(cluster, "odd")
        assert (event["reason"], event["type"], event["count"]) == ("Refused", "Warning", 1)
        assert "spec.egress[0].toFQDNs" in event["message"]
        _, current = cluster.call("GET", path)
        assert event["involvedObject"]["uid"] == current["metadata"]["uid"]
        writes = event_writes(cluster, "odd")
        cluster.create(fine)  # the cluster is looked at again
        time.sleep(11)
        assert event_writes(cluster, "odd") == writes
        current["spec"] = {"endpointSelector": {}, "ingress": [{"fromGroups": [{}]}]}
        assert cluster.call("PUT", path, current)[0] == 200
        wait_for(lambda: events(cluster, "odd")[0]["count"] == 2, "it is counted up", 40)
        (event,) = events(cluster, "odd")
        assert "fromGroups" in event["message"]
        if shutil.which("kubectl"):
            options = ["--kubeconfig", cluster.kubeconfig(ADMIN), "-n", NAMESPACE]
            command = ["kubectl", *options, "describe", "ciliumnetworkpolicies.cilium.io/odd"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert "Refused" in said.partition("Events:")[2]
            assert "fromGroups" in said.partition("Events:")[2]
    with controller(cluster, tmp_path / "b", REPLICAS[1]) as b:  # the next leader: nothing changed
        wait_for(lambda: b.leads, "it leads", 40)
        time.sleep(5)
        assert [e["count"] for e in events(cluster, "odd")] == [2]
    cluster.delete(policy, fine)


def test_a_refused_policy_of_the_whole_cluster_has_its_event_in_the_default_namespace(
    cluster: ApiServer, tmp_path: Path
) -> None:
    policy = cilium("odd-everywhere", ODD, "CiliumClusterwideNetworkPolicy")
    cluster.create(policy)
    with controller(cluster, tmp_path / "a"):
        wait_for(lambda: len(events(cluster, "odd-everywhere", "default")) == 1, "it has an event", 40)
    cluster.delete(policy)


def test_what_a_node_says_of_its_pods_is_said_on_them(cluster: ApiServer, tmp_path: Path) -> None:
    _, pod = cluster.call("GET", f"/api/v1/namespaces/{NAMESPACE}/pods/web")

    async def whole(target: str) -> None:
        async with agent(target, "node-t") as node:
            ghost = PodCondition("Captured", ConditionStatus.FALSE, "GhostBypass", "8080 bypasses Envoy")
            began = time.monotonic()
            node.report(NodeReport(conditions={pod["metadata"]["uid"]: (ghost,)}))
            await asyncio.to_thread(wait_for, lambda: len(events(cluster, "web")) == 1, "the ghost has an event", 10)
            print(f"ghost bypass reported to event: {time.monotonic() - began:.1f} s")
            (event,) = events(cluster, "web")
            assert (event["reason"], event["message"]) == ("GhostBypass", "8080 bypasses Envoy")
            hooks = PodCondition("Enforced", ConditionStatus.FALSE, "NotHooked", "no interface of it was found")
            node.report(NodeReport(conditions={pod["metadata"]["uid"]: (ghost, hooks)}))
            await asyncio.to_thread(wait_for, lambda: len(events(cluster, "web")) == 2, "it is not enforced", 60)

    with controller(cluster, tmp_path / "a") as a:
        wait_for(lambda: a.leads, "it leads", 40)
        asyncio.run(whole(a.target))


def test_a_namespace_that_is_being_deleted_is_no_obstacle_and_has_none(cluster: ApiServer, tmp_path: Path) -> None:
    """Without a namespace controller nothing finalizes it: what counts is that nothing of ours would keep it."""
    ending = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ending"}}
    policy = {**cilium("odd", ODD), "metadata": {"name": "odd", "namespace": "ending"}}
    ours = {
        "apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy",
        "metadata": {"name": "ours", "namespace": "ending"}, "spec": {},
    }  # fmt: skip
    cluster.create(ending, policy, ours)
    cluster.call("DELETE", "/api/v1/namespaces/ending")
    try:
        with controller(cluster, tmp_path / "a") as a:
            late = {**ours, "metadata": {"name": "late", "namespace": NAMESPACE}}
            cluster.create(late)
            path = f"/apis/meshbridge.io/v1alpha1/namespaces/{NAMESPACE}/bypasspolicies/late"
            wait_for(lambda: "status" in cluster.call("GET", path)[1], "others are written", 40)
            time.sleep(3)
            assert "may not create events" not in a.get("/problems"), "it is not permissions that are missing"
            for each in (policy, ours):
                _, found = cluster.call("GET", f"{path_of(each)}/{each['metadata']['name']}")
                assert "finalizers" not in found["metadata"]
            cluster.delete(late)
    finally:
        cluster.delete(policy, ours, ending)
