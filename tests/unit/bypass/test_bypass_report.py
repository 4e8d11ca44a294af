"""The report on whole clusters of YAML: rows, guarantees, compensation, half bypasses, isolation, the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from meshbridge.bypass.guarantees import Fate, GuaranteeKind
from meshbridge.bypass.halves import Delivered
from meshbridge.bypass.inventory import inventory
from meshbridge.bypass.report import Report, Row, report
from meshbridge.cli.bypass import command
from meshbridge.identity.model import IpFamily, TcpPorts
from meshbridge.kube.objects import read_objects
from meshbridge.policy.capture import PortClass
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Direction

INPUTS = Path(__file__).parents[3] / "manifests/inputs"

NAMESPACES = """
apiVersion: v1
kind: Namespace
metadata: {name: finance, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: monitoring, labels: {istio-injection: enabled}}
---
"""


def pod(
    key: str, address: str, annotations: str = "{}", labels: str = "", ports: str = "8080", proxy: bool = True
) -> str:
    namespace, _, name = key.partition("/")
    listed = ", ".join(f"{{containerPort: {port}}}" for port in ports.split(","))
    sidecar = "  - {name: istio-proxy}\n" if proxy else ""
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}{labels}}}, annotations: {annotations}}}
spec:
  containers:
  - {{name: app, ports: [{listed}]}}
{sidecar}status: {{podIP: {address}}}
---
"""


EXCLUDED = '{traffic.sidecar.istio.io/excludeInboundPorts: "8080"}'
STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: finance}
spec: {mtls: {mode: STRICT}}
---
"""
ONLY_MONITORING = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: scrape, namespace: finance}
spec:
  action: ALLOW
  rules:
  - from: [{source: {namespaces: [monitoring]}}]
    to: [{operation: {ports: ["8080"]}}]
---
"""
PROMETHEUS = pod(
    "monitoring/prometheus", "10.0.1.1", '{traffic.sidecar.istio.io/excludeOutboundPorts: "8080"}', ports="9090"
)


def of(*texts: str) -> Report:
    return report(inventory(read_objects("".join(texts).encode(), "all.yaml").documents))


def row(found: Report, pod_name: str, direction: Direction = Direction.INGRESS) -> Row:
    rows = [r for r in found.rows if (r.pod, r.direction, r.port_class) == (pod_name, direction, PortClass.EXCLUDED)]
    assert len(rows) == 1
    return rows[0]


def fates(found: Row) -> dict[GuaranteeKind, list[Fate]]:
    kept: dict[GuaranteeKind, list[Fate]] = {}
    for guarantee in found.guarantees:
        kept.setdefault(guarantee.kind, []).append(guarantee.fate)
    return kept


def test_strict_and_a_namespace_rule_become_addresses() -> None:
    found = of(NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED), pod("finance/web", "10.0.0.2"),
               pod("finance/plain", "10.0.0.3", proxy=False), PROMETHEUS, STRICT, ONLY_MONITORING)  # fmt: skip
    api = row(found, "finance/api")
    assert fates(api) == {
        GuaranteeKind.PEER_CERTIFICATE: [Fate.WEAKENED],
        GuaranteeKind.ENCRYPTION: [Fate.LOST],
        GuaranteeKind.AUTHORIZATION: [Fate.WEAKENED],
        GuaranteeKind.TELEMETRY: [Fate.WEAKENED],
    }
    assert api.compensation is not None
    assert api.compensation.allowed == ("monitoring/prometheus",)
    assert set(api.compensation.refused) == {"finance/web", "finance/plain", "another node", "world"}
    assert "weaker" in api.with_fate(Fate.WEAKENED)[0].stands_in


def test_strict_alone_lets_in_mesh_workloads_only() -> None:
    found = of(NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED), pod("finance/web", "10.0.0.2"),
               pod("finance/plain", "10.0.0.3", proxy=False), STRICT)  # fmt: skip
    compensation = row(found, "finance/api").compensation
    assert compensation is not None
    assert compensation.allowed == ("finance/web",)
    assert "finance/plain" in compensation.refused


