"""What the kernel makes of mesh policies: the early deny on captured ports, compensation on excluded ones."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from policycast import AGENT, API, CONTESTED, LEDGER, NODE, PRIVATE, WEB, WEB6, WORLD, compiled, decide, policies

from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.policy.capture import AppProtocol, Capture, PortClass, PortClasses
from meshbridge.policy.lowering import own_principal
from meshbridge.policy.model import Direction, Judge, Verdict
from meshbridge.policy.precedence import DropReason

ALLOW, OPEN, DENY = Verdict.ALLOW, Verdict.NEEDS_L7, Verdict.DENY
HTTP, TCP, AUTO = AppProtocol.HTTP, AppProtocol.TCP, AppProtocol.AUTO


def authorization(action: str, rules: str, name: str = "p") -> str:
    return f"""
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: shop}}
spec: {{selector: {{matchLabels: {{app: api}}}}, action: {action}, rules: {rules}}}
"""


def mtls(mode: str) -> str:
    return f"""
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: m, namespace: shop}}
spec: {{mtls: {{mode: {mode}}}}}
"""


IN_10 = "{from: [{source: {ipBlocks: [10.0.0.0/8]}}]}"
NOT_10 = "{from: [{source: {notIpBlocks: [10.0.0.0/8]}}]}"
BY_NAME = "{from: [{source: {principals: [cluster.local/ns/shop/sa/default]}}]}"
NOT_BY_NAME = "{from: [{source: {notPrincipals: ['*']}}]}"
GET = "{to: [{operation: {methods: [GET]}}]}"
PORT = "{to: [{operation: {ports: ['8080']}}]}"
PORT_GET = "{to: [{operation: {ports: ['8080'], methods: [GET]}}]}"

CAPTURED: dict[str, tuple[str, AppProtocol, Workload | str, Verdict]] = {
    "no policy restricts nothing": ("", AUTO, WEB, ALLOW),
    "an ALLOW without rules denies everybody": (authorization("ALLOW", "[]"), AUTO, WEB, DENY),
    "a rule without conditions allows everybody": (authorization("ALLOW", "[{}]"), AUTO, WORLD, ALLOW),
    "an address inside the block is allowed": (authorization("ALLOW", f"[{IN_10}]"), AUTO, WEB, ALLOW),
    "an address outside the block is dropped early": (authorization("ALLOW", f"[{IN_10}]"), AUTO, WORLD, DENY),
    "IPv4 blocks never match IPv6": (authorization("ALLOW", f"[{IN_10}]"), AUTO, WEB6, DENY),
    "notIpBlocks": (authorization("ALLOW", f"[{NOT_10}]"), AUTO, WEB, DENY),
    "a DENY by address drops": (authorization("DENY", f"[{IN_10}]"), AUTO, PRIVATE, DENY),
    "a DENY by address leaves the others": (authorization("DENY", f"[{IN_10}]"), AUTO, WORLD, ALLOW),
    "a name never denies by itself: any source may present it": (
        authorization("ALLOW", f"[{BY_NAME}]"), AUTO, LEDGER, OPEN),
    "a DENY by name is left to Envoy": (authorization("DENY", f"[{BY_NAME}]"), AUTO, WEB, OPEN),
    "a DENY of the nameless is left to Envoy": (authorization("DENY", f"[{NOT_BY_NAME}]"), AUTO, WORLD, OPEN),
    "an ALLOW by method on HTTP is left to Envoy": (authorization("ALLOW", f"[{GET}]"), HTTP, WEB, OPEN),
    "an ALLOW by method on TCP is gone, so everybody is denied": (authorization("ALLOW", f"[{GET}]"), TCP, WEB, DENY),
    "an ALLOW by method on a sniffed port is left to Envoy": (authorization("ALLOW", f"[{GET}]"), AUTO, WEB, OPEN),
    "a DENY by method on HTTP is left to Envoy": (authorization("DENY", f"[{GET}]"), HTTP, WEB, OPEN),
    "a DENY by method on TCP is a DENY of all": (authorization("DENY", f"[{GET}]"), TCP, WEB, DENY),
    "a DENY by method on a sniffed port is left to Envoy": (authorization("DENY", f"[{GET}]"), AUTO, WEB, OPEN),
    "an ALLOW for the port": (authorization("ALLOW", f"[{PORT}]"), AUTO, WORLD, ALLOW),
    "a DENY for port and method on HTTP": (authorization("DENY", f"[{PORT_GET}]"), HTTP, WORLD, OPEN),
    "a certain DENY beats an open ALLOW": (
        authorization("ALLOW", f"[{GET}]") + authorization("DENY", f"[{IN_10}]", "q"), HTTP, WEB, DENY),
    "one matching rule of several is enough": (authorization("ALLOW", f"[{GET}, {IN_10}]"), HTTP, WEB, ALLOW),
    "AUDIT has no effect": (authorization("AUDIT", "[{}]"), AUTO, WEB, ALLOW),
    "CUSTOM is somebody else's answer": (
        authorization("CUSTOM, provider: {name: opa}", "[{}]"), AUTO, WEB, OPEN),
    "CUSTOM that cannot match asks nobody": (
        authorization("CUSTOM, provider: {name: opa}", f"[{IN_10}]"), AUTO, WORLD, ALLOW),
    "remoteIpBlocks on HTTP depend on a header": (
        authorization("ALLOW", "[{from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]}]"), HTTP, WORLD, OPEN),
    "remoteIpBlocks on TCP are the peer's address": (
        authorization("ALLOW", "[{from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]}]"), TCP, WORLD, DENY),
    "destination.ip is the pod's own address": (
        authorization("ALLOW", "[{when: [{key: destination.ip, values: [10.1.0.2]}]}]"), AUTO, WORLD, ALLOW),
    "another destination.ip never matches": (
        authorization("ALLOW", "[{when: [{key: destination.ip, values: [10.1.0.3]}]}]"), AUTO, WORLD, DENY),
    "SNI is not known before Envoy": (
        authorization("ALLOW", "[{when: [{key: connection.sni, values: [a.b]}]}]"), TCP, WORLD, OPEN),
    "STRICT is left to Envoy": (mtls("STRICT"), AUTO, WORLD, OPEN),
    "PERMISSIVE restricts nothing": (mtls("PERMISSIVE"), AUTO, WORLD, ALLOW),
    "a refused mesh policy is left to Envoy": (
        authorization("ALLOW", "[{from: [{source: {nonsense: [x]}}]}]"), AUTO, WEB, OPEN),
    "a certain DENY stands beside a refused policy": (
        authorization("ALLOW", "[{nonsense: 1}]") + authorization("DENY", f"[{IN_10}]", "q"), AUTO, WEB, DENY),
    "a refused policy may be the ALLOW that is missing": (
        authorization("ALLOW", "[{nonsense: 1}]") + authorization("ALLOW", f"[{IN_10}]", "q"), AUTO, WORLD, OPEN),
}  # fmt: skip


@pytest.mark.parametrize(("text", "protocol", "source", "expected"), CAPTURED.values(), ids=CAPTURED.keys())
def test_on_a_captured_port(text: str, protocol: AppProtocol, source: Workload | str, expected: Verdict) -> None:
    capture = Capture.sidecar(protocols={8080: protocol})
    destination = API if source is not WEB6 else _with_ipv6()
    assert decide(policies(text), source, destination, ("TCP", 8080), capture=capture).verdict is expected


def _with_ipv6() -> Workload:

    return replace(API, addresses=(*API.addresses, ip_address("fd00:1::2")))


EXCLUDED: dict[str, tuple[str, Workload | str, Verdict]] = {
    "no policy restricts nothing": ("", WORLD, ALLOW),
    "a name the source has is allowed": (authorization("ALLOW", f"[{BY_NAME}]"), WEB, ALLOW),
    "a name the source has not is dropped": (authorization("ALLOW", f"[{BY_NAME}]"), LEDGER, DENY),
    "the world has no name": (authorization("ALLOW", f"[{BY_NAME}]"), WORLD, DENY),
    "a DENY of the nameless drops the world": (authorization("DENY", f"[{NOT_BY_NAME}]"), WORLD, DENY),
    "a DENY of the nameless leaves a sidecar's pod": (authorization("DENY", f"[{NOT_BY_NAME}]"), WEB, ALLOW),
    "an ALLOW by method is dropped: nobody would look": (authorization("ALLOW", f"[{GET}]"), WEB, DENY),
    "a DENY by method drops: nobody would look": (authorization("DENY", f"[{GET}]"), WEB, DENY),
    "a DENY by method for another port leaves this one": (
        authorization("DENY", "[{to: [{operation: {ports: ['9'], methods: [GET]}}]}]"), WEB, ALLOW),
    "STRICT drops who has no certificate": (mtls("STRICT"), WORLD, DENY),
    "STRICT passes a pod of the mesh, by its address": (mtls("STRICT"), WEB, ALLOW),
    "a refused mesh policy closes the port": (authorization("ALLOW", "[{nonsense: 1}]"), WEB, DENY),
    "CUSTOM closes the port": (authorization("CUSTOM, provider: {name: opa}", "[{}]"), WEB, DENY),
    "an address of two claimants may be the one that is denied": (
        authorization("DENY", f"[{BY_NAME}]"), CONTESTED, DENY),
    "an address of two claimants may be the one without a name": (
        authorization("DENY", f"[{NOT_BY_NAME}]"), CONTESTED, DENY),
    "an address of two claimants may not be the one that is allowed": (
        authorization("ALLOW", f"[{BY_NAME}]"), CONTESTED, DENY),
    "an address of two claimants passes where nobody is told apart": (
        authorization("DENY", "[{to: [{operation: {ports: ['9']}}]}]"), CONTESTED, ALLOW),
}  # fmt: skip
BYPASSED = Capture(
    dict.fromkeys(IpFamily, PortClasses.of(PortClass.CAPTURED, {8080: PortClass.EXCLUDED})), frozenset({Judge.ENVOY})
)


@pytest.mark.parametrize(("text", "source", "expected"), EXCLUDED.values(), ids=EXCLUDED.keys())
def test_on_an_excluded_port(text: str, source: Workload | str, expected: Verdict) -> None:
    decision = decide(policies(text), source, API, ("TCP", 8080), capture=BYPASSED)
    assert decision.verdict is expected
    if expected is DENY:
        assert decision.deny_reason == DropReason.COMPENSATION


def test_the_own_node_reaches_a_declared_probe_port_that_is_excluded() -> None:

    probed = replace(API, probe_ports=("http",))
    found = policies(mtls("STRICT"))
    assert decide(found, NODE, probed, ("TCP", 8080), capture=BYPASSED).verdict is ALLOW
    assert decide(found, NODE, API, ("TCP", 8080), capture=BYPASSED).verdict is DENY


def test_mesh_policies_guard_tcp_only_and_none_of_istios_own_ports() -> None:
    found = policies(authorization("ALLOW", "[]"))
    capture = Capture.sidecar()
    assert decide(found, WEB, API, ("UDP", 8080), capture=capture).verdict is ALLOW
    for port in (15008, 15020, 15021, 15090):
        assert decide(found, WEB, API, ("TCP", port), capture=capture).verdict is ALLOW
    assert decide(found, WEB, API, ("TCP", 15006), capture=capture).verdict is DENY


def test_without_a_sidecar_no_mesh_policy_is_guarded() -> None:
    assert decide(policies(authorization("ALLOW", "[]")), WEB, API, ("TCP", 8080)).verdict is ALLOW


def test_what_needs_l7_is_dropped_where_nobody_judges() -> None:
    capture = Capture.sidecar(judges=frozenset())
    decision = decide(policies(mtls("STRICT")), WEB, API, ("TCP", 8080), capture=capture)
    assert (decision.verdict, decision.deny_reason) == (DENY, DropReason.NO_L7_JUDGE)


HTTP_RULES = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: h, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: web}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{method: GET, path: "/api/.*"}]}}]
"""


