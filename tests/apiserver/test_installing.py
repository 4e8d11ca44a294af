"""``meshbridge install`` in a real API server: what is there afterwards, what is left alone, forth and back."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ADMIN, NOBODY, READER, ApiServer, definition, path_of, plural, wait_for
from click.testing import CliRunner, Result
from policygen import cilium_policy, cluster_policy

from meshbridge.cli import cli
from meshbridge.cli.certificates import controller_pair
from meshbridge.install.cluster import Cluster
from meshbridge.install.manifests import Options, is_definition, packaged, render
from meshbridge.kube.api import Api, ClusterError
from meshbridge.kube.lease import Election
from meshbridge.kube.objects import read_objects
from meshbridge.kube.ownobjects import keep_secret, trust_webhook
from meshbridge.policy.model import Document
from meshbridge.policy.parse import parse

SYSTEM = "meshbridge-system"
POLICIES = "/apis/meshbridge.io/v1alpha1/namespaces/default/bypasspolicies"


def run(server: ApiServer, *options: str, token: str = ADMIN) -> Result:
    return CliRunner().invoke(cli, [*options, "--kubeconfig", str(server.kubeconfig(token))])


def found(server: ApiServer, each: dict[str, Any]) -> dict[str, Any] | None:
    code, answer = server.call("GET", f"{path_of(each)}/{each['metadata']['name']}")
    return answer if code == 200 else None


def objects(*more: str) -> list[dict[str, Any]]:
    """What ``--dry-run client`` prints."""
    result = CliRunner().invoke(cli, ["install", "--dry-run", "client", "-o", "json", *more])
    assert result.exit_code == 0, result.output
    items: list[dict[str, Any]] = json.loads(result.output)["items"]
    return items


@pytest.fixture
def server(api_server: ApiServer) -> Iterator[ApiServer]:
    """The API server, without anything of ours before and after."""
    yield api_server
    made = objects("--with-crds", "cilium.io", "--with-crds", "policy.networking.k8s.io")
    ours = [each for each in made if ((found(api_server, each) or {}).get("metadata", {}).get("labels") or {}).get(
        "app.kubernetes.io/managed-by") == "meshbridge-install"]  # fmt: skip
    api_server.delete(*reversed(ours))
    wait_for(lambda: not any(found(api_server, each) for each in ours), "what was installed is gone")


def test_everything_is_there_and_a_second_time_changes_nothing(server: ApiServer) -> None:
    first = run(server, "install", "--image", "registry.test/mb:1")
    assert first.exit_code == 0, first.output
    there = [found(server, each) for each in objects()]
    assert all(there), [each["metadata"]["name"] for each, now in zip(objects(), there, strict=True) if not now]
    second = run(server, "install", "--image", "registry.test/mb:1")
    assert second.exit_code == 0, second.output
    again = [found(server, each) for each in objects()]
    versions = [[each and each["metadata"]["resourceVersion"] for each in some] for some in (there, again)]
    assert versions[0] == versions[1]


def test_the_image_and_the_replicas_are_those_asked_for(server: ApiServer) -> None:
    assert run(server, "install", "--image", "registry.test/mb:1", "--replicas", "1").exit_code == 0
    for each in objects():
        if each["kind"] in ("Deployment", "DaemonSet"):
            now = found(server, each)
            assert now is not None
            assert [c["image"] for c in now["spec"]["template"]["spec"]["containers"]] == ["registry.test/mb:1"]
            assert now["spec"].get("replicas", 1) == 1


def test_forth_and_back_keeps_what_users_and_components_wrote(server: ApiServer) -> None:
    """Another version has a further field, another argument, and one object more or less."""
    api = Api(server.client())
    this, other = list(render(packaged(), Options())), list(render(packaged(), Options(image="registry.test/mb:2")))
    other = [each for each in other if each["metadata"]["name"] != "meshbridge-fixes"]
    other.append(
        {
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "of-the-next", "namespace": SYSTEM,
                         "labels": {"app.kubernetes.io/managed-by": "meshbridge-install"}},
        }
    )  # fmt: skip
    cluster = Cluster(api, [].append)
    cluster.apply([each for each in this if is_definition(each)])
    policy = {
        "apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy",
        "metadata": {"name": "kept", "namespace": "default"}, "spec": {"mode": "audit", "routes": []},
    }  # fmt: skip
    server.create(policy)  # before a webhook is asked that nobody runs here
    cluster.apply(this)
    # as the components do it: the certificate into the Secret, the bundle into the configuration
    secret = f"/api/v1/namespaces/{SYSTEM}/secrets/meshbridge-controller-tls"
    hook = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/bypass.meshbridge.io"
    api.patch(secret, {"data": {"ca.pem": "Y2E="}})
    told = [
        {**each, "clientConfig": {**each["clientConfig"], "caBundle": "Y2E="}} for each in api.get(hook)["webhooks"]
    ]
    api.patch(hook, {"webhooks": told})
    for version, image in ((other, "registry.test/mb:2"), (this, "localhost/meshbridge:0.1.0")):
        cluster.apply(version)
        cluster.prune(version)
        agent = server.call("GET", f"/apis/apps/v1/namespaces/{SYSTEM}/daemonsets/meshbridge-agent")[1]
        assert agent["spec"]["template"]["spec"]["containers"][0]["image"] == image
        assert server.call("GET", f"{POLICIES}/kept")[1]["spec"] == policy["spec"]
        assert server.call("GET", secret)[1]["data"] == {"ca.pem": "Y2E="}
        assert server.call("GET", hook)[1]["webhooks"] == told
        extra = server.call("GET", f"/api/v1/namespaces/{SYSTEM}/configmaps/of-the-next")[0]
        fixes = server.call("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles/meshbridge-fixes")[0]
        assert (extra, fixes) == ((200, 404) if version is other else (404, 200))


def test_definitions_of_others_are_installed_where_absent_and_never_overwritten(server: ApiServer) -> None:
    # the test's own of cilium.io/v2 are there already: CiliumNetworkPolicy without a schema of ours
    theirs = definition("cilium.io/v2", "CiliumNetworkPolicy", namespaced=True)
    before = found(server, theirs)
    assert before is not None
    result = run(server, "install", "--with-crds", "cilium.io")
    assert result.exit_code == 0, result.output
    after = found(server, theirs)
    assert after is not None
    assert after["spec"] == before["spec"]
    assert "left as it is" in result.output
    assert found(server, definition("cilium.io/v2", "CiliumCIDRGroup", namespaced=False)) is not None


def test_files_of_users_apply_where_only_our_definitions_are(server: ApiServer) -> None:
    """What the parsers take, our definitions of others' kinds take as well, strictly, and give back whole."""
    groups = ("cilium.io", "policy.networking.k8s.io")
    kinds = [("cilium.io/v2", "CiliumNetworkPolicy"), ("cilium.io/v2", "CiliumClusterwideNetworkPolicy"),
             ("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy")]  # fmt: skip
    for api_version, kind in kinds:
        server.uninstall(api_version, kind)
    try:
        result = run(server, "install", "--with-crds", groups[0], "--with-crds", groups[1])
        assert result.exit_code == 0, result.exception
        wait_for(
            lambda: all(server.call("GET", f"/apis/{v}/{plural(k)}")[0] == 200 for v, k in kinds), "all are served"
        )
        taken = 0
        for document in documents_of_users():
            body = {**document.data, "metadata": {**document.data["metadata"], "name": document.name}}
            if document.namespace:
                body["metadata"]["namespace"] = "default"
            code, answer = server.call("POST", f"{path_of(body)}?dryRun=All&fieldValidation=Strict", body)
            assert code == 201, (document, answer)
            assert {key: answer[key] for key in ("spec", "specs") if key in body} == {
                key: body[key] for key in ("spec", "specs") if key in body
            }
            taken += 1
        assert taken > 60
    finally:
        for each in objects(*(part for group in groups for part in ("--with-crds", group))):
            if each["kind"] == "CustomResourceDefinition" and each["spec"]["group"] in groups:
                server.delete(each)
                wait_for(lambda each=each: found(server, each) is None, "it is gone")
        for api_version, kind in kinds:
            server.install(api_version, kind, namespaced=kind == "CiliumNetworkPolicy")


