"""Numbering by single changes against numbering from scratch."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from hypothesis import given, settings
from hypothesis import strategies as st

from meshbridge.abi import address_bytes
from meshbridge.agent.identities import PeerNumbers
from meshbridge.identity.model import Entity, IpNetwork, Peer
from meshbridge.identity.numbering import Held, class_of

ADDRESSES = [address_bytes(IPv4Address(f"10.0.{n // 4}.{n % 4}")) for n in range(8)]
ADDRESSES += [address_bytes(IPv6Address(f"fd00::{n}")) for n in range(2)]
NETWORKS = [
    IPv4Network("10.0.0.0/24"), IPv4Network("10.0.1.0/30"), IPv4Network("192.0.2.0/24"), IPv4Network("0.0.0.0/0"),
    IPv4Network("10.0.0.0/8"), IPv6Network("::/0"), IPv6Network("fd00::1/128"),
]  # fmt: skip
PEERS = [
    Peer("shop", {"app": "web"}), Peer("shop", {"app": "api"}), Peer("pay", {"app": "web"}),
    Peer(entities=frozenset({Entity.HOST})), Peer(entities=frozenset({Entity.REMOTE_NODE})),
]  # fmt: skip

HOLDERS = st.dictionaries(st.sampled_from(ADDRESSES), st.sampled_from(PEERS))
CHANGES = st.lists(
    st.one_of(
        st.dictionaries(st.sampled_from(ADDRESSES), st.one_of(st.none(), st.sampled_from(PEERS)), min_size=1),
        st.sets(st.sampled_from(NETWORKS)),
    ),
    max_size=5,
)


def meaning(numbers: PeerNumbers) -> dict[object, tuple[object, object]]:
    """What the ipcache says, with classes in place of numbers."""

    def name(number: int) -> object:
        return class_of(numbers.identities[number]) if number else None

    tables = (numbers.ipcache.exact, numbers.ipcache.prefixes)
    return {key: (name(v.identity), name(v.forwarded_identity)) for table in tables for key, v in table.items()}


@settings(deadline=None, max_examples=200)
@given(HOLDERS, st.sets(st.sampled_from(NETWORKS)), CHANGES)
def test_single_changes_mean_the_same_as_a_numbering_from_scratch(
    holders: dict[bytes, Peer], networks: set[IpNetwork], changes: list[dict[bytes, Peer | None] | set[IpNetwork]]
) -> None:
    numbers = PeerNumbers()
    numbers.renumber(holders, networks)
    for changed in changes:
        before = numbers.identities
        if isinstance(changed, set):
            networks = changed
            assert numbers.tell_apart(networks)
        else:
            assert numbers.change(changed)
        assert before.items() <= numbers.identities.items(), "a number never means another class"
        for address, peer in changed.items() if isinstance(changed, dict) else ():
            if peer is None:
                holders.pop(address, None)
            else:
                holders[address] = peer
    scratch = PeerNumbers()
    scratch.renumber(holders, networks)
    assert meaning(numbers) == meaning(scratch)


def test_numbers_found_in_the_kernel_are_kept_and_new_ones_start_above() -> None:
    numbers = PeerNumbers()
    holders = {ADDRESSES[0]: PEERS[0], ADDRESSES[1]: PEERS[1]}
    numbers.renumber(holders, (), observed={ADDRESSES[0]: Held(777)}, highest=900)
    assert numbers.of(IPv4Address("10.0.0.0")) == 777
    assert (numbers.of(IPv4Address("10.0.0.1")) or 0) > 900


def test_too_many_leftovers_ask_for_a_renumbering() -> None:
    numbers = PeerNumbers()
    numbers.renumber({}, ())
    assert numbers.change({ADDRESSES[0]: PEERS[0]})
    alive = True
    for n in range(1100):
        alive = numbers.change({ADDRESSES[0]: Peer("shop", {"app": f"a{n}"})})
    assert not alive
    numbers.renumber({ADDRESSES[0]: Peer("shop", {"app": "a1099"})}, ())
    assert len([peer for peer in numbers.identities.values() if peer.is_pod]) == 1


def test_pods_that_come_and_go_leave_nothing_over() -> None:
    numbers = PeerNumbers()
    numbers.renumber({ADDRESSES[0]: PEERS[0]}, ())
    for _ in range(1100):
        assert numbers.change({ADDRESSES[1]: PEERS[1]})
        assert numbers.change({ADDRESSES[1]: None})


def test_many_other_networks_ask_for_a_renumbering() -> None:
    numbers = PeerNumbers()
    numbers.renumber({ADDRESSES[0]: PEERS[0]}, ())
    assert not numbers.tell_apart(IPv4Network(f"10.{n}.0.0/16") for n in range(20))
    assert numbers.networks == frozenset(), "which then finds all as it was"


def test_whoever_held_an_address_before_is_forgotten_at_once() -> None:
    numbers = PeerNumbers()
    numbers.renumber({ADDRESSES[0]: PEERS[0]}, ())
    numbers.change({ADDRESSES[0]: None})
    assert numbers.of(IPv4Address("10.0.0.0")) is None
