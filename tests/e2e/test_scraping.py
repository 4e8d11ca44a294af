"""A real Prometheus scrapes past the sidecars, and the kernel keeps out who is not Prometheus."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import topology
import yaml
from images import PROMETHEUS
from installed import Installed
from kubectl import Kubectl, Object, wait_until
from workloads import NO_ANSWER, address_of, ask, namespace, pod, service, service_account, wait_for_code

INPUTS = Path(__file__).parent.parent.parent / "manifests/inputs"
NODE_1, NODE_2 = (each.name for each in topology.NODES)
NAMESPACES = ("finance", "marketing", "monitoring")
EXCLUDED = {"traffic.sidecar.istio.io/excludeInboundPorts": "8080"}
PAST_OUTBOUND = {"traffic.sidecar.istio.io/excludeOutboundPorts": "8080"}
TARGET = "ledger"
CONFIGURATION = f"""
global: {{scrape_interval: 1s}}
scrape_configs:
- job_name: targets
  dns_sd_configs: [{{names: [{TARGET}.finance.svc.cluster.local], type: A, port: 8080, refresh_interval: 2s}}]
"""


def prometheus() -> list[Object]:
    """The user's Deployment with what the fragment leaves out; nothing that it says is changed."""
    deployment: Object = yaml.safe_load((INPUTS / "prometheus-deployment.yaml").read_text())
    deployment["spec"]["selector"] = {"matchLabels": {"app": "prometheus"}}
    spec = deployment["spec"]["template"]["spec"]
    completed = {
        "prometheus": {
            "image": PROMETHEUS, "imagePullPolicy": "Never",
            "args": ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/tmp/data"],
            "volumeMounts": [{"name": "config", "mountPath": "/etc/prometheus"}],
            "readinessProbe": {"httpGet": {"path": "/-/ready", "port": 9090}, "periodSeconds": 1},
        },
        "istio-proxy": {"image": "auto", "imagePullPolicy": "Never"},
    }  # fmt: skip
    for container in spec["containers"]:
        container.update(completed[container["name"]])
    spec.update(
        {"volumes": [{"name": "config", "configMap": {"name": "prometheus"}}], "terminationGracePeriodSeconds": 0}
    )
    configuration = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "prometheus", "namespace": "monitoring"},
        "data": {"prometheus.yml": CONFIGURATION},
    }  # fmt: skip
    return [configuration, deployment]


@pytest.fixture(scope="module")
def mesh(installed: Installed, kubectl: Kubectl) -> Iterator[None]:
    kubectl.apply(*(namespace(each, injected=True) for each in NAMESPACES))
    try:
        kubectl.apply(INPUTS / "ccnp-prometheus-scrape-access.yaml")
        kubectl.apply(
            {
                "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
                "metadata": {"name": "strict", "namespace": "finance"}, "spec": {"mtls": {"mode": "STRICT"}},
            },
            {
                "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "metrics", "namespace": "finance"},
                "spec": {"action": "ALLOW", "rules": [{
                    "from": [{"source": {"namespaces": ["monitoring"]}}], "to": [{"operation": {"ports": ["8080"]}}]}]},
            },
            service_account(TARGET, "finance"), service(TARGET, "finance", {"http-metrics": 8080}, clusterIP="None"),
            pod(TARGET, "finance", ports=[8080], node=NODE_2, service_account=TARGET, annotations=EXCLUDED,
                labels={"prometheus.io/scrape": "true"}),
            pod("alertmanager", "monitoring", node=NODE_1, annotations=PAST_OUTBOUND),
            pod("client", "marketing", node=NODE_1, annotations=PAST_OUTBOUND),
            *prometheus(),
        )  # fmt: skip
        kubectl.roll_out("deployment/prometheus", "monitoring")
        for each in NAMESPACES:
            kubectl("wait", "pod", "--all", "-n", each, "--for=condition=Ready", "--timeout=120s", timeout_s=130)
        yield
    finally:
        for each in NAMESPACES:
            kubectl.delete("namespace", each)
        kubectl.delete("ccnp", "allow-prometheus-scrape")


def query(kubectl: Kubectl, expression: str) -> list[Any]:
    """What Prometheus answers."""
    text = kubectl.exec(
        "deployment/prometheus", "monitoring", "curl", "-fsSG", "--data-urlencode", f"query={expression}",
        "http://127.0.0.1:9090/api/v1/query", container="prometheus",
    )  # fmt: skip
    found: list[Any] = json.loads(text)["data"]["result"]
    return found


