"""What ``meshbridge evaluate`` answers about single flows: every field of a question and of an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshbridge.evaluation.batch import MAX_LINE_BYTES, answer_lines
from meshbridge.evaluation.cluster import Cluster
from meshbridge.kube.objects import read_objects

BASE = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Node
metadata: {name: one}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: one, serviceAccountName: web, containers: [{name: app}]}
status: {phase: Running, podIPs: [{ip: 10.1.0.1}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: api
  namespace: shop
  labels: {app: api}
  annotations:
    traffic.sidecar.istio.io/excludeInboundPorts: "9090"
    traffic.sidecar.istio.io/excludeOutboundPorts: "6379"
spec:
  nodeName: two
  containers: [{name: app, ports: [{name: http, containerPort: 8080}]}]
status: {phase: Running, podIPs: [{ip: 10.1.0.2}]}
---
apiVersion: v1
kind: Pod
metadata: {name: plain, namespace: ops, labels: {app: plain}}
spec: {nodeName: two, containers: [{name: app}]}
status: {phase: Running, podIPs: [{ip: 10.3.0.1}]}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: api}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: made, namespace: shop}
spec: {template: {metadata: {labels: {app: api}}, spec: {containers: [{name: app}]}}}
"""


def authorization(rule: str, action: str = "ALLOW") -> str:
    return f"""
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: api, namespace: shop}}
spec: {{selector: {{matchLabels: {{app: api}}}}, action: {action}, rules: [{rule}]}}
"""


def network(direction: str, rules: str, app: str) -> str:
    return f"""
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {app}, namespace: shop}}
spec: {{podSelector: {{matchLabels: {{app: {app}}}}}, policyTypes: [{direction.capitalize()}], {direction}: [{rules}]}}
"""


def cluster(text: str = "") -> Cluster:
    return Cluster(read_objects((BASE + text).encode(), "m.yaml").documents)


def ask(text: str, **flow: Any) -> dict[str, Any]:
    flow = {"src": "shop/web", "dst": "shop/api", "port": 8080, **flow}
    ((record, answered),) = [(line.record, line.answered) for line in answer_lines(cluster(text), [dumped(flow)])]
    assert answered, record
    return record


def dumped(flow: Any) -> bytes:
    return json.dumps(flow).encode()


