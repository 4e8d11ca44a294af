"""``mesh`` of random policies and flows against the literal reading of Istio's documents in ``mesh_oracle``.

Of a flow of which everything is said the verdict is the oracle's, unless another provider is asked; of one with parts
left out it is the oracle's wherever it is certain.
"""

from __future__ import annotations

import json
import random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mesh_oracle import Caller, Content, MeshFacts, admits

from meshbridge.evaluation.batch import answer_lines
from meshbridge.evaluation.cluster import Cluster
from meshbridge.policy.mesh import MeshSettings, ProviderKind
from meshbridge.policy.model import Document

CHECKED = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MESH = MeshSettings(
    trust_domain="td", trust_domain_aliases=("old",),
    providers=(("grpc", ProviderKind.GRPC), ("oauth", ProviderKind.HTTP)),
)  # fmt: skip
FACTS = MeshFacts("td", ("old",), {"meshbridge": "grpc", "oauth": "http"})
LABELS = {"app": "api"}
VALUES: dict[str, list[str]] = {
    "principals": ["td/ns/shop/sa/web", "cluster.local/ns/shop/sa/web", "old/ns/pay/sa/*", "*/sa/web", "*", "other/*"],
    "namespaces": ["shop", "s*", "*y", "s*p", "*"],
    "serviceAccounts": ["web", "pay/web", "shop/web"],
    "trustDomains": ["td", "old", "other", "cluster.local", "o*"],
    "ipBlocks": ["10.1.0.0/16", "10.1.0.1", "203.0.113.0/24", "::/0"],
    "remoteIpBlocks": ["10.1.0.0/16", "203.0.113.0/24"],
    "requestPrincipals": ["*", "https://issuer/ann", "https://issuer/*", "*/ann", "https://issuer/a*", "*/a*", "ann"],
    "hosts": ["api.example", "API.*", "*.example", "*"],
    "methods": ["GET", "POST", "P*", "*"],
    "paths": ["/a", "/a/*", "*/b", "/{*}/b", "/a/{**}", "*"],
    "ports": ["8080", "9090", "80"],
}
SOURCE = (
    "principals",
    "namespaces",
    "serviceAccounts",
    "trustDomains",
    "ipBlocks",
    "remoteIpBlocks",
    "requestPrincipals",
)
OPERATION = ("hosts", "methods", "paths", "ports")
WHEN: dict[str, list[str]] = {
    "source.ip": VALUES["ipBlocks"], "remote.ip": VALUES["remoteIpBlocks"], "source.namespace": VALUES["namespaces"],
    "source.principal": VALUES["principals"], "source.serviceAccount": VALUES["serviceAccounts"],
    "source.trustDomain": VALUES["trustDomains"], "destination.port": VALUES["ports"],
    "request.auth.principal": VALUES["requestPrincipals"], "request.auth.audiences": ["a", "b", "*"],
    "request.auth.presenter": ["app", "*"], "request.auth.claims[scope]": ["read", "w*", "*"],
    "request.auth.claims[nested][role]": ["admin", "*n"], "request.headers[X-User]": ["ann", "a*", "*"],
    "connection.sni": ["api.example", "*"], "request.claims": ["x"],
}  # fmt: skip
OF_IDENTITY = {"principals", "namespaces", "serviceAccounts", "trustDomains", "requestPrincipals"}
WITHOUT_ACCOUNTS = {"principals", "namespaces"}


def some(rng: random.Random, values: list[str]) -> list[str]:
    return rng.sample(values, rng.randint(1, min(2, len(values))))


def fields(rng: random.Random, names: tuple[str, ...], custom: bool) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    allowed = [name for name in names if not (custom and name in OF_IDENTITY)]
    for name in rng.sample(allowed, rng.randint(1, 2)):
        if name == "serviceAccounts" and WITHOUT_ACCOUNTS & {f.removeprefix("not").lower() for f in found}:
            continue
        if name in WITHOUT_ACCOUNTS and any(f.lower().endswith("serviceaccounts") for f in found):
            continue
        negated = f"not{name[0].upper()}{name[1:]}"
        for key in rng.choice(([name], [name], [negated], [name, negated])):
            found[key] = some(rng, VALUES[name])
    return found