@pytest.mark.usefixtures("mesh")
def test_prometheus_scrapes_past_both_sidecars(kubectl: Kubectl) -> None:
    address = address_of(kubectl, TARGET, "finance")

    def scraped() -> int:
        counts = query(kubectl, f'count_over_time(e2e_up{{instance="{address}:8080"}}[5m])')
        return int(counts[0]["value"][1]) if counts else 0

    def accepted() -> int:
        stats = "stats?filter=^listener.0.0.0.0_15006.downstream_cx_total$"
        text = kubectl.exec(TARGET, "finance", "pilot-agent", "request", "GET", stats, container="istio-proxy")
        return int(text.partition(": ")[2])

    wait_until(lambda: scraped() > 1, "Prometheus has scraped its target", 60, lambda: str(query(kubectl, "up")))
    before, connections = scraped(), accepted()
    wait_until(lambda: scraped() >= before + 3, "Prometheus goes on scraping", 60, lambda: str(query(kubectl, "up")))
    assert accepted() == connections


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize(("ns", "client"), [("marketing", "client"), ("monitoring", "alertmanager")])
def test_who_is_not_prometheus_is_dropped_at_the_excluded_port(
    installed: Installed, kubectl: Kubectl, ns: str, client: str
) -> None:
    dropped = installed.dropped(NODE_2) + installed.dropped(NODE_1)
    answer = ask(kubectl, client, ns, f"http://{address_of(kubectl, TARGET, 'finance')}:8080/metrics", timeout_s=2)
    assert answer.code == NO_ANSWER, answer
    assert installed.dropped(NODE_2) + installed.dropped(NODE_1) > dropped


@pytest.mark.usefixtures("mesh")
def test_the_bypass_is_listed_with_what_stands_in_for_envoy(installed: Installed) -> None:
    listed = installed.json_on_node(NODE_2, "bypass", "list", "-n", "finance")["bypasses"]
    mine = [each for each in listed if each["pod"] == f"finance/{TARGET}" and each["direction"] == "ingress"]
    assert mine, listed
    assert all(each["compensation"]["enforced"] for each in mine), mine


def test_an_excluded_port_lets_in_only_whom_the_mesh_would_have(
    installed: Installed, kubectl: Kubectl, make_namespace: Callable[..., str]
) -> None:
    """No network policy at all: what Envoy kept out, the kernel keeps out."""
    ns, other = make_namespace("server", injected=True), make_namespace("other", injected=True)
    kubectl.apply(
        {
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "strict", "namespace": ns}, "spec": {"mtls": {"mode": "STRICT"}},
        },
        {
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "own", "namespace": ns},
            "spec": {"rules": [{"from": [{"source": {"namespaces": [ns]}}]}]},
        },
        pod("server", ns, ports=[8080], node=NODE_2, annotations=EXCLUDED),
        pod("client", ns, node=NODE_1), pod("client", other, node=NODE_1),
    )  # fmt: skip
    for each in (ns, other):
        kubectl("wait", "pod", "--all", "-n", each, "--for=condition=Ready", "--timeout=120s", timeout_s=130)
    url = f"http://{address_of(kubectl, 'server', ns)}:8080/"
    wait_for_code(kubectl, ns, url, "200")
    answer = ask(kubectl, "client", other, url, timeout_s=2)
    assert answer.code in (NO_ANSWER, "503"), answer
    drops = installed.drops(NODE_2, "--to-pod", f"{ns}/server") + installed.drops(NODE_1, "--to-pod", f"{ns}/server")
    assert {each["flow"]["source"]["namespace"] for each in drops} == {other}
    assert ask(kubectl, "client", ns, url).code == "200"


def test_a_half_bypass_is_found_and_mended(
    installed: Installed, kubectl: Kubectl, make_namespace: Callable[..., str]
) -> None:
    """istio/istio#30311, by the objects that MeshBridge proposes."""
    ns = make_namespace("half", injected=True)
    kubectl.apply(
        service("server", ns, {"http": 8080}), pod("server", ns, ports=[8080], node=NODE_2, annotations=EXCLUDED),
        pod("client", ns, node=NODE_1),
    )  # fmt: skip
    kubectl("wait", "pod", "--all", "-n", ns, "--for=condition=Ready", "--timeout=120s", timeout_s=130)
    wait_for_code(kubectl, ns, "http://server:8080/", "503")
    proposed = [each for each in yaml.safe_load_all(installed.meshbridge("bypass", "fix", "-n", ns)) if each]
    assert [each["kind"] for each in proposed] == ["DestinationRule"]
    kubectl.apply(*proposed)
    wait_for_code(kubectl, ns, "http://server:8080/", "200")
