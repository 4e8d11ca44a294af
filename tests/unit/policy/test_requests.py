"""What ext_authz answers: Istio's string forms, the order of actions, tokens, mTLS, HTTP rules of network policies."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from policycast import API, LEDGER, WEB, policies

from meshbridge.identity.model import Entity, Peer
from meshbridge.policy.l7 import Request, RequestJudge, decide_request
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings, ProviderKind
from meshbridge.policy.model import Verdict
from meshbridge.policy.strings import matches_path

ME = "spiffe://cluster.local/ns/shop/sa/default"
CLAIMS = {"iss": "https://issuer", "sub": "ann", "aud": ["a", "b"], "azp": "app", "scope": "read write",
          "groups": ["dev", "ops"], "nested": {"role": "admin"}, "n": 3}  # fmt: skip
BASE = Request(
    ip_address("10.1.0.1"), 8080, ip_address("10.1.0.2"), ME, "api.shop", True, "POST", "/api/v1/process?q=1",
    "API.example:8080", {"x-user": "ann", "x-empty": ""}, claims=(CLAIMS,),
)  # fmt: skip


def authorization(action: str, rules: str, name: str = "p", extra: str = "") -> str:
    return f"""
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: shop{extra}}}
spec: {{selector: {{matchLabels: {{app: api}}}}, action: {action}, rules: {rules}}}
"""


def source(field: str, *values: str) -> str:
    return f"{{from: [{{source: {{{field}: {list(values)}}}}}]}}"


def operation(field: str, *values: str) -> str:
    return f"{{to: [{{operation: {{{field}: {list(values)}}}}}]}}"


def when(key: str, *values: str, negative: bool = False) -> str:
    return f"{{when: [{{key: '{key}', {'notValues' if negative else 'values'}: {list(values)}}}]}}"


MATCHES = {
    "a principal is written without spiffe://": (source("principals", "cluster.local/ns/shop/sa/default"), True),
    "another principal": (source("principals", "cluster.local/ns/shop/sa/other"), False),
    "any principal": (source("principals", "*"), True),
    "a principal by prefix": (source("principals", "cluster.local/ns/shop/*"), True),
    "a principal by suffix": (source("principals", "*/sa/default"), True),
    "notPrincipals of another": (source("notPrincipals", "cluster.local/ns/pay/*"), True),
    "notPrincipals of any": (source("notPrincipals", "*"), False),
    "a namespace": (source("namespaces", "shop"), True),
    "a namespace by prefix": (source("namespaces", "sh*"), True),
    "a star in the middle of a namespace is a wildcard": (source("namespaces", "s*p"), True),
    "a namespace is not a prefix by itself": (source("namespaces", "sho"), False),
    "a service account in the policy's namespace": (source("serviceAccounts", "default"), True),
    "a service account of another namespace": (source("serviceAccounts", "pay/default"), False),
    "a trust domain": (source("trustDomains", "cluster.local"), True),
    "another trust domain": (source("trustDomains", "other"), False),
    "an address in a block": (source("ipBlocks", "10.1.0.0/16"), True),
    "an address alone": (source("ipBlocks", "10.1.0.9"), False),
    "a request principal": (source("requestPrincipals", "https://issuer/ann"), True),
    "the subject may be any": (source("requestPrincipals", "https://issuer/*"), True),
    "the issuer may be any": (source("requestPrincipals", "*/ann"), True),
    "any request principal": (source("requestPrincipals", "*"), True),
    "another subject": (source("requestPrincipals", "https://issuer/bob"), False),
    "an issuer by suffix": (source("requestPrincipals", "*issuer/ann"), True),
    "beside a leading wildcard the subject is exact": (source("requestPrincipals", "*/an*"), False),
    "beside a trailing wildcard the issuer is exact": (source("requestPrincipals", "https://iss*/a*"), False),
    "a wildcard at the start of the subject alone is a literal": (source("requestPrincipals", "https://issuer/*n"),
                                                                  False),
    "without a slash a suffix asks of the subject": (source("requestPrincipals", "*nn"), True),
    "without a slash a prefix asks of the issuer": (source("requestPrincipals", "https*"), True),
    "without a slash or wildcard the subject has to be empty": (source("requestPrincipals", "issuer"), False),
    "a method": (operation("methods", "GET", "POST"), True),
    "methods mind the case": (operation("methods", "post"), False),
    "notMethods": (operation("notMethods", "POST"), False),
    "an exact path without the query": (operation("paths", "/api/v1/process"), True),
    "a path by prefix": (operation("paths", "/api/*"), True),
    "a path by suffix": (operation("paths", "*/process"), True),
    "a star in the middle is a star": (operation("paths", "/api/*/process"), False),
    "one segment of a template": (operation("paths", "/api/{*}/process"), True),
    "a template's segment is one segment": (operation("paths", "/{*}/process"), False),
    "the tail of a template": (operation("paths", "/api/{**}"), True),
    "a template ends where it ends": (operation("paths", "/api/{*}"), False),
    "a template with a literal end": (operation("paths", "/{**}/process"), True),
    "paths mind the case": (operation("paths", "/API/v1/process"), False),
    "a host ignores case and has its port": (operation("hosts", "api.EXAMPLE:8080"), True),
    "a host without the port that was sent": (operation("hosts", "api.example"), False),
    "a host by prefix": (operation("hosts", "api.*"), True),
    "a port": (operation("ports", "8080"), True),
    "another port": (operation("ports", "80"), False),
    "a header": (when("request.headers[x-user]", "ann"), True),
    "a header's name ignores case": (when("request.headers[X-User]", "a*"), True),
    "a header that was not sent": (when("request.headers[x-none]", "*"), False),
    "not a header that was not sent": (when("request.headers[x-none]", "*", negative=True), True),
    "an empty header is there": (when("request.headers[x-empty]", "*"), True),
    "an audience of a list": (when("request.auth.audiences", "b"), True),
    "the presenter": (when("request.auth.presenter", "app"), True),
    "a member of a list claim": (when("request.auth.claims[groups]", "ops"), True),
    "a nested claim": (when("request.auth.claims[nested][role]", "admin"), True),
    "a nested claim that is not there": (when("request.auth.claims[nested][role][x]", "admin"), False),
    "a scope among several": (when("request.auth.claims[scope]", "write"), True),
    "a scope that is not there": (when("request.auth.claims[scope]", "admin"), False),
    "a number is no string": (when("request.auth.claims[n]", "3"), False),
    "SNI": (when("connection.sni", "api.*"), True),
    "the pod's address": (when("destination.ip", "10.1.0.2"), True),
    "every condition is needed": (
        "{when: [{key: source.namespace, values: [shop]}, {key: connection.sni, values: [x]}]}", False),
    "one of several sources is enough": (
        "{from: [{source: {namespaces: [pay]}}, {source: {namespaces: [shop]}}]}", True),
    "fields of one source are all needed": ("{from: [{source: {namespaces: [shop], ipBlocks: [10.9.0.0/16]}}]}", False),
    "values and not-values of one field": (
        "{to: [{operation: {paths: ['/api/*'], notPaths: ['/api/v1/*']}}]}", False),
}  # fmt: skip


@pytest.mark.parametrize(("rule", "expected"), MATCHES.values(), ids=MATCHES.keys())
def test_whether_a_rule_matches(rule: str, expected: bool) -> None:
    assert decide_request(API, policies(authorization("ALLOW", f"[{rule}]")), BASE).allowed is expected
    assert decide_request(API, policies(authorization("DENY", f"[{rule}]")), BASE).allowed is not expected


PLAINTEXT = {
    "no positive identity matches": source("principals", "*"),
    "no namespace matches": source("namespaces", "*"),
    "no service account matches": source("serviceAccounts", "default"),
}


@pytest.mark.parametrize("rule", PLAINTEXT.values(), ids=PLAINTEXT.keys())
def test_a_plaintext_source_has_no_name(rule: str) -> None:
    assert not decide_request(API, policies(authorization("ALLOW", f"[{rule}]")), replace(BASE, principal=None)).allowed


def test_a_plaintext_source_is_none_of_notprincipals() -> None:
    found = policies(authorization("DENY", f"[{source('notPrincipals', '*')}]"))
    assert not decide_request(API, found, replace(BASE, principal=None)).allowed
    assert decide_request(API, found, BASE).allowed


def test_deny_beats_allow_and_names_its_rule() -> None:
    found = policies(
        authorization("ALLOW", "[{}]") + authorization("DENY", f"[{{}}, {operation('methods', 'POST')}]", "q")
    )
    decision = decide_request(API, found, BASE)
    assert not decision.allowed
    assert [origin.name for origin in decision.origins] == ["q"]


def test_audit_and_dry_run_are_reported_and_have_no_effect() -> None:
    extra = ", annotations: {istio.io/dry-run: 'true'}"
    found = policies(
        authorization("AUDIT", "[{}]", "a")
        + authorization("DENY", "[{}]", "d", extra)
        + authorization("ALLOW", "[]", "e", extra)
    )
    decision = decide_request(API, found, BASE)
    assert decision.allowed
    assert [origin.name for origin in decision.reported] == ["a", "d"]


def test_a_custom_provider_nobody_asks_denies_and_ours_does_not() -> None:
    def of(provider: str) -> str:
        return authorization(f"CUSTOM, provider: {{name: {provider}}}", "[{}]")

    assert not decide_request(API, policies(of("opa")), BASE).allowed
    assert decide_request(API, policies(of("meshbridge")), BASE).allowed
    asked = MeshSettings(providers=(("opa", ProviderKind.GRPC),))
    assert decide_request(API, policies(of("opa"), asked), BASE).allowed
    assert not decide_request(API, policies(of("opa"), replace(asked, own_sidecars=True)), BASE).allowed
    assert not decide_request(API, policies(of("opa") + of("meshbridge"), asked), BASE).allowed


@pytest.mark.parametrize("action", ["DENY", "AUDIT", "CUSTOM", "NONSENSE"])
def test_a_refused_mesh_policy_denies_whatever_others_allow(action: str) -> None:
    text = authorization(action, "[{nonsense: 1}]") + authorization("ALLOW", "[{}]", "q")
    decision = decide_request(API, policies(text), BASE)
    assert not decision.allowed
    assert "refused policy" in decision.reason


def test_a_refused_policy_that_only_allows_allows_nothing_and_forbids_nothing() -> None:
    refused = authorization("ALLOW", "[{nonsense: 1}]")
    decision = decide_request(API, policies(refused), BASE)
    assert not decision.allowed
    assert [origin.rule for origin in decision.origins] == ["refused"]
    assert decide_request(API, policies(refused + authorization("ALLOW", "[{}]", "q")), BASE).allowed


def test_a_refused_policy_for_a_gateway_concerns_no_sidecar() -> None:
    text = authorization("DENY", "[{nonsense: 1}]").replace(
        "selector: {matchLabels: {app: api}}", "targetRefs: [{name: g}]"
    )
    found = policies(text)
    assert found.refusals
    assert decide_request(API, found, BASE).allowed


def test_strict_refuses_plaintext() -> None:
    strict = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: m, namespace: shop}
spec: {selector: {matchLabels: {app: api}}, mtls: {mode: STRICT}, portLevelMtls: {9090: {mode: PERMISSIVE}}}
"""
    found = policies(strict)
    assert decide_request(API, found, BASE).allowed
    assert not decide_request(API, found, replace(BASE, principal=None)).allowed
    assert decide_request(API, found, replace(BASE, principal=None, port=9090)).allowed