WEB = "spiffe://cluster.local/ns/shop/sa/web"
FROM_WEB = authorization("{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}")
GET = authorization("{to: [{operation: {methods: [GET]}}]}")
CLAIM = authorization('{when: [{key: "request.auth.claims[role]", values: [admin]}]}')
NAMED = authorization("{from: [{source: {ipBlocks: [10.1.0.0/24]}}]}")
REMOTE = authorization("{from: [{source: {remoteIpBlocks: [203.0.113.0/24]}}]}")
HEADER = authorization('{when: [{key: "request.headers[x-a]", values: ["2"]}]}')
SNI = authorization("{when: [{key: connection.sni, values: [api.shop]}]}")
TO_IP = authorization("{when: [{key: destination.ip, values: [10.1.0.2]}]}")
STRICT = """
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
"""
PATH = authorization("{to: [{operation: {paths: [/api]}}]}")
DENY_GET = authorization("{to: [{operation: {methods: [GET]}}]}", "DENY")
HTTP = {"method": "GET", "path": "/", "host": "api"}
MESH: dict[str, tuple[str, dict[str, Any], str]] = {
    "no policy": ("", {}, "ALLOW"),
    "a principal nobody has said": (FROM_WEB, {}, "NEEDS_L7"),
    "the principal asked for": (FROM_WEB, {"peer_principal": WEB}, "ALLOW"),
    "the same without its scheme": (FROM_WEB, {"peer_principal": WEB.removeprefix("spiffe://")}, "ALLOW"),
    "another principal": (FROM_WEB, {"peer_principal": "spiffe://cluster.local/ns/x/sa/web"}, "DENY"),
    "plaintext": (FROM_WEB, {"peer_principal": None}, "DENY"),
    "STRICT and plaintext": (STRICT, {"peer_principal": None}, "DENY"),
    "STRICT and who knows": (STRICT, {}, "NEEDS_L7"),
    "STRICT and a certificate": (STRICT, {"peer_principal": WEB}, "ALLOW"),
    "a method nobody has said": (GET, {"app_protocol": "http"}, "NEEDS_L7"),
    "the method asked for": (GET, {"http": {"method": "GET"}}, "ALLOW"),
    "another method": (GET, {"http": {"method": "POST"}}, "DENY"),
    "a request without its method": (GET, {"http": {"path": "/"}}, "NEEDS_L7"),
    "an ALLOW with a method on TCP matches nothing": (GET, {"app_protocol": "tcp"}, "DENY"),
    "a DENY with a method on TCP denies all": (DENY_GET, {"app_protocol": "tcp"}, "DENY"),
    "a sniffed port is certain where both forms agree": (authorization("{}"), {"app_protocol": "auto"}, "ALLOW"),
    "a sniffed port is open where they do not": (DENY_GET, {"app_protocol": "auto"}, "NEEDS_L7"),
    "a Service names the protocol": (DENY_GET, {}, "NEEDS_L7"),
    "a path that Envoy makes the one asked for": (PATH, {"http": {**HTTP, "path": "/x/../%61pi?q"}}, "ALLOW"),
    "slashes that Envoy leaves": (PATH, {"http": {**HTTP, "path": "//api"}}, "DENY"),
    "a path that Envoy refuses": (authorization("{}"), {"http": {**HTTP, "path": "/%00"}}, "DENY"),
    "the claim asked for": (CLAIM, {"http": HTTP, "claims": {"role": "admin"}}, "ALLOW"),
    "another claim": (CLAIM, {"http": HTTP, "claims": {"role": "user"}}, "DENY"),
    "a request that tells of no token has none": (CLAIM, {"http": HTTP}, "DENY"),
    "a valid token whose claims nobody has said": (CLAIM, {"http": HTTP, "token": "valid"}, "NEEDS_L7"),
    "no token": (CLAIM, {"token": "absent", "app_protocol": "http"}, "DENY"),
    "a source inside a block": (NAMED, {}, "ALLOW"),
    "a source outside": (NAMED, {"src": "ops/plain"}, "DENY"),
    "an address given beside the source": (NAMED, {"src_ip": "10.9.0.1"}, "DENY"),
    "the world has no address": (NAMED, {"src": "entity:world"}, "NEEDS_L7"),
    "the client of a request that came through no proxy": (REMOTE, {"http": HTTP}, "DENY"),
    "the client is the last that a request was forwarded for": (
        REMOTE, {"http": {**HTTP, "headers": {"X-Forwarded-For": "1.2.3.4, 203.0.113.9"}}}, "ALLOW"),
    "and no other": (REMOTE, {"http": {**HTTP, "headers": {"X-Forwarded-For": "203.0.113.9,1.2.3.4"}}}, "DENY"),
    "what is no address counts for nothing": (
        REMOTE, {"http": {**HTTP, "headers": {"X-Forwarded-For": "203.0.113.9, me"}}}, "DENY"),
    "of a header sent twice each value counts": (
        HEADER, {"http": {**HTTP, "headers": {"X-A": ["1", "2"]}}}, "ALLOW"),
    "a comma in a value is a comma": (HEADER, {"http": {**HTTP, "headers": {"x-a": "1,2"}}}, "DENY"),
    "the client of a request of which nothing is said": (REMOTE, {"app_protocol": "http"}, "NEEDS_L7"),
    "the client that is said": (REMOTE, {"remote_ip": "203.0.113.9"}, "ALLOW"),
    "a name nobody has said": (SNI, {}, "NEEDS_L7"),
    "the name asked for": (SNI, {"sni": "api.shop"}, "ALLOW"),
    "the pod's own address": (TO_IP, {}, "ALLOW"),
    "an address given beside the destination": (TO_IP, {"dst_ip": "10.1.0.99"}, "DENY"),
    "a pod by its labels": (FROM_WEB, {"dst": {"namespace": "shop", "labels": {"app": "api"}}}, "NEEDS_L7"),
    "labels nobody has in the files": (
        FROM_WEB, {"dst": {"namespace": "shop", "labels": {"app": "api", "v": "2"}}, "peer_principal": WEB}, "ALLOW"),
    "labels the policy does not select": (FROM_WEB, {"dst": {"namespace": "shop", "labels": {"app": "x"}}}, "ALLOW"),
    "a template of pods": (FROM_WEB, {"dst": "shop/made", "peer_principal": None}, "DENY"),
    "a pod without a sidecar is not guarded": (FROM_WEB, {"proxy": "none", "peer_principal": None}, "ALLOW"),
    "UDP is not guarded": (FROM_WEB, {"protocol": "UDP"}, "ALLOW"),
    "ztunnel: a DENY with only a method denies nothing": (DENY_GET, {"proxy": "ztunnel"}, "ALLOW"),
    "ztunnel: an ALLOW with a method allows nothing": (GET, {"proxy": "ztunnel"}, "DENY"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "flow", "expected"), MESH.values(), ids=MESH.keys())
