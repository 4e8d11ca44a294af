"""The Helm chart and the kustomize base say the same; and what values change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ADMIN, REPO, ApiServer, definition, path_of, wait_for
from click.testing import CliRunner

from meshbridge.cli import cli
from meshbridge.install.manifests import Options, key_of, packaged, render

CHART = REPO / "deploy/helm/meshbridge"
KUBECTL = Path(sys.executable).with_name("kubectl")

Helm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    found = subprocess.run([REPO / "scripts/third-party", "--path", "helm"], capture_output=True, text=True)
    if found.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"cannot run in CI: {found.stderr}", pytrace=False)
        pytest.skip(f"needs helm: {found.stderr.strip()}")
    home = tmp_path_factory.mktemp("helm")

    def run(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [f"{found.stdout.strip()}/bin/helm", *map(str, arguments)], capture_output=True, text=True, timeout=100,
            env={"HOME": str(home), "PATH": os.environ["PATH"]},
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stderr
        return done

    return run


def objects(text: str) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    found = [each for each in yaml.safe_load_all(text) if each]
    assert len({key_of(each) for each in found}) == len(found)
    return {key_of(each): each for each in found}


def template(helm: Helm, *values: str) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    found = objects(helm("template", "meshbridge", CHART, *(a for value in values for a in ("--set", value))).stdout)
    for each in found.values():  # what Helm alone needs
        annotations = each["metadata"].get("annotations", {})
        annotations.pop("helm.sh/resource-policy", None)
        if annotations == {}:
            each["metadata"].pop("annotations", None)
    return found


def kustomize(folder: str = "deploy/kustomize/base") -> dict[tuple[str, str, str, str], dict[str, Any]]:
    return objects(subprocess.check_output([KUBECTL, "kustomize", REPO / folder], text=True))


def workload(found: dict[tuple[str, str, str, str], dict[str, Any]], name: str) -> dict[str, Any]:
    (one,) = [each for (_, kind, _, n), each in found.items() if n == name and kind in ("Deployment", "DaemonSet")]
    return one


def test_by_default_the_chart_and_the_base_are_equal(helm: Helm) -> None:
    assert template(helm) == kustomize()


def test_kustomize_and_the_installer_are_equal_but_for_the_installers_labels() -> None:
    found = {key_of(each): json.loads(json.dumps(each)) for each in render(packaged(), Options())}
    for each in found.values():
        assert each["metadata"]["labels"].pop("app.kubernetes.io/managed-by") == "meshbridge-install"
    assert found == kustomize()


def test_the_linter_finds_nothing(helm: Helm) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", CHART).stdout


def test_a_packed_chart_is_whole(helm: Helm, tmp_path: Path) -> None:
    helm("package", CHART, "--destination", tmp_path)
    (packed,) = tmp_path.glob("*.tgz")
    assert objects(helm("template", "meshbridge", packed).stdout).keys() == kustomize().keys()


def test_image_replicas_and_arguments(helm: Helm) -> None:
    digest = f"sha256:{'a' * 64}"
    found = template(
        helm, "image.repository=r.test/mb", f"image.digest={digest}", "controller.replicas=1",
        "webhook.denyRefused=true", "istioNamespace=mesh", "agent.cni.binDir=/home/cni",
        "agent.extraArgs={--attach=tcx}", "image.pullSecrets={key}",
    )  # fmt: skip
    for name in ("controller", "agent", "authz", "webhook"):
        pod = workload(found, f"meshbridge-{name}")["spec"]["template"]["spec"]
        assert [c["image"] for c in pod["containers"]] == [f"r.test/mb@{digest}"]
        assert pod["imagePullSecrets"] == [{"name": "key"}]
    assert workload(found, "meshbridge-controller")["spec"]["replicas"] == 1
    arguments = {
        name: workload(found, f"meshbridge-{name}")["spec"]["template"]["spec"]["containers"][0]["args"]
        for name in ("controller", "agent", "webhook")
    }
    assert "--istio-namespace=mesh" in arguments["controller"]
    assert arguments["webhook"][-2:] == ["--istio-namespace=mesh", "--deny-refused"]
    assert arguments["agent"][-1] == "--attach=tcx"
    volumes = workload(found, "meshbridge-agent")["spec"]["template"]["spec"]["volumes"]
    assert {"name": "cni-bin", "hostPath": {"path": "/home/cni", "type": "DirectoryOrCreate"}} in volumes


def test_failure_policies_by_webhook(helm: Helm) -> None:
    found = template(helm, "webhook.failurePolicy.policies=Fail", "webhook.failurePolicy.auto=Fail")
    hooks = {
        hook["name"].partition(".")[0]: hook["failurePolicy"]
        for each in found.values() if each["kind"].endswith("WebhookConfiguration") for hook in each["webhooks"]
    }  # fmt: skip
    assert hooks == {
        "auto": "Fail",
        "gate": "Ignore",
        "pods": "Ignore",
        "templates": "Ignore",
        "bypasspolicies": "Fail",
        "policies": "Fail",
    }


LEFT_OUT = {
    "with Cilium there are no agents": ("enforcer=cilium", {("DaemonSet", "meshbridge-agent")}),
    "fixes are only proposed": (
        "fixes.apply=false", {("ClusterRole", "meshbridge-fixes"), ("ClusterRoleBinding", "meshbridge-fixes")},
    ),
    "no policies of its own": (
        "networkPolicy.enabled=false", {("NetworkPolicy", "meshbridge-authz"), ("NetworkPolicy", "meshbridge-webhook")},
    ),
    "the namespace is there": ("namespace.create=false", {("Namespace", "meshbridge-system")}),
}  # fmt: skip


@pytest.mark.parametrize(("value", "gone"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_what_values_leave_out(helm: Helm, value: str, gone: set[tuple[str, str]]) -> None:
    assert {(kind, name) for _, kind, _, name in kustomize().keys() - template(helm, value).keys()} == gone


@pytest.mark.parametrize("value", ["enforcer=xdp", "controler.replicas=1", "controller.replicas=0", "image.digest=x"])
def test_values_that_are_not_known_are_refused(helm: Helm, value: str) -> None:
    assert helm("template", "meshbridge", CHART, "--set", value, check=False).returncode != 0


def test_a_release_brings_definitions_where_absent_keeps_them_and_leaves_the_rest_to_its_end(
    helm: Helm, api_server: ApiServer
) -> None:
    at = ("--kubeconfig", str(api_server.kubeconfig(ADMIN)), "--namespace", "default")
    options = (CHART, *at, "--set", r"crds.cilium\.io=true")
    theirs = definition("cilium.io/v2", "CiliumNetworkPolicy", namespaced=True)
    ours = definition("cilium.io/v2", "CiliumCIDRGroup", namespaced=False)

    def at_server(each: dict[str, Any]) -> dict[str, Any] | None:
        code, answer = api_server.call("GET", f"{path_of(each)}/{each['metadata']['name']}")
        return answer if code == 200 else None

    before = at_server(theirs)
    assert before is not None
    own = [each for each in kustomize().values() if each["kind"] == "CustomResourceDefinition"]
    try:
        helm("install", "meshbridge", *options)
        assert at_server(workload(kustomize(), "meshbridge-agent")) is not None
        assert at_server(ours) is not None
        refused = CliRunner().invoke(cli, ["install", "--kubeconfig", str(api_server.kubeconfig(ADMIN))])
        assert (refused.exit_code, "'helm upgrade'" in str(refused.exception)) == (1, True), refused.exception
        helm("upgrade", "meshbridge", *options, "--set", "controller.replicas=3")
        now = at_server(workload(kustomize(), "meshbridge-controller"))
        assert now is not None
        assert now["spec"]["replicas"] == 3
        assert at_server(ours) is not None, "a definition of ours is still the release's after an upgrade"
        assert (at_server(theirs) or {})["spec"] == before["spec"]
        helm("uninstall", "meshbridge", *at)
        assert at_server(workload(kustomize(), "meshbridge-agent")) is None
        assert all(map(at_server, [ours, *own])), "definitions stay with everybody's policies"
    finally:
        helm("uninstall", "meshbridge", *at, check=False)
        more = [each for each in kustomize("deploy/kustomize/foreign-crds/cilium.io").values() if each != theirs]
        mine = [each for each in (*more, *own) if key_of(each) != key_of(theirs)]
        kept = [each for each in mine if each["metadata"]["name"] != "ciliumclusterwidenetworkpolicies.cilium.io"]
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "meshbridge-system"}}
        api_server.delete(*kept, namespace)
        wait_for(lambda: not any(map(at_server, [*kept, namespace])), "nothing of it is left")
