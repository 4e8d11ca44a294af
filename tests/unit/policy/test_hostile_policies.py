"""Objects made to hurt: huge, deep, of wrong types everywhere. They cost bounded time and loosen nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policycast import API, compiled, documents, policies

from meshbridge.policy.capture import Capture
from meshbridge.policy.model import Direction, Document, Severity
from meshbridge.policy.parse import CLUSTER_KINDS, POLICY_KINDS, parse
from meshbridge.policy.policyset import PolicySet

KINDS = [*POLICY_KINDS, *sorted(CLUSTER_KINDS)]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("*") | st.binary()
WORDS = [
    "spec", "specs", "endpointSelector", "matchLabels", "matchExpressions", "key", "operator", "values", "ingress",
    "egress", "ingressDeny", "fromEndpoints", "toEntities", "toPorts", "ports", "port", "endPort", "icmps", "from",
    "to",
    "podSelector", "ipBlock", "cidr", "except", "policyTypes", "rules", "source", "principals", "operation", "when",
    "selector", "action", "mtls", "mode", "portLevelMtls", "jwtRules", "issuer", "jwks", "metadata", "annotations",
    "tier", "priority", "subject", "namespaces", "pods", "nodes", "networks", "domainNames", "protocols", "tcp",
    "destinationPort", "range", "portNumber", "portRange",
    "containers", "template", "status", "podIPs", "initContainers", "args", "http", "path",
]  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=5),
    max_leaves=30,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KINDS), TREES, TREES)
def test_no_content_raises(kind: tuple[str, str], spec: Any, metadata: Any) -> None:
    data = {"spec": spec, "specs": spec, "metadata": metadata, "status": metadata}
    parsed = parse(Document(kind[1], f"{kind[0]}/v1" if kind[0] else "v1", "shop", "x", data))
    for refusal in parsed.refusals:
        assert str(refusal).isprintable()


def test_a_megabyte_of_rules_is_read_in_bounded_time() -> None:
    peers = "".join(f"    - matchLabels: {{app: a{n}}}\n" for n in range(35_000))
    text = f"""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: big, namespace: shop}}
spec:
  endpointSelector: {{}}
  ingress:
  - fromEndpoints:
{peers}"""
    assert len(text) > 1_000_000
    (document,) = documents(text)
    started = time.process_time()
    (refusal,) = parse(document).refusals
    assert "more than 20000" in str(refusal)
    assert time.process_time() - started < 1


def test_a_megabyte_that_is_valid_compiles_in_bounded_time() -> None:
    rules = "".join(
        f"  - {{fromEndpoints: [{{matchLabels: {{app: a{n}}}}}], toPorts: [{{ports: [{{port: '{n + 1}'}}]}}]}}\n"
        for n in range(10_000)
    )
    text = f"""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: big, namespace: shop}}
spec:
  endpointSelector: {{}}
  ingress:
{rules}"""
    (document,) = documents(text)
    started = time.process_time()
    found = PolicySet.of([document])
    assert not found.refusals
    compiled(found, API, Capture.sidecar())
    assert time.process_time() - started < 3


def test_many_rules_below_a_pass_of_many_ranges_compile_in_bounded_time() -> None:
    ranges = ", ".join(
        f"{{tcp: {{destinationPort: {{range: {{start: {n}, end: {n + 2000}}}}}}}}}" for n in range(1, 26)
    )
    rules = "".join(f"  - {{ports: [{{port: {n + 1}, endPort: {n + 5001}}}]}}\n" for n in range(5_000))
    found = policies(f"""
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {{name: guard}}
spec:
  tier: Admin
  priority: 1
  subject: {{namespaces: {{}}}}
  ingress:
  - {{action: Pass, from: [{{namespaces: {{}}}}], protocols: [{ranges}]}}
  - {{action: Deny, from: [{{namespaces: {{}}}}]}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: big, namespace: shop}}
spec:
  podSelector: {{}}
  ingress:
{rules}""")
    assert not found.refusals
    started = time.process_time()
    compiled(found, API)
    assert time.process_time() - started < 5


def test_deep_nesting_is_refused_without_recursion() -> None:
    deep: Any = {}
    for _ in range(50_000):
        deep = {"matchLabels": deep}
    data = {"spec": {"endpointSelector": deep, "ingress": [{}]}}
    (refusal,) = parse(Document("CiliumNetworkPolicy", "cilium.io/v2", "shop", "x", data)).refusals
    assert "unknown field" in str(refusal) or "expected a string" in str(refusal)


def test_an_error_quotes_no_more_of_a_value_than_a_line() -> None:
    data = {"spec": {"mtls": {"mode": "x" * 100_000 + "\n\x1b[2J"}}}
    (refusal,) = parse(Document("PeerAuthentication", "security.istio.io/v1", "shop", "x", data)).refusals
    assert len(str(refusal)) < 300


CONTRADICTIONS = {
    "two values of one label": "{matchLabels: {app: a}, matchExpressions: [{key: app, operator: In, values: [b]}]}",
    "in and not in": (
        "{matchExpressions: [{key: app, operator: In, values: [a]}, {key: app, operator: NotIn, values: [a]}]}"
    ),
    "there and not there": "{matchExpressions: [{key: app, operator: Exists}, {key: app, operator: DoesNotExist}]}",
    "a value of what is not there": "{matchLabels: {app: a}, matchExpressions: [{key: app, operator: DoesNotExist}]}",
}


@pytest.mark.parametrize("selector", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
@pytest.mark.parametrize("place", ["subject", "peer"])
def test_a_selector_that_contradicts_itself_selects_nothing_and_says_so(selector: str, place: str) -> None:
    subject, peer = (selector, "{}") if place == "subject" else ("{}", selector)
    found = policies(f"""
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: p, namespace: shop}}
spec: {{podSelector: {subject}, ingress: [{{from: [{{podSelector: {peer}}}]}}]}}
""")
    (notice,) = found.notices
    assert notice.severity is Severity.ERROR
    assert "selects nothing" in str(notice)
    assert "policy.yaml:5" in str(notice)
    isolated = any(rule.direction is Direction.INGRESS for rule in found.selecting(API).network)
    assert isolated is (place == "peer")


def test_a_kind_of_a_policy_group_that_is_not_read_says_so() -> None:
    parsed = parse(Document("CiliumEnvoyConfig", "cilium.io/v2", "", "g", {"spec": {}}))
    assert any("no effect here" in str(notice) for notice in parsed.notices)


def test_other_kinds_are_passed_over() -> None:
    parsed = parse(Document("ConfigMap", "v1", "shop", "c", {"data": {}}))
    assert (parsed.refusals, parsed.notices, parsed.objects) == ((), (), ())