def test_the_mesh_verdict(text: str, flow: dict[str, Any], expected: str) -> None:
    assert ask(text, **flow)["mesh"] == expected


def test_a_bad_token_is_refused_only_where_tokens_are_asked_for() -> None:
    request = """
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: shop}
spec: {jwtRules: [{issuer: me, jwksUri: "https://me.example/keys"}]}
"""
    assert ask(request, http=HTTP, token="bad")["mesh"] == "DENY"
    assert ask(request, http=HTTP)["mesh"] == "ALLOW"
    assert ask("", http=HTTP, token="bad")["mesh"] == "ALLOW"


TO_API = network("egress", "{to: [{podSelector: {matchLabels: {app: api}}}], ports: [{port: 8080}]}", "web")
FROM_OPS = network("ingress", "{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: plain}}}]}", "api")
NETWORK: dict[str, tuple[str, dict[str, Any], tuple[str, str, str]]] = {
    "nothing restricts": ("", {}, ("ALLOW", "PASS", "ALLOW")),
    "egress allows": (TO_API, {}, ("ALLOW", "PASS", "ALLOW")),
    "egress does not": (TO_API, {"port": 8081}, ("DENY", "DROP", "DENY")),
    "ingress does not": (FROM_OPS, {}, ("DENY", "DROP", "DENY")),
    "ingress allows": (FROM_OPS, {"src": "ops/plain"}, ("ALLOW", "PASS", "ALLOW")),
    "the pod's own node always may": (FROM_OPS, {"src": "node/two"}, ("ALLOW", "PASS", "ALLOW")),
    "another node may not": (FROM_OPS, {"src": "node/one"}, ("DENY", "DROP", "DENY")),
    "a node by its address": (FROM_OPS, {"src": "192.168.0.1"}, ("DENY", "DROP", "DENY")),
    "a pod to itself always may": (FROM_OPS, {"src": "shop/api"}, ("ALLOW", "PASS", "ALLOW")),
    "a pod by its address": (TO_API, {"dst": "10.1.0.2"}, ("ALLOW", "PASS", "ALLOW")),
    "a Service by its address": (TO_API, {"dst": "10.96.0.1", "port": 80}, ("ALLOW", "PASS", "ALLOW")),
    "the pods behind a Service count": (FROM_OPS, {"dst": "10.96.0.1", "port": 80}, ("DENY", "DROP", "DENY")),
    "the world": (TO_API, {"dst": "203.0.113.7"}, ("DENY", "DROP", "DENY")),
    "a ping": (TO_API, {"protocol": "ICMP", "port": 8}, ("DENY", "DROP", "DENY")),
    "certain in the mesh, so dropped early": (
        authorization("{to: [{operation: {ports: ['1']}}]}"), {}, ("ALLOW", "DROP", "DENY")),
    "open in the kernel, decided by Envoy": (FROM_WEB, {"peer_principal": None}, ("ALLOW", "PASS", "DENY")),
    "an excluded port passes only what is certain": (FROM_WEB, {"port": 9090}, ("ALLOW", "PASS", "ALLOW")),
    "an excluded port drops what nobody judges": (GET, {"port": 9090}, ("ALLOW", "DROP", "DENY")),
}  # fmt: skip


