"""Policies that come and go one by one end where putting all of them together ends."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policycast import documents
from policygen import NAMESPACES, cluster_policy, outsiders, random_pods, random_policies
from test_compiler_oracle import documents_of, peer_of

from meshbridge.policy.cilium import CiliumSettings
from meshbridge.policy.mesh import MeshSettings
from meshbridge.policy.model import Document
from meshbridge.policy.parse import parse
from meshbridge.policy.policybook import PolicyBook
from meshbridge.policy.policyset import PolicySet

GROUP = """
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {{name: g1}}
spec: {{externalCIDRs: [10.{number}.0.0/16]}}
"""
CONFIG = """
apiVersion: v1
kind: ConfigMap
metadata: {{name: cilium-config, namespace: kube-system}}
data: {{enable-policy: {mode}}}
"""
REFERRING = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: refers, namespace: {namespace}}}
spec:
  endpointSelector: {{}}
  ingress: [{{fromCIDRSet: [{{cidrGroupRef: g1}}]}}]
"""


def changed_object(rng: random.Random) -> Document:
    """One of a few names, so that objects are replaced as well."""
    choice = rng.random()
    if choice < 0.08:
        return documents(GROUP.format(number=rng.randrange(3)))[0]
    if choice < 0.12:
        return documents(CONFIG.format(mode=rng.choice(("default", "always", "never"))))[0]
    if choice < 0.25:
        return documents(REFERRING.format(namespace=rng.choice(list(NAMESPACES))))[0]
    if choice < 0.5:
        data: dict[str, Any] = cluster_policy(rng, f"c{rng.randrange(4)}")
    else:
        data = rng.choice(random_policies(rng, network=4, mesh=4) or [cluster_policy(rng, "c0")])
        if rng.random() < 0.2:
            data.get("spec", {})["notAField"] = 1
    return documents_of([data])[0]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**63 - 1))
def test_single_changes_end_where_putting_all_together_ends(seed: int) -> None:
    rng = random.Random(seed)
    book = PolicyBook()
    # enough that nothing but the changed object is looked at
    for number, each in enumerate(documents_of(random_policies(rng, network=15, mesh=15))):
        book.put(f"kept {number}", parse(each))
    mesh = MeshSettings()
    peers = [peer_of(each) for each in (*random_pods(rng, 5), *outsiders())]
    for _ in range(12):
        if rng.random() < 0.3 and book:
            book.put(rng.choice(list(book)), None)
        elif rng.random() < 0.05:
            mesh = MeshSettings(root_namespace=rng.choice(list(NAMESPACES)))
        else:
            document = changed_object(rng)
            book.put("/".join(document.key), parse(document))
        if rng.random() < 0.8:
            found, scratch = book.policies(mesh), PolicySet.of_parsed(book.values(), mesh)
            assert found == scratch
            assert found.referenced_networks() == scratch.referenced_networks()
            assert found.anchors() == scratch.anchors()
            for peer in peers:
                assert found.selecting(peer) == scratch.selecting(peer)
                selecting = replace(scratch, cilium=CiliumSettings()).selecting(peer)
                assert found.concerns(peer) == (selecting != PolicySet(mesh=mesh))


def test_what_did_not_change_is_not_looked_at() -> None:
    book = PolicyBook()
    rng = random.Random(1)
    for number, each in enumerate(documents_of(random_policies(rng, network=20, mesh=20))):
        book.put(f"p{number}", parse(each))
    before = book.policies()
    assert book.policies() is before
    book.put("new", parse(documents(REFERRING.format(namespace="shop"))[0]))
    after = book.policies()
    assert [rule for rule in after.network if rule.origin.name != "refers"] == list(before.network)
    assert len(after.network) == len(before.network) + 1
