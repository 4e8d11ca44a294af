"""Our own kinds in a real API server: their schemas take what the parser takes, and refuse what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ADMIN, ApiServer, wait_for
from bypass_policy_cases import BEYOND_A_SCHEMA, REFUSED, TAKEN
from click.testing import CliRunner

from meshbridge.bypass.bypasspolicy import parse_bypass_policy
from meshbridge.cli import cli
from meshbridge.kube.cluster import read_cluster
from meshbridge.policy.model import Document

CRDS = Path(__file__).parents[2] / "deploy/crds"
GROUP = "/apis/meshbridge.io/v1alpha1"


@pytest.fixture(scope="module")
def server(api_server: ApiServer) -> Iterator[ApiServer]:
    definitions = [yaml.safe_load(path.read_text()) for path in sorted(CRDS.glob("*.yaml"))]
    api_server.create(*definitions)
    for definition in definitions:
        plural = definition["spec"]["names"]["plural"]
        wait_for(lambda plural=plural: api_server.call("GET", f"{GROUP}/{plural}")[0] == 200, f"{plural} are served")
    yield api_server
    api_server.delete(*definitions)
    for definition in definitions:
        plural = definition["spec"]["names"]["plural"]
        wait_for(lambda plural=plural: api_server.call("GET", f"{GROUP}/{plural}")[0] == 404, f"{plural} are gone")


def policy(spec: Any, name: str, kind: str = "BypassPolicy") -> dict[str, Any]:
    metadata = {"name": name, **({"namespace": "default"} if kind == "BypassPolicy" else {})}
    return {"apiVersion": "meshbridge.io/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


def post(server: ApiServer, body: dict[str, Any]) -> tuple[int, Any]:
    namespace = body["metadata"].get("namespace")
    plural = "bypasspolicies" if namespace else "clusterbypasspolicies"
    path = f"{GROUP}/namespaces/{namespace}/{plural}" if namespace else f"{GROUP}/{plural}"
    return server.call("POST", f"{path}?fieldValidation=Strict", body)


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_parser_takes_the_api_server_takes_and_gives_back(server: ApiServer, name: str) -> None:
    body = policy(yaml.safe_load(TAKEN[name]), name.replace(" ", "-"))
    code, answer = post(server, body)
    assert code == 201, answer
    (found,) = [d for d in read_cluster(server.client()).documents if d.name == body["metadata"]["name"]]
    assert parse_bypass_policy(found).refusal is None
    server.delete(body)


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - BEYOND_A_SCHEMA))
def test_what_the_parser_refuses_the_api_server_refuses(server: ApiServer, name: str) -> None:
    body = policy(yaml.safe_load(REFUSED[name][0]), name.replace(" ", "-"))
    document = Document("BypassPolicy", body["apiVersion"], "default", "x", body)
    assert parse_bypass_policy(document).refusal is not None
    code, answer = post(server, body)
    assert code in (400, 422), answer


def test_a_clusterwide_policy_selects_namespaces(server: ApiServer) -> None:
    body = policy({"namespaceSelector": {"matchLabels": {"team": "pay"}}}, "team", "ClusterBypassPolicy")
    code, answer = post(server, body)
    assert code == 201, answer
    server.delete(body)


PROMOTED = {"of a namespace": ("BypassPolicy", "default/p"), "of the cluster": ("ClusterBypassPolicy", "p")}


@pytest.mark.parametrize(("kind", "name"), PROMOTED.values(), ids=PROMOTED.keys())
def test_an_audited_policy_is_promoted_in_the_cluster(server: ApiServer, kind: str, name: str) -> None:
    body = policy({"mode": "audit", "routes": []}, "p", kind)
    assert post(server, body)[0] == 201
    options = ["bypass", "promote", name, "--kubeconfig", str(server.kubeconfig(ADMIN))]
    said = [CliRunner().invoke(cli, [*options, *more]) for more in (["--dry-run"], [], [])]
    assert [result.exit_code for result in said] == [0, 0, 0], said
    assert ["would become" in said[0].output, "enforces already" in said[2].output] == [True, True]
    (found,) = [d for d in read_cluster(server.client()).documents if (d.kind, d.name) == (kind, "p")]
    assert found.data["spec"] == {"mode": "enforce", "routes": []}
    server.delete(body)


def test_a_policy_that_is_not_there_or_may_not_be_changed_is_an_error(server: ApiServer) -> None:
    missing = CliRunner().invoke(cli, ["bypass", "promote", "x/y", "--kubeconfig", str(server.kubeconfig(ADMIN))])
    assert (missing.exit_code, "there is none" in str(missing.exception)) == (1, True)
    nobody = CliRunner().invoke(cli, ["bypass", "promote", "x/y", "--kubeconfig", str(server.kubeconfig("nobody"))])
    assert nobody.exit_code == 1
    assert "forbidden" in str(nobody.exception)
