"""What `kubectl get bypasspolicy -o yaml` says: conditions that follow what nodes report, on a real API server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import REPLICAS, ApiServer, wait_for
from controllers import agent, controller, installation

from meshbridge.xds.nodereport import ConditionStatus, NodeReport, PodCondition

GROUP = "/apis/meshbridge.io/v1alpha1"
PATH = f"{GROUP}/namespaces/status/bypasspolicies"
POD = {
    "apiVersion": "v1", "kind": "Pod",
    "metadata": {"name": "web", "namespace": "status", "labels": {"app": "web"},
                 "annotations": {"traffic.sidecar.istio.io/excludeInboundPorts": "9090"}},
    "spec": {"nodeName": "node-s", "containers": [{"name": n, "image": "i"} for n in ("app", "istio-proxy")]},
    "status": {"phase": "Running", "podIP": "10.9.0.1", "podIPs": [{"ip": "10.9.0.1"}]},
}  # fmt: skip
OBJECTS: list[dict[str, Any]] = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "status"}},
    {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-s"}},
    POD,
]


@pytest.fixture(scope="module")
def cluster(api_server: ApiServer) -> Iterator[ApiServer]:
    with installation(api_server, *OBJECTS) as server:
        yield server


def policy(name: str, spec: dict[str, Any], kind: str = "BypassPolicy") -> dict[str, Any]:
    metadata = {"name": name, **({"namespace": "status"} if kind == "BypassPolicy" else {})}
    return {"apiVersion": "meshbridge.io/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


def said(server: ApiServer, path: str) -> dict[str, tuple[str, str]]:
    code, found = server.call("GET", path)
    assert code == 200, found
    listed = (found.get("status") or {}).get("conditions", [])
    return {c["type"]: (c["status"], c["reason"]) for c in listed}


def says(server: ApiServer, path: str, **expected: tuple[str, str]) -> Callable[[], bool]:
    return lambda: expected.items() <= said(server, path).items()


def status_writes(server: ApiServer, name: str) -> int:
    refs = [event["objectRef"] for event in server.writes() if event["user"]["username"] in REPLICAS]
    return len([ref for ref in refs if ref.get("subresource") == "status" and ref["name"] == name])


async def until(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_for, condition, what)


def test_conditions_follow_what_nodes_report(cluster: ApiServer, tmp_path: Path) -> None:
    scrape = policy("scrape", {"selector": {"matchLabels": {"app": "web"}}, "proof": True})
    path = f"{PATH}/scrape"
    cluster.create(scrape)

    async def whole(target: str) -> None:
        await until(says(cluster, path, Programmed=("False", "Pending")), "nobody has said that it holds it")
        _, found = cluster.call("GET", path)
        uid, pod_uid = found["metadata"]["uid"], cluster.call("GET", "/api/v1/namespaces/status/pods/web")[1]
        pod_uid = pod_uid["metadata"]["uid"]

        def told(generation: int, *conditions: PodCondition) -> NodeReport:
            return NodeReport(programmed={uid: generation}, conditions={pod_uid: conditions} if conditions else {})

        async with agent(target, "node-s") as node:
            node.report(told(1))
            pending = {"Programmed": ("True", "Programmed"), "Enforced": ("Unknown", "ProofPending")}
            await until(says(cluster, path, **pending), "it is held, and nothing is proved")
            node.report(told(1, PodCondition("Proved", ConditionStatus.TRUE, "Proved")))
            await until(says(cluster, path, Enforced=("True", "Proved")), "it is proved")
            before = cluster.call("GET", path)[1]
            ghost = PodCondition("Captured", ConditionStatus.FALSE, "GhostBypass", "8080 bypasses Envoy")
            node.report(told(1, PodCondition("Proved", ConditionStatus.TRUE, "Proved"), ghost))
            await until(says(cluster, path, Degraded=("True", "GhostBypass")), "the ghost is seen")
            after = cluster.call("GET", path)[1]
            since = [
                {c["type"]: c["lastTransitionTime"] for c in found["status"]["conditions"]} for found in (before, after)
            ]
            assert {k: v for k, v in since[0].items() if k != "Degraded"}.items() <= since[1].items()
            # written anew: what nodes hold is the generation before
            after["spec"]["otherwise"] = "deny"
            assert cluster.call("PUT", path, after)[0] == 200
            await until(says(cluster, path, Programmed=("False", "Pending")), "the new generation is not held yet")
            _, found = cluster.call("GET", path)
            assert {c["observedGeneration"] for c in found["status"]["conditions"]} == {2}
            node.report(told(2, PodCondition("Proved", ConditionStatus.TRUE, "Proved")))
            quiet = {"Enforced": ("True", "Proved"), "Degraded": ("False", "AsExpected")}
            await until(says(cluster, path, **quiet), "all is well")
            writes = status_writes(cluster, "scrape")
            await asyncio.sleep(6)
            assert status_writes(cluster, "scrape") == writes, "a status that says the same is not written again"

    with controller(cluster, tmp_path / "a") as a:
        asyncio.run(whole(a.target))
    cluster.delete(scrape)


def test_a_refused_policy_says_why_and_where(cluster: ApiServer, tmp_path: Path) -> None:
    refused = policy("refused", {"routes": [{"direction": "inbound", "ports": ["90-80"]}]}, "ClusterBypassPolicy")
    with controller(cluster, tmp_path / "a"):
        cluster.create(refused)
        path = f"{GROUP}/clusterbypasspolicies/refused"
        expected = {"Accepted": ("False", "Refused"), "Degraded": ("True", "Refused")}
        wait_for(says(cluster, path, **expected), "it is refused")
        _, found = cluster.call("GET", path)
        (message,) = [c["message"] for c in found["status"]["conditions"] if c["type"] == "Accepted"]
        assert message.startswith(
            "ClusterBypassPolicy refused spec.routes[0].ports[0]: '90-80' is no port and no range"
        )
    cluster.delete(refused)


def test_a_status_that_somebody_else_changed_is_put_right_and_theirs_beside_it_stays(
    cluster: ApiServer, tmp_path: Path
) -> None:
    one = policy("one", {"selector": {"matchLabels": {"app": "nobody"}}})
    cluster.create(one)
    path = f"{PATH}/one"
    with controller(cluster, tmp_path / "a"):
        wait_for(says(cluster, path, Programmed=("True", "NoPods")), "it has a status")
        _, found = cluster.call("GET", path)
        theirs = {
            "type": "Reviewed",
            "status": "True",
            "reason": "Yes",
            "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
        found["status"]["conditions"] = [theirs, {**found["status"]["conditions"][0], "status": "False"}]
        assert cluster.call("PUT", f"{path}/status", found)[0] == 200
        expected = {"Accepted": ("True", "Understood"), "Programmed": ("True", "NoPods"), "Reviewed": ("True", "Yes")}
        wait_for(says(cluster, path, **expected), "it is as before")
    cluster.delete(one)


def test_what_may_not_be_written_is_a_problem_and_policy_goes_on(cluster: ApiServer, tmp_path: Path) -> None:
    path = "/apis/rbac.authorization.k8s.io/v1/clusterroles/meshbridge-controller"
    _, role = cluster.call("GET", path)
    rules = [rule for rule in role["rules"] if "patch" not in rule["verbs"]]
    assert cluster.call("PUT", path, {**role, "rules": rules})[0] == 200
    one = policy("unwritten", {})
    cluster.create(one)
    with controller(cluster, tmp_path / "a") as a:
        wait_for(lambda: "may not patch bypasspolicies/status" in a.get("/problems"), "it is a problem")
        assert a.serves
        _, now = cluster.call("GET", path)
        assert cluster.call("PUT", path, {**now, "rules": role["rules"]})[0] == 200
        wait_for(lambda: "Accepted" in said(cluster, f"{PATH}/unwritten"), "what is permitted is written", 60)
        wait_for(lambda: "may not patch" not in a.get("/problems"), "the problem is gone", 60)
    cluster.delete(one)
