"""``meshbridge.io/bypass: auto`` excludes what is proved to lose nothing unaccepted, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbridge.bypass.automatic import Automatic, automatic_exclusions, with_automatic
from meshbridge.bypass.halves import Delivered
from meshbridge.bypass.inventory import Inventory, inventory
from meshbridge.bypass.report import report
from meshbridge.cli.bypass import command
from meshbridge.kube.objects import read_objects
from meshbridge.policy.capture import PortClass
from meshbridge.policy.model import Direction

NOW = datetime(2026, 11, 24, tzinfo=UTC)
IN, OUT = "traffic.sidecar.istio.io/excludeInboundPorts", "traffic.sidecar.istio.io/excludeOutboundPorts"


def deployment(annotations: str = "") -> str:
    return f"""
apiVersion: apps/v1
kind: Deployment
metadata: {{name: api, namespace: finance}}
spec:
  template:
    metadata: {{labels: {{app: api}}, annotations: {{meshbridge.io/bypass: auto{annotations}}}}}
    spec: {{containers: [{{name: app, ports: [{{containerPort: 8080}}, {{containerPort: 9090}}]}}]}}
---
"""


NAMESPACE = """
apiVersion: v1
kind: Namespace
metadata: {name: finance, labels: {istio-injection: enabled}}
---
"""
ONLY_GET = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: get, namespace: finance}
spec:
  action: ALLOW
  rules: [{to: [{operation: {ports: ["8080"], methods: [GET]}}]}, {to: [{operation: {ports: ["9090"]}}]}]
---
"""
CLIENT = """
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: finance}
spec: {containers: [{name: app}, {name: istio-proxy}]}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: finance}
spec: {selector: {app: api}, ports: [{name: http, port: 8080}, {name: metrics, port: 9090}]}
---
"""
STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: finance}
spec: {mtls: {mode: STRICT}}
---
"""
DISABLED = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: metrics, namespace: finance}
spec: {selector: {matchLabels: {app: api}}, portLevelMtls: {"9090": {mode: DISABLE}}}
---
"""


def policy(spec: str) -> str:
    return f"""
apiVersion: meshbridge.io/v1alpha1
kind: BypassPolicy
metadata: {{name: allowed, namespace: finance}}
spec: {spec}
---
"""


ENCRYPTION = policy("{accept: [encryption], reason: internal}")


def read(*texts: str) -> Inventory:
    return inventory(read_objects("".join(texts).encode(), "all.yaml").documents, now=NOW)


def automatic(*texts: str) -> Automatic:
    found = read(NAMESPACE, *texts)
    (workload,) = [w for w in found.workloads if w.name == "api"]
    return automatic_exclusions(workload, found)


def test_without_an_acceptance_nothing_is_excluded_and_each_port_says_why() -> None:
    found = automatic(deployment())
    assert found.annotations == ()
    assert [(refused.port, refused.why) for refused in found.refused] == [
        (8080, "it would lose encryption, which nobody accepted"),
        (9090, "it would lose encryption, which nobody accepted"),
    ]


def test_ports_whose_losses_are_accepted_are_excluded_and_others_stay() -> None:
    found = automatic(deployment(), ONLY_GET, ENCRYPTION)
    assert found.annotations == ((IN, "9090"),)
    (refused,) = found.refused
    assert (refused.port, refused.why) == (8080, "it would lose authorization, which nobody accepted")


def test_a_port_that_would_break_for_a_client_stays() -> None:
    found = automatic(deployment(), CLIENT, ENCRYPTION)
    assert found.annotations == ()
    assert all("would break for finance/client" in refused.why for refused in found.refused)
    assert automatic(deployment(), CLIENT, ENCRYPTION, DISABLED).annotations == ((IN, "9090"),)


def test_a_route_that_no_policy_allows_stays() -> None:
    found = automatic(
        deployment(), policy("{routes: [{direction: inbound, ports: [9090]}], accept: [encryption], reason: r}")
    )
    assert found.annotations == ((IN, "9090"),)
    assert found.refused[0].why == "no BypassPolicy allows this route"


def test_what_the_user_excluded_stays_excluded() -> None:
    found = automatic(deployment(f', {IN}: "8080"'), ENCRYPTION)
    assert dict(found.annotations)[IN] == "8080,9090"


def test_an_include_list_leaves_nothing_to_exclude() -> None:
    found = automatic(deployment(', traffic.sidecar.istio.io/includeInboundPorts: "8080"'), ENCRYPTION)
    assert found.annotations == ()
    assert "have no effect" in found.refused[0].why


def test_outbound_ports_are_those_that_a_policy_names() -> None:
    both = "{routes: [{direction: outbound, ports: [443]}], accept: [encryption, registry-only], reason: r}"
    assert dict(automatic(deployment(), policy(both)).annotations) == {OUT: "443"}
    one = "{routes: [{direction: outbound, ports: [443]}], accept: [registry-only], reason: r}"
    assert automatic(deployment(), policy(one)).annotations == ()


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.sampled_from(["encryption", "l7", "telemetry", "registry-only"])),
    st.sets(st.sampled_from([ONLY_GET, CLIENT, STRICT, DISABLED])),
    st.sampled_from(["", "routes: [{direction: inbound}], ", "routes: [{direction: inbound, ports: [9090]}], "]),
)
def test_afterwards_nothing_is_lost_that_nobody_accepted_and_nothing_breaks(
    accept: set[str], objects: set[str], routes: str
) -> None:
    allowed = policy(f"{{{routes}accept: [{', '.join(sorted(accept))}], reason: r}}") if accept else ""
    after = report(with_automatic(read(NAMESPACE, deployment(), allowed, *sorted(objects))))
    for row in after.rows:
        if row.pod == "finance/api" and row.port_class is PortClass.EXCLUDED and row.direction is Direction.INGRESS:
            assert row.ruling is not None
            assert row.ruling.allowed
            assert not row.ruling.unaccepted
    assert not any(half.delivery.outcome is Delivered.BROKEN for half in after.halves if half.delivery.half)


def test_plan_shows_what_auto_comes_to(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(NAMESPACE + deployment() + ONLY_GET + ENCRYPTION)
    result = CliRunner().invoke(command, ["plan", "-f", str(tmp_path)])
    assert result.exit_code == 0
    assert f"auto: finance/api gets {IN}: 9090" in result.output
    assert "auto: finance/api ingress 8080 stays with Envoy: it would lose authorization" in result.output
