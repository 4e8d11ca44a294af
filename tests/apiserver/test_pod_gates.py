"""The readiness gate ``meshbridge.io/compensated`` on a real API server: it says what proofs say, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import REPLICAS, ApiServer, wait_for
from controllers import agent, controller, installation

from meshbridge.bypass.proof import GATE
from meshbridge.xds.nodereport import ConditionStatus, NodeReport, PodCondition

PODS = "/api/v1/namespaces/gates/pods"
POLICY = {
    "apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy", "metadata": {"name": "all", "namespace": "gates"},
    "spec": {"proof": True, "readinessGate": True},
}  # fmt: skip


def pod(name: str, gates: list[str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "gates"},
        "spec": {"nodeName": "node-g", "containers": [{"name": "app", "image": "i"}],
                 "readinessGates": [{"conditionType": gate} for gate in gates]},
        "status": {"phase": "Running", "podIP": "10.9.1.1", "podIPs": [{"ip": "10.9.1.1"}],
                   "conditions": [{"type": "ContainersReady", "status": "True"}]},
    }  # fmt: skip


OBJECTS: list[dict[str, Any]] = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "gates"}},
    {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-g"}},
    pod("gated", [GATE]),
    pod("plain", []),
]


@pytest.fixture(scope="module")
def cluster(api_server: ApiServer) -> Iterator[ApiServer]:
    with installation(api_server, *OBJECTS) as server:
        yield server


def conditions(server: ApiServer, name: str) -> dict[str, dict[str, Any]]:
    code, found = server.call("GET", f"{PODS}/{name}")
    assert code == 200, found
    return {condition["type"]: condition for condition in found["status"].get("conditions", [])}


def said(server: ApiServer, name: str = "gated") -> tuple[str, str]:
    condition = conditions(server, name).get(GATE, {})
    return condition.get("status", ""), condition.get("reason", "")


def writes(server: ApiServer) -> int:
    refs = [event["objectRef"] for event in server.writes() if event["user"]["username"] in REPLICAS]
    return len([ref for ref in refs if ref["resource"] == "pods"])


def test_the_gate_opens_and_closes_with_proofs_and_with_nothing_else(cluster: ApiServer, tmp_path: Path) -> None:
    cluster.create(POLICY)
    uid = cluster.call("GET", f"{PODS}/gated")[1]["metadata"]["uid"]

    def told(status: ConditionStatus, reason: str) -> NodeReport:
        return NodeReport(conditions={uid: (PodCondition("Proved", status, reason, "why"),)})

    async def until(*expected: str) -> None:
        await asyncio.to_thread(wait_for, lambda: said(cluster) == expected, f"the gate says {expected}")

    async def whole(target: str) -> None:
        await until("False", "NotProved")
        async with agent(target, "node-g") as node:
            node.report(told(ConditionStatus.UNKNOWN, "Pending"))
            await asyncio.sleep(2)
            assert said(cluster) == ("False", "NotProved")
            node.report(told(ConditionStatus.TRUE, "Proved"))
            await until("True", "Proved")
            before = writes(cluster)
            node.report(told(ConditionStatus.UNKNOWN, "Pending"))
            await asyncio.sleep(3)
            assert (said(cluster), writes(cluster)) == (("True", "Proved"), before), "programmed anew: it stays"
            node.report(told(ConditionStatus.FALSE, "ProbeContradicts"))
            await until("False", "ProbeContradicts")
            node.report(told(ConditionStatus.TRUE, "Proved"))
            await until("True", "Proved")
        found = conditions(cluster, "gated")
        assert found["ContainersReady"]["status"] == "True", "a kubelet's own stays"
        assert found[GATE]["message"] == "why"
        assert GATE not in conditions(cluster, "plain")

    with controller(cluster, tmp_path / "a") as a:
        asyncio.run(whole(a.target))
        cluster.delete(POLICY)
        wait_for(lambda: said(cluster) == ("True", "NoProofAsked"), "nobody asks any more")