JWT = """
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: j, namespace: shop}
spec:
  jwtRules:
  - {issuer: "https://issuer", jwksUri: "https://issuer/keys", audiences: [a], forwardOriginalToken: true,
     fromHeaders: [{name: X-Token, prefix: "T "}], fromParams: [token], outputPayloadToHeader: X-Payload}
"""


def test_a_bad_token_is_refused_and_none_is_not() -> None:
    found = policies(JWT)
    assert decide_request(API, found, replace(BASE, claims=())).allowed
    decision = decide_request(API, found, replace(BASE, claims=(), token_error="expired"))
    assert not decision.allowed
    assert decision.unauthenticated
    assert decide_request(WEB, policies(""), replace(BASE, token_error="expired")).allowed


def test_it_is_told_where_nothing_says_where_keys_are() -> None:
    (notice,) = policies(JWT.replace('jwksUri: "https://issuer/keys", ', "").replace("https://issuer", "me")).notices
    assert "spec.jwtRules[0]" in str(notice)
    assert "nothing says where the keys of issuer 'me' are" in str(notice)
    assert not policies(JWT).notices


def test_jwt_rules_are_read_as_written() -> None:
    (rule,) = RequestJudge.of(API, policies(JWT)).jwt_rules
    assert (rule.issuer, rule.jwks_uri, rule.audiences) == ("https://issuer", "https://issuer/keys", ("a",))
    assert [(at.header, at.prefix, at.parameter) for at in rule.locations] == [("x-token", "T ", ""), ("", "", "token")]
    assert rule.output_payload_to_header == "x-payload"
    assert rule.forward_original_token


