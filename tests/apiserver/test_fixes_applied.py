"""Fixes applied by the controller on a real API server: applied, owned, kept, and removed with their cause."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import REPLICAS, ApiServer, path_of, wait_for
from controllers import controller, installation
from test_bypass_reports import OBJECTS as REPORTED

NAMESPACE = "fixed"
OBJECTS = REPORTED.replace("reported", NAMESPACE).replace("node-r", "node-f").replace("10.9.2.", "10.9.3.")
POLICY = {
    "apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy",
    "metadata": {"name": "scrape", "namespace": NAMESPACE},
    "spec": {"fix": "apply", "accept": ["telemetry", "encryption", "identity", "l7"], "reason": "scraped in plaintext"},
}  # fmt: skip
RULE: dict[str, Any] = {
    "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
    "metadata": {"name": "meshbridge-ledger", "namespace": NAMESPACE}, "spec": {"host": "other"},
}  # fmt: skip
PATH = f"{path_of(RULE)}/meshbridge-ledger"


@pytest.fixture
def cluster(api_server: ApiServer) -> Iterator[ApiServer]:
    objects = list(yaml.safe_load_all(OBJECTS))
    api_server.install("networking.istio.io/v1", "DestinationRule", namespaced=True)
    with installation(api_server) as server:
        server.create(*objects, POLICY)
        yield server
        server.delete(RULE, POLICY, *reversed(objects))


def rule(server: ApiServer) -> dict[str, Any] | None:
    code, found = server.call("GET", PATH)
    return found if code == 200 else None


def change(server: ApiServer, path: str, by: Callable[[dict[str, Any]], object]) -> None:
    _, found = server.call("GET", path)
    by(found)
    code, answer = server.call("PUT", path, found)
    assert code == 200, answer


def degraded(server: ApiServer) -> dict[str, Any]:
    _, found = server.call("GET", f"{path_of(POLICY)}/scrape")
    listed = {c["type"]: c for c in (found.get("status") or {}).get("conditions", [])}
    told: dict[str, Any] = listed.get("Degraded", {})
    return told


def test_it_is_applied_owned_and_removed_with_its_cause(cluster: ApiServer, tmp_path: Path) -> None:
    with controller(cluster, tmp_path / "a"):
        wait_for(lambda: rule(cluster) is not None, "it is applied", 40)
        made = rule(cluster)
        assert made is not None
        assert made["spec"]["trafficPolicy"]["portLevelSettings"] == [
            {"port": {"number": 9090}, "tls": {"mode": "DISABLE"}}
        ]
        _, policy = cluster.call("GET", f"{path_of(POLICY)}/scrape")
        assert [o["uid"] for o in made["metadata"]["ownerReferences"]] == [policy["metadata"]["uid"]]
        assert [f["manager"] for f in made["metadata"]["managedFields"]] == ["meshbridge-controller"]
        time.sleep(5)
        kept = rule(cluster)
        assert kept is not None
        assert kept["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"], "written once"

        cluster.call("DELETE", PATH)
        wait_for(lambda: rule(cluster) is not None, "it is applied again", 30)
        change(cluster, f"{path_of(POLICY)}/scrape", lambda p: p["spec"].update(fix="advise"))
        wait_for(lambda: rule(cluster) is None, "it goes with the policy's word", 30)
        change(cluster, f"{path_of(POLICY)}/scrape", lambda p: p["spec"].update(fix="apply"))
        wait_for(lambda: rule(cluster) is not None, "it is applied again", 30)
        asks = "traffic.sidecar.istio.io/excludeInboundPorts"
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/ledger"
        change(cluster, path, lambda pod: pod["metadata"]["annotations"].pop(asks))
        wait_for(lambda: rule(cluster) is None, "it goes with the bypass", 30)


def test_an_object_of_somebody_else_is_left_alone_and_told_on_both(cluster: ApiServer, tmp_path: Path) -> None:
    cluster.create(RULE)
    before = rule(cluster)
    with controller(cluster, tmp_path / "a"):
        wait_for(lambda: degraded(cluster).get("reason") == "FixNotApplied", "the policy says so", 40)
        assert "is not the controller's" in degraded(cluster)["message"]
        selector = "involvedObject.name=meshbridge-ledger"
        listed = f"/api/v1/namespaces/{NAMESPACE}/events?fieldSelector={selector}"
        wait_for(lambda: len(cluster.call("GET", listed)[1]["items"]) == 1, "the object says so", 30)
        assert rule(cluster) == before
        cluster.call("DELETE", PATH)
        wait_for(lambda: rule(cluster) is not None, "it is applied when the way is free", 30)
        wait_for(lambda: degraded(cluster)["status"] == "False", "the policy is well", 30)


def test_what_somebody_changed_in_it_is_not_taken_back(cluster: ApiServer, tmp_path: Path) -> None:
    with controller(cluster, tmp_path / "a"):
        wait_for(lambda: rule(cluster) is not None, "it is applied", 40)
        strict = [{"port": {"number": 9090}, "tls": {"mode": "ISTIO_MUTUAL"}}]
        change(cluster, PATH, lambda made: made["spec"]["trafficPolicy"].update(portLevelSettings=strict))
        wait_for(lambda: degraded(cluster).get("reason") == "FixNotApplied", "the policy says so", 30)
        time.sleep(3)
        kept = rule(cluster)
        assert kept is not None
        assert kept["spec"]["trafficPolicy"]["portLevelSettings"] == strict


def test_without_the_role_it_is_a_problem_and_all_else_is_written(cluster: ApiServer, tmp_path: Path) -> None:
    path = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/meshbridge-fixes"
    _, binding = cluster.call("GET", path)
    cluster.call("DELETE", path)
    with controller(cluster, tmp_path / "a", REPLICAS[1]) as a:
        wait_for(lambda: "may not patch destinationrules" in a.get("/problems"), "it is a problem", 40)
        wait_for(lambda: degraded(cluster).get("reason") == "FixNotApplied", "the policy says so", 30)
        assert rule(cluster) is None
        cluster.create({key: binding[key] for key in ("apiVersion", "kind", "roleRef", "subjects")}
                       | {"metadata": {"name": binding["metadata"]["name"]}})  # fmt: skip
        wait_for(lambda: rule(cluster) is not None, "it is applied", 60)