@pytest.mark.parametrize(("text", "flow", "expected"), NETWORK.values(), ids=NETWORK.keys())
def test_network_kernel_and_verdict(text: str, flow: dict[str, Any], expected: tuple[str, str, str]) -> None:
    answer = ask(text, **flow)
    assert (answer["network"], answer["kernel"], answer["verdict"]) == expected


PATHS: dict[str, tuple[dict[str, Any], tuple[str | None, str | None]]] = {
    "sidecar to sidecar": ({}, ("captured", "captured")),
    "an excluded inbound port": ({"port": 9090}, ("captured", "bypassed")),
    "an excluded outbound port": ({"src": "shop/api", "dst": "shop/web", "port": 6379}, ("bypassed", "captured")),
    "without a sidecar at either end": ({"src": "ops/plain", "dst": "ops/plain"}, (None, None)),
    "from the world": ({"src": "203.0.113.7"}, (None, "captured")),
    "to the world": ({"dst": "203.0.113.7"}, ("captured", None)),
    "UDP": ({"protocol": "UDP"}, (None, None)),
    "the sidecar's own port": ({"port": 15020}, ("captured", None)),
}


@pytest.mark.parametrize(("flow", "expected"), PATHS.values(), ids=PATHS.keys())
def test_the_path(flow: dict[str, Any], expected: tuple[str | None, str | None]) -> None:
    path = ask("", **flow)["path"]
    assert (path["egress"], path["ingress"]) == expected


def test_reasons_name_policy_kind_rule_file_and_line() -> None:
    (reason,) = ask(TO_API, port=8081)["reasons"]
    assert (reason["policy"], reason["kind"], reason["file"]) == ("shop/web", "NetworkPolicy", "m.yaml")
    assert reason["line"] > 0
    assert "isolated by NetworkPolicy shop/web" in reason["text"]
    assert [r["policy"] for r in ask(FROM_WEB, peer_principal=None)["reasons"]] == ["shop/api"]


def test_keys_that_are_not_known_come_back_as_they_were() -> None:
    answer = ask("", ticket={"id": [1, None]}, note="x")
    assert (answer["ticket"], answer["note"], answer["src"]) == ({"id": [1, None]}, "x", "shop/web")


HTTP_RULE = """
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress: [{toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{method: GET}]}}]}]
"""


@pytest.mark.parametrize(
    ("http", "network_verdict", "verdict"),
    [(None, "ALLOW", "NEEDS_L7"), (HTTP, "ALLOW", "ALLOW"), ({**HTTP, "method": "PUT"}, "DENY", "DENY")],
    ids=["nothing said", "the rule matches", "the rule does not"],
)
def test_http_rules_of_network_policies(http: dict[str, str] | None, network_verdict: str, verdict: str) -> None:
    answer = ask(HTTP_RULE, http=http)
    assert (answer["network"], answer["kernel"], answer["verdict"]) == (network_verdict, "PASS", verdict)