def test_where_nothing_is_left_to_enforce_it_says_none_and_why() -> None:
    compensation = row(of(NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED)), "finance/api").compensation
    assert compensation is not None
    assert not compensation.enforced
    assert compensation.summary.startswith("none: mTLS is PERMISSIVE and no AuthorizationPolicy")


RULES = {
    "ports and addresses stay": (
        'rules: [{from: [{source: {ipBlocks: ["10.0.0.0/8"]}}]}]', "ALLOW", Fate.KEPT, "the kernel",
    ),
    "an identity becomes an address": (
        "rules: [{from: [{source: {namespaces: [monitoring]}}]}]", "ALLOW", Fate.WEAKENED, "by address",
    ),
    "an allow that asks for a path is lost, and refuses": (
        'rules: [{to: [{operation: {paths: ["/metrics"]}}]}]', "ALLOW", Fate.LOST, "nobody sees paths",
    ),
    "a deny that asks for a path is kept, and wider": (
        'rules: [{to: [{operation: {paths: ["/metrics"]}}]}]', "DENY", Fate.KEPT, "wider",
    ),
    "an allow of nothing stays": ("selector: {}", "ALLOW", Fate.KEPT, "drops everything"),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "action", "fate", "stands_in"), RULES.values(), ids=RULES.keys())
def test_fate_of_an_authorization_rule(spec: str, action: str, fate: Fate, stands_in: str) -> None:
    policy = f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: p, namespace: finance}}
spec: {{action: {action}, {spec}}}
---
"""
    found = row(of(NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED), policy), "finance/api")
    (guarantee,) = [g for g in found.guarantees if g.kind is GuaranteeKind.AUTHORIZATION]
    assert guarantee.fate is fate
    assert stands_in in guarantee.stands_in
    assert guarantee.origin is not None
    assert guarantee.origin.file == "all.yaml"


def test_a_rule_for_another_port_is_not_named() -> None:
    other = ONLY_MONITORING.replace('"8080"', '"9999"')
    found = row(of(NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED), other), "finance/api")
    assert GuaranteeKind.AUTHORIZATION not in fates(found)
    assert found.compensation is not None
    assert found.compensation.allowed == ()


def test_tokens_are_a_lost_guarantee_and_refuse_nothing() -> None:
    tokens = """
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: finance}
spec: {jwtRules: [{issuer: "https://issuer", jwksUri: "https://issuer/keys"}]}
---
"""
    found = row(of(NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED), tokens), "finance/api")
    assert fates(found)[GuaranteeKind.JWT] == [Fate.LOST]
    assert found.compensation is not None
    assert not found.compensation.enforced


def test_a_refused_mesh_policy_closes_the_port_and_is_named() -> None:
    broken = ONLY_MONITORING.replace("namespaces: [monitoring]", "namespaces: 7")
    found = row(of(NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED), PROMETHEUS, broken), "finance/api")
    assert GuaranteeKind.REFUSED_POLICY in fates(found)
    assert found.compensation is not None
    assert found.compensation.allowed == ()


def test_probes_of_the_own_node_are_reported_as_weakened() -> None:
    probed = pod("finance/api", "10.0.0.1", EXCLUDED).replace(
        "{name: app,", "{name: app, readinessProbe: {tcpSocket: {port: 8080}},"
    )
    compensation = row(of(NAMESPACES, probed, STRICT), "finance/api").compensation
    assert compensation is not None
    assert compensation.weakened


def test_outbound_says_which_destinations_refuse() -> None:
    closed = ONLY_MONITORING.replace("[monitoring]", "[finance]")
    found = of(NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED), PROMETHEUS, closed)
    outbound = row(found, "monitoring/prometheus", Direction.EGRESS)
    assert outbound.compensation is not None
    assert outbound.compensation.refused == ("finance/api:8080",)
    assert "1 known ports refuse" in outbound.compensation.summary
    assert fates(outbound)[GuaranteeKind.REGISTRY_ONLY] == [Fate.LOST], "nobody says what the mesh is"
    open_to_all = row(
        of(NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED), PROMETHEUS), "monitoring/prometheus", Direction.EGRESS
    )
    assert open_to_all.compensation is not None
    assert open_to_all.compensation.summary.startswith("none: no known destination's policy")


def test_outbound_does_not_speak_for_pods_of_other_nodes() -> None:
    text = NAMESPACES + pod("finance/api", "10.0.0.1", EXCLUDED) + PROMETHEUS
    known = inventory(read_objects(text.encode(), "cluster.yaml").documents)
    elsewhere = replace(known, others={"finance/ledger": known.peer(known.workloads[0])})
    outbound = row(report(elsewhere), "monitoring/prometheus", Direction.EGRESS)
    assert outbound.compensation is not None
    assert "others drop what they refuse where it arrives" in outbound.compensation.summary


def test_outbound_names_pods_of_other_nodes_that_exclude_the_port_and_refuse() -> None:
    closed = ONLY_MONITORING.replace("[monitoring]", "[finance]")
    text = NAMESPACES + pod("finance/api", "10.0.0.1", EXCLUDED) + PROMETHEUS + closed
    known = inventory(read_objects(text.encode(), "cluster.yaml").documents)
    server = known.peer(next(w for w in known.workloads if w.key == "finance/api"))
    here = replace(known, workloads=tuple(w for w in known.workloads if w.key != "finance/api"))
    for excluded, refused in ((8080, ("finance/api:8080",)), (9999, ())):
        seen = replace(server, excluded=(TcpPorts(IpFamily.IPV4, excluded, excluded),))
        outbound = row(report(replace(here, others={"finance/api": seen})), "monitoring/prometheus", Direction.EGRESS)
        assert outbound.compensation is not None
        assert outbound.compensation.refused == refused


def test_client_excludes_and_server_captures_breaks_under_strict() -> None:
    found = of(NAMESPACES, pod("finance/api", "10.0.0.1"), PROMETHEUS, STRICT)
    (half,) = found.halves
    assert (half.server, half.port, half.clients) == ("finance/api", 8080, ("monitoring/prometheus",))
    assert half.delivery.outcome is Delivered.BROKEN
    assert "resets" in half.delivery.why


def test_server_excludes_and_client_captures_sends_a_tls_hello() -> None:
    service = """
