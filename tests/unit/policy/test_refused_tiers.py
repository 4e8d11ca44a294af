"""A refused object of the Admin tier isolates, and what Baseline denied stays denied."""

from __future__ import annotations

from typing import Any

from meshbridge.identity.model import Entity, IpFamily, Peer, Workload
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import compile_endpoint
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.model import Direction, Document, Verdict
from meshbridge.policy.policyset import PolicySet

GROUP = "policy.networking.k8s.io/v1alpha2"
POD = Workload("shop", "web", "u", "n", (), {"app": "web"})
PEERS = {300: Peer(entities=frozenset({Entity.HOST})), 301: Peer("pay", {"app": "ledger"})}


def policy(name: str, tier: str, rule: dict[str, Any]) -> Document:
    spec = {"tier": tier, "priority": 1, "subject": {"namespaces": {}}, "ingress": [rule]}
    data = {"apiVersion": GROUP, "kind": "ClusterNetworkPolicy", "metadata": {"name": name}, "spec": spec}
    return Document("ClusterNetworkPolicy", GROUP, "", name, data)


def verdicts(*documents: Document) -> dict[int, Verdict]:
    compiled = compile_endpoint(POD, PolicySet.of(documents), PEERS, Capture.none())
    ingress = compiled.map(Direction.INGRESS, IpFamily.IPV4)
    return {number: evaluate(ingress, number, 6, 80).network.verdict for number in PEERS}


DENY = policy("base", "Baseline", {"action": "Deny", "from": [{"aKindOfPeerToCome": {}}]})  # everybody, to be safe
ACCEPT = policy("base", "Baseline", {"action": "Accept", "from": [{"namespaces": {}}]})
SPOILT = policy("admin", "Admin", {"action": "Accept", "from": [{"namespaces": {}}], "notAField": 1})


def test_what_baseline_denies_stays_denied_beside_a_refused_object() -> None:
    assert set(verdicts(DENY).values()) == {Verdict.DENY}
    assert set(verdicts(DENY, SPOILT).values()) == {Verdict.DENY}


def test_what_baseline_accepts_is_isolated_all_the_same() -> None:
    assert verdicts(ACCEPT)[301] is Verdict.ALLOW
    assert verdicts(ACCEPT, SPOILT)[301] is Verdict.DENY
