"""NetworkPolicies against cyclonus: every pair of ends × ports of random clusters, each end by itself.

Where the two may differ, and why:

- ``NotIn`` on a label that is absent: Kubernetes' label selectors match it, cyclonus does not. A difference counts as
  explained only if the API's text gives our answer as it stands, and cyclonus' when ``NotIn`` is read as cyclonus does.
- cyclonus knows no nodes: whether a pod's own node gets in is not asked. Nor is ICMP, which the API leaves open.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import oracle
import pytest
from goprograms import ask, built
from oracle import EGRESS, INGRESS, Flow, Holder, network_allows
from policygen import PORTS, network_policy, outsiders, random_pods
from policypoints import compiled_answers

SEED = int(os.environ.get("CONFORMANCE_SEED", "20261124"))
CLUSTERS = 60
PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
EXPRESSION = oracle._expression


def asked_flows(rng: random.Random, ends: list[Holder]) -> Iterator[tuple[int, int, str, int]]:
    """Source, destination (their places), protocol and port, for every pair of one family with a pod in it."""
    spots = [(protocol, port + off) for protocol in PROTOCOLS for port in PORTS for off in (0, 1, 500)]
    for source, destination in permutations(range(len(ends)), 2):
        one, other = ends[source], ends[destination]
        if one.address.version != other.address.version or not (one.is_pod or other.is_pod) or "host" in one.entities:
            continue
        for protocol, port in rng.sample(spots, 8):
            yield source, destination, protocol, port


def port_name(pod: Holder, protocol: str, port: int) -> str:
    return next((name for name, number, of in pod.ports if (number, of) == (port, protocol)), "")


def not_in_needs_the_label(expression: dict[str, Any], value: str | None) -> bool:
    return EXPRESSION(expression, value) and not (expression["operator"] == "NotIn" and value is None)


@pytest.mark.timeout(900)
def test_every_pair_of_ends_gets_cyclonus_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(SEED)
    clusters, cases = [], []
    for _ in range(CLUSTERS):
        ends = random_pods(rng, 5) + outsiders()
        objects = [network_policy(rng, f"n{index}") for index in range(rng.randint(1, 6))]
        flows = list(asked_flows(rng, ends))
        clusters.append((ends, objects, flows))
        cases.append({
            "policies": objects,
            "ends": [
                {"address": str(e.address), "namespace": e.namespace, "labels": e.labels if e.is_pod else {},
                 "namespaceLabels": {**e.namespace_labels, "kubernetes.io/metadata.name": e.namespace}}
                for e in ends
            ],
            "flows": [
                {"source": s, "destination": d, "protocol": protocol, "port": port,
                 "portName": port_name(ends[d], protocol, port)}
                for s, d, protocol, port in flows
            ],
        })  # fmt: skip
    seen: Counter[str] = Counter()
    for (ends, objects, flows), answers in zip(
        clusters, ask(built(Path(__file__).parent / "cyclonus"), cases), strict=True
    ):
        points = [
            (direction, Flow(ends[mine], ends[peer], direction, PROTOCOLS[protocol], port), answer[direction])
            for (source, destination, protocol, port), answer in zip(flows, answers, strict=True)
            for direction, mine, peer in ((EGRESS, source, destination), (INGRESS, destination, source))
            if ends[mine].is_pod
        ]
        ours = compiled_answers(objects, ends, [flow for _, flow, _ in points])
        for (direction, flow, theirs), mine in zip(points, ours, strict=True):
            if mine is not theirs:
                assert network_allows(objects, flow) is mine, (flow, objects)
                with monkeypatch.context() as patch:
                    patch.setattr(oracle, "_expression", not_in_needs_the_label)
                    assert network_allows(objects, flow) is theirs, (flow, objects)
                seen["NotIn on an absent label"] += 1
            seen[f"{direction} {'passes' if mine else 'is denied'}"] += 1
    print(dict(seen))
    for what in ("ingress passes", "ingress is denied", "egress passes", "egress is denied"):
        assert seen[what] > 5_000, f"hardly anything to compare: {what}"
    assert seen["NotIn on an absent label"] < seen.total() / 50, "too much is explained away"
