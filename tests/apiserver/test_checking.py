"""``meshbridge check`` and ``status --cluster`` in a real API server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import ADMIN, NOBODY, ApiServer
from click.testing import CliRunner, Result

from meshbridge.cli import cli
from meshbridge.install.manifests import Options, packaged, render

SYSTEM = "meshbridge-system"
HOOKS = "/apis/admissionregistration.k8s.io/v1"


def run(server: ApiServer, *options: str, token: str = ADMIN) -> Result:
    return CliRunner().invoke(cli, [*options, "--kubeconfig", str(server.kubeconfig(token))])


def outcomes(result: Result) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for each in json.loads(result.output):
        found.setdefault(each["what"], set()).add(each["outcome"])
    return found


def istiod() -> dict[str, Any]:
    labels = {"app": "istiod"}
    return {
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "istiod", "namespace": "istio-system", "labels": labels},
        "spec": {"selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels},
            "spec": {"containers": [{"name": "discovery", "image": "registry.test/pilot:1.27.1"}]}}},
    }  # fmt: skip


@pytest.fixture
def server(api_server: ApiServer) -> Iterator[ApiServer]:
    made = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "istio-system"}},
        istiod(),
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"}},
        *({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
           "status": {"nodeInfo": dict.fromkeys(
               ("machineID", "systemUUID", "bootID", "osImage", "containerRuntimeVersion", "kubeletVersion",
                "kubeProxyVersion"), "x") | {"kernelVersion": kernel, "operatingSystem": "linux",
                                             "architecture": "amd64"}}}
          for name, kernel in (("new", "6.1.0"), ("old", "4.19.0"))),
    ]  # fmt: skip
    api_server.create(*made)
    yield api_server
    api_server.delete(*reversed(made))


def test_each_finding_is_a_line_and_what_fails_is_the_exit_code(server: ApiServer) -> None:
    result = run(server, "check", "-o", "json")
    assert result.exit_code == 3, (result.output, result.exception)
    found = outcomes(result)
    assert found["kernel of old"] == {"fail"}
    assert found["kernel of new"] == found["rights"] == found["API server"] == {"ok"}
    assert found["Istio"] == {"ok", "warn"}, "the version is read; the injector's ConfigMap is missing"
    text = run(server, "check")
    assert "fail  kernel of old: Linux 4.19.0 is too old" in text.output


def test_whoever_may_not_read_the_cluster_is_told_so(server: ApiServer) -> None:
    result = run(server, "check", token=NOBODY)
    assert result.exit_code == 1
    assert "forbidden" in str(result.exception)


def test_where_cilium_enforces_there_are_no_agents_and_status_says_so(server: ApiServer) -> None:
    assert run(server, "install", "--enforcer", "cilium").exit_code == 0
    try:
        said = run(server, "status", "--cluster").output
        assert ("enforcer: cilium" in said, "DaemonSet  meshbridge-agent" in said) == (True, False)
        assert json.loads(run(server, "status", "--cluster", "-o", "json").output)["enforcer"] == "cilium"
    finally:
        server.delete(*(dict(each) for each in reversed(render(packaged(), Options()))))


def test_kubectl_finds_the_plugin_and_its_verbs_read_the_cluster_of_a_context(server: ApiServer) -> None:
    programs = Path(sys.executable).parent
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "KUBECONFIG": str(server.kubeconfig(ADMIN))}
    for arguments in (["--version"], ["evaluate", "--help"], ["analyze", "--context", "c", "-A", "-o", "json"]):
        done = subprocess.run(
            ["kubectl", "meshbridge", *arguments], capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode == 0, done.stderr
    nowhere = subprocess.run(
        ["kubectl", "meshbridge", "observe", "--context", "c"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert (nowhere.returncode, "no agent runs in the cluster" in nowhere.stderr) == (1, True), nowhere.stderr


def test_status_says_what_is_installed_and_what_keeps_it_from_working(server: ApiServer) -> None:
    nothing = run(server, "status", "--cluster")
    assert (nothing.exit_code, "is not installed" in str(nothing.exception)) == (1, True)
    installed = run(server, "install")
    assert installed.exit_code == 0, installed.exception
    try:
        result = run(server, "status", "--cluster", "-o", "json")
        assert result.exit_code == 3, (result.output, result.exception)
        found = json.loads(result.output)
        assert [each["component"] for each in found["components"]] == ["agent", "authz", "controller", "webhook"]
        assert any("no caBundle" in text for text in found["problems"])
        assert any("no controller leads" in text for text in found["problems"])
        text = run(server, "status", "--cluster")
        assert "localhost/meshbridge:0.1.0" in text.output
        assert found["enforcer"] == "ebpf"
        late = run(server, "status", "--wait", "--timeout", "2")
        assert late.exit_code == 3
    finally:
        server.delete(*(dict(each) for each in reversed(render(packaged(), Options()))))