apiVersion: v1
kind: Service
metadata: {name: api, namespace: finance}
spec: {selector: {app: api}, ports: [{port: 80, targetPort: 8080}]}
---
"""
    found = of(NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED), PROMETHEUS, service)
    (half,) = found.halves
    assert (half.via, half.clients) == ("Service finance/api:80", ("monitoring/prometheus",))
    assert "TLS hello" in half.delivery.why


def service(ports: str, cluster_ip: str = "10.96.0.9") -> str:
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: api, namespace: finance}}
spec: {{clusterIP: {cluster_ip}, selector: {{app: api}}, ports: [{ports}]}}
---
"""


def rule(policy: str, host: str = "api.finance.svc.cluster.local", namespace: str = "istio-system") -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: r, namespace: {namespace}}}
spec: {{host: "{host}", trafficPolicy: {policy}}}
---
"""


OFF, MUTUAL = "{tls: {mode: DISABLE}}", "{tls: {mode: ISTIO_MUTUAL}}"
OF_80 = "{portLevelSettings: [{port: {number: 80}, tls: {mode: DISABLE}}]}"
HTTP, TCP = "{name: http, port: 8080}", "{name: tcp, port: 8080}"
NOT_MTLS = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: api, namespace: finance}
spec: {selector: {matchLabels: {app: api}}, portLevelMtls: {"8080": {mode: DISABLE}}}
---
"""
SCRAPED = '{prometheus.io/scrape: "true", prometheus.io/port: "8080"}'
WEB, SCRAPER = pod("finance/web", "10.0.0.2", ports="1"), pod("monitoring/prometheus", "10.0.1.1", ports="9090")
SERVER, EXCLUDING = pod("finance/api", "10.0.0.1"), pod("finance/api", "10.0.0.1", EXCLUDED)
ASKING = pod("finance/api", "10.0.0.1", SCRAPED)
BY_SERVICE = "Service finance/api:8080"

