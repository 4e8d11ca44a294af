"""The simulated cluster is what its size says, and is read by the product without refusal."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from meshbridge.bench import simulated
from meshbridge.bench.scale import _Changes
from meshbridge.bench.simulated import Size
from meshbridge.controller.cluster import Cluster
from meshbridge.kube.objects import read_objects
from meshbridge.policy.parse import parse

SIZE = Size(nodes=7, pods=400, policies=100)


@pytest.mark.parametrize("size", [SIZE, Size(7, 400, 100, own_keys=True)], ids=str)
def test_every_object_is_read_and_parsed_without_refusal(size: Size) -> None:
    found = list(simulated.objects(size))
    changes = _Changes(size)
    for objects in (changes.outset(), *(files for _, files, _ in changes.of(1))):
        found += [each for listed in objects.values() for each in listed]
    content = read_objects("\n---\n".join(map(json.dumps, found)).encode(), "objects.yaml")
    assert not content.problems
    for document in content.documents:
        parsed = parse(document)
        assert not parsed.refusals, parsed.refusals
        assert not parsed.notices, parsed.notices


def test_the_cluster_has_the_size_it_says_and_policies_select_somebody() -> None:
    kinds = Counter(each["kind"] for each in simulated.objects(SIZE))
    assert (kinds["Node"], kinds["Pod"]) == (SIZE.nodes, SIZE.pods)
    policies = kinds["NetworkPolicy"] + kinds["CiliumNetworkPolicy"] + kinds["AuthorizationPolicy"]
    assert policies == SIZE.policies
    content = read_objects("\n---\n".join(map(json.dumps, simulated.objects(SIZE))).encode(), "objects.yaml")
    cluster = Cluster()
    cluster.apply({document.key: (document,) for document in content.documents})
    assert not list(cluster.problems)
    selected = {item.name for node in simulated.node_names(SIZE) for item in cluster.policies_on(node)}
    assert len(selected) == SIZE.policies


def test_namespaces_with_keys_of_their_own_share_no_view_of_the_addresses() -> None:
    size = Size(7, 400, 100, own_keys=True)
    content = read_objects("\n---\n".join(map(json.dumps, simulated.objects(size))).encode(), "objects.yaml")
    cluster = Cluster()
    cluster.apply({document.key: (document,) for document in content.documents})
    keys = {key for item in cluster.policies.values() for key in item.distinctions.labels.pod if key.endswith("/part")}
    assert len(keys) == size.namespaces
