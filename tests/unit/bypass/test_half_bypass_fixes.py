"""Fixes of half bypasses: applied, nothing breaks any more; and what makes a bypass unnecessary is said first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from meshbridge.bypass.fixes import Fix, advice, fixes
from meshbridge.bypass.inventory import inventory
from meshbridge.bypass.report import rows_of
from meshbridge.cli.bypass import command
from meshbridge.evaluation.batch import answer_lines
from meshbridge.evaluation.cluster import Cluster
from meshbridge.kube.objects import read_objects
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings

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


def rule(name: str, host: str, policy: str) -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: {name}, namespace: finance}}
spec: {{host: {host}, trafficPolicy: {policy}}}
---
"""


EXCLUDED = 'traffic.sidecar.istio.io/excludeInboundPorts: "8080,9090"'
LEDGER, CLIENT = pod("ledger", "10.0.0.1", EXCLUDED), pod("client", "10.0.0.2")


OWN_SIDECARS = replace(DEFAULT_MESH, own_sidecars=True)


def found(*texts: str, mesh: MeshSettings = DEFAULT_MESH) -> list[Fix]:
    documents = read_objects("".join(texts).encode(), "all.yaml").documents
    return fixes(inventory(documents, mesh=mesh), documents)


def applied(*texts: str, mesh: MeshSettings = DEFAULT_MESH) -> dict[str, Any]:
    return {fix.apply["kind"]: fix.apply for fix in found(*texts, mesh=mesh) if fix.apply}


def dumped(objects: dict[str, Any]) -> str:
    return "".join(f"{yaml.safe_dump(item)}---\n" for item in objects.values())


def test_a_server_that_does_not_see_its_ports_gets_one_rule_for_its_service() -> None:
    (rule,) = applied(NAMESPACE, LEDGER, CLIENT, SERVICE, STRICT, OPEN).values()
    assert rule["kind"] == "DestinationRule"
    assert rule["spec"]["host"] == "ledger.finance.svc.cluster.local"
    assert [item["port"]["number"] for item in rule["spec"]["trafficPolicy"]["portLevelSettings"]] == [80, 9090]


def test_by_its_address_it_gets_plaintext_from_istios_sidecars_and_mutual_tls_from_ours() -> None:
    texts = (NAMESPACE, LEDGER, CLIENT, STRICT, OPEN)
    assert found(*texts) == []
    authentication = applied(*texts, mesh=OWN_SIDECARS)["PeerAuthentication"]
    assert authentication["spec"] == {
        "selector": {"matchLabels": {"app": "ledger"}},
        "mtls": {"mode": "UNSET"},
        "portLevelMtls": {"8080": {"mode": "DISABLE"}, "9090": {"mode": "DISABLE"}},
    }


HEADLESS = SERVICE.replace("10.96.0.9", "None").replace("port: 80,", "port: 8080,").replace("name: http", "name: tcp")
MENDED = {
    "by its Service": ((SERVICE,), DEFAULT_MESH, "DestinationRule"),
    "by its headless Service, whatever PeerAuthentication says": ((HEADLESS,), DEFAULT_MESH, "DestinationRule"),
    "by a Service with a DestinationRule of somebody else": (
        (SERVICE, rule("mine", "ledger", "{connectionPool: {tcp: {maxConnections: 1}}}")),
        DEFAULT_MESH, "PeerAuthentication",
    ),
    "by a Service with a rule for all hosts of its namespace": (
        (SERVICE, rule("all", '"*.finance.svc.cluster.local"', "{tls: {mode: ISTIO_MUTUAL}}")),
        DEFAULT_MESH, "DestinationRule",
    ),
    "of sidecars that are ours": ((SERVICE,), OWN_SIDECARS, "PeerAuthentication"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "mesh", "kind"), MENDED.values(), ids=MENDED.keys())
def test_with_the_fixes_applied_nothing_is_left_to_fix(more: tuple[str, ...], mesh: MeshSettings, kind: str) -> None:
    texts = (NAMESPACE, LEDGER, CLIENT, STRICT, OPEN, *more)
    objects = applied(*texts, mesh=mesh)
    assert objects.keys() - {"AuthorizationPolicy"} == {kind}
    assert not any(fix.todo for fix in found(*texts, mesh=mesh))
    assert found(*texts, dumped(objects), mesh=mesh) == []


@pytest.mark.parametrize("mesh", [DEFAULT_MESH, OWN_SIDECARS], ids=["istio", "own"])
def test_a_port_that_is_excluded_later_is_added_to_the_object_there_is(mesh: MeshSettings) -> None:
    one = pod("ledger", "10.0.0.1", 'traffic.sidecar.istio.io/excludeInboundPorts: "8080"')
    first = applied(NAMESPACE, one, CLIENT, SERVICE, STRICT, mesh=mesh)
    both = applied(NAMESPACE, LEDGER, CLIENT, SERVICE, STRICT, mesh=mesh)
    assert first != both
    assert applied(NAMESPACE, LEDGER, CLIENT, SERVICE, STRICT, dumped(first), mesh=mesh) == both


