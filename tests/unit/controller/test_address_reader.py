"""Addresses read one after another: what each says by itself, with one object for peers that are told alike."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from hypothesis import given
from hypothesis import strategies as st
from test_agent_messages import ADDRESS, PEERS, through

from meshbridge.controller import messages as writing
from meshbridge.identity.model import Peer
from meshbridge.xds import messages as reading


@given(st.lists(st.tuples(ADDRESS, PEERS, st.sampled_from("nm")), max_size=6))
def test_addresses_read_together(holders: list[tuple[IPv4Address | IPv6Address, Peer, str]]) -> None:
    told = [writing.address_message(address, peer, name=n, uid=n * 2, node=n * 3) for address, peer, n in holders * 2]
    reader = reading.HolderReader()
    found = [reader.read(through(message)) for message in told]
    assert found == [reading.holder_of(message) for message in told]
    half = len(holders)
    assert all(one.peer is two.peer for one, two in zip(found[:half], found[half:], strict=True))
