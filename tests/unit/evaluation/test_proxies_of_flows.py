"""Who judges: sidecars, ztunnel, gateways; what path Envoy judges by, and as what it takes a port."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_flow_questions import HTTP
from test_what_sidecars_send import ask, scope

from meshbridge.policy.mesh import DEFAULT_MESH, PathNormalization

GATEWAYS = """
---
apiVersion: v1
kind: Pod
metadata: {name: front, namespace: shop, labels: {istio: front}}
spec:
  containers: [{name: istio-proxy, args: [proxy, router], ports: [{name: http2, containerPort: 8080}]}]
status: {phase: Running, podIPs: [{ip: 10.1.0.50}]}
---
apiVersion: v1
kind: Pod
metadata: {name: tls, namespace: shop, labels: {istio: tls}, annotations: {inject.istio.io/templates: gateway}}
spec: {containers: [{name: istio-proxy, image: auto}]}
status: {phase: Running, podIPs: [{ip: 10.1.0.51}]}
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: shop}
spec: {clusterIP: 10.96.0.50, selector: {istio: front}, ports: [{name: any, port: 80, targetPort: 8080}]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: front, namespace: ops}
spec: {selector: {istio: front}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ["*"]}]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: tls, namespace: ops}
spec: {selector: {istio: tls}, servers: [{port: {number: 8443, name: tls, protocol: TLS}, hosts: ["*"]}]}
"""


def authorization(rules: str, action: str = "ALLOW", labels: str = "istio: front", more: str = "") -> str:
    return f"""
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: p, namespace: shop}}
spec: {{selector: {{matchLabels: {{{labels}}}}}, action: {action}, rules: [{rules}]{more}}}
"""


GET = "{to: [{operation: {methods: [GET]}}]}"
FROM = "{from: [{source: {remoteIpBlocks: [203.0.113.0/24]}}]}"
BEHIND = {"src": "198.51.100.1", "dst": "shop/front", "http": {**HTTP, "headers": {"x-forwarded-for": "203.0.113.9"}}}
TWO = replace(DEFAULT_MESH, trusted_proxies=1)
GATEWAY: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "a gateway's policies are judged": (
        authorization(GET), DEFAULT_MESH, {"src": "203.0.113.7", "dst": "shop/front", "http": HTTP}, "ALLOW"),
    "and deny": (authorization(GET, "DENY"), DEFAULT_MESH,
                 {"src": "203.0.113.7", "dst": "shop/front", "http": HTTP}, "DENY"),
    "a Gateway says what the port behind its Service speaks": (
        authorization(GET, "DENY"), DEFAULT_MESH, {"src": "203.0.113.7", "dst": "shop/front"}, "NEEDS_L7"),
    "and what it speaks where no Service does": (
        authorization(GET, "DENY", "istio: tls"), DEFAULT_MESH,
        {"src": "203.0.113.7", "dst": "shop/tls", "port": 8443}, "DENY"),
    "PeerAuthentication says nothing of a gateway's servers": ("""
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: m, namespace: shop}
spec: {mtls: {mode: STRICT}}
""", DEFAULT_MESH, {"src": "203.0.113.7", "dst": "shop/front", "peer_principal": None}, "ALLOW"),
    "a gateway's client is who connects": (authorization(FROM), DEFAULT_MESH, BEHIND, "DENY"),
    "or who a trusted proxy says": (authorization(FROM), TWO, BEHIND, "ALLOW"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "mesh", "flow", "expected"), GATEWAY.values(), ids=GATEWAY.keys())
def test_at_a_gateway(text: str, mesh: Any, flow: dict[str, Any], expected: str) -> None:
    answer = ask(GATEWAYS + text, mesh, **flow)
    assert (answer["mesh"], answer["verdict"], answer["path"]["ingress"]) == (expected, expected, "captured")


AMBIENT = """
---
apiVersion: v1
kind: Namespace
metadata: {name: calm, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: calm, labels: {app: a}}
spec: {containers: [{name: app}]}
status: {phase: Running, podIPs: [{ip: 10.4.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: out, namespace: calm, labels: {app: a, istio.io/dataplane-mode: none}}
spec: {containers: [{name: app}]}
status: {phase: Running, podIPs: [{ip: 10.4.0.2}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: calm}
spec: {action: ACTION, rules: [RULE]}
"""
STRICT_BUT = """
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: ns, namespace: calm}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: w, namespace: calm}
spec: {selector: {matchLabels: {app: a}}, mtls: {mode: UNSET}, portLevelMtls: {8080: {mode: MODE}}}
"""
ZTUNNEL: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "1: a DENY with HTTP fields alone denies nothing": ("DENY", GET, {}, "ALLOW"),
    "1: one empty part makes a rule nobody's": (
        "DENY", "{from: [{source: {namespaces: [shop]}}], to: [{operation: {methods: [GET]}}]}",
        {"peer_principal": "cluster.local/ns/shop/sa/web"}, "ALLOW"),
    "1: what is left of a part counts": ("DENY", "{to: [{operation: {methods: [GET], ports: ['8080']}}]}", {}, "DENY"),
    "2: SNI is not ztunnel's": ("ALLOW", "{when: [{key: connection.sni, values: [a]}]}", {"sni": "a"}, "DENY"),
    "2: remoteIpBlocks are not": ("ALLOW", "{from: [{source: {remoteIpBlocks: [0.0.0.0/0]}}]}", {}, "DENY"),
    "2: a service account under when is not": (
        "ALLOW", "{when: [{key: source.serviceAccount, values: [shop/web]}]}",
        {"peer_principal": "cluster.local/ns/shop/sa/web"}, "DENY"),
    "3: trustDomains beside namespaces are not looked at": (
        "ALLOW", "{from: [{source: {namespaces: [shop], trustDomains: [other]}}]}",
        {"peer_principal": "cluster.local/ns/shop/sa/web"}, "ALLOW"),
    "5: an ALLOW with an HTTP field is left out and still denies": ("ALLOW", GET, {}, "DENY"),
    "6: a namespace is the identity's, to its ends": (
        "ALLOW", "{from: [{source: {namespaces: ['s*']}}]}",
        {"peer_principal": "cluster.local/ns/shop/sa/web"}, "ALLOW"),
    "6: a star in the middle of a namespace is a star": (
        "ALLOW", "{from: [{source: {namespaces: ['s*p']}}]}",
        {"peer_principal": "cluster.local/ns/shop/sa/web"}, "DENY"),
    "6: also among those that are not meant": (
        "ALLOW", "{from: [{source: {notNamespaces: ['s*p']}}]}",
        {"peer_principal": "cluster.local/ns/shop/sa/web"}, "ALLOW"),
    "6: who has no name is none of notPrincipals": (
        "ALLOW", "{from: [{source: {notPrincipals: ['*']}}]}", {"peer_principal": None}, "ALLOW"),
    "the pod that opts out is not guarded": ("ALLOW", GET, {"dst": "calm/out"}, "ALLOW"),
    "an unknown when key leaves nothing to match": ("DENY", "{when: [{key: nonsense, values: [a]}]}", {}, "ALLOW"),
}  # fmt: skip


@pytest.mark.parametrize(("action", "rule", "flow", "expected"), ZTUNNEL.values(), ids=ZTUNNEL.keys())
def test_at_ztunnel(action: str, rule: str, flow: dict[str, Any], expected: str) -> None:
    text = AMBIENT.replace("ACTION", action).replace("RULE", rule)
    assert ask(text, **{"src": "ops/plain", "dst": "calm/a", **flow})["mesh"] == expected


@pytest.mark.parametrize(
    ("mode", "port", "expected"),
    [
        ("PERMISSIVE", 8080, "ALLOW"),
        ("PERMISSIVE", 8081, "DENY"),
        ("DISABLE", 8080, "DENY"),
        ("STRICT", 8080, "DENY"),
    ],
    ids=[
        "an exception opens its port", "and no other", "DISABLE is no exception where the workload's mode is UNSET",
        "STRICT adds nothing",
    ],
)  # fmt: skip
def test_modes_of_ports_at_ztunnel(mode: str, port: int, expected: str) -> None:
    text = AMBIENT.replace("ACTION", "ALLOW").replace("RULE", "{}") + STRICT_BUT.replace("MODE", mode)
    flow = {"src": "ops/plain", "dst": "calm/a", "port": port, "peer_principal": None}
    assert ask(text, **flow)["mesh"] == expected


BEHIND_A_WAYPOINT = """
---
apiVersion: v1
kind: Namespace
metadata: {name: calm, labels: {istio.io/dataplane-mode: ambient, istio.io/use-waypoint: way}}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: calm, labels: {app: a}}
spec: {containers: [{name: app}]}
status: {phase: Running, podIPs: [{ip: 10.4.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: calm, labels: {app: b}}
spec: {serviceAccountName: b, containers: [{name: app}]}
status: {phase: Running, podIPs: [{ip: 10.4.0.2}]}
---
apiVersion: v1
kind: Service
metadata: {name: a, namespace: calm}
spec: {clusterIP: 10.96.4.1, selector: {app: a}, ports: [{name: http, port: 80, targetPort: 8080}]}
"""


def attached(target: str, rules: str, namespace: str = "calm", action: str = "DENY") -> str:
    return f"""
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: w, namespace: {namespace}}}
spec: {{targetRefs: [{{{target}}}], action: {action}, rules: [{rules}]}}
"""


WAY = "group: gateway.networking.k8s.io, kind: Gateway, name: way"
CLASS = "group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint"
FROM_WAY = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: z, namespace: calm}
spec: {rules: [{from: [{source: {principals: [cluster.local/ns/calm/sa/way]}}]}]}
"""
PORT_80 = "{to: [{operation: {ports: ['80'], methods: [GET]}}]}"
WAYPOINT: dict[str, tuple[str, dict[str, Any], str]] = {
    "a policy of the waypoint": (attached(WAY, GET), {}, "DENY"),
    "of another": (attached(WAY.replace("way", "other"), GET), {}, "ALLOW"),
    "of another namespace": (attached(WAY, GET, "shop"), {}, "ALLOW"),
    "of its class": (attached(CLASS, GET, "istio-system"), {}, "DENY"),
    "of the Service": (attached("kind: Service, name: a", GET), {}, "DENY"),
    "of another Service": (attached("kind: Service, name: b", GET), {}, "ALLOW"),
    "the port there is the Service's": (attached("kind: Service, name: a", PORT_80), {}, "DENY"),
    "by the Service's address": (attached("kind: Service, name: a", GET), {"dst": "10.96.4.1", "port": 80}, "DENY"),
    "a request that is not described": (attached(WAY, GET), {"http": None}, "NEEDS_L7"),
    "ztunnel behind it sees the waypoint": (FROM_WAY, {"peer_principal": "cluster.local/ns/calm/sa/b"}, "ALLOW"),
    "a client outside of ambient comes past it": (attached(WAY, GET), {"src": "ops/plain"}, "ALLOW"),
    "and is refused where only the waypoint may come": (
        FROM_WAY, {"src": "ops/plain", "peer_principal": None}, "DENY"),
    "a port that no Service leads to is reached past it": (attached(WAY, GET), {"port": 9999}, "ALLOW"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "flow", "expected"), WAYPOINT.values(), ids=WAYPOINT.keys())