def test_a_rule_that_says_something_else_is_named_and_not_doubled() -> None:
    ways = found(NAMESPACE, LEDGER, CLIENT, SERVICE, rule("mine", "ledger", "{tls: {mode: ISTIO_MUTUAL}}"))
    assert all(fix.apply is None for fix in ways)
    assert any("add to DestinationRule finance/mine" in fix.todo for fix in ways)


def test_an_authentication_of_the_pod_is_named_and_not_doubled() -> None:
    own = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: mine, namespace: finance}
spec: {selector: {matchLabels: {app: ledger}}, mtls: {mode: STRICT}}
---
"""
    (eight, nine) = found(NAMESPACE, LEDGER, CLIENT, own, OPEN, mesh=OWN_SIDECARS)
    assert eight.apply is nine.apply is None
    assert "add to PeerAuthentication finance/mine: portLevelMtls: {8080: {mode: DISABLE}}" in eight.todo


def test_a_rule_that_switches_tls_off_where_it_is_demanded_is_a_person_to_decide_on() -> None:
    plain = rule("plain", "ledger", "{tls: {mode: DISABLE}}")
    ways = found(NAMESPACE, pod("ledger", "10.0.0.1"), CLIENT, SERVICE, STRICT, plain)
    assert all(fix.apply is None for fix in ways)
    assert "ISTIO_MUTUAL for the port (DestinationRule finance/plain)" in ways[0].todo


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
    assert {item["kind"] for item in yaml.safe_load_all(result.output)} == {"DestinationRule"}


def test_clients_of_which_nothing_says_that_they_use_the_port_are_left_alone() -> None:
    assert found(NAMESPACE, LEDGER, CLIENT, STRICT) == []


STRANGER = """
apiVersion: v1
kind: Pod
metadata: {name: stranger, namespace: finance, labels: {app: stranger}}
spec: {containers: [{name: app}]}
status: {podIP: 10.0.0.9}
---
"""
MINE = rule("mine", "ledger", "{connectionPool: {tcp: {maxConnections: 1}}}")
HALF = (NAMESPACE, LEDGER, CLIENT, STRANGER, SERVICE, MINE, STRICT)


def let_in(*texts: str) -> set[str]:
    """Whom the kernel lets in to the ledger's port 8080; everybody where nothing is compensated."""
    known = inventory(read_objects("".join(texts).encode(), "all.yaml").documents)
    (ledger,) = [workload for workload in known.workloads if workload.name == "ledger"]
    (row,) = [row for row in rows_of(ledger, known) if row.ports.spans[0][0] == 8080]
    assert row.compensation is not None
    everybody = set(known.sources()) - {"finance/ledger"}
    return set(row.compensation.allowed) if row.compensation.enforced else everybody


def test_what_is_opened_to_plaintext_stays_closed_to_strangers() -> None:
    """STRICT let in who has the mesh's identity; the fix switches it off on the port."""
    objects = applied(*HALF)
    assert list(objects) == ["AuthorizationPolicy", "PeerAuthentication"]
    assert let_in(*HALF) == {"finance/client"}
    assert let_in(*HALF, dumped(objects)) == {"finance/client"}
    assert let_in(*HALF, dumped({"only": objects["PeerAuthentication"]})) == {"finance/client"}
    somebodys = objects["PeerAuthentication"]
    somebodys["metadata"]["labels"] = {}
    assert "finance/stranger" in let_in(*HALF, dumped({"only": somebodys}))


@pytest.mark.parametrize("policy", [OPEN, ""], ids=["by namespace", "by STRICT alone"])
def test_the_kernel_lets_in_the_same_whether_the_fix_is_applied_or_not(policy: str) -> None:
    texts = (*HALF, policy)
    for more in ((), (dumped(applied(*texts)),)):
        documents = read_objects("".join((*texts, *more)).encode(), "all.yaml").documents
        flows = [{"src": f"finance/{name}", "dst": "10.0.0.1", "port": 8080} for name in ("client", "stranger")]
        answers = answer_lines(Cluster(documents), [json.dumps(flow).encode() for flow in flows])
        assert [answer.record["kernel"] for answer in answers] == ["PASS", "DROP"]


def test_where_plaintext_was_let_in_before_nobody_is_kept_out() -> None:
    permissive = tuple(text for text in HALF if text is not STRICT)
    assert set(applied(*permissive)) == {"PeerAuthentication"}