def test_http_rules_of_a_network_policy_pass_only_where_ext_authz_judges() -> None:
    found = policies(HTTP_RULES)
    judged = Capture.sidecar(judges=frozenset({Judge.ENVOY, Judge.EXT_AUTHZ}))
    decision = decide(found, WEB, API, ("TCP", 8080), capture=judged)
    assert (decision.verdict, decision.network.judge) == (OPEN, Judge.EXT_AUTHZ)
    assert decide(found, AGENT, API, ("TCP", 8080), capture=judged).deny_reason == DropReason.POLICY
    for capture in (Capture.sidecar(), Capture.none(), BYPASSED):
        assert decide(found, WEB, API, ("TCP", 8080), capture=capture).deny_reason == DropReason.NO_L7_JUDGE


def test_a_rule_without_http_part_beside_one_with_it_allows() -> None:
    found = policies(HTTP_RULES + "  - fromEndpoints: [{matchLabels: {app: web}}]\n")
    assert decide(found, WEB, API, ("TCP", 8080)).verdict is ALLOW


def test_one_endpoint_gets_equal_maps_for_both_families_when_nothing_tells_them_apart() -> None:
    policy = compiled(policies(authorization("ALLOW", f"[{BY_NAME}]")), API, Capture.sidecar())
    assert policy.map(Direction.INGRESS, IpFamily.IPV4) is policy.map(Direction.INGRESS, IpFamily.IPV6)


def test_a_peer_without_proxy_has_no_name() -> None:

    assert own_principal(WEB.peer()) == "spiffe://cluster.local/ns/shop/sa/default"
    assert own_principal(replace(WEB.peer(), proxy=ProxyClass.NONE)) is None
    assert own_principal(replace(WEB.peer(), masqueraded=True)) is None
