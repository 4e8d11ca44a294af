"""``bypass fix --apply`` on a real API server: what is applied, what is only tried, and what is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from api_server import ADMIN, READER, ApiServer, path_of
from click.testing import CliRunner, Result

from meshbridge.cli.bypass import command
from meshbridge.kube.api import ClusterError

RULES = "networking.istio.io/v1"
OBJECTS = """
apiVersion: v1
kind: Namespace
metadata: {name: fix-me, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Pod
metadata:
  name: ledger
  namespace: fix-me
  labels: {app: ledger}
  annotations: {traffic.sidecar.istio.io/excludeInboundPorts: "9090", sidecar.istio.io/status: "{}"}
spec:
  initContainers: [{name: istio-validation, image: i}]
  containers:
  - {name: app, image: i, ports: [{containerPort: 9090}, {containerPort: 9091}]}
  - {name: istio-proxy, image: i, args: [proxy, sidecar]}
status: {phase: Running, podIPs: [{ip: 10.1.7.1}], podIP: 10.1.7.1}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: fix-me, annotations: {sidecar.istio.io/status: "{}"}}
spec:
  initContainers: [{name: istio-validation, image: i}]
  containers: [{name: app, image: i}, {name: istio-proxy, image: i, args: [proxy, sidecar]}]
status: {phase: Running, podIPs: [{ip: 10.1.7.2}], podIP: 10.1.7.2}
---
apiVersion: v1
kind: Service
metadata: {name: ledger, namespace: fix-me}
spec: {selector: {app: ledger}, ports: [{name: http, port: 9090}, {name: more, port: 9091}]}
"""
MADE = {
    "apiVersion": RULES,
    "kind": "DestinationRule",
    "metadata": {"name": "meshbridge-ledger", "namespace": "fix-me"},
}
NAME = "DestinationRule fix-me/meshbridge-ledger"


@pytest.fixture
def cluster(api_server: ApiServer) -> Iterator[ApiServer]:
    objects = list(yaml.safe_load_all(OBJECTS))
    api_server.install(RULES, "DestinationRule", namespaced=True)
    api_server.create(*objects)
    yield api_server
    api_server.delete(MADE, *reversed(objects[1:]))


def fix(server: ApiServer, *options: str, token: str = ADMIN) -> Result:
    # -n: other tests' objects are nobody's business here
    return CliRunner().invoke(command, ["fix", "--kubeconfig", str(server.kubeconfig(token)), "-n", "fix-me", *options])


def present(server: ApiServer) -> dict[str, Any] | None:
    code, answer = server.call("GET", f"{path_of(MADE)}/meshbridge-ledger")
    assert code in (200, 404), answer
    return answer if code == 200 else None


def test_it_is_applied_once_and_nothing_is_left_to_fix(cluster: ApiServer) -> None:
    tried = fix(cluster, "--apply", "--dry-run=server")
    assert tried.exit_code == 0, tried.exception
    assert f"# applied (server dry run): {NAME}" in tried.stdout
    assert present(cluster) is None

    done = fix(cluster, "--apply")
    assert done.exit_code == 0, done.exception
    assert f"# applied: {NAME}" in done.stdout
    made = present(cluster)
    assert made is not None
    assert made["spec"] == {
        "host": "ledger.fix-me.svc.cluster.local",
        "trafficPolicy": {"portLevelSettings": [{"port": {"number": 9090}, "tls": {"mode": "DISABLE"}}]},
    }
    assert made["metadata"]["labels"] == {"app.kubernetes.io/managed-by": "meshbridge"}
    (fields,) = made["metadata"]["managedFields"]
    assert (fields["manager"], fields["operation"]) == ("meshbridge", "Apply")

    assert fix(cluster, "--apply").stdout == "# No half bypass breaks anything.\n"


def test_what_is_applied_later_keeps_what_was_applied_before(cluster: ApiServer) -> None:
    assert fix(cluster, "--apply").exit_code == 0
    path = "/api/v1/namespaces/fix-me/pods/ledger"
    _, pod = cluster.call("GET", path)
    pod["metadata"]["annotations"]["traffic.sidecar.istio.io/excludeInboundPorts"] = "9090,9091"
    assert cluster.call("PUT", path, pod)[0] == 200
    assert fix(cluster, "--apply").exit_code == 0
    made = present(cluster)
    assert made is not None
    settings = made["spec"]["trafficPolicy"]["portLevelSettings"]
    assert [item["port"]["number"] for item in settings] == [9090, 9091]
    assert fix(cluster).stdout == "# No half bypass breaks anything.\n"


def test_an_object_of_somebody_else_under_the_name_is_left_alone(cluster: ApiServer) -> None:
    theirs = {**MADE, "spec": {"host": "other"}}
    cluster.create(theirs)
    refused = fix(cluster, "--apply")
    assert isinstance(refused.exception, ClusterError)
    assert "is not MeshBridge's" in str(refused.exception)
    made = present(cluster)
    assert made is not None
    assert made["spec"] == {"host": "other"}


def test_what_somebody_changed_in_it_is_not_taken_back(cluster: ApiServer) -> None:
    assert fix(cluster, "--apply").exit_code == 0
    made = present(cluster)
    assert made is not None
    made["spec"]["trafficPolicy"]["portLevelSettings"][0]["tls"]["mode"] = "ISTIO_MUTUAL"
    assert cluster.call("PUT", f"{path_of(MADE)}/meshbridge-ledger", made)[0] == 200
    refused = fix(cluster, "--apply")
    assert isinstance(refused.exception, ClusterError)
    assert "answers 409" in str(refused.exception)
    assert "somebody changed what MeshBridge had written" in str(refused.exception)
    kept = present(cluster)
    assert kept is not None
    assert kept["spec"] == made["spec"]


def test_who_may_not_write_is_told_and_nothing_is_written(cluster: ApiServer) -> None:
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "fix-reader"},
            "rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["get", "list"]}]}  # fmt: skip
    binding = {"apiVersion": role["apiVersion"], "kind": "ClusterRoleBinding", "metadata": {"name": "fix-reader"},
               "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "fix-reader"},
               "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": READER}]}  # fmt: skip
    cluster.create(role, binding)
    try:
        refused = fix(cluster, "--apply", token=READER)
    finally:
        cluster.delete(binding, role)
    assert isinstance(refused.exception, ClusterError)
    assert "answers 403" in str(refused.exception)
    assert present(cluster) is None


def test_without_the_flag_nothing_is_applied(cluster: ApiServer) -> None:
    assert fix(cluster).exit_code == 0
    assert present(cluster) is None
    for wrong in (["--dry-run=server"], ["--apply", "-f", "-"]):
        assert CliRunner().invoke(command, ["fix", *wrong]).exit_code == 2
