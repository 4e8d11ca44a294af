"""A real API server asks the real webhook process: pods and policies are warned of, patched and refused by it."""

from __future__ import annotations

import base64
import json
import re
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ADMIN, REPO, ApiServer, free_port, path_of, wait_for

IN = "traffic.sidecar.istio.io/excludeInboundPorts"
AUTO = {"meshbridge.io/bypass": "auto"}
SHOP = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"istio-injection": "enabled"}}}


@dataclass
class Webhook:
    """The process, and the configurations by which the API server asks it."""

    server: ApiServer
    directory: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        command = [
            Path(sys.executable).with_name("meshbridge"), "webhook", "--listen", f"127.0.0.1:{self.port}",
            "--kubeconfig", str(self.server.kubeconfig(ADMIN)), "--state-dir", str(self.directory / "state"),
            "--ca-bundle-file", str(self.bundle), "--linger", "0", *options,
        ]  # fmt: skip
        with (self.directory / "webhook.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(self._is_synced, f"the webhook is ready, see {self.directory}")

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    @property
    def bundle(self) -> Path:
        return self.directory / "ca.pem"

    def _is_synced(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "webhook.log").read_text()
        try:
            context = ssl.create_default_context(cafile=str(self.bundle))
            with urllib.request.urlopen(f"https://127.0.0.1:{self.port}/healthz", timeout=5, context=context) as answer:
                synced: bool = json.load(answer)["synced"]
                return synced
        except (OSError, ssl.SSLError):
            return False

    def configurations(self) -> list[dict[str, Any]]:
        """Those of deploy/webhook, by URL in place of a Service, which this cluster without nodes cannot reach."""
        found = []
        for path in sorted((REPO / "deploy/webhook").glob("*.yaml")):
            configuration = yaml.safe_load(path.read_text())
            for hook in configuration["webhooks"]:
                service = hook["clientConfig"].pop("service")
                url = f"https://127.0.0.1:{self.port}{service['path']}"
                bundle = base64.b64encode(self.bundle.read_bytes()).decode()
                hook["clientConfig"] = {"url": url, "caBundle": bundle}
            found.append(configuration)
        return found


@pytest.fixture(scope="module")
def webhook(api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webhook]:
    found = Webhook(api_server, tmp_path_factory.mktemp("webhook"))
    crds = [yaml.safe_load(path.read_text()) for path in sorted((REPO / "deploy/crds").glob("*.yaml"))]
    api_server.create(*crds, SHOP)
    for crd in crds:
        listed = f"/apis/meshbridge.io/v1alpha1/{crd['spec']['names']['plural']}"
        wait_for(lambda listed=listed: api_server.call("GET", listed)[0] == 200, f"{listed} is served")
    made: list[dict[str, Any]] = []
    try:
        found.start()
        made = found.configurations()
        api_server.create(*made)
        wait_for(lambda: warnings_of(found, pod("probe", {IN: "8080"}), dry_run=True) != [], "the webhook is asked")
        yield found
    finally:
        api_server.delete(*made)
        if found.process is not None and found.process.poll() is None:
            found.stop()
        api_server.delete(*crds)


def pod(name: str, annotations: dict[str, str] | None = None, labels: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "annotations": annotations or {},
                     "labels": labels or {"app": name}},
        "spec": {"containers": [{"name": "app", "image": "i", "ports": [{"containerPort": 8080}]}]},
    }  # fmt: skip


