"""Finding policies by namespace and label gives what looking at every one of them gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policycast import documents
from policygen import APPS, NAMESPACES, outsiders, random_pods, random_policies
from test_compiler_oracle import documents_of, peer_of

from meshbridge.identity.model import Peer
from meshbridge.policy.anchors import anchors_at
from meshbridge.policy.mesh import selects
from meshbridge.policy.model import Layer
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.selectors import Selector

ROOT = "istio-system"


def scanned(policies: PolicySet, peer: Peer) -> PolicySet:
    """The policies that concern ``peer``, each one looked at."""
    near = (ROOT, peer.namespace)
    return PolicySet(
        network=tuple(rule for rule in policies.network if rule.subject.matches(peer)),
        authorization=tuple(p for p in policies.authorization if selects(p, peer, policies.mesh)),
        peer_authentication=tuple(p for p in policies.peer_authentication if p.namespace in near),
        request_authentication=tuple(p for p in policies.request_authentication if selects(p, peer, policies.mesh)),
        refusals=tuple(
            refusal
            for refusal in policies.refusals
            if (refusal.layer is Layer.NETWORK or refusal.document.namespace in near)
            and any(selector.matches(peer) for selector in refusal.selectors)
        ),
        mesh=policies.mesh,
    )


def request_authentication(rng: random.Random, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = {"jwtRules": [{"issuer": "iss", "jwks": '{"keys":[]}'}]}
    if rng.random() < 0.6:
        spec["selector"] = {"matchLabels": {"app": rng.choice(APPS)}}
    return {
        "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
        "metadata": {"name": name, "namespace": rng.choice((*NAMESPACES, ROOT))}, "spec": spec,
    }  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**63 - 1))
def test_policies_found_by_their_anchors_are_those_that_select(seed: int) -> None:
    rng = random.Random(seed)
    objects = random_policies(rng, network=8, mesh=8)
    objects += [request_authentication(rng, f"r{number}") for number in range(rng.randint(0, 3))]
    for each in objects:
        if "istio" in each["apiVersion"] and rng.random() < 0.2:
            each["spec"]["notAField"] = 1
    policies = PolicySet.of(documents_of(objects))
    root = Peer(namespace=ROOT, labels={"app": rng.choice(APPS)})
    for peer in [root, *map(peer_of, [*random_pods(rng, 6), *outsiders()])]:
        expected = scanned(policies, peer)
        assert policies.selecting(peer) == expected
        assert policies.network_rules(peer) == expected.network
        if expected != PolicySet(mesh=policies.mesh):
            assert policies.anchors() & set(anchors_at(peer))


@pytest.mark.parametrize(
    ("namespace", "labels", "looked_at"),
    [("shop", {"app": "a7", "hash": "1"}, 1), ("shop", {"app": "other"}, 0), ("pay", {"app": "a7"}, 0)],
)
def test_a_search_looks_only_at_rules_that_name_a_label_of_the_peer(
    namespace: str, labels: dict[str, str], looked_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "---".join(
        f"""
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: p{number}, namespace: shop}}
spec: {{podSelector: {{matchLabels: {{app: a{number}}}}}}}
"""
        for number in range(50)
    )
    policies = PolicySet.of(documents(text))
    asked: list[Selector] = []
    matches = Selector.matches

    def counted(selector: Selector, peer: Peer) -> bool:
        asked.append(selector)
        return matches(selector, peer)

    monkeypatch.setattr(Selector, "matches", counted)
    found = policies.network_rules(Peer(namespace=namespace, labels=labels))
    assert (len(found), len(asked)) == (looked_at, looked_at)
