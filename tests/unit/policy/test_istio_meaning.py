"""What Istio silently does with policies is what our verdicts do, and what the notices tell.

The ids are the sentences of Istio's behaviour; ``policy.l7`` answers them for a request whose every field is known.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from policycast import API, policies

from meshbridge.identity.model import ProxyClass, Workload
from meshbridge.policy.baseline import UNDECIDED, Flow, mesh_verdict
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.l7 import Request, decide_request
from meshbridge.policy.lowering import guard_of
from meshbridge.policy.mesh import GATEWAY_LABEL, MeshSettings, ProviderKind
from meshbridge.policy.model import Verdict

ALLOW, OPEN, DENY = Verdict.ALLOW, Verdict.NEEDS_L7, Verdict.DENY
HTTP, TCP, AUTO = AppProtocol.HTTP, AppProtocol.TCP, AppProtocol.AUTO
ME = "spiffe://cluster.local/ns/shop/sa/default"
REQUEST = Request(ip_address("10.1.0.1"), 8080, ip_address("10.1.0.2"), ME, method="POST", path="/x", host="api")


def authorization(action: str, rules: str, name: str = "p", extra: str = "", where: str = "app: api") -> str:
    return f"""
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: shop{extra}}}
spec: {{selector: {{matchLabels: {{{where}}}}}, action: {action}, rules: {rules}}}
"""


def custom(provider: str, rules: str = "[{}]", extra: str = "") -> str:
    return authorization(f"CUSTOM, provider: {{name: {provider}}}", rules, provider, extra)


def verdict(
    text: str,
    protocol: AppProtocol = HTTP,
    mesh: MeshSettings | None = None,
    workload: Workload = API,
    principal: object = UNDECIDED,
) -> Verdict:
    """What is certain of a connection from 10.1.0.1 to port 8080 of which no more is known."""
    guard = guard_of(workload, policies(text, mesh or MeshSettings()).selecting(workload))
    flow = Flow(guard.networks, 8080, principal, workload.addresses)  # type: ignore[arg-type]
    return mesh_verdict(guard, flow, protocol).verdict


UNKNOWN_KEY = "{when: [{key: request.claims, values: [a]}]}"
UNKNOWN_TOO = "{to: [{operation: {ports: ['8080']}}], when: [{key: 'destination.labels[a]', values: [b]}]}"
METADATA = "{when: [{key: 'experimental.envoy.filters.network.mysql_proxy[db.t]', values: ['[select]']}]}"
KNOWN = MeshSettings(providers=(("http", ProviderKind.HTTP), ("grpc", ProviderKind.GRPC)))
DRY = ", annotations: {istio.io/dry-run: 'true'}"

CERTAIN: dict[str, tuple[str, AppProtocol, Verdict]] = {
    "an unknown when key takes its rule out of an ALLOW, which then allows nobody": (
        authorization("ALLOW", f"[{UNKNOWN_KEY}]"), HTTP, DENY),
    "the other rules of an ALLOW stay": (authorization("ALLOW", f"[{UNKNOWN_KEY}, {{}}]"), HTTP, ALLOW),
    "an unknown when key takes its rule out of a DENY, which then denies nobody": (
        authorization("DENY", f"[{UNKNOWN_TOO}]"), HTTP, ALLOW),
    "metadata of another filter is not known before Envoy": (authorization("DENY", f"[{METADATA}]"), HTTP, OPEN),
    "metadata is kept on TCP": (authorization("ALLOW", f"[{METADATA}]"), TCP, OPEN),
    "CUSTOM of our own provider asks nothing that policies do not say": (custom("meshbridge"), HTTP, ALLOW),
    "dry-run of a DENY has no effect": (authorization("DENY", "[{}]", extra=DRY), HTTP, ALLOW),
    "dry-run of an ALLOW does not switch default deny on": (authorization("ALLOW", "[]", extra=DRY), HTTP, ALLOW),
    "dry-run of a CUSTOM is a DENY": (custom("grpc", extra=DRY), HTTP, DENY),
    "an unreadable dry-run is enforced": (
        authorization("DENY", "[{}]", extra=", annotations: {istio.io/dry-run: 'yes'}"), HTTP, DENY),
    "two providers on one workload deny what the rules of either match": (
        custom("grpc") + custom("meshbridge"), HTTP, DENY),
    "and nothing else": (custom("grpc", f"[{UNKNOWN_KEY}]") + custom("meshbridge", f"[{UNKNOWN_KEY}]"), HTTP, ALLOW),
    "a provider of several policies is one": (custom("grpc") + custom("grpc").replace("name: grpc,", "name: q,"), HTTP,
                                             OPEN),
}  # fmt: skip


@pytest.mark.parametrize(("text", "protocol", "expected"), CERTAIN.values(), ids=CERTAIN.keys())
def test_what_is_certain_before_envoy(text: str, protocol: AppProtocol, expected: Verdict) -> None:
    assert verdict(text, protocol) is expected
    request = replace(REQUEST, http=protocol is HTTP)
    decided = decide_request(API, policies(text), request).verdict
    if expected is not OPEN:
        assert decided is expected


PROVIDERS: dict[str, tuple[str, AppProtocol, Verdict]] = {
    "a gRPC provider is asked": ("grpc", HTTP, OPEN),
    "a gRPC provider is asked on TCP": ("grpc", TCP, OPEN),
    "an HTTP provider is asked on HTTP": ("http", HTTP, OPEN),
    "an HTTP provider is not asked on TCP": ("http", TCP, ALLOW),
    "a provider that the mesh does not define makes its rules a DENY": ("opa", HTTP, DENY),
    "on TCP too": ("opa", TCP, DENY),
    "ours needs no definition": ("meshbridge", HTTP, ALLOW),
}


@pytest.mark.parametrize(("provider", "protocol", "expected"), PROVIDERS.values(), ids=PROVIDERS.keys())
def test_who_is_asked_where_the_mesh_says_which_providers_there_are(
    provider: str, protocol: AppProtocol, expected: Verdict
) -> None:
    assert verdict(custom(provider), protocol, KNOWN) is expected


def test_what_only_envoy_knows_allows_nothing_and_denies_whatever_it_may() -> None:
    assert not decide_request(API, policies(authorization("ALLOW", f"[{METADATA}]")), REQUEST).allowed
    assert not decide_request(API, policies(authorization("DENY", f"[{METADATA}]")), REQUEST).allowed


GATEWAY = replace(API, labels={"app": "api", GATEWAY_LABEL: "front"}, proxy=ProxyClass.GATEWAY)
WAYPOINT = replace(GATEWAY, proxy=ProxyClass.WAYPOINT)
TARGETS = {
    "a Gateway by its name": ("group: gateway.networking.k8s.io, kind: Gateway, name: front", "shop", True, True),
    "another Gateway": ("group: gateway.networking.k8s.io, kind: Gateway, name: back", "shop", False, False),
    "a Gateway of another namespace": (
        "group: gateway.networking.k8s.io, kind: Gateway, name: front", "pay", False, False),
    "the class of waypoints, from the root namespace": (
        "group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint", "istio-system", False, True),
    "the class of waypoints, from elsewhere": (
        "group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint", "shop", False, False),
    "a Service": ("group: '', kind: Service, name: front", "shop", False, False),
}  # fmt: skip


@pytest.mark.parametrize(("target", "namespace", "gateway", "waypoint"), TARGETS.values(), ids=TARGETS.keys())
def test_what_a_target_selects(target: str, namespace: str, gateway: bool, waypoint: bool) -> None:
    text = authorization("DENY", "[{}]").replace("selector: {matchLabels: {app: api}}", f"targetRefs: [{{{target}}}]")
    text = text.replace("namespace: shop", f"namespace: {namespace}")
    assert verdict(text) is ALLOW, "a sidecar is selected by no target"
    assert verdict(text, workload=GATEWAY) is (DENY if gateway else ALLOW)
    assert verdict(text, workload=WAYPOINT) is (DENY if waypoint else ALLOW)


def test_labels_select_a_gateway_and_never_a_waypoint() -> None:
    text = authorization("DENY", "[{}]")
    assert verdict(text, workload=GATEWAY) is DENY
    assert verdict(text, workload=WAYPOINT) is ALLOW


def test_where_mtls_is_off_no_certificate_is_asked_for_so_nobody_has_a_name() -> None:
    off = """
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: without, namespace: shop}
spec: {selector: {matchLabels: {app: api}}, mtls: {mode: DISABLE}, portLevelMtls: {9090: {mode: STRICT}}}
"""
    named = "[{from: [{source: {principals: ['*']}}]}]"
    assert verdict(off + authorization("ALLOW", named)) is DENY
    assert verdict(off + authorization("ALLOW", named), principal=ME) is DENY
    assert verdict(off + authorization("DENY", named), principal=ME) is ALLOW


NOTICES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "an unknown when key": (
        authorization("DENY", f"[{UNKNOWN_KEY}]"), [("MB0101", "spec.rules[0].when[0].key")]),
    "dry-run of a CUSTOM": (custom("grpc", extra=DRY), [("MB0115", "metadata.annotations.istio.io/dry-run")]),
    "a dry-run nobody can read": (
        authorization("DENY", "[{}]", extra=", annotations: {istio.io/dry-run: 'yes'}"),
        [("MB0116", "metadata.annotations.istio.io/dry-run")]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), NOTICES.values(), ids=NOTICES.keys())
def test_what_is_told(text: str, expected: list[tuple[str, str]]) -> None:
    assert [(notice.code, notice.path) for notice in policies(text).notices] == expected
