"""The user's own files, applied as they are to a cluster with MeshBridge: who gets through, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import topology
from installed import Installed
from kubectl import Kubectl
from tokens import Issuer
from workloads import NO_ANSWER, address_of, ask, namespace, pod, service, service_account, wait_for_code

INPUTS = Path(__file__).parent.parent.parent / "manifests/inputs"
ORIGINALS = Path(__file__).parent.parent.parent.parent / "shared/inputs"
SERVER, CLIENT = "transaction-service", "client"
NAMESPACES = ("finance", "marketing", "monitoring")
URL = f"http://{SERVER}.finance:8080/api/v1/process"
NODE_1, NODE_2 = (each.name for each in topology.NODES)
ISSUER = Issuer.create()


@pytest.fixture(scope="module")
def mesh(installed: Installed, kubectl: Kubectl) -> Iterator[None]:
    """transaction-service on node 2, clients of finance and marketing on node 1; policies are there before them."""
    kubectl.apply(*(namespace(each, injected=True) for each in NAMESPACES))
    try:
        for each in ("cilium-l4-policy.yaml", "ccnp-prometheus-scrape-access.yaml", "istio-l7-policy.yaml"):
            kubectl.apply(INPUTS / each)
        kubectl.apply(
            {
                "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
                "metadata": {"name": "issuer", "namespace": "finance"},
                "spec": {"jwtRules": [{"issuer": ISSUER.name, "jwks": ISSUER.jwks}]},
            },
            service_account(SERVER, "finance"), service(SERVER, "finance", {"http": 8080}),
            pod(SERVER, "finance", ports=[8080], node=NODE_2, service_account=SERVER),
            pod(CLIENT, "finance", node=NODE_1), pod(CLIENT, "marketing", node=NODE_1),
        )  # fmt: skip
        for each in ("finance", "marketing"):
            kubectl("wait", "pod", "--all", "-n", each, "--for=condition=Ready", "--timeout=120s", timeout_s=130)
        wait_for_code(kubectl, "finance", URL, "403")
        yield
    finally:
        for each in NAMESPACES:
            kubectl.delete("namespace", each)
        kubectl.delete("ccnp", "allow-prometheus-scrape")


def connections_of_its_sidecar(kubectl: Kubectl) -> int:
    """How many istio-proxy of the server has ever accepted for the application."""
    text = kubectl.exec(
        SERVER, "finance", "pilot-agent", "request", "GET", "stats?filter=^listener.0.0.0.0_15006.downstream_cx_total$",
        container="istio-proxy",
    )  # fmt: skip
    return int(text.partition(": ")[2])


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="the originals are not beside this repository")
def test_the_files_are_the_users_own() -> None:
    for each in INPUTS.iterdir():
        assert each.read_bytes() == (ORIGINALS / each.name).read_bytes()


@pytest.mark.usefixtures("mesh")
def test_another_namespace_is_dropped_before_envoy(installed: Installed, kubectl: Kubectl) -> None:
    dropped, accepted = installed.dropped(NODE_2), connections_of_its_sidecar(kubectl)
    token = {"authorization": f"Bearer {ISSUER.token(scope='transactions')}"}
    for url in (URL, f"http://{address_of(kubectl, SERVER, 'finance')}:8080/api/v1/process"):
        answer = ask(kubectl, CLIENT, "marketing", url, method="POST", headers=token)
        assert answer.code in (NO_ANSWER, "503"), answer
    assert connections_of_its_sidecar(kubectl) == accepted >= 1  # the one of finance's client, which stays open
    assert installed.dropped(NODE_2) >= dropped + 2
    drops = installed.drops(NODE_2, "--to-pod", f"finance/{SERVER}")
    assert drops
    assert {"marketing"} == {each["flow"]["source"]["namespace"] for each in drops}


@pytest.mark.usefixtures("mesh")
def test_its_own_namespace_passes_by_claims(kubectl: Kubectl) -> None:
    good, other = ({"authorization": f"Bearer {ISSUER.token(scope=each)}"} for each in ("transactions", "reports"))
    assert ask(kubectl, CLIENT, "finance", URL, method="POST", headers=good).code == "200"
    assert ask(kubectl, CLIENT, "finance", URL, method="POST", headers=other).code == "403"
    assert ask(kubectl, CLIENT, "finance", URL, method="POST").code == "403"
    assert ask(kubectl, CLIENT, "finance", URL, headers=good).code == "403"