def rule(rng: random.Random, custom: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if rng.random() < 0.5:
        found["from"] = [{"source": fields(rng, SOURCE, custom)} for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.5:
        found["to"] = [{"operation": fields(rng, OPERATION, custom)} for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.5:
        keys = [
            key for key in WHEN if not (custom and key.startswith(("source.", "request.auth")) and key != "source.ip")
        ]
        key = rng.choice(keys)
        kinds = rng.choice((["values"], ["notValues"], ["values", "notValues"]))
        found["when"] = [{"key": key, **{kind: some(rng, WHEN[key]) for kind in kinds}}]
    return found


def authorization(rng: random.Random, index: int) -> dict[str, Any]:
    action = rng.choice(("ALLOW", "ALLOW", "DENY", "DENY", "CUSTOM", "AUDIT"))
    custom = action == "CUSTOM"
    count = rng.randint(0 if action == "ALLOW" else 1, 2)
    spec: dict[str, Any] = {"action": action, "rules": [rule(rng, custom) for _ in range(count)]}
    if custom:
        spec["provider"] = {"name": rng.choice(("meshbridge", "oauth", "nobody"))}
    if rng.random() < 0.6:
        spec["selector"] = {"matchLabels": rng.choice((LABELS, LABELS, {"app": "web"}))}
    annotations = {"istio.io/dry-run": rng.choice(("true", "T", "false", "yes"))} if rng.random() < 0.15 else {}
    meta = {"name": f"a{index}", "namespace": rng.choice(("shop", "shop", "istio-system", "pay"))}
    return {
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {**meta, "annotations": annotations}, "spec": spec,
    }  # fmt: skip


def peer_authentication(rng: random.Random, index: int) -> dict[str, Any]:
    modes = ("STRICT", "PERMISSIVE", "DISABLE", "UNSET")
    spec: dict[str, Any] = {"mtls": {"mode": rng.choice(modes)}}
    if rng.random() < 0.5:
        spec["selector"] = {"matchLabels": LABELS}
        spec["portLevelMtls"] = {8080: {"mode": rng.choice(modes)}}
    meta = {"name": f"p{index}", "namespace": rng.choice(("shop", "istio-system"))}
    created = f"2026-01-0{index + 1}T00:00:00Z"
    return {
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {**meta, "creationTimestamp": created}, "spec": spec,
    }  # fmt: skip


POD = {
    "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "api", "namespace": "shop", "labels": LABELS},
    "spec": {"containers": [{"name": "app"}, {"name": "istio-proxy", "args": ["proxy", "sidecar"]}]},
    "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.2"}]},
}  # fmt: skip
CLAIMS = [
    {"iss": "https://issuer", "sub": "ann", "aud": ["a", "c"], "azp": "app", "scope": "read write"},
    {"iss": "https://issuer", "sub": "", "aud": "b", "nested": {"role": "admin"}},
    {"sub": "ann", "scope": ["write"]},
]


def whole_flow(rng: random.Random) -> dict[str, Any]:
    account = rng.choice(
        (None, "td/ns/shop/sa/web", "old/ns/pay/sa/web", "cluster.local/ns/shop/sa/web", "other/ns/x/sa/y")
    )
    flow: dict[str, Any] = {
        "src": rng.choice(("10.1.0.1", "10.2.0.1", "203.0.113.7")), "dst": "10.1.0.2", "port": rng.choice((8080, 9090)),
        "peer_principal": f"spiffe://{account}" if account else None, "sni": rng.choice(("", "api.example")),
        "app_protocol": rng.choice(("http", "tcp")), "token": "absent",
    }  # fmt: skip
    if flow["app_protocol"] == "http":
        headers = rng.choice(({}, {"X-User": "ann"}, {"X-User": ""}, {"x-forwarded-for": "1.2.3.4, 203.0.113.9"}))
        flow["http"] = {
            "method": rng.choice(("GET", "PUT")), "path": rng.choice(("/a", "/a/b?c", "/x/b", "/a/b/c")),
            "host": rng.choice(("api.example", "API.example:80")), "headers": headers,
        }  # fmt: skip
        if rng.random() < 0.6:
            flow |= {"claims": rng.choice(CLAIMS), "token": "valid"}
    return flow


def truth(objects: list[dict[str, Any]], flow: dict[str, Any]) -> bool:
    http = flow.get("http")
    caller = Caller(flow["peer_principal"], flow["src"], flow["sni"])
    content = Content(False)
    if http is not None:
        headers = tuple((name.lower(), value) for name, value in http["headers"].items())
        content = Content(True, http["method"], http["path"], headers, http["host"], flow.get("claims"))
    return admits(objects, "shop", LABELS, flow["port"], caller, content, FACTS)


def without_some(rng: random.Random, flow: dict[str, Any]) -> dict[str, Any]:
    """The flow with parts of it left unsaid."""
    left = {key: value for key, value in flow.items() if key in ("src", "dst", "port") or rng.random() < 0.6}
    if "http" in left:
        kept = {key: value for key, value in left["http"].items() if key == "headers" or rng.random() < 0.6}
        left["http"] = kept
    if "claims" not in left and left.get("token") == "absent" and flow["token"] == "valid":
        del left["token"]
    if "http" in left and "claims" not in left and flow["token"] == "valid":
        left["token"] = "valid"  # of a request that is described, a token that is not said is not there
    return left


@CHECKED
@given(st.integers(0, 2**63 - 1))
def test_the_verdict_is_the_oracles(seed: int) -> None:
    rng = random.Random(seed)
    objects = [authorization(rng, index) for index in range(rng.randint(1, 4))]
    objects += [peer_authentication(rng, index) for index in range(rng.randint(0, 3))]
    documents = [
        Document(o["kind"], o["apiVersion"], o["metadata"]["namespace"], o["metadata"]["name"], o)
        for o in (POD, *objects)
    ]
    cluster = Cluster(documents, MESH)
    assert not cluster.policies.refusals, cluster.policies.refusals[0]
    flows = [whole_flow(rng) for _ in range(15)]
    asked = [*flows, *(without_some(rng, flow) for flow in flows)]
    lines = list(answer_lines(cluster, [json.dumps(flow).encode() for flow in asked]))
    asking = any(o["spec"].get("provider") == {"name": "oauth"} for o in objects)
    for flow, line in zip(flows, lines[: len(flows)], strict=True):
        if asking and line.record["mesh"] == "NEEDS_L7" and flow["app_protocol"] == "http":
            continue
        assert line.record["mesh"] == ("ALLOW" if truth(objects, flow) else "DENY"), (flow, objects)
    for flow, line in zip(flows, lines[len(flows) :], strict=True):
        if line.record["mesh"] != "NEEDS_L7":
            assert line.record["mesh"] == ("ALLOW" if truth(objects, flow) else "DENY"), (flow, line.record, objects)