def documents_of_users() -> list[Document]:
    """Documents of the two groups that our parsers understand: those of the manifests, and many random ones."""
    files = (Path(__file__).parents[2] / "manifests").rglob("*.yaml")
    found = [d for path in files for d in read_objects(path.read_bytes(), path.name).documents]
    rng = random.Random(1)
    made = [make(rng, f"p{n}") for n in range(60) for make in (cluster_policy, cilium_policy)]
    text = yaml.safe_dump_all(made).encode()
    found += read_objects(text, "random.yaml").documents
    groups = ("cilium.io", "policy.networking.k8s.io")
    return [d for d in found if d.api_version.partition("/")[0] in groups and not parse(d).refusals]


def test_a_field_that_somebody_changed_is_told_of_and_taken_over_only_when_asked(server: ApiServer) -> None:
    assert run(server, "install").exit_code == 0
    path = f"/apis/apps/v1/namespaces/{SYSTEM}/deployments/meshbridge-webhook"
    Api(server.client()).patch(path, {"spec": {"replicas": 5}})
    refused = run(server, "install")
    assert refused.exit_code == 1
    assert ".spec.replicas" in str(refused.exception)
    assert "--force-conflicts" in str(refused.exception)
    assert run(server, "install", "--force-conflicts").exit_code == 0
    assert server.call("GET", path)[1]["spec"]["replicas"] == 2


