"""Masks say what selectors say of each peer, also of those that came later."""

from __future__ import annotations

import random
from ipaddress import ip_network

from hypothesis import given, settings
from hypothesis import strategies as st

from meshbridge.identity.model import Entity, Peer
from meshbridge.policy.peers import PeerIndex
from meshbridge.policy.selectors import (
    CidrPeers,
    ClusterPeers,
    EntityPeers,
    LabelSource,
    Operator,
    PeerSelector,
    Requirement,
    Selector,
)

NETWORKS = [ip_network("10.0.0.0/8"), ip_network("10.1.0.0/16")]
SELECTORS: list[PeerSelector] = [
    Selector.of([Requirement(source, key, operator, ("a", "b") if operator in (Operator.IN, Operator.NOT_IN) else ())])
    for source, key in ((LabelSource.POD, "app"), (LabelSource.NAMESPACE, ""), (LabelSource.NODE, "app"))
    for operator in Operator
]
SELECTORS += [EntityPeers(frozenset({Entity.HOST, Entity.WORLD})), ClusterPeers(""), ClusterPeers("west"), Selector()]
SELECTORS += [CidrPeers(NETWORKS[0], (NETWORKS[1],), pods, pods) for pods in (True, False)]


def random_peer(rng: random.Random) -> Peer:
    labels = {"app": rng.choice("abc")} if rng.random() < 0.7 else {}
    networks = frozenset(rng.sample(NETWORKS, rng.randint(0, 2)))
    if rng.random() < 0.6:
        return Peer(rng.choice("abc"), labels, cluster=rng.choice(("default", "west")), networks=networks)
    entities = frozenset(rng.sample([Entity.HOST, Entity.WORLD, Entity.REMOTE_NODE], rng.randint(1, 2)))
    return Peer(labels=labels, entities=entities, networks=networks)


def app_of(peer: Peer) -> str | None:
    return peer.labels.get("app")


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 100), min_size=1, max_size=4))
def test_an_index_that_grows_says_what_each_selector_says_of_each_peer(seed: int, sizes: list[int]) -> None:
    rng = random.Random(seed)
    index = PeerIndex({})
    peers: dict[int, Peer] = {}
    highest = 0
    for size in sizes:
        numbers = [highest := highest + rng.randint(1, 3) for _ in range(size)]
        added = {number: random_peer(rng) for number in rng.sample(numbers, size)}
        peers |= added
        assert index.extend(added)
        assert list(index.identities) == sorted(peers)
        for selector in SELECTORS:
            found = index.numbers(index.matching(selector))
            assert found == [number for number in sorted(peers) if selector.matches(peers[number])], selector
        grouped = {said: index.numbers(mask) for said, mask in index.grouped(app_of).items()}
        assert sorted(number for numbers in grouped.values() for number in numbers) == sorted(peers)
        assert all(app_of(peers[number]) == said for said, numbers in grouped.items() for number in numbers)
        inside = index.numbers(index.inside(NETWORKS[1]))
        assert inside == [number for number in sorted(peers) if NETWORKS[1] in peers[number].networks]


def test_a_number_below_another_is_not_taken_in() -> None:
    index = PeerIndex({5: Peer("a")})
    assert not index.extend({4: Peer("b"), 6: Peer("c")})
    assert list(index.identities) == [5]
