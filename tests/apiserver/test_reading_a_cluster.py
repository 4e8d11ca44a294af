"""Verbs without ``-f`` against a real API server: they say what the same objects say as manifests, or why not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ADMIN, NOBODY, READER, ApiServer
from click.testing import CliRunner, Result

from meshbridge.cli.evaluate import command as evaluate
from meshbridge.cli.explain import command as explain
from meshbridge.kube import api
from meshbridge.kube.api import ClusterError
from meshbridge.kube.cluster import read_cluster

OBJECTS = """
apiVersion: v1
kind: Namespace
metadata: {name: istio-system}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: v1
kind: Namespace
metadata: {name: pay}
---
apiVersion: v1
kind: Node
metadata: {name: one}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  nodeName: one
  initContainers: [{name: istio-init, image: i, args: [istio-iptables, -p, "15001", -z, "15006", -u, "1337", -m,
    REDIRECT, -i, "*", -x, "", -b, "*", -d, "15090,15021,15020"]}]
  containers: [{name: app, image: i}, {name: istio-proxy, image: i, args: [proxy, sidecar]}]
status: {phase: Running, podIPs: [{ip: 10.1.0.1}], podIP: 10.1.0.1}
---
apiVersion: v1
kind: Pod
metadata:
  name: api
  namespace: pay
  labels: {app: api}
  annotations: {traffic.sidecar.istio.io/excludeInboundPorts: "9090", sidecar.istio.io/status: "{}"}
spec:
  nodeName: one
  initContainers: [{name: istio-init, image: i, args: [istio-iptables, -p, "15001", -z, "15006", -u, "1337", -m,
    REDIRECT, -i, "*", -x, "", -b, "*", -d, "15090,15021,15020,9090"]}]
  containers:
  - {name: app, image: i, ports: [{name: http, containerPort: 8080}]}
  - {name: istio-proxy, image: i, args: [proxy, sidecar]}
