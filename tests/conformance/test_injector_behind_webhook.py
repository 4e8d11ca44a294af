"""Istio's real injector behind our webhook: what ours writes into annotations is what istio-init is started with.

A real API server asks both, ours first by its name; the injector is istiod's, with the templates of Istio's own charts.
"""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ADMIN, REPO, ApiServer, free_port, missing, running_api_server, wait_for
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from envoy_world import ROOT_NAMESPACE
from istiod_server import istiod_at
from test_webhook import AUTO, IN, SHOP, Webhook, apply, pod, policy

from meshbridge.bypass.capture import capture_state
from meshbridge.identity.model import IpFamily, Workload
from meshbridge.policy.capture import PortClass
from meshbridge.policy.model import Document
from meshbridge.policy.parse import parse

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

ACCEPTED = {
    "selector": {"matchLabels": {"accepted": "yes"}},
    "routes": [{"direction": "inbound", "kinds": ["excludeInboundPorts"], "ports": [8080]}],
    "accept": ["telemetry", "encryption", "identity", "l7", "registry-only"],
    "reason": "a test",
}


def certificate(directory: Path) -> dict[str, Path]:
    """One for istiod's HTTPS port on the loopback, which signs itself."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "istiod")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("istiod")])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1)).not_valid_after(now + timedelta(hours=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    chain = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    found = {}
    for option, content in (("tlsCertFile", chain), ("tlsKeyFile", private), ("caCertFile", chain)):
        found[option] = directory / f"{option}.pem"
        found[option].write_bytes(content)
    return found


def of_istios_charts(istio: Path) -> dict[tuple[str, str], dict[str, Any]]:
    command = [istio / "bin/istioctl", "manifest", "generate", "--manifests", istio / "share/manifests"]
    text = subprocess.run([*command, "--set", "profile=minimal"], capture_output=True, text=True, check=True).stdout
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text) if each}


@pytest.fixture(scope="module")
def cluster(third_party: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webhook]:
    istio = third_party("istio")
    if reason := missing():
        pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)
    charts = of_istios_charts(istio)
    with ExitStack() as stack:
        api = stack.enter_context(running_api_server(tmp_path_factory.mktemp("api"), {}))
        root = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ROOT_NAMESPACE}}
        crds = [yaml.safe_load(path.read_text()) for path in sorted((REPO / "deploy/crds").glob("*.yaml"))]
        api.create(root, SHOP, charts["ConfigMap", "istio"], charts["ConfigMap", "istio-sidecar-injector"], *crds)
        directory, port = tmp_path_factory.mktemp("istiod"), free_port()
        files = certificate(directory)
        stack.enter_context(
            istiod_at(
                istio / "bin/pilot-discovery", api.kubeconfig(ADMIN), directory, f"--httpsAddr=127.0.0.1:{port}",
                *(f"--{option}={path}" for option, path in files.items()),
            )
        )  # fmt: skip
        injector = charts["MutatingWebhookConfiguration", "istio-sidecar-injector"]
        for hook in injector["webhooks"]:
            bundle = base64.b64encode(files["caCertFile"].read_bytes()).decode()
            path = hook["clientConfig"]["service"]["path"]
            hook["clientConfig"] = {"url": f"https://127.0.0.1:{port}{path}", "caBundle": bundle}
        api.create(injector)
        found = Webhook(api, tmp_path_factory.mktemp("webhook"))
        wait_for(lambda: api.call("GET", "/apis/meshbridge.io/v1alpha1/bypasspolicies")[0] == 200, "ours are served")
        api.create(policy("scrape", ACCEPTED))
        found.start()
        stack.callback(found.stop)
        api.create(*found.configurations())
        wait_for(lambda: bool(applied(found, pod("probe", {IN: "8080"}), dry_run=True)[1]), "our webhook is asked")
        wait_for(lambda: arguments(applied(found, pod("probe"), dry_run=True)[0]) != {}, "the injector is asked")
        yield found


def applied(webhook: Webhook, each: dict[str, Any], *, dry_run: bool = False) -> tuple[dict[str, Any], list[str]]:
    each["spec"]["serviceAccountName"] = "default"  # which another part of a whole cluster would write
    code, made, warnings = apply(webhook, each, dry_run=dry_run)
    assert code == 201, made.get("message")
    return made, warnings


def arguments(made: dict[str, Any]) -> dict[str, str]:
    """What istio-init is started with, by flag."""
    for each in made["spec"].get("initContainers", ()):
        if each["name"] == "istio-init":
            given = each["args"]
            return dict(zip(given[1::2], given[2::2], strict=False))
    return {}


def accepted(name: str, annotations: dict[str, str]) -> dict[str, Any]:
    return pod(name, annotations, {"app": name, "accepted": "yes"})


def state_at(made: dict[str, Any], port: int) -> PortClass:
    """What our agent computes of the pod that came out."""
    metadata = made["metadata"]
    parsed = parse(Document("Pod", "v1", metadata["namespace"], metadata["name"], made))
    (workload,) = (each for each in parsed.objects if isinstance(each, Workload))
    return capture_state(workload).inbound(intended=True)[IpFamily.IPV4].at(port)


def test_auto_reaches_istio_inits_arguments(cluster: Webhook) -> None:
    made, warnings = applied(cluster, accepted("auto", AUTO))
    assert made["metadata"]["annotations"][IN] == "8080"
    assert "8080" in arguments(made)["-d"].split(",")
    assert "istio-proxy" in {each["name"] for each in [*made["spec"]["containers"], *made["spec"]["initContainers"]]}
    assert state_at(made, 8080) is PortClass.EXCLUDED
    assert warnings == []


def test_a_port_nobody_accepts_stays_with_envoy_and_its_author_is_told(cluster: Webhook) -> None:
    made, warnings = applied(cluster, pod("kept", AUTO))
    assert IN not in made["metadata"]["annotations"]
    assert "8080" not in arguments(made)["-d"].split(",")
    assert state_at(made, 8080) is PortClass.CAPTURED
    assert any("inbound TCP 8080 stays with Envoy" in line for line in warnings)


def test_a_pod_that_asks_for_nothing_is_injected_as_ever(cluster: Webhook) -> None:
    made, warnings = applied(cluster, accepted("plain", {}))
    assert arguments(made)["-d"] == "15090,15021,15020"
    assert warnings == []


def test_with_our_webhook_away_pods_start_injected_and_nothing_is_excluded(cluster: Webhook) -> None:
    cluster.stop()
    try:
        made, _ = applied(cluster, accepted("away", AUTO))
        assert arguments(made)["-d"] == "15090,15021,15020"
        assert state_at(made, 8080) is PortClass.CAPTURED
    finally:
        cluster.start()


def test_the_injector_comes_after_us_by_name(cluster: Webhook) -> None:
    server: ApiServer = cluster.server
    _, found = server.call("GET", "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations")
    assert [each["metadata"]["name"] for each in found["items"]] == ["bypass.meshbridge.io", "istio-sidecar-injector"]


def test_our_own_server_gets_the_meshs_certificates_and_no_envoy(cluster: Webhook) -> None:
    """By the labels and annotations of deploy/istio, which have the injector take its template ``grpc-agent``."""
    patch = yaml.safe_load((REPO / "deploy/istio/authz-with-mesh-certificates.yaml").read_text())["spec"]["template"]
    each = pod("authz", patch["metadata"]["annotations"], patch["metadata"]["labels"])
    each["spec"]["containers"][0] |= {"name": "authz", "args": patch["spec"]["containers"][0]["args"]}
    made, _ = applied(cluster, each)
    containers = {container["name"]: container for container in made["spec"]["containers"]}
    assert arguments(made) == {}
    environment = {variable["name"]: variable.get("value") for variable in containers["istio-proxy"]["env"]}
    assert (environment["DISABLE_ENVOY"], environment["OUTPUT_CERTS"]) == ("true", "/var/lib/istio/data")
    mounted = {mount["mountPath"] for mount in containers["authz"]["volumeMounts"]}
    files = {argument.partition("=")[2] for argument in containers["authz"]["args"] if argument.endswith(".pem")}
    assert {str(Path(file).parent) for file in files} <= mounted
    assert made["metadata"]["labels"]["security.istio.io/tlsMode"] == "istio"