HALVES: dict[str, tuple[tuple[str, ...], list[tuple[str, str]]]] = {
    "by its Service, what excludes the port gets a TLS hello": (
        (EXCLUDING, WEB, service(HTTP)), [(BY_SERVICE, "broken")]),
    "by its address plaintext, where a policy says that it is used": (
        (EXCLUDING, SCRAPER, STRICT, ONLY_MONITORING), [("", "plaintext")]),
    "a DestinationRule that switches TLS off mends it": (
        (EXCLUDING, WEB, service(HTTP), rule(OFF)), [(BY_SERVICE, "plaintext")]),
    "also of that port alone": (
        (EXCLUDING, WEB, service("{name: http, port: 80, targetPort: 8080}"), rule(OF_80)),
        [("Service finance/api:80", "plaintext")]),
    "not of another": ((EXCLUDING, WEB, service(HTTP), rule(OF_80)), [(BY_SERVICE, "broken")]),
    "not one of a namespace that does not concern it": (
        (EXCLUDING, WEB, service(HTTP), rule(OFF, namespace="monitoring")), [(BY_SERVICE, "broken")]),
    "a PeerAuthentication mends it": ((EXCLUDING, WEB, service(HTTP), NOT_MTLS), [(BY_SERVICE, "plaintext")]),
    "but not for a headless Service, whose clients go by the label": (
        (EXCLUDING, WEB, service(TCP, "None"), NOT_MTLS), [(BY_SERVICE, "broken")]),
    "a headless Service's TCP port is also what its pods' addresses are": (
        (EXCLUDING, SCRAPER, service(TCP, "None"), STRICT, ONLY_MONITORING), [("", "broken"), (BY_SERVICE, "broken")]),
    "an HTTP port is not": (
        (EXCLUDING, SCRAPER, service(HTTP, "None"), STRICT, ONLY_MONITORING),
        [(BY_SERVICE, "broken"), ("", "plaintext")]),
    "TLS that is switched off meets STRICT": (
        (SERVER, WEB, service(HTTP), STRICT, rule(OFF)), [(BY_SERVICE, "broken")]),
    "and is nobody's trouble where both are taken": ((SERVER, WEB, service(HTTP), rule(OFF)), []),
    "a scrape by address meets STRICT though nobody excludes anything": (
        (ASKING, SCRAPER, STRICT), [("", "broken")]),
    "also beside a Service": ((ASKING, SCRAPER, service(HTTP), STRICT), [("", "broken")]),
    "not where both are taken": ((ASKING, SCRAPER), []),
    "not of a headless Service's TCP port": ((ASKING, SCRAPER, service(TCP, "None"), STRICT), []),
    "of other pods nothing says that they scrape": ((ASKING, WEB, STRICT), []),
    "of other pods that a policy lets in it does": (
        (ASKING, WEB, STRICT, ONLY_MONITORING.replace("[monitoring]", "[finance]")), [("", "broken")]),
    "without asking to be scraped, where a policy names the port and no Service leads there": (
        (SERVER, SCRAPER, STRICT, ONLY_MONITORING), [("", "broken")]),
    "but not beside a Service": ((SERVER, SCRAPER, STRICT, ONLY_MONITORING, service(HTTP)), []),
    "what a Sidecar leaves out is not called": (
        (SERVER, WEB, service(HTTP), STRICT, """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: finance}
spec: {egress: [{hosts: ["istio-system/*"]}]}
---
"""), []),
}  # fmt: skip


@pytest.mark.parametrize(("texts", "expected"), HALVES.values(), ids=HALVES.keys())
def test_what_clients_will_meet(texts: tuple[str, ...], expected: list[tuple[str, str]]) -> None:
    halves = of(NAMESPACES, *texts).halves
    assert [(half.via, half.delivery.outcome.value) for half in halves] == expected
    assert all(half.delivery.fix for half in halves if half.delivery.outcome is Delivered.BROKEN)


def test_what_makes_the_clients_envoy_send_it_is_named() -> None:
    (half,) = of(NAMESPACES, SERVER, WEB, service(HTTP), STRICT, rule(OFF)).halves
    assert half.delivery.origin is not None
    assert (half.delivery.origin.kind, half.delivery.origin.policy) == ("DestinationRule", "istio-system/r")
    assert not half.delivery.half