status: {phase: Running, podIPs: [{ip: 10.1.0.2}], podIP: 10.1.0.2}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: pay}
spec: {clusterIP: 10.96.0.10, selector: {app: api}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Secret
metadata: {name: hidden, namespace: pay}
stringData: {password: never-read}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: "trustDomain: corp"}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: other, namespace: pay}
data: {password: never-read}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: api, namespace: pay}
spec:
  podSelector: {matchLabels: {app: api}}
  ingress:
  - from: [{namespaceSelector: {matchLabels: {team: a}}}]
    ports: [{port: 8080}, {port: 9090}]
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: no-9999}
spec: {endpointSelector: {}, enableDefaultDeny: {egress: false}, egressDeny: [{toPorts: [{ports: [{port: "9999"}]}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: readers, namespace: pay}
spec:
  rules:
  - from: [{source: {principals: [corp/ns/shop/sa/default]}}]
    to: [{operation: {methods: [GET]}}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
"""
OWN = "spiffe://corp/ns/shop/sa/default"
FLOWS: list[dict[str, Any]] = [
    {"src": "shop/web", "dst": "pay/api", "port": 8080, "peer_principal": principal, "http": {"method": method}}
    for principal in (OWN, None, "spiffe://cluster.local/ns/shop/sa/default")
    for method in ("GET", "PUT")
] + [
    {"src": "shop/web", "dst": "10.96.0.10", "port": 80},
    {"src": "shop/web", "dst": "pay/api", "port": 9090},
    {"src": "shop/web", "dst": "8.8.8.8", "port": 9999},
    {"src": "192.168.0.1", "dst": "pay/api", "port": 8080},
    {"src": "entity:world", "dst": "pay/api", "port": 8080},
]


@pytest.fixture(scope="module")
def shop(api_server: ApiServer) -> Iterator[ApiServer]:
    """The API server with the objects above in it."""
    objects = list(yaml.safe_load_all(OBJECTS))
    api_server.create(*objects)
    yield api_server
    api_server.delete(*reversed(objects))


def run(server: ApiServer, token: str, *options: str) -> Result:
    flows = "\n".join(map(json.dumps, FLOWS))
    arguments = ["--kubeconfig", str(server.kubeconfig(token)), "--flows", "-", *options]
    return CliRunner().invoke(evaluate, arguments, input=flows)


def answers(result: Result) -> list[dict[str, Any]]:
    """Without the places of rules in files, which a cluster does not have."""
    found = [json.loads(line) for line in result.stdout.splitlines()]
    for each in found:
        for reason in each["reasons"]:
            reason["text"] = re.sub(r" \([^()]*:\d+\)", "", reason["text"])
            reason["file"], reason["line"] = "", 0
    return found


def test_a_cluster_and_its_manifests_give_the_same_answers(shop: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(OBJECTS)
    flows = "\n".join(map(json.dumps, FLOWS))
    expected = CliRunner().invoke(evaluate, ["-f", str(tmp_path), "--flows", "-"], input=flows)
    found = run(shop, ADMIN)
    assert (found.exit_code, expected.exit_code) == (0, 0), found.stderr
    assert answers(found) == answers(expected)
    assert {each["verdict"] for each in answers(found)} == {"ALLOW", "DENY", "NEEDS_L7"}


def test_no_secret_and_no_config_map_but_the_meshs_is_read(shop: ApiServer) -> None:
    content = read_cluster(shop.client())
    assert {d.name for d in content.documents if d.kind in ("Secret", "ConfigMap")} == {"istio"}
    assert "never-read" not in repr(content)


def test_a_kind_that_the_cluster_does_not_know_is_named_and_read_once_it_does(shop: ApiServer) -> None:
    kind = ("policy.networking.k8s.io/v1alpha1", "BaselineAdminNetworkPolicy")
    assert "BaselineAdminNetworkPolicy.policy.networking.k8s.io" in run(shop, ADMIN).stderr
    baseline = {"apiVersion": kind[0], "kind": kind[1], "metadata": {"name": "default"}, "spec": {"priority": "no"}}
    shop.install(*kind, namespaced=False)
    try:
        shop.create(baseline)
        told = run(shop, ADMIN).stderr
        assert "BaselineAdminNetworkPolicy.policy" not in told
        assert "Warning: refused: BaselineAdminNetworkPolicy default" in told
    finally:
        shop.uninstall(*kind)


def test_a_long_list_is_read_to_its_end(shop: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "PAGE", 3)
    policies = [
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "spec": {"podSelector": {}},
         "metadata": {"name": f"p{number}", "namespace": "shop"}}
        for number in range(10)
    ]  # fmt: skip
    shop.create(*policies)
    try:
        read = [d.name for d in read_cluster(shop.client()).documents if d.namespace == "shop" and d.name[0] == "p"]
        assert sorted(read) == sorted(f"p{number}" for number in range(10))
    finally:
        shop.delete(*policies)


def test_what_may_not_be_read_is_an_error_that_names_the_roles_that_suffice(shop: ApiServer) -> None:
    denied = run(shop, READER)
    assert isinstance(denied.exception, ClusterError)
    assert denied.stdout == ""
    assert "networkpolicies.networking.k8s.io" in denied.exception.what
    made = grant(shop, READER, denied.exception.fix)
    try:
        allowed = run(shop, READER)
        assert allowed.exit_code == 0, allowed.exception
        assert answers(allowed) == answers(run(shop, ADMIN))
    finally:
        shop.delete(*made)


def grant(server: ApiServer, user: str, commands: str) -> list[dict[str, Any]]:
    """Make and bind what the ``kubectl create clusterrole`` commands in an error would make."""
    made: list[dict[str, Any]] = []
    for name, verb, resources, only in re.findall(
        r"create clusterrole (\S+) --verb=(\w+) --resource=([^\s;]+)((?: --resource-name=[^\s;]+)*)", commands
    ):
        rules = [
            {"apiGroups": [resource.partition(".")[2]], "resources": [resource.partition(".")[0]], "verbs": [verb],
             **({"resourceNames": re.findall(r"=(\S+)", only)} if only else {})}
            for resource in resources.split(",")
        ]  # fmt: skip
        rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": name}}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
        subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}
        made += [
            {**rbac, "kind": "ClusterRole", "rules": rules},
            {**rbac, "kind": "ClusterRoleBinding", "roleRef": reference, "subjects": [subject]},
        ]
    server.create(*made)
    return made


def test_one_kind_that_may_not_be_read_gives_no_partial_answer(shop: ApiServer) -> None:
    denied = run(shop, NOBODY)
    assert isinstance(denied.exception, ClusterError)
    made = grant(shop, NOBODY, denied.exception.fix.replace("networkpolicies.networking.k8s.io,", ""))
    try:
        partial = run(shop, NOBODY)
        assert isinstance(partial.exception, ClusterError)
        assert partial.exception.what.startswith("may not be read: networkpolicies.networking.k8s.io (")
        assert partial.stdout == ""
    finally:
        shop.delete(*made)


def test_credentials_that_are_not_accepted_are_told(shop: ApiServer) -> None:
    with pytest.raises(ClusterError, match="does not accept the credentials"):
        read_cluster(shop.client("stranger"))


def test_chosen_namespaces_are_read_with_the_meshs_root(shop: ApiServer) -> None:
    content = read_cluster(shop.client(), ["pay"])
    assert {d.namespace for d in content.documents} == {"", "pay", "istio-system"}
    assert "only istio-system, pay were read" in run(shop, ADMIN, "-n", "pay").stderr


def test_explain_names_rules_by_namespace_and_name_where_there_is_no_file(shop: ApiServer) -> None:
    options = ["--kubeconfig", str(shop.kubeconfig(ADMIN)), "--from", "entity:world", "--to", "pay/api:8080"]
    done = CliRunner().invoke(explain, options)
    assert done.exit_code == 1, done.output
    assert "isolated by NetworkPolicy pay/api" in " ".join(done.stdout.split())
    assert "(:0)" not in done.stdout
