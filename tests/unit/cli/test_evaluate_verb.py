"""``meshbridge evaluate`` as a person runs it: files in, JSON lines out, an exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshbridge.cli.evaluate import command
from meshbridge.kube.api import ClusterError

MANIFESTS = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: app}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: "trustDomain: corp\\nrootNamespace: root"}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: everywhere, namespace: root}
spec: {rules: [{from: [{source: {principals: [corp/ns/shop/sa/web]}}]}]}
"""
FLOW = '{"src": "shop/web", "dst": "shop/web", "port": 80, "src_ip": "10.0.0.1"}'


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    (tmp_path / "shop.yaml").write_text(MANIFESTS)
    return tmp_path


def run(*arguments: str | Path, flows: str) -> tuple[int, list[dict[str, object]], str]:
    done = CliRunner().invoke(command, [*map(str, arguments), "--flows", "-"], input=flows)
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_every_flow_is_answered_on_a_line_of_its_own(manifests: Path) -> None:
    code, answers, _ = run("-f", manifests, "-o", "jsonl", flows=f"{FLOW}\n{FLOW}\n")
    assert code == 0
    assert [answer["verdict"] for answer in answers] == ["ALLOW", "ALLOW"]


def test_a_line_with_an_error_shows_in_the_exit_code(manifests: Path) -> None:
    code, answers, _ = run("-f", manifests, flows=f"{FLOW}\nnope\n")
    assert code == 3
    assert ["error" in answer for answer in answers] == [False, True]


def test_the_mesh_is_configured_by_the_config_map_among_the_files(manifests: Path) -> None:
    flow = {"src": "10.0.0.9", "dst": "shop/web", "port": 80}
    asked = [{**flow, "peer_principal": f"{domain}/ns/shop/sa/web"} for domain in ("corp", "cluster.local")]
    _, answers, _ = run("-f", manifests, flows="\n".join(map(json.dumps, asked)))
    assert [answer["mesh"] for answer in answers] == ["ALLOW", "DENY"]


def test_a_refused_object_is_told_beside_the_answers(manifests: Path) -> None:
    (manifests / "bad.yaml").write_text(MANIFESTS.rpartition("---")[2].replace("principals", "princes"))
    code, _, told = run("-f", manifests / "bad.yaml", flows="")
    assert code == 0
    assert "Warning: refused: " in told
    assert "bad.yaml:" in told


def test_without_files_and_without_a_kubeconfig_it_says_what_to_name(tmp_path: Path) -> None:
    nowhere = {"KUBECONFIG": None, "KUBERNETES_SERVICE_HOST": None, "HOME": str(tmp_path)}
    done = CliRunner().invoke(command, ["--flows", "-"], input=FLOW, env=nowhere)
    assert isinstance(done.exception, ClusterError)
    assert "-f" in done.exception.fix


def test_manifests_may_come_from_standard_input(tmp_path: Path) -> None:
    asked = tmp_path / "flows.jsonl"
    asked.write_text(FLOW)
    done = CliRunner().invoke(command, ["-f", "-", "--flows", str(asked)], input=MANIFESTS)
    assert (done.exit_code, json.loads(done.stdout)["verdict"]) == (0, "ALLOW")


@pytest.mark.parametrize(
    "options",
    [["-f", "-", "--flows", "-"], ["-A", "-n", "shop", "--flows", "-"], ["-f", ".", "-n", "a", "--flows", "-"]],
)
def test_options_that_contradict_each_other_are_refused(options: list[str]) -> None:
    assert CliRunner().invoke(command, options, input=FLOW).exit_code == 2