def test_sidecars_of_ours_send_mutual_tls_by_address_and_read_no_rules() -> None:
    documents = read_objects(
        "".join((NAMESPACES, EXCLUDING, SCRAPER, STRICT, ONLY_MONITORING, rule(OFF))).encode(), "a"
    )
    known = inventory(documents.documents, mesh=replace(DEFAULT_MESH, own_sidecars=True))
    (half,) = report(known).halves
    assert (half.via, half.delivery.outcome) == ("", Delivered.BROKEN)


def test_clients_a_policy_keeps_away_are_no_half_bypass() -> None:
    closed = ONLY_MONITORING.replace("[monitoring]", "[finance]")
    assert of(NAMESPACES, pod("finance/api", "10.0.0.1"), PROMETHEUS, STRICT, closed).halves == ()


def test_the_inputs_clusterwide_policy_isolates_every_other_port() -> None:
    policy = (INPUTS / "ccnp-prometheus-scrape-access.yaml").read_text() + "\n---\n"
    scraped = pod("finance/api", "10.0.0.1", labels=', prometheus.io/scrape: "true"', ports="8080,9000")
    found = of(NAMESPACES, scraped, pod("finance/web", "10.0.0.2"), pod("monitoring/prometheus", "10.0.1.1"), policy)
    (isolation,) = found.isolations
    assert isolation.pod == "finance/api"
    assert isolation.policy == "CiliumClusterwideNetworkPolicy allow-prometheus-scrape"
    ports = {port.port: port for port in isolation.ports}
    assert ports[8080].kept == ("monitoring/prometheus",)
    assert not ports[8080].closed
    assert ports[9000].closed
    assert "9000/TCP stops working" in str(isolation)


def test_what_another_policy_closes_anyway_is_not_laid_at_its_door() -> None:
    deny_all = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: none, namespace: finance}
