"""ClusterNetworkPolicies, alone and around NetworkPolicies, as Cilium's own policy engine judges them.

What is not asked, since Cilium is known to answer otherwise (CILIUM.md §c):

- a NetworkPolicy beside a Baseline Accept, which in Cilium opens what the NetworkPolicy's implicit deny closes;
- equal priorities and a peer of an unknown kind beside a known one, where the API leaves or gives another answer;
- domain names, to which Cilium adds a rule of its own, labels that Cilium leaves out of identities, two ports of one
  name, of which Cilium knows the last, and the own node, which is one identity to Cilium in both address families;
- a namespace selector that only says what is not: Cilium lets it pick the world and nodes too. Such a selector is given
  a requirement that every namespace meets, which changes nothing of what the API says.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from goprograms import ask, built
from oracle import EGRESS, INGRESS, Flow, Holder
from policygen import PORTS, cluster_policy, maybe, network_policy, outsiders, random_pods
from policypoints import compiled_answers

SEED = int(os.environ.get("CONFORMANCE_SEED", "20261124"))
CASES = 150
PROBES = [(protocol, port + off) for protocol in (6, 17, 132) for port in PORTS for off in (0, 1)] + [(1, 8), (58, 128)]
DIRECTIONS = (INGRESS, EGRESS)
NOT_ASKED = ("domainNames", "pod-template-hash", "AdminNetworkPolicy", "portNumber", "portRange", "namedPort")


def random_objects(rng: random.Random) -> list[dict[str, Any]]:
    """ClusterNetworkPolicies of different priorities, and half the time NetworkPolicies instead of a Baseline tier."""
    priorities = rng.sample(range(1001), 7)
    found = [
        each | {"spec": each["spec"] | {"priority": priority}}
        for index, priority in enumerate(priorities)
        if is_asked(each := cluster_policy(rng, f"c{index}"))
    ]
    if maybe(rng, 0.5):
        found = [each for each in found if each["spec"]["tier"] == "Admin"]
        made = (network_policy(rng, f"n{index}") for index in range(rng.randint(1, 3)))
        found += [each for each in made if is_asked(each) and says_what_it_does(each)]
    for each in found:
        if each["kind"] == "ClusterNetworkPolicy" and maybe(rng, 0.6):
            each["spec"]["subject"] = {"namespaces": {}}
        name_namespaces(each["spec"])
    return found


def name_namespaces(value: Any) -> None:
    """Every namespace selector asks for the label that every namespace has."""
    if isinstance(value, list):
        for item in value:
            name_namespaces(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("namespaces", "namespaceSelector"):
                item.setdefault("matchExpressions", []).append(
                    {"key": "kubernetes.io/metadata.name", "operator": "Exists"}
                )
            else:
                name_namespaces(item)


def is_asked(policy: dict[str, Any]) -> bool:
    peers = [
        peer
        for direction in ("ingress", "egress")
        for rule in policy["spec"].get(direction) or []
        for peer in rule.get("from") or rule.get("to") or []
    ]
    known = all(peer and "tenants" not in peer for peer in peers)
    return known and not any(word in str(policy) for word in NOT_ASKED)


def says_what_it_does(policy: dict[str, Any]) -> bool:
    """Cilium takes rules of a direction that policyTypes leave out for meant."""
    types = policy["spec"].get("policyTypes") or ["Ingress", "Egress"]
    return all(name.capitalize() in types for name in DIRECTIONS if policy["spec"].get(name))


def as_cilium_has_it(pod: Holder) -> Holder:
    """Without labels that are no part of an identity, and with one port of each name."""
    labels = {key: value for key, value in pod.labels.items() if key in ("app", "role")}
    return replace(pod, labels=labels, ports=tuple({name: (name, *port) for name, *port in pod.ports}.values()))


def case_of(objects: list[dict[str, Any]], pods: list[Holder], others: list[Holder]) -> dict[str, Any]:
    return {
        "enforcement": "default", "cidrMatchMode": ["pods", "nodes"], "nodeLabels": True, "policies": objects,
        "probes": [{"protocol": protocol, "port": port} for protocol, port in PROBES],
        "pods": [
            {"namespace": p.namespace, "labels": p.labels, "serviceAccount": p.service_account,
             "namespaceLabels": {**p.namespace_labels, "kubernetes.io/metadata.name": p.namespace},
             "address": str(p.address),
             "ports": [{"name": name, "port": port, "protocol": protocol} for name, port, protocol in p.ports]}
            for p in pods
        ],
        "others": [
            {"entities": [each for each in o.entities if "world" not in each], "address": str(o.address),
             "nodeLabels": o.labels}
            for o in others
        ],
    }  # fmt: skip


@pytest.mark.timeout(1800)  # the first run builds the engine
def test_every_verdict_is_ciliums() -> None:
    rng = random.Random(SEED)
    clusters, cases = [], []
    for _ in range(CASES):
        pods = [as_cilium_has_it(pod) for pod in random_pods(rng, 4)]
        objects, others = random_objects(rng), [other for other in outsiders() if "host" not in other.entities]
        clusters.append((objects, pods, others))
        cases.append(case_of(objects, pods, others))
    seen: Counter[str] = Counter()
    answers = ask(built(Path(__file__).parent / "cilium"), cases)
    for (objects, pods, others), answer in zip(clusters, answers, strict=True):
        assert not answer["refused"], answer["refused"]
        points = [
            (Flow(pod, peer, direction, *probe, direction == INGRESS and "host" in peer.entities), said == "1")
            for pod, by_direction in zip(pods, answer["verdicts"], strict=True)
            for direction, by_peer in zip(DIRECTIONS, by_direction, strict=True)
            for peer, line in zip([*pods, *others], by_peer, strict=True)
            if peer.address.version == pod.address.version and peer is not pod
            for probe, said in zip(PROBES, line, strict=True)
        ]
        ours = compiled_answers(objects, [*pods, *others], [flow for flow, _ in points])
        for (flow, theirs), mine in zip(points, ours, strict=True):
            assert mine is theirs, (flow, objects)
            seen[f"{flow.direction} {'passes' if mine else 'is denied'}"] += 1
    print(dict(seen))
    for what in ("ingress passes", "ingress is denied", "egress passes", "egress is denied"):
        assert seen[what] > 5_000, f"hardly anything to compare: {what}"
