"""Numbers of peers: stable for a class, local to a node, never handed out twice; what the ipcache holds of them."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

from hypothesis import given, settings
from hypothesis import strategies as st

from meshbridge.identity.model import Entity, IpAddress, Peer
from meshbridge.identity.networks import NetworkIndex
from meshbridge.identity.numbering import FIRST_LOCAL, RESERVED, Held, Numbering, number_peers

HOST = Peer(entities=frozenset({Entity.HOST}))
WORLD4 = frozenset({Entity.WORLD, Entity.WORLD_IPV4})


def pod(app: str, namespace: str = "shop") -> Peer:
    return Peer(namespace=namespace, labels={"app": app})


def holders(*pairs: tuple[str, Peer]) -> dict[IpAddress, Peer]:
    return {ip_address(address): peer for address, peer in pairs}


def number_of(numbering: Numbering, address: str) -> int:
    return numbering.addresses[ip_address(address)].identity


def test_equal_peers_share_a_number_and_others_do_not() -> None:
    found = number_peers(holders(("10.0.0.1", pod("a")), ("10.0.0.2", pod("a")), ("10.0.0.3", pod("b"))))
    assert number_of(found, "10.0.0.1") == number_of(found, "10.0.0.2") != number_of(found, "10.0.0.3")


def test_equal_labels_in_and_out_of_a_policy_cidr_are_two_classes() -> None:
    found = number_peers(holders(("10.0.0.1", pod("a")), ("10.0.1.2", pod("a"))), [ip_network("10.0.0.0/24")])
    inside, outside = number_of(found, "10.0.0.1"), number_of(found, "10.0.1.2")
    assert inside != outside
    assert found.identities[inside].networks == {ip_network("10.0.0.0/24")}
    assert found.identities[outside].networks == frozenset()


def test_the_node_is_host_and_its_forwarded_packets_are_somebody_else() -> None:
    held = number_peers(holders(("192.168.0.1", HOST))).addresses[ip_address("192.168.0.1")]
    assert held.identity == 1
    assert held.forwarded >= FIRST_LOCAL


def test_a_forwarded_node_address_is_masqueraded_in_every_class() -> None:
    found = number_peers(holders(("192.168.0.1", HOST)), [ip_network("192.168.0.0/16")])
    held = found.addresses[ip_address("192.168.0.1")]
    assert found.identities[held.forwarded].masqueraded
    assert not found.identities[held.identity].masqueraded
    assert held.identity >= FIRST_LOCAL


def test_only_nodes_have_a_forwarded_identity() -> None:
    assert number_peers(holders(("10.0.0.1", pod("a")))).addresses[ip_address("10.0.0.1")].forwarded == 0


def test_reserved_identities_are_always_there_and_zero_never_is() -> None:
    found = number_peers({})
    assert found.identities.keys() == RESERVED.keys()
    assert {number: found.networks[network] for number, network in ((9, ip_network("0.0.0.0/0")),
            (10, ip_network("::/0")))} == {9: 9, 10: 10}  # fmt: skip


def test_each_policy_cidr_stands_for_the_world_inside_it() -> None:
    found = number_peers({}, [ip_network("10.0.0.0/8"), ip_network("10.1.0.0/16"), ip_network("fd00::/8")])
    inner = found.identities[found.networks[ip_network("10.1.0.0/16")]]
    assert inner == Peer(entities=WORLD4, networks=frozenset({ip_network("10.0.0.0/8"), ip_network("10.1.0.0/16")}))
    assert found.identities[found.networks[ip_network("fd00::/8")]].entities == {Entity.WORLD, Entity.WORLD_IPV6}
    assert found.networks[ip_network("0.0.0.0/0")] == 9


def test_a_cidr_of_everything_is_a_class_of_its_own() -> None:
    found = number_peers({}, [ip_network("0.0.0.0/0")])
    assert found.networks[ip_network("0.0.0.0/0")] >= FIRST_LOCAL


def test_a_class_keeps_its_number_when_its_addresses_change() -> None:
    before = number_peers(holders(("10.0.0.1", pod("a")), ("10.0.0.2", pod("b"))))
    after = number_peers(holders(("10.0.0.9", pod("b"))), known=before.identities, highest=before.highest)
    assert number_of(after, "10.0.0.9") == number_of(before, "10.0.0.2")


def test_a_number_is_never_handed_out_again() -> None:
    before = number_peers(holders(("10.0.0.1", pod("a"))))
    between = number_peers({}, known=before.identities, highest=before.highest)
    after = number_peers(holders(("10.0.0.1", pod("b"))), known=between.identities, highest=between.highest)
    assert number_of(after, "10.0.0.1") > before.highest


def test_numbers_are_adopted_from_what_the_kernel_holds() -> None:
    at = holders(("10.0.0.1", pod("a")), ("10.0.0.2", pod("b")), ("192.168.0.1", HOST))
    before = number_peers(at)
    after = number_peers(at, observed=before.addresses)
    assert after.addresses == before.addresses


def test_when_classes_contend_for_a_number_the_one_with_more_addresses_has_it() -> None:
    at = holders(("10.0.0.1", pod("a")), ("10.0.0.2", pod("b")), ("10.0.0.3", pod("b")))
    observed = {address: Held(900) for address in at}
    found = number_peers(at, observed=observed)
    assert number_of(found, "10.0.0.2") == 900
    assert number_of(found, "10.0.0.1") == 901


def test_a_reserved_number_is_never_adopted_by_a_pod() -> None:
    found = number_peers(holders(("10.0.0.1", pod("a"))), observed={ip_address("10.0.0.1"): Held(1)})
    assert number_of(found, "10.0.0.1") >= FIRST_LOCAL


ADDRESSES = st.integers(0, 255).map(lambda n: ip_address(f"10.0.0.{n}"))
PEERS = st.sampled_from([pod("a"), pod("b"), pod("a", "pay"), replace(pod("a"), service_account="x"), HOST])
NETWORKS = st.sets(st.sampled_from([ip_network(f"10.0.0.0/{n}") for n in range(24, 32)]))


@settings(deadline=None)
@given(st.dictionaries(ADDRESSES, PEERS), st.dictionaries(ADDRESSES, PEERS), NETWORKS, st.randoms())
def test_one_number_one_class_after_any_change(
    before: dict[IpAddress, Peer], after: dict[IpAddress, Peer], networks: set[object], rng: object
) -> None:
    first = number_peers(before)
    items = list(after.items())
    rng.shuffle(items)  # type: ignore[attr-defined]
    found = number_peers(dict(items), networks, known=first.identities, highest=first.highest)  # type: ignore[arg-type]
    again = number_peers(after, networks, known=first.identities, highest=first.highest)  # type: ignore[arg-type]
    assert found == again
    for address, peer in after.items():
        held = found.identities[found.addresses[address].identity]
        assert replace(held, networks=frozenset()) == peer
        assert held.networks == frozenset(network for network in networks if address in network)  # type: ignore[operator]
    for number, peer in first.identities.items():
        assert found.identities.get(number, peer) == peer


@settings(deadline=None)
@given(st.sets(st.integers(0, 2**32 - 1)), st.integers(0, 2**32 - 1), st.integers(0, 32))
def test_the_index_finds_exactly_the_networks_that_contain_an_address(values: set[int], at: int, length: int) -> None:
    networks = {ip_network((value, length), strict=False) for value in values} | {ip_network((at, 8), strict=False)}
    address = ip_address(at)
    assert NetworkIndex(networks).containing(address) == {n for n in networks if address in n}