spec: {podSelector: {}, policyTypes: [Ingress]}
---
"""
    policy = (INPUTS / "ccnp-prometheus-scrape-access.yaml").read_text() + "\n---\n"
    scraped = pod("finance/api", "10.0.0.1", labels=', prometheus.io/scrape: "true"')
    assert of(NAMESPACES, scraped, PROMETHEUS, deny_all, policy).isolations == ()


def test_the_report_does_not_depend_on_the_order_of_objects() -> None:
    texts = [NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED), PROMETHEUS, STRICT, ONLY_MONITORING]
    documents = read_objects("".join(texts).encode(), "all.yaml").documents
    assert report(inventory(documents)) == report(inventory(documents[::-1]))


def test_a_wide_exclusion_is_one_row_and_named_ports_have_their_own() -> None:
    only = pod("finance/api", "10.0.0.1", '{traffic.sidecar.istio.io/includeInboundPorts: "9999"}', ports="8080,9000")
    rows = [r for r in of(NAMESPACES, only).rows if r.port_class is PortClass.EXCLUDED]
    singles = [str(r.ports) for r in rows if len(r.ports) == 1]
    assert singles == ["8080", "9000"]
    assert len(rows) == 3


# The command line


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    text = "".join([NAMESPACES, pod("finance/api", "10.0.0.1", EXCLUDED), PROMETHEUS, STRICT, ONLY_MONITORING])
    (tmp_path / "all.yaml").write_text(text)
    return tmp_path


def test_list_shows_a_line_per_bypass(manifests: Path) -> None:
    result = run("list", "-f", str(manifests))
    assert result.exit_code == 0
    header, *lines = result.output.splitlines()
    assert header.split()[:4] == ["POD", "PORTS", "DIRECTION", "ROUTE"]
    assert any("finance/api" in line and "excludeInboundPorts" in line for line in lines)
    assert any("monitoring/prometheus" in line and "excludeOutboundPorts" in line for line in lines)


def test_list_of_a_namespace_and_as_json(manifests: Path) -> None:
    result = run("list", "-n", "finance", "-f", str(manifests), "-o", "json")
    record: dict[str, Any] = json.loads(result.output)
    assert set(record) == {"bypasses", "findings", "half_bypasses", "isolations", "not_starting", "automatic", "proofs"}
    (bypass,) = record["bypasses"]
    assert set(bypass) == {
        "pod", "direction", "families", "protocol", "ports", "destinations", "class", "route", "guarantees",
        "compensation", "ruling",
    }  # fmt: skip
    assert (bypass["pod"], bypass["ports"], bypass["class"]) == ("finance/api", [[8080, 8080]], "excluded")
    assert bypass["compensation"]["allowed"] == ["monitoring/prometheus"]
    assert {g["fate"] for g in bypass["guarantees"]} == {"lost", "weakened"}


def test_show_names_the_guarantee_and_what_stands_in(manifests: Path) -> None:
    result = run("show", "finance/api", "-f", str(manifests))
    assert result.exit_code == 0
    assert "AuthorizationPolicy finance/scrape spec.rules[0]" in result.output
    assert "source.namespace by address" in result.output
    assert "lets in    monitoring/prometheus" in result.output


def test_show_of_an_unknown_pod_says_so(manifests: Path) -> None:
    result = run("show", "finance/none", "-f", str(manifests))
    assert result.exit_code == 1
    assert "nothing is known of this pod" in str(result.exception)


def test_plan_exits_3_when_something_breaks(tmp_path: Path, manifests: Path) -> None:
    assert run("plan", "-f", str(manifests)).exit_code == 4
    text = NAMESPACES + pod("finance/api", "10.0.0.1") + PROMETHEUS + STRICT
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/all.yaml").write_text(text)
    result = run("plan", "-f", str(tmp_path / "broken"))
    assert result.exit_code == 3
    assert "half bypass: monitoring/prometheus → finance/api:8080: broken" in result.output


def test_plan_of_the_inputs_names_what_prometheus_loses() -> None:
    result = run("plan", "-f", str(INPUTS / "prometheus-deployment.yaml"))
    assert result.exit_code == 4
    assert "8080,9090" in result.output
    assert "9090" in result.output


def test_plan_names_pods_that_never_start(tmp_path: Path) -> None:
    bad = pod("finance/api", "10.0.0.1", '{traffic.sidecar.istio.io/excludeInboundPorts: "090"}')
    (tmp_path / "all.yaml").write_text(NAMESPACES + bad)
    result = run("plan", "-f", str(tmp_path))
    assert result.exit_code == 3
    assert "finance/api is refused or never starts" in result.output
    assert "'090'" in result.output


BAD_FILES = {
    "no YAML": b"a: [b",
    "no mapping": b"- 1\n",
    "invalid UTF-8": b"kind: \xff\xfe\n",
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    result = run("list", "-f", str(tmp_path))
    assert result.exit_code == 1
    assert "bad.yaml" in str(result.exception)


def test_names_from_manifests_cannot_forge_lines(tmp_path: Path) -> None:
    bad = pod("finance/api", "10.0.0.1", '{traffic.sidecar.istio.io/excludeInboundPorts: "80\\n! forged"}')
    (tmp_path / "all.yaml").write_text(NAMESPACES + bad)
    output = run("plan", "-f", str(tmp_path)).output
    assert not any(line.startswith("! forged") for line in output.splitlines())


def test_registry_only_is_kept_by_address_where_the_mesh_is_known_to_be() -> None:
    documents = read_objects(f"{NAMESPACES}{PROMETHEUS}".encode(), "m.yaml").documents
    found = report(inventory(documents, mesh=MeshSettings(registry_only=True)))
    outbound = row(found, "monitoring/prometheus", Direction.EGRESS)
    assert fates(outbound)[GuaranteeKind.REGISTRY_ONLY] == [Fate.WEAKENED]
    assert outbound.compensation is not None
    assert outbound.compensation.summary == "kernel: drops whom no registry knows"
    anybody = report(inventory(documents, mesh=MeshSettings()))
    assert GuaranteeKind.REGISTRY_ONLY not in fates(row(anybody, "monitoring/prometheus", Direction.EGRESS))