def test_with_two_tokens_an_allow_needs_both_and_a_deny_one() -> None:
    two = replace(BASE, claims=(CLAIMS, {"iss": "x", "sub": "y"}))
    rule = f"[{when('request.auth.claims[nested][role]', 'admin')}]"
    assert not decide_request(API, policies(authorization("ALLOW", rule)), two).allowed
    assert not decide_request(API, policies(authorization("DENY", rule)), two).allowed


def test_on_tcp_an_allow_by_method_is_gone_and_a_deny_by_method_denies_all() -> None:
    tcp = replace(BASE, http=False)
    get = operation("methods", "GET")
    assert not decide_request(API, policies(authorization("ALLOW", f"[{get}]")), tcp).allowed
    assert not decide_request(API, policies(authorization("DENY", f"[{get}]")), tcp).allowed


def test_a_policy_of_the_root_namespace_selects_everywhere_and_of_another_nowhere() -> None:
    denying = authorization("DENY", "[{}]")
    assert not decide_request(
        API, policies(denying.replace("namespace: shop", "namespace: istio-system")), BASE
    ).allowed
    assert decide_request(API, policies(denying.replace("namespace: shop", "namespace: pay")), BASE).allowed


def test_a_policy_with_target_refs_selects_no_sidecar() -> None:
    text = authorization("DENY", "[{}]").replace(
        "selector: {matchLabels: {app: api}}", "targetRefs: [{name: g, kind: Gateway}]"
    )
    assert decide_request(API, policies(text), BASE).allowed