GOOD = {"src": "shop/web", "dst": "shop/api", "port": 80}
BAD: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"nope", "no JSON"),
    "not UTF-8": (b'{"src": "\xff"}', "no JSON"),
    "too deep": (b"[" * 100_000, "no JSON"),
    "a list": (b"[1]", "a list, not an object"),
    "too long": (b'"' + b"x" * MAX_LINE_BYTES + b'"', "longer than"),
    "no destination": (dumped({"src": "shop/web", "port": 1}), "dst: is missing"),
    "no source": (dumped({"dst": "shop/api", "port": 1}), "src: is missing"),
    "no port": (dumped({"dst": "shop/api", "src": "shop/web"}), "port: is missing"),
    "a port that is none": (dumped({**GOOD, "port": 65536}), "is no port"),
    "a port that is a truth": (dumped({**GOOD, "port": True}), "is no port"),
    "an ICMP type that is none": (dumped({**GOOD, "protocol": "ICMP", "port": 256}), "is no ICMP type"),
    "an unknown protocol": (dumped({**GOOD, "protocol": "GRE"}), "use one of: TCP"),
    "an unknown pod": (dumped({**GOOD, "dst": "shop/none"}), "no pod 'shop/none'"),
    "an unknown entity": (dumped({**GOOD, "src": "entity:mars"}), "no entity 'mars'"),
    "an address that is none": (dumped({**GOOD, "src_ip": "10.0.0"}), "src_ip: '10.0.0' is no address"),
    "labels that are none": (dumped({**GOOD, "dst": {"namespace": "a", "labels": [1]}}), "dst.labels"),
    "a request that is none": (dumped({**GOOD, "http": "GET /"}), "http: 'GET /' is no object"),
    "a method that is none": (dumped({**GOOD, "http": {"method": 3}}), "http.method"),
    "claims that are none": (dumped({**GOOD, "claims": "x"}), "claims"),
    "an unknown proxy": (dumped({**GOOD, "proxy": "envoy"}), "use one of: SIDECAR"),
}


@pytest.mark.parametrize(("line", "text"), BAD.values(), ids=BAD.keys())
def test_a_line_that_cannot_be_answered_says_why_and_the_others_are_answered(line: bytes, text: str) -> None:
    first, bad, last = answer_lines(cluster(), [dumped(GOOD), line, dumped(GOOD)])
    assert first.answered
    assert last.record == first.record
    assert not bad.answered
    assert bad.record["error"]["line"] == 2
    assert text in bad.record["error"]["text"]


def test_blank_lines_are_no_questions() -> None:
    assert len(list(answer_lines(cluster(), [b"\n", dumped(GOOD), b"  \n"]))) == 1


SECOND_NETWORK = """
---
apiVersion: v1
kind: Pod
metadata:
  name: both
  namespace: shop
  labels: {app: api}
  annotations: {traffic.sidecar.istio.io/excludeInterfaces: net1}
spec: {nodeName: two, containers: [{name: app}]}
status: {phase: Running, podIPs: [{ip: 10.1.0.3}]}
"""


def test_an_excluded_interface_is_a_way_past_envoy() -> None:
    policy = SECOND_NETWORK + GET
    by_default = ask(policy, dst="shop/both", http={"method": "POST"})
    assert (by_default["path"]["ingress"], by_default["kernel"], by_default["verdict"]) == ("captured", "PASS", "DENY")
    excluded = ask(policy, dst="shop/both", interface="net1", http={"method": "GET"})
    assert (excluded["path"]["ingress"], excluded["kernel"], excluded["verdict"]) == ("bypassed", "DROP", "DENY")
    assert ask(policy, src="shop/both", dst="shop/api", interface="net1")["path"]["egress"] == "bypassed"
    assert ask(policy, src="shop/both", dst="shop/api")["path"]["egress"] == "captured"


def test_who_sends_as_the_proxys_user_passes_by_its_envoy() -> None:
    asked = {uid: ask(STRICT, src="shop/web", dst="shop/api", src_uid=uid) for uid in (1000, 1337)}
    assert {uid: record["path"]["egress"] for uid, record in asked.items()} == {1000: "captured", 1337: "bypassed"}
    assert asked[1337]["verdict"] == "DENY", "plaintext, which STRICT resets"
    assert asked[1000]["verdict"] != "DENY"


@pytest.mark.parametrize(
    "wrong", [{"interface": ""}, {"interface": "a-name-of-17-chars"}, {"interface": 1}, {"src_uid": -1},
              {"src_uid": True}, {"src_uid": "1337"}, {"src_uid": 1 << 32}],
)  # fmt: skip
def test_an_interface_or_user_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    flow = {"src": "shop/web", "dst": "shop/api", "port": 8080, **wrong}
    (line,) = answer_lines(cluster(), [dumped(flow)])
    assert not line.answered
    assert next(iter(wrong)) in str(line.record["error"])
