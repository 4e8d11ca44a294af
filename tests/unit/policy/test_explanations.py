"""Explanations: what a person reads about a decision, and which mTLS mode holds where."""

from __future__ import annotations

import pytest
from policycast import API, NODE, WEB, WORLD, decide, policies

from meshbridge.identity.model import Workload
from meshbridge.policy.capture import Capture
from meshbridge.policy.explain import explain
from meshbridge.policy.mesh import DEFAULT_MESH, MtlsMode, effective_mtls

POLICIES = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: n, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}, ingress: [{from: [{podSelector: {}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: shop}
spec: {rules: [{to: [{operation: {ports: ["8080"], methods: [GET]}}]}]}
"""
CASES: dict[str, tuple[Workload | str, int, tuple[str, str, str]]] = {
    "isolated, and no rule allows": (WORLD, 8080, (
        "f: dropped by network policy",
        "network policy: no rule allows it, and it is isolated by NetworkPolicy shop/n spec (policy.yaml:5)",
        "mesh policy: depends on more than the packet shows: AuthorizationPolicy shop/a (policy.yaml:7), "
        "AuthorizationPolicy shop/a spec.rules[0] (policy.yaml:10)",
    )),
    "allowed, and Envoy decides": (WEB, 8080, (
        "f: passes in the kernel; Envoy decides each request",
        "network policy: allowed by NetworkPolicy shop/n spec.ingress[0] (policy.yaml:5)",
        "mesh policy: depends on more than the packet shows: AuthorizationPolicy shop/a (policy.yaml:7), "
        "AuthorizationPolicy shop/a spec.rules[0] (policy.yaml:10)",
    )),
    "no mesh rule can match": (WEB, 9090, (
        "f: dropped by mesh policy",
        "network policy: allowed by NetworkPolicy shop/n spec.ingress[0] (policy.yaml:5)",
        "mesh policy: no ALLOW rule can match, of AuthorizationPolicy shop/a (policy.yaml:7)",
    )),
    "the own node": (NODE, 15021, (
        "f: passes",
        "network policy: no rule allows it, but a pod's own node may always reach it",
        "mesh policy: nothing restricts it",
    )),
}  # fmt: skip


@pytest.mark.parametrize(("source", "port", "expected"), CASES.values(), ids=CASES.keys())
def test_a_decision_in_words(source: Workload | str, port: int, expected: tuple[str, str, str]) -> None:
    decision = decide(policies(POLICIES), source, API, ("TCP", port), capture=Capture.sidecar())
    assert explain(decision, "f") == expected


def mtls(name: str, namespace: str, spec: str, created: str = "") -> str:
    stamp = f", creationTimestamp: '{created}'" if created else ""
    return f"""
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: {name}, namespace: {namespace}{stamp}}}
spec: {{{spec}}}
"""


STRICT, DISABLE, UNSET = (f"mtls: {{mode: {mode}}}" for mode in ("STRICT", "DISABLE", "UNSET"))
FOR_API = "selector: {matchLabels: {app: api}}, "
MODES = {
    "nothing is PERMISSIVE": ("", 80, MtlsMode.PERMISSIVE),
    "the mesh's": (mtls("m", "istio-system", STRICT), 80, MtlsMode.STRICT),
    "the namespace's over the mesh's": (
        mtls("m", "istio-system", STRICT) + mtls("n", "shop", DISABLE), 80, MtlsMode.DISABLE),
    "the workload's over the namespace's": (
        mtls("n", "shop", DISABLE) + mtls("w", "shop", FOR_API + STRICT), 80, MtlsMode.STRICT),
    "another namespace's is not ours": (mtls("n", "pay", STRICT), 80, MtlsMode.PERMISSIVE),
    "another workload's is not ours": (
        mtls("w", "shop", "selector: {matchLabels: {app: web}}, " + STRICT), 80, MtlsMode.PERMISSIVE),
    "UNSET inherits": (mtls("n", "shop", STRICT) + mtls("w", "shop", FOR_API + UNSET), 80, MtlsMode.STRICT),
    "the oldest of a scope": (
        mtls("a", "shop", DISABLE, "2026-02-01T00:00:00Z") + mtls("b", "shop", STRICT, "2026-01-01T00:00:00Z"),
        80, MtlsMode.STRICT),
    "a port's over the workload's": (
        mtls("w", "shop", FOR_API + STRICT + ", portLevelMtls: {'80': {mode: DISABLE}}"), 80, MtlsMode.DISABLE),
    "another port keeps the workload's": (
        mtls("w", "shop", FOR_API + STRICT + ", portLevelMtls: {'81': {mode: DISABLE}}"), 80, MtlsMode.STRICT),
    "an UNSET port inherits": (
        mtls("w", "shop", FOR_API + STRICT + ", portLevelMtls: {'80': {mode: UNSET}}"), 80, MtlsMode.STRICT),
    "a selector in the root namespace is ignored": (
        mtls("w", "istio-system", FOR_API + STRICT), 80, MtlsMode.PERMISSIVE),
}  # fmt: skip


@pytest.mark.parametrize(("text", "port", "mode"), MODES.values(), ids=MODES.keys())
def test_the_mtls_mode_of_a_port(text: str, port: int, mode: MtlsMode) -> None:
    found = policies(text)
    assert effective_mtls(found.peer_authentication, API.peer(), DEFAULT_MESH).at(port)[0] is mode
