"""What is dropped where it is sent past Envoy, by what is known of how the destination takes it in."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policycast import API, LEDGER, WEB, numbered, policies

from meshbridge.identity.model import IpFamily, TcpPorts, Workload
from meshbridge.policy.capture import (
    LAST_PORT,
    SIDECAR,
    Capture,
    OutboundBypass,
    PortClass,
    sidecar_excluding,
)
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Direction, Verdict
from meshbridge.policy.precedence import DropReason

V4, V6 = IpFamily.IPV4, IpFamily.IPV6
PORTS = st.integers(0, LAST_PORT)


@given(st.lists(st.tuples(PORTS, PORTS).map(sorted), max_size=4), PORTS)
def test_a_sidecar_with_exclusions_captures_all_the_rest(spans: list[list[int]], port: int) -> None:
    excluded = [TcpPorts(V4, first, last) for first, last in spans]
    classes = sidecar_excluding(excluded)
    inside = any(first <= port <= last for first, last in spans)
    assert classes[V4].at(port) is (PortClass.EXCLUDED if inside else SIDECAR.at(port))
    assert classes[V6] == SIDECAR
    assert classes[V4].ranges[0].first == 0
    assert classes[V4].ranges[-1].last == LAST_PORT


def authorization(action: str, rule: str) -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: p, namespace: shop}}
spec: {{selector: {{matchLabels: {{app: api}}}}, action: {action}, rules: [{rule}]}}
"""


STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: m, namespace: shop}
spec: {mtls: {mode: STRICT}}
"""
FROM_SHOP = "{from: [{source: {namespaces: [shop]}}]}"
GET = "{to: [{operation: {methods: [GET]}}]}"
BY_ADDRESS = "{when: [{key: destination.ip, values: [10.1.0.2]}]}"
OTHER_DOMAIN = replace(DEFAULT_MESH, trust_domain="td.example")
IN_OTHER_DOMAIN = "{from: [{source: {principals: [td.example/ns/shop/sa/default]}}]}"
PASSES, DROPS = True, False
CASES: dict[str, tuple[str, Workload, bool, bool, MeshSettings]] = {
    "an ALLOW of another namespace": (authorization("ALLOW", FROM_SHOP), LEDGER, PASSES, DROPS, DEFAULT_MESH),
    "an ALLOW of its own namespace": (authorization("ALLOW", FROM_SHOP), WEB, PASSES, PASSES, DEFAULT_MESH),
    "a DENY of its own namespace": (authorization("DENY", FROM_SHOP), WEB, PASSES, DROPS, DEFAULT_MESH),
    "an ALLOW by method: nobody looks where Envoy is passed by": (
        authorization("ALLOW", GET), WEB, PASSES, DROPS, DEFAULT_MESH),
    "a DENY of all": (authorization("DENY", "{}"), WEB, DROPS, DROPS, DEFAULT_MESH),
    "STRICT": (STRICT, WEB, PASSES, PASSES, DEFAULT_MESH),
    "an ALLOW by the destination's address, which only the destination knows": (
        authorization("ALLOW", BY_ADDRESS), WEB, PASSES, PASSES, DEFAULT_MESH),
    "an ALLOW by name in the mesh's own trust domain": (
        authorization("ALLOW", IN_OTHER_DOMAIN), WEB, PASSES, PASSES, OTHER_DOMAIN),
}  # fmt: skip


@pytest.mark.parametrize(("text", "source", "captured", "excluded", "mesh"), CASES.values(), ids=CASES.keys())
def test_what_a_destination_refuses(
    text: str, source: Workload, captured: bool, excluded: bool, mesh: MeshSettings
) -> None:
    found = policies(text, mesh)
    numbering = numbered(found)
    own, server = (numbering.addresses[pod.addresses[0]].identity for pod in (source, API))
    identities = {n: replace(p, trust_domain=mesh.trust_domain) for n, p in numbering.identities.items()}
    sends = Capture(outbound={V4: (OutboundBypass(8080, 8080),)})
    for ports, passes in ((), captured), ((TcpPorts(V4, 8080, 8080),), excluded):
        classes = sidecar_excluding(ports)
        compiler = Compiler(identities, {server: classes})
        leaving = evaluate(compiler.endpoint(source, found, sends).map(Direction.EGRESS, V4), server, 6, 8080)
        arriving = compiler.endpoint(API, found, replace(Capture.sidecar(), inbound=classes))
        assert leaving.passes is passes
        if not passes:
            assert leaving.deny_reason == DropReason.COMPENSATION
            assert evaluate(arriving.map(Direction.INGRESS, V4), own, 6, 8080).verdict is Verdict.DENY
