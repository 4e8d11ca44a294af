"""Certificates that replicas share through a real API server: made once, renewed in place, and believed before used."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from api_server import ADMIN, READER, ApiServer, free_port, wait_for
from test_token_reviews import NAMESPACE, OBJECTS, named, token

from meshbridge.cli.certificates import controller_pair, secret_certificates
from meshbridge.errors import SettingsError
from meshbridge.kube.api import Api, ClusterError
from meshbridge.kube.ownobjects import keep_secret, trust_webhook
from meshbridge.xds.certificates import SERVING, renewed
from meshbridge.xds.client import ControllerClient

SECRET = "meshbridge-controller-tls"
SERVICE_NAME = f"meshbridge-controller.{NAMESPACE}.svc"
MEANT = [sys.executable, "-c", "from meshbridge.cli import main; main()"]
RBAC = "rbac.authorization.k8s.io"
ROLE: dict[str, Any] = {
    "apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": {"name": "keeper", "namespace": NAMESPACE},
    "rules": [{"apiGroups": [""], "resources": [kind], "resourceNames": [name], "verbs": ["get", "patch"]}
              for kind, name in (("secrets", SECRET), ("configmaps", "meshbridge-ca"))],
}  # fmt: skip
BINDING: dict[str, Any] = {
    "apiVersion": f"{RBAC}/v1", "kind": "RoleBinding", "metadata": {"name": "keeper", "namespace": NAMESPACE},
    "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": "keeper"},
    "subjects": [{"kind": "User", "name": READER, "apiGroup": RBAC}],
}  # fmt: skip
PATHS = {kind: f"/api/v1/namespaces/{NAMESPACE}/{kind}" for kind in ("secrets", "configmaps")}


@pytest.fixture
def cluster(api_server: ApiServer) -> Iterator[ApiServer]:
    api_server.create(*OBJECTS)
    yield api_server
    for kind, names in (("Secret", (SECRET, "meshbridge-webhook-tls")), ("ConfigMap", ("meshbridge-ca",))):
        api_server.delete(*(named(kind, name, NAMESPACE) for name in names))
    api_server.delete(ROLE, BINDING, *reversed(OBJECTS))


def held(server: ApiServer, secret: str = SECRET) -> dict[str, bytes]:
    _, found = server.call("GET", f"{PATHS['secrets']}/{secret}")
    return {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}


def test_replicas_that_start_at_once_end_with_one_certificate(cluster: ApiServer) -> None:
    replicas = [Api(cluster.client(ADMIN)) for _ in range(4)]
    with ThreadPoolExecutor(len(replicas)) as pool:
        pairs = list(pool.map(lambda api: controller_pair(api, NAMESPACE, SECRET), replicas))
    assert len(set(pairs)) == 1
    assert pairs[0][0] == held(cluster)[SERVING]
    _, published = cluster.call("GET", f"{PATHS['configmaps']}/meshbridge-ca")
    assert published["data"]["ca.crt"].count("BEGIN CERTIFICATE") == 1
    assert "PRIVATE" not in published["data"]["ca.crt"]


def test_a_secret_that_a_chart_made_empty_needs_no_right_to_create_any(cluster: ApiServer) -> None:
    cluster.create(named("Secret", SECRET, NAMESPACE), named("ConfigMap", "meshbridge-ca", NAMESPACE), ROLE, BINDING)
    api = Api(cluster.client(READER))
    wait_for(lambda: _may(api), "the role is in force")
    chain, _, _ = controller_pair(api, NAMESPACE, SECRET)
    assert chain == held(cluster)[SERVING]
    cluster.delete(named("Secret", SECRET, NAMESPACE))
    with pytest.raises(ClusterError, match=r"403.*secrets"):
        controller_pair(api, NAMESPACE, SECRET)


def _may(api: Api) -> bool:
    with contextlib.suppress(ClusterError):
        keep_secret(api, NAMESPACE, SECRET, lambda data: data)
        return True
    return False


def test_what_is_due_is_renewed_and_what_others_keep_there_stays(cluster: ApiServer) -> None:
    api = Api(cluster.client(ADMIN))
    month_ago = datetime.now(UTC) - timedelta(days=31)
    old = renewed({}, (SERVICE_NAME,), month_ago, "controller", "test")
    keep_secret(api, NAMESPACE, SECRET, lambda _: {**old.files, "theirs": b"x"})
    found = secret_certificates(api, NAMESPACE, SECRET, (SERVICE_NAME,), "controller")
    assert found.serving != old.serving
    assert found.bundle == old.bundle
    assert held(cluster) == {**found.files, "theirs": b"x"}
    version = cluster.call("GET", f"{PATHS['secrets']}/{SECRET}")[1]["metadata"]["resourceVersion"]
    secret_certificates(api, NAMESPACE, SECRET, (SERVICE_NAME,), "controller")
    assert cluster.call("GET", f"{PATHS['secrets']}/{SECRET}")[1]["metadata"]["resourceVersion"] == version


def test_a_damaged_ca_is_said_and_not_replaced(cluster: ApiServer) -> None:
    api = Api(cluster.client(ADMIN))
    keep_secret(api, NAMESPACE, SECRET, lambda _: {"ca-1.pem": b"rubbish"})
    with pytest.raises(SettingsError, match=f"Secret {NAMESPACE}/{SECRET}, ca-1.pem: cannot be read"):
        controller_pair(api, NAMESPACE, SECRET)
    assert held(cluster) == {"ca-1.pem": b"rubbish"}


def test_two_replicas_are_believed_by_an_agent_that_knows_the_config_map(cluster: ApiServer, tmp_path: Path) -> None:
    ports, running = [free_port(), free_port()], []
    try:
        for number, port in enumerate(ports):
            command = [*MEANT, "controller", "--kubernetes", "--kubeconfig", str(cluster.kubeconfig(ADMIN)),
                       "--namespace", NAMESPACE, "--listen", f"127.0.0.1:{port}",
                       "--state-dir", str(tmp_path / str(number))]  # fmt: skip
            with (tmp_path / f"log-{number}").open("wb") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=log))
        for port in ports:
            wait_for(lambda port=port: _listens(port), f"a replica listens, see {tmp_path}")
        _, published = cluster.call("GET", f"{PATHS['configmaps']}/meshbridge-ca")
        (tmp_path / "ca.crt").write_text(published["data"]["ca.crt"])
        projected = token(cluster, "meshbridge-agent", "agent")

        async def follow(port: int) -> None:
            client = ControllerClient(
                f"127.0.0.1:{port}", "node-a", lambda: projected, tmp_path / "ca.crt", SERVICE_NAME
            )
            updates = client.updates()
            async with asyncio.timeout(30):
                assert (await anext(updates)).revision > 0
            await updates.aclose()

        for port in ports:
            asyncio.run(follow(port))
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(20)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def configuration(kind: str, name: str) -> dict[str, Any]:
    def webhook(of: str, client: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": of, "failurePolicy": "Ignore", "sideEffects": "None", "admissionReviewVersions": ["v1"],
            "clientConfig": client, "rules": [],
        }  # fmt: skip

    return {
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": name},
        "webhooks": [
            webhook("a.meshbridge.io", {"service": {"name": "meshbridge-webhook", "namespace": NAMESPACE}}),
            webhook("b.meshbridge.io", {"service": {"name": "somebody-else", "namespace": NAMESPACE}}),
            webhook("c.meshbridge.io", {"url": "https://127.0.0.1:1/x"}),
        ],
    }  # fmt: skip


def test_a_webhooks_callers_are_told_whom_to_believe(cluster: ApiServer, tmp_path: Path) -> None:
    """The command: replicas share the Secret, and both configurations that name the Service get its CA."""
    kinds = ("ValidatingWebhookConfiguration", "MutatingWebhookConfiguration")
    made = [configuration(kind, "bypass.meshbridge.io") for kind in kinds]
    cluster.create(*made)
    port, running = free_port(), []
    command = [*MEANT, "webhook", "--kubeconfig", str(cluster.kubeconfig(ADMIN)), "--namespace", NAMESPACE,
               "--tls-secret", "meshbridge-webhook-tls", "--listen", f"127.0.0.1:{port}", "--linger", "0"]  # fmt: skip
    try:
        with (tmp_path / "log").open("wb") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path))
        wait_for(lambda: _listens(port), f"the webhook listens, see {tmp_path}")
        wait_for(lambda: bool(_bundle(cluster, kinds[0])), "the configurations are told")
        bundles = {_bundle(cluster, kind) for kind in kinds}
        assert len(bundles) == 1
        context = ssl.create_default_context(cadata=base64.b64decode(bundles.pop()).decode())
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            context.wrap_socket(plain, server_hostname=f"meshbridge-webhook.{NAMESPACE}.svc") as secured,
        ):
            assert secured.version() == "TLSv1.3"
        assert not trust_webhook(Api(cluster.client(ADMIN)), "not-there", (NAMESPACE, "meshbridge-webhook"), b"x")
    finally:
        for process in running:
            process.terminate()
            process.wait(20)
        cluster.delete(*made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"], "no key on a disk"


def _bundle(server: ApiServer, kind: str) -> str:
    path = f"/apis/admissionregistration.k8s.io/v1/{kind.lower()}s/bypass.meshbridge.io"
    of_us, of_others, by_url = (w["clientConfig"] for w in server.call("GET", path)[1]["webhooks"])
    assert "caBundle" not in of_others
    assert "caBundle" not in by_url
    found = of_us.get("caBundle", "")
    assert isinstance(found, str)
    return found
