"""Fixes of half bypasses: applied, nothing breaks any more; and what makes a bypass unnecessary is said first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from meshbridge.bypass.fixes import Fix, advice, fixes
from meshbridge.bypass.inventory import inventory
from meshbridge.cli.bypass import command
from meshbridge.kube.objects import read_objects

NAMESPACE = """
apiVersion: v1
kind: Namespace
metadata: {name: finance}
---
"""
STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: finance}
spec: {mtls: {mode: STRICT}}
---
"""
OPEN = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: open, namespace: finance}
spec: {selector: {matchLabels: {app: ledger}}, rules: [{from: [{source: {namespaces: [finance]}}]}]}
---
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: ledger, namespace: finance}
spec:
  clusterIP: 10.96.0.9
  selector: {app: ledger}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: metrics, port: 9090}]
---
"""


def pod(name: str, address: str, annotations: str = "", probe: str = "") -> str:
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: finance, labels: {{app: {name}}}, annotations: {{{annotations}}}}}
spec:
  containers:
  - {{name: app, ports: [{{containerPort: 8080}}, {{containerPort: 9090}}]{probe}}}
  - {{name: istio-proxy}}
status: {{podIP: {address}}}
---
"""


EXCLUDED = 'traffic.sidecar.istio.io/excludeInboundPorts: "8080,9090"'
LEDGER, CLIENT = pod("ledger", "10.0.0.1", EXCLUDED), pod("client", "10.0.0.2")


def found(*texts: str) -> list[Fix]:
    documents = read_objects("".join(texts).encode(), "all.yaml").documents
    return fixes(inventory(documents), documents)


def applied(*texts: str) -> dict[str, Any]:
    return {fix.apply["kind"]: fix.apply for fix in found(*texts) if fix.apply}


def test_a_server_that_does_not_see_its_ports_gets_one_rule_for_its_service_and_one_for_its_address() -> None:
    objects = applied(NAMESPACE, LEDGER, CLIENT, SERVICE, STRICT, OPEN)
    rule, authentication = objects["DestinationRule"], objects["PeerAuthentication"]
    assert rule["spec"]["host"] == "ledger.finance.svc.cluster.local"
    assert [item["port"]["number"] for item in rule["spec"]["trafficPolicy"]["portLevelSettings"]] == [80, 9090]
    assert authentication["spec"] == {
        "selector": {"matchLabels": {"app": "ledger"}},
        "mtls": {"mode": "UNSET"},
        "portLevelMtls": {"8080": {"mode": "DISABLE"}, "9090": {"mode": "DISABLE"}},
    }


def test_with_the_fixes_applied_nothing_is_left_to_fix() -> None:
    texts = (NAMESPACE, LEDGER, CLIENT, STRICT, OPEN)
    documents = "---\n".join(yaml.safe_dump(item) for item in applied(*texts).values())
    assert found(*texts)
    assert found(*texts, documents) == []


def test_a_rule_that_is_there_is_named_and_not_doubled() -> None:
    rule = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: mine, namespace: finance}
spec: {host: ledger}
---
"""
    ways = found(NAMESPACE, LEDGER, CLIENT, SERVICE, rule)
    assert "DestinationRule" not in {fix.apply["kind"] for fix in ways if fix.apply}
    assert any("add to DestinationRule finance/mine" in fix.todo for fix in ways)


def test_an_authentication_of_the_pod_is_named_and_not_doubled() -> None:
    own = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: mine, namespace: finance}
spec: {selector: {matchLabels: {app: ledger}}, mtls: {mode: STRICT}}
---
"""
    (eight, nine) = found(NAMESPACE, LEDGER, CLIENT, own, OPEN)
    assert eight.apply is nine.apply is None
    assert "add to PeerAuthentication finance/mine: portLevelMtls: {8080: {mode: DISABLE}}" in eight.todo


def test_a_client_that_excludes_alone_is_a_person_to_decide_on() -> None:
    client = pod("client", "10.0.0.2", 'traffic.sidecar.istio.io/excludeOutboundPorts: "9090"')
    server = pod("ledger", "10.0.0.1", 'traffic.sidecar.istio.io/excludeInboundPorts: "15099"')
    (fix,) = found(NAMESPACE, server, client, STRICT)
    assert fix.apply is None
    assert 'excludeInboundPorts: "15099,9090"' in fix.todo
    assert "capture the port at finance/client again" in fix.todo


UNNECESSARY = {
    "scraped": (pod("a", "10.0.0.1", EXCLUDED + ', prometheus.io/scrape: "true", prometheus.io/port: "9090"'), [9090]),
    "not scraped": (pod("a", "10.0.0.1", EXCLUDED + ', prometheus.io/port: "9090"'), []),
    "scraped elsewhere": (pod("a", "10.0.0.1", EXCLUDED + ', prometheus.io/scrape: "true"'), []),
    "probed": (pod("a", "10.0.0.1", EXCLUDED, ", livenessProbe: {httpGet: {port: 8080}}"), [8080]),
    "probed, and not rewritten": (
        pod("a", "10.0.0.1", EXCLUDED + ', sidecar.istio.io/rewriteAppHTTPProbers: "false"',
            ", livenessProbe: {httpGet: {port: 8080}}"), [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "ports"), UNNECESSARY.values(), ids=UNNECESSARY.keys())
def test_what_makes_a_bypass_unnecessary(text: str, ports: list[int]) -> None:
    documents = read_objects((NAMESPACE + text).encode(), "all.yaml").documents
    assert [item.port for item in advice(inventory(documents))] == ports


def test_the_command_prints_objects_that_apply_and_says_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(NAMESPACE + LEDGER + CLIENT + SERVICE + STRICT + OPEN)
    result = CliRunner().invoke(command, ["fix", "-f", str(tmp_path)])
    assert result.exit_code == 0
    assert {item["kind"] for item in yaml.safe_load_all(result.output)} == {"DestinationRule", "PeerAuthentication"}


def test_clients_of_which_nothing_says_that_they_use_the_port_are_left_alone() -> None:
    assert found(NAMESPACE, LEDGER, CLIENT, STRICT) == []