def test_components_fill_what_is_made_empty_with_the_rights_that_are_installed_and_no_more(server: ApiServer) -> None:
    assert run(server, "install").exit_code == 0
    rbac = "rbac.authorization.k8s.io"
    bindings = [
        {
            "apiVersion": f"{rbac}/v1", "kind": f"{kind}Binding",
            "metadata": {"name": f"test-{component}", **({"namespace": SYSTEM} if kind == "Role" else {})},
            "roleRef": {"apiGroup": rbac, "kind": kind, "name": f"meshbridge-{component}"},
            "subjects": [{"apiGroup": rbac, "kind": "User", "name": READER}],
        }
        for component in ("controller", "webhook") for kind in ("Role", "ClusterRole")
    ]  # fmt: skip
    server.create(*bindings)
    api = Api(server.client(READER))
    try:
        controller_pair(api, SYSTEM, "meshbridge-controller-tls")
        keep_secret(api, SYSTEM, "meshbridge-webhook-tls", lambda _: {"ca.pem": b"x"})
        assert trust_webhook(api, "bypass.meshbridge.io", (SYSTEM, "meshbridge-webhook"), b"x")
        election = Election(api, SYSTEM, "meshbridge-controller", "replica-1")
        election.attempt()
        assert election.held_for_s > 0, election.problem
        with pytest.raises(ClusterError, match="forbidden"):
            keep_secret(api, SYSTEM, "another", lambda _: {"ca.pem": b"x"})
    finally:
        server.delete(*bindings)


def test_a_dry_run_leaves_nothing(server: ApiServer) -> None:
    result = run(server, "install", "--dry-run", "server")
    assert result.exit_code == 0, result.output
    assert not any(found(server, each) for each in objects() if each["kind"] != "Namespace")


def test_without_rights_nothing_is_done_and_it_is_said_what_is_needed(server: ApiServer) -> None:
    refused = run(server, "install", token=NOBODY)
    assert refused.exit_code == 1
    assert "administrator" in str(refused.exception)


def test_waiting_ends_when_all_serve_and_says_what_is_missing_when_not(server: ApiServer) -> None:
    late = run(server, "install", "--wait", "--timeout", "1")
    assert late.exit_code == 1
    assert "meshbridge-agent" in str(late.exception)
    for each in objects():
        if each["kind"] not in ("Deployment", "DaemonSet"):
            continue
        now = found(server, each)
        assert now is not None
        path, generation = f"{path_of(each)}/{each['metadata']['name']}/status", now["metadata"]["generation"]
        counts = (
            {"replicas": 2, "updatedReplicas": 2, "availableReplicas": 2, "readyReplicas": 2}
            if each["kind"] == "Deployment"
            else {"desiredNumberScheduled": 3, "currentNumberScheduled": 3, "updatedNumberScheduled": 3,
                  "numberReady": 3, "numberAvailable": 3, "numberMisscheduled": 0}
        )  # fmt: skip
        code, answer = server.call("PUT", path, {**now, "status": {"observedGeneration": generation, **counts}})
        assert code == 200, answer
    done = run(server, "install", "--wait", "--timeout", "10")
    assert done.exit_code == 0, done.exception


def test_the_packaged_manifests_are_those_of_the_repository() -> None:
    repository = Path(__file__).parents[2] / "deploy"
    names = {yaml.safe_load(path.read_text())["metadata"]["name"] for path in (repository / "crds").glob("*.yaml")}
    assert names <= {each["metadata"]["name"] for each in render(packaged(), Options())}