def test_through_a_waypoint(text: str, flow: dict[str, Any], expected: str) -> None:
    asked = {"src": "calm/b", "dst": "calm/a", "http": HTTP, **flow}
    assert ask(BEHIND_A_WAYPOINT + text, **asked)["mesh"] == expected


ADMIN = authorization("{to: [{operation: {paths: ['/admin/*']}}]}", "DENY", "app: api")
PATHS: dict[str, tuple[PathNormalization, str, str]] = {
    "a path by detours is the path": (PathNormalization.BASE, "/x/../admin/a", "DENY"),
    "also with escaped dots": (PathNormalization.BASE, "/x/%2e%2E/admin/a", "DENY"),
    "also with a backslash": (PathNormalization.BASE, "\\admin\\a", "DENY"),
    "as it comes where the mesh says so": (PathNormalization.NONE, "/x/../admin/a", "ALLOW"),
    "slashes are kept": (PathNormalization.BASE, "//admin/a", "ALLOW"),
    "but where they are merged": (PathNormalization.MERGE_SLASHES, "//admin/a", "DENY"),
    "escaped slashes are kept": (PathNormalization.MERGE_SLASHES, "/admin%2Fa", "ALLOW"),
    "but where they are decoded": (PathNormalization.DECODE_AND_MERGE_SLASHES, "/admin%2Fa", "DENY"),
    "the query is no path": (PathNormalization.DECODE_AND_MERGE_SLASHES, "/x?/../admin/a", "ALLOW"),
}