ALIASES = MeshSettings(trust_domain="td1", trust_domain_aliases=("old",))


@pytest.mark.parametrize(
    ("principal", "peer", "expected"),
    [
        ("cluster.local/ns/shop/sa/default", "td1", True),
        ("cluster.local/ns/shop/sa/default", "old", True),
        ("cluster.local/ns/shop/sa/default", "cluster.local", False),
        ("td1/ns/shop/sa/default", "old", True),
        ("foreign/ns/shop/sa/default", "foreign", True),
        ("foreign/ns/shop/sa/default", "td1", False),
        ("*/ns/shop/sa/default", "foreign", True),
    ],
    ids=[
        "cluster.local means the mesh's own", "and its aliases", "but no peer of that name", "own means aliases too",
        "a foreign domain is kept as written", "and means no other", "a wildcard is kept as written",
    ],
)  # fmt: skip
def test_trust_domain_aliases(principal: str, peer: str, expected: bool) -> None:
    found = policies(authorization("ALLOW", f"[{source('principals', principal)}]"), ALIASES)
    request = replace(BASE, principal=f"spiffe://{peer}/ns/shop/sa/default")
    assert decide_request(API, found, request).allowed is expected


@pytest.mark.parametrize(
    ("written", "peer", "expected"),
    [
        ("td1", "old", True),
        ("old", "td1", True),
        ("cluster.local", "td1", False),
        ("cluster.local", "cluster.local", True),
        ("td*", "td1", True),
        ("td*", "old", False),
    ],
    ids=[
        "own means aliases too", "and the other way round", "cluster.local means no other", "but itself",
        "a wildcard asks of the name", "and is not expanded",
    ],
)  # fmt: skip
def test_trust_domains_are_expanded_by_their_own_rule(written: str, peer: str, expected: bool) -> None:
    found = policies(authorization("ALLOW", f"[{source('trustDomains', written)}]"), ALIASES)
    request = replace(BASE, principal=f"spiffe://{peer}/ns/shop/sa/default")
    assert decide_request(API, found, request).allowed is expected


