"""`kubectl get bypassreports` on a real API server: what is there, when it is written, and when it goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import REPLICAS, ApiServer, wait_for
from controllers import controller, installation

OBJECTS = """
apiVersion: v1
kind: Namespace
metadata: {name: reported, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Node
metadata: {name: node-r}
---
apiVersion: v1
kind: Pod
metadata:
  name: ledger
  namespace: reported
  labels: {app: ledger}
  annotations: {traffic.sidecar.istio.io/excludeInboundPorts: "9090", sidecar.istio.io/status: "{}"}
spec:
  nodeName: node-r
  initContainers: [{name: istio-validation, image: i}]
  containers:
  - {name: app, image: i, ports: [{containerPort: 9090}]}
  - {name: istio-proxy, image: i, args: [proxy, sidecar]}
status: {phase: Running, podIPs: [{ip: 10.9.2.1}], podIP: 10.9.2.1}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: reported, annotations: {sidecar.istio.io/status: "{}"}}
spec:
  nodeName: node-r
  initContainers: [{name: istio-validation, image: i}]
  containers: [{name: app, image: i}, {name: istio-proxy, image: i, args: [proxy, sidecar]}]
status: {phase: Running, podIPs: [{ip: 10.9.2.2}], podIP: 10.9.2.2}
---
apiVersion: v1
kind: Service
metadata: {name: ledger, namespace: reported}
spec: {selector: {app: ledger}, ports: [{name: http, port: 9090}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: reported}
spec: {mtls: {mode: STRICT}}
"""
PODS = "/api/v1/namespaces/reported/pods"
REPORTS = "/apis/meshbridge.io/v1alpha1/namespaces/reported/bypassreports"


@pytest.fixture
def cluster(api_server: ApiServer) -> Iterator[ApiServer]:
    objects = list(yaml.safe_load_all(OBJECTS))
    with installation(api_server) as server:
        server.create(*objects)
        yield server
        server.delete(*reversed(objects))


def report(server: ApiServer) -> dict[str, Any] | None:
    code, found = server.call("GET", f"{REPORTS}/ledger")
    return found if code == 200 else None


def report_writes(server: ApiServer) -> int:
    ours = [event["objectRef"]["resource"] for event in server.writes() if event["user"]["username"] in REPLICAS]
    return ours.count("bypassreports")


def test_a_report_comes_with_the_bypass_changes_with_it_and_goes_with_it(cluster: ApiServer, tmp_path: Path) -> None:
    with controller(cluster, tmp_path / "a") as a:
        wait_for(lambda: report(cluster) is not None, "there is a report", 40)
        found = report(cluster)
        assert found is not None
        _, pod = cluster.call("GET", f"{PODS}/ledger")
        assert [owner["uid"] for owner in found["metadata"]["ownerReferences"]] == [pod["metadata"]["uid"]]
        status = found["status"]
        assert (status["ports"], status["enforcement"], status["accepted"]) == ("9090", "Kernel", False)
        assert "encryption" in status["lost"]
        assert status["bypasses"][0]["compensation"]["allowed"] == ["reported/client"]
        (half,) = status["halfBypasses"]
        assert (half["role"], half["via"], half["delivery"]) == ("server", "Service reported/ledger:9090", "broken")

        writes = report_writes(cluster)
        _, client = cluster.call("GET", f"{PODS}/client")
        client["metadata"]["labels"] = {"looked": "again"}  # the cluster is looked at again
        assert cluster.call("PUT", f"{PODS}/client", client)[0] == 200
        time.sleep(5)
        assert report_writes(cluster) == writes

        pod["metadata"]["annotations"]["traffic.sidecar.istio.io/excludeInboundPorts"] = "9090,9091"
        assert cluster.call("PUT", f"{PODS}/ledger", pod)[0] == 200
        wait_for(lambda: (report(cluster) or {})["status"]["ports"] == "9090-9091", "it is said", 30)
        _, pod = cluster.call("GET", f"{PODS}/ledger")
        del pod["metadata"]["annotations"]["traffic.sidecar.istio.io/excludeInboundPorts"]
        assert cluster.call("PUT", f"{PODS}/ledger", pod)[0] == 200
        wait_for(lambda: report(cluster) is None, "the report is gone", 30)
        assert a.get("/problems").count("unwritable") == 0


def test_the_table_has_what_an_operator_asks_for(cluster: ApiServer, tmp_path: Path) -> None:
    with controller(cluster, tmp_path / "a"):
        wait_for(lambda: report(cluster) is not None, "there is a report", 40)
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/bypassreports.meshbridge.io"
    _, definition = cluster.call("GET", path)
    shown = [column["name"] for column in definition["spec"]["versions"][0]["additionalPrinterColumns"]]
    assert shown == ["Ports", "Lost", "Accepted", "Enforcement", "Weakened", "Node", "Age"]
    conditions = {c["type"]: c["status"] for c in definition["status"]["conditions"]}
    assert conditions["Established"] == "True"
    assert "NonStructuralSchema" not in conditions


def test_nothing_is_lost_while_the_next_leader_takes_over(cluster: ApiServer, tmp_path: Path) -> None:
    with controller(cluster, tmp_path / "a"):
        wait_for(lambda: report(cluster) is not None, "there is a report", 40)
    before = report(cluster)
    _, pod = cluster.call("GET", f"{PODS}/ledger")
    pod["metadata"]["annotations"]["traffic.sidecar.istio.io/excludeInboundPorts"] = "9090,7070"
    assert cluster.call("PUT", f"{PODS}/ledger", pod)[0] == 200  # while nobody leads
    with controller(cluster, tmp_path / "b", REPLICAS[1]):
        wait_for(lambda: (report(cluster) or {})["status"]["ports"] == "7070,9090", "it is made up for", 40)
    after = report(cluster)
    assert before is not None
    assert after is not None
    assert before["metadata"]["uid"] == after["metadata"]["uid"]
