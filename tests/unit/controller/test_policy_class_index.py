"""Whom policies concern, kept up change by change, is what matching every policy against every pod gives."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policygen import APPS, NAMESPACES, random_policies

from meshbridge.controller.cluster import Cluster
from meshbridge.kube.manifests import Key
from meshbridge.policy.model import Document

PODS = 8
PLACES = (*NAMESPACES, "istio-system")
Changed = dict[Key, tuple[Document, ...]]


def document(data: dict[str, Any]) -> Document:
    metadata = data["metadata"]
    return Document(data["kind"], data["apiVersion"], metadata.get("namespace", ""), metadata["name"], data)


def random_pod(rng: random.Random, number: int) -> Document:
    labels = {"app": rng.choice(APPS), **({"role": rng.choice("xy")} if rng.random() < 0.5 else {})}
    return document(
        {
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": f"pod-{number}", "namespace": rng.choice(PLACES), "labels": labels},
            "spec": {"nodeName": rng.choice(("one", "two")), "containers": [{"name": "app"}]},
            "status": {"phase": "Running", "podIPs": [{"ip": f"10.0.0.{number + 1}"}]},
        }
    )  # fmt: skip


def change(rng: random.Random, known: set[Key]) -> Changed:
    """Some objects come or change, some go."""
    made = [random_pod(rng, rng.randrange(PODS)) for _ in range(rng.randint(0, 3))]
    made += [document(data) for data in random_policies(rng, network=4, mesh=3)]
    gone = rng.sample(sorted(known), min(len(known), rng.randint(0, 3)))
    return dict.fromkeys(gone, ()) | {one.key: (one,) for one in made}


def matched(cluster: Cluster, node: str) -> list[str]:
    endpoints = [local.workload.peer(cluster=cluster.mesh.cluster) for local in cluster.endpoints(node)]
    return sorted(item.name for item in cluster.policies.values() if any(item.concerns(peer) for peer in endpoints))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**63 - 1))
def test_policies_of_nodes_and_pods_are_those_that_match_after_every_change(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster()
    known: set[Key] = set()
    for _ in range(6):
        changes = change(rng, known)
        before = {node: [item.resource for item in cluster.policies_on(node)] for node in ("one", "two")}
        touched = cluster.apply(changes)
        known = {key for key in known | changes.keys() if changes.get(key, (1,))}
        for node, had in before.items():
            assert [item.name for item in cluster.policies_on(node)] == matched(cluster, node)
            assert node in touched.nodes or had == [item.resource for item in cluster.policies_on(node)]
        for pod in cluster.workloads:
            names = [
                item for item in cluster.policies.values() if item.concerns(pod.peer(cluster=cluster.mesh.cluster))
            ]
            rules = sorted(rule.origin for item in names for rule in item.parsed.network)
            assert sorted(rule.origin for rule in cluster.policies_of(pod).network) == rules


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**63 - 1))
def test_an_emptied_cluster_keeps_nothing_in_its_index(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster()
    known: set[Key] = set()
    for _ in range(3):
        changes = change(rng, known)
        cluster.apply(changes)
        known |= changes.keys()
    cluster.apply(dict.fromkeys(known, ()))
    assert not cluster._policies_at
    assert not cluster._classes_at
    assert not cluster._by_uid