@pytest.mark.parametrize(("how", "path", "expected"), PATHS.values(), ids=PATHS.keys())
def test_the_path_that_is_judged(how: PathNormalization, path: str, expected: str) -> None:
    answer = ask(ADMIN, replace(DEFAULT_MESH, path_normalization=how), http={**HTTP, "path": path})
    assert answer["mesh"] == expected
    assert answer["http"]["path"] == path, "the question comes back as it was"


def test_a_path_that_cannot_be_normalized_is_refused() -> None:
    answer = ask("", http={**HTTP, "path": "/a%00"})
    assert answer["verdict"] == "DENY"
    assert "answers 400" in answer["reasons"][0]["text"]


def test_a_sidecars_own_listeners_say_what_ports_speak() -> None:
    deny = authorization(GET, "DENY", "app: api")
    tcp = scope("{ingress: [{port: {number: 8080, protocol: TCP, name: tcp}, defaultEndpoint: '127.0.0.1:1'}]}")
    assert ask(deny)["mesh"] == "NEEDS_L7"
    assert ask(deny + tcp)["mesh"] == "DENY"


@pytest.mark.parametrize(
    ("interception", "ingress"), [("REDIRECT", "captured"), ("TPROXY", "captured"), ("NONE", "bypassed")]
)
def test_how_the_mesh_captures_where_a_pod_does_not_say(interception: str, ingress: str) -> None:
    answer = ask("", replace(DEFAULT_MESH, interception=interception))
    assert answer["path"] == {"egress": ingress, "ingress": ingress}