def policy(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop"}
    return {"apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy", "metadata": metadata, "spec": spec}


def apply(webhook: Webhook, each: dict[str, Any], *, dry_run: bool = False) -> tuple[int, dict[str, Any], list[str]]:
    """Create an object: the status code, the answer, and what a person is warned of."""
    server = webhook.server
    url = f"{server.url}{path_of(each)}{'?dryRun=All' if dry_run else ''}"
    headers = {"Authorization": f"Bearer {ADMIN}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(each).encode(), headers, method="POST")
    context = ssl.create_default_context(cafile=str(server.directory / "certs/apiserver.crt"))
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as response:
            lines = response.headers.get_all("Warning") or []
            return response.status, json.load(response), [warning_text(line) for line in lines]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), []


def warning_text(line: str) -> str:
    """The text of a ``Warning: 299 - "…"``."""
    found = re.fullmatch(r'299 - "(.*)"', line)
    assert found, line
    return found[1].replace('\\"', '"')


def warnings_of(webhook: Webhook, each: dict[str, Any], *, dry_run: bool = False) -> list[str]:
    code, answer, warnings = apply(webhook, each, dry_run=dry_run)
    assert code == 201, answer
    return warnings


@contextmanager
def existing(webhook: Webhook, *objects: dict[str, Any]) -> Iterator[None]:
    """Objects that the webhook knows of inside, and no more afterwards."""
    webhook.server.create(*objects)
    try:
        yield
    finally:
        webhook.server.delete(*objects)
        # every policy of these tests selects this pod
        bare = pod("denied", {IN: "8080"})
        wait_for(lambda: "no BypassPolicy" in str(apply(webhook, bare, dry_run=True)[2]), "they are forgotten")


def test_a_pod_that_loses_something_is_created_with_a_warning(webhook: Webhook) -> None:
    (warning,) = warnings_of(webhook, pod("loses", {IN: "8080"}), dry_run=True)
    assert warning.startswith("inbound TCP 8080 bypasses Envoy by excludeInboundPorts")
    assert "loses encryption, which no BypassPolicy accepts" in warning
    assert warnings_of(webhook, pod("keeps"), dry_run=True) == []


def test_a_pod_whose_bypass_a_policy_denies_is_refused_and_one_it_accepts_is_not(webhook: Webhook) -> None:
    deny = policy("none", {"selector": {"matchLabels": {"app": "denied"}}, "routes": [], "otherwise": "deny"})
    with existing(webhook, deny):
        wait_for(lambda: apply(webhook, pod("denied", {IN: "8080"}), dry_run=True)[0] == 403, "the policy is known")
        _, answer, _ = apply(webhook, pod("denied", {IN: "8080"}))
        assert answer["message"] == (
            'admission webhook "pods.bypass.meshbridge.io" denied the request: inbound TCP 8080 bypasses Envoy by '
            f'excludeInboundPorts (annotation {IN}: "8080"): no route that BypassPolicy shop/none allows'
        )
        assert warnings_of(webhook, pod("another", {IN: "8080"}), dry_run=True)
    accept = policy("some", {"accept": ["encryption"], "reason": "r", "otherwise": "deny"})
    with existing(webhook, accept):
        wait_for(lambda: warnings_of(webhook, pod("taken", {IN: "8080"}), dry_run=True) == [], "it is accepted")


def test_a_template_is_warned_of_and_never_refused(webhook: Webhook) -> None:
    template = {"metadata": {"labels": {"app": "t"}, "annotations": {IN: "8080"}}, "spec": pod("x")["spec"]}
    deployment = {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "t", "namespace": "shop"},
        "spec": {"selector": {"matchLabels": {"app": "t"}}, "template": template},
    }  # fmt: skip
    assert "inbound TCP 8080 bypasses Envoy" in warnings_of(webhook, deployment, dry_run=True)[0]
    with existing(webhook, policy("none", {"routes": [], "otherwise": "deny"})):
        refused = "its pods will be refused: inbound TCP 8080"
        wait_for(
            lambda: any(w.startswith(refused) for w in warnings_of(webhook, deployment, dry_run=True)), "it is known"
        )


def test_auto_becomes_the_injectors_annotations_where_nothing_unaccepted_is_lost(webhook: Webhook) -> None:
    code, answer, (warning,) = apply(webhook, pod("auto", AUTO), dry_run=True)
    assert (code, answer["metadata"]["annotations"]) == (201, AUTO)
    assert warning == "inbound TCP 8080 stays with Envoy: it would lose encryption, which nobody accepted"
    with existing(webhook, policy("accepted", {"accept": ["encryption"], "reason": "r"})):
        wait_for(lambda: warnings_of(webhook, pod("auto", AUTO), dry_run=True) == [], "it is accepted")
        _, answer, _ = apply(webhook, pod("auto", AUTO), dry_run=True)
        assert answer["metadata"]["annotations"] == {**AUTO, IN: "8080"}


def test_a_pod_gets_the_readiness_gate_that_a_policy_asks_for(webhook: Webhook) -> None:
    def gates(each: dict[str, Any]) -> list[str]:
        _, answer, _ = apply(webhook, each, dry_run=True)
        return [gate["conditionType"] for gate in answer["spec"].get("readinessGates", [])]

    wanted = policy("gate", {"selector": {"matchLabels": {"app": "waits"}}, "proof": True, "readinessGate": True})
    assert gates(pod("waits")) == []
    with existing(webhook, wanted):
        wait_for(lambda: gates(pod("waits")) == ["meshbridge.io/compensated"], "the policy is known")
        own = pod("waits")
        own["spec"]["readinessGates"] = [{"conditionType": "meshbridge.io/compensated"}]
        assert gates(own) == ["meshbridge.io/compensated"]
        assert gates(pod("another")) == []


def test_a_policy_of_ours_that_is_not_understood_is_refused_by_its_path(webhook: Webhook) -> None:
    bad = policy("bad", {"routes": [{"direction": "inbound", "ports": ["9-8"]}]})
    code, answer, _ = apply(webhook, bad)
    assert code == 422
    assert "BypassPolicy shop/bad spec.routes[0].ports[0]: '9-8' is no port and no range" in answer["message"]
    assert answer["details"]["causes"][0]["field"] == "spec.routes[0].ports[0]"


def test_a_policy_of_others_that_is_not_understood_is_created_with_a_warning(webhook: Webhook) -> None:
    strange = {
        "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "odd", "namespace": "shop"},
        "spec": {"endpointSelector": {}, "ingress": [{"fromNowhere": []}]},
    }  # fmt: skip
    (warning,) = warnings_of(webhook, strange, dry_run=True)
    assert warning.startswith("not understood by MeshBridge: CiliumNetworkPolicy shop/odd spec.ingress[0].fromNowhere")


def test_while_the_webhook_is_away_pods_start_and_our_kinds_wait(webhook: Webhook) -> None:
    assert webhook.stop() == 0
    try:
        assert warnings_of(webhook, pod("starts", {IN: "8080"}), dry_run=True) == []
        assert warnings_of(webhook, pod("plain", AUTO), dry_run=True) == []
        code, answer, _ = apply(webhook, policy("waits", {}), dry_run=True)
        assert code == 500
        assert "failed calling webhook" in answer["message"]
    finally:
        webhook.start()
    assert warnings_of(webhook, pod("starts", {IN: "8080"}), dry_run=True)
    assert warnings_of(webhook, policy("waits", {}), dry_run=True) == []