@pytest.mark.parametrize(("peer", "expected"), [("new-td", True), ("old", True), ("other-td", True), ("x", False)])
def test_a_trust_domain_by_suffix_means_what_it_matches_and_the_meshs_other_names(peer: str, expected: bool) -> None:
    mesh = MeshSettings(trust_domain="new-td", trust_domain_aliases=("old",))
    found = policies(authorization("ALLOW", f"[{source('principals', '*-td/ns/shop/sa/default')}]"), mesh)
    request = replace(BASE, principal=f"spiffe://{peer}/ns/shop/sa/default")
    assert decide_request(API, found, request).allowed is expected


HTTP_RULES = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: h, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: web}}]
    toPorts:
    - ports: [{port: "8080", protocol: TCP}]
      rules: {http: [{method: GET}, {method: POST, path: "/api/.*", headers: ["X-User: ann"]}]}
"""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"method": "GET"}, True),
        ({"path": "/other"}, False),
        ({"headers": {}}, False),
        ({"port": 9090}, True),
    ],
    ids=[
        "a rule matches",
        "another rule matches",
        "no path matches",
        "a header is missing",
        "a port without http rules",
    ],
)
def test_http_rules_of_a_network_policy(change: dict[str, object], expected: bool) -> None:
    request = replace(BASE, peer=WEB.peer(), **change)  # type: ignore[arg-type]
    assert decide_request(API, policies(HTTP_RULES), request).allowed is expected


@pytest.mark.parametrize("path", ["/[[:alpha:]]+", "/a++", "/a*+", "/a{,3}", "(?i)/a", r"/\\d"])
def test_an_expression_python_reads_otherwise_than_envoy_is_refused(path: str) -> None:
    (refusal,) = policies(HTTP_RULES.replace("/api/.*", path)).refusals
    assert "mean another thing to Envoy" in str(refusal)


def world(*networks: str) -> Peer:
    return Peer(entities=frozenset({Entity.WORLD, Entity.WORLD_IPV4}), networks=frozenset(map(ip_network, networks)))


HOST_PEER, REMOTE_PEER = (Peer(entities=frozenset({entity})) for entity in (Entity.HOST, Entity.REMOTE_NODE))
HTTP_SOURCES: dict[str, tuple[str, Peer | None, bool]] = {
    "the world by its entity": ("fromEntities: [world]", world(), False),
    "the world by a CIDR": ("fromCIDR: [203.0.113.0/24]", world("203.0.113.0/24"), False),
    "the node by its entity": ("fromEntities: [host]", HOST_PEER, False),
    "an address nobody holds may be the node's": ("fromEntities: [host]", None, False),
    "the node, which nothing but localhost lets in": ("fromEndpoints: [{}]", HOST_PEER, True),
    "another node": ("fromEntities: [remote-node]", REMOTE_PEER, False),
    "a pod that no rule covers": ("fromEntities: [world]", WEB.peer(), False),
}


@pytest.mark.parametrize(("sources", "peer", "expected"), HTTP_SOURCES.values(), ids=HTTP_SOURCES.keys())
def test_http_rules_hold_for_sources_that_are_no_pods(sources: str, peer: Peer | None, expected: bool) -> None:
    rules = HTTP_RULES.replace("fromEndpoints: [{matchLabels: {app: web}}]", sources)
    request = replace(BASE, method="DELETE", peer=peer)
    assert decide_request(API, policies(rules), request).allowed is expected


def test_without_default_deny_http_rules_concern_only_whom_they_cover() -> None:
    rules = HTTP_RULES.replace("  ingress:", "  enableDefaultDeny: {ingress: false}\n  ingress:")
    assert decide_request(API, policies(rules), replace(BASE, method="DELETE", peer=LEDGER.peer())).allowed
    assert not decide_request(API, policies(rules), replace(BASE, method="DELETE", peer=WEB.peer())).allowed


def test_a_thousand_rules_by_path_do_not_cost_a_scan() -> None:
    rules = ", ".join(operation("paths", f"/service-{n}/run") for n in range(1000))
    judge = RequestJudge.of(API, policies(authorization("ALLOW", f"[{rules}]")))
    assert judge.decide(replace(BASE, path="/service-999/run")).allowed
    assert not judge.decide(replace(BASE, path="/service-1000/run")).allowed
    index = judge._rules[judge.guard.policies[0].action]
    assert len(index.candidates(replace(BASE, path="/service-7/run"))) == 1


@pytest.mark.parametrize("path", ["*", "/a*", "*/b", "/{*}/b", "/a", "/a/*", "/a/b", "/{**}"])
def test_the_index_finds_whatever_a_scan_finds(path: str) -> None:
    judge = RequestJudge.of(API, policies(authorization("ALLOW", f"[{operation('paths', path)}]")))
    for asked in ("/a", "/ab", "/a/b", "/a/", "/", "", "*", "/x/b", "a/b", "//b"):
        assert judge.decide(replace(BASE, path=asked)).allowed is matches_path(path, asked), asked


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", True), ("2", True), ("1,2", False), ("*", True), ("*2", True), ("1*", True), ("3", False)],
)
def test_a_header_sent_twice_is_matched_value_by_value(value: str, expected: bool) -> None:
    asked = replace(BASE, headers={"x-a": "1,2"}, repeated={"x-a": ("1", "2")})
    for negative in (False, True):
        found = policies(authorization("ALLOW", f"[{when('request.headers[x-a]', value, negative=negative)}]"))
        assert decide_request(API, found, asked).allowed is (expected is not negative)


def test_a_template_takes_the_characters_envoys_own_takes() -> None:
    """Envoy 1.40, asked for every printable character of a path."""
    printable = [chr(code) for code in range(0x21, 0x7F)]
    taken = "".join(c for c in printable if matches_path("/x/{*}", f"/x/a{c}b"))
    assert taken == "!$%&'()*+,-.0123456789:;=@ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"
    assert [c for c in printable if matches_path("/x/{**}", f"/x/a{c}b")] == sorted([*taken, "/"])


def test_default_mesh_settings_are_istios() -> None:
    assert (DEFAULT_MESH.root_namespace, DEFAULT_MESH.trust_domain) == ("istio-system", "cluster.local")
    assert decide_request(API, policies(""), BASE).verdict is Verdict.ALLOW
