"""Numbers for the classes of peers that policies can tell apart, and what the ipcache therefore holds.

Numbers are local to a node. Which number a class gets depends on nothing but the arguments: a class keeps the number it
is known by, else the one its addresses are observed under, else gets a fresh one. Two states that differ in numbers
only are the same state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Generic, TypeVar

from meshbridge.identity.model import Entity, IpAddress, IpFamily, IpNetwork, Peer
from meshbridge.identity.networks import NetworkIndex

FIRST_LOCAL: Final = 256
"""IDENTITY_FIRST_LOCAL of bpf/abi.h; 0 means anyone and is never handed out."""

_WORLD: Final = {
    IpFamily.IPV4: frozenset({Entity.WORLD, Entity.WORLD_IPV4}),
    IpFamily.IPV6: frozenset({Entity.WORLD, Entity.WORLD_IPV6}),
}
_EVERYTHING: Final[Mapping[IpFamily, IpNetwork]] = {
    IpFamily.IPV4: IPv4Network("0.0.0.0/0"),
    IpFamily.IPV6: IPv6Network("::/0"),
}

RESERVED: Final[Mapping[int, Peer]] = {
    1: Peer(entities=frozenset({Entity.HOST})),
    2: Peer(entities=frozenset({Entity.WORLD})),
    3: Peer(entities=frozenset({Entity.UNMANAGED})),
    4: Peer(entities=frozenset({Entity.HEALTH})),
    5: Peer(entities=frozenset({Entity.INIT})),
    6: Peer(entities=frozenset({Entity.REMOTE_NODE})),
    7: Peer(entities=frozenset({Entity.KUBE_APISERVER, Entity.REMOTE_NODE})),
    8: Peer(entities=frozenset({Entity.INGRESS})),
    9: Peer(entities=_WORLD[IpFamily.IPV4]),
    10: Peer(entities=_WORLD[IpFamily.IPV6]),
}
"""Peers that no policy CIDR contains and that have a number of Cilium's. Inside a CIDR they are classes like others."""

_Class = tuple[object, ...]
AddressT = TypeVar("AddressT", bound=IpAddress | bytes)
"""An address, or its 16 bytes as the ipcache has it: nobody need make objects of ten thousand of those."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the ipcache says of one address. ``forwarded`` is not 0 for the node's own addresses: who it is when its
    packet was forwarded, hence masqueraded."""

    identity: int
    forwarded: int = 0


@dataclass(frozen=True, slots=True)
class Numbering(Generic[AddressT]):
    """The identities of a node and the contents of both ipcache tables.

    ``highest`` is the highest number ever handed out; the next numbering starts above it, so that no entry left over
    from a class that is gone ever speaks for another one.
    """

    identities: Mapping[int, Peer]
    addresses: Mapping[AddressT, Held]
    networks: Mapping[IpNetwork, int]
    highest: int


def number_peers(
    holders: Mapping[AddressT, Peer],
    networks: Iterable[IpNetwork] = (),
    *,
    known: Mapping[int, Peer] | None = None,
    observed: Mapping[AddressT, Held] | None = None,
    highest: int = 0,
) -> Numbering[AddressT]:
    """Number every class of peers among the holders of addresses and the world.

    Args:
        holders: Who holds each address; ``Peer.networks`` is computed here and need not be filled in. A holder that is
            ``Entity.HOST`` is this node: its addresses get a second, masqueraded identity.
        networks: The CIDRs policies refer to (``PolicySet.referenced_networks``).
        known: The identities of the numbering before.
        observed: What is read back from the kernel after a restart, instead of ``known``.
        highest: The highest number handed out before, or seen in the kernel.
    """
    index = NetworkIndex(networks)
    classes = _Classes()
    at = {address: classes.of(peer, index.containing(address)) for address, peer in holders.items()}
    forwarded = {
        address: classes.of(replace(peer, masqueraded=True), index.containing(address))
        for address, peer in holders.items()
        if Entity.HOST in peer.entities
    }
    prefixes = {network: classes.of(peer, peer.networks) for network, peer in worlds(index).items()}
    for peer in RESERVED.values():
        classes.of(peer, frozenset())
    numbers, top = _assign(classes, at, forwarded, known or {}, observed or {}, highest)
    return Numbering(
        identities={number: classes.peers[place] for place, number in sorted(numbers.items(), key=lambda one: one[1])},
        addresses={
            address: Held(numbers[place], numbers[forwarded[address]] if address in forwarded else 0)
            for address, place in at.items()
        },
        networks={network: numbers[place] for network, place in prefixes.items()},
        highest=top,
    )


def worlds(index: NetworkIndex) -> dict[IpNetwork, Peer]:
    """Who an address is that nobody holds, by the narrowest of these CIDRs it is in, and all of either family."""
    return {
        network: Peer(entities=_WORLD[IpFamily.of(network)], networks=index.covering(network))
        for network in (*index.networks, *_EVERYTHING.values())
    }


class _Classes:
    """Peers by everything in them (a Peer's own hash leaves its labels out); each class has its place in two lists."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.keys: list[_Class] = []
        self.places: dict[_Class, int] = {}
        self._known: dict[int, tuple[Peer, dict[frozenset[IpNetwork], int]]] = {}

    def of(self, peer: Peer, networks: frozenset[IpNetwork]) -> int:
        """The place of the class of ``peer`` inside these CIDRs."""
        held = self._known.get(id(peer))
        if held is None:
            held = self._known[id(peer)] = (peer, {})  # the peer too, so that its id is not another's meanwhile
        known = held[1]
        place = known.get(networks)
        if place is None:
            within = replace(peer, networks=networks)
            key = class_of(within)
            place = known[networks] = self.places.setdefault(key, len(self.keys))
            if place == len(self.keys):
                self.keys.append(key)
                self.peers.append(within)
        return place


def class_of(peer: Peer) -> _Class:
    """A sortable value equal for equal peers."""
    return (
        peer.namespace or "",
        peer.is_pod,
        tuple(sorted(peer.labels.items())),
        tuple(sorted(peer.namespace_labels.items())),
        peer.service_account,
        peer.cluster,
        peer.trust_domain,
        peer.proxy,
        tuple(sorted(peer.entities)),
        peer.masqueraded,
        peer.service,
        peer.excluded,
        peer.registered,
        tuple(sorted((port.name, port.port, port.protocol) for port in peer.ports)),
        tuple(sorted(str(network) for network in peer.networks)),
    )


def _assign(
    classes: _Classes,
    at: Mapping[AddressT, int],
    forwarded: Mapping[AddressT, int],
    known: Mapping[int, Peer],
    observed: Mapping[AddressT, Held],
    highest: int,
) -> tuple[dict[int, int], int]:
    """The number of each class, by its place, and the highest number."""
    numbers: dict[int, int] = {}
    for number, peer in RESERVED.items():
        numbers[classes.places[class_of(peer)]] = number
    for number, peer in sorted(known.items()):
        place = classes.places.get(class_of(peer))
        if number >= FIRST_LOCAL and place is not None:
            numbers.setdefault(place, number)
    taken = set(numbers.values())
    votes: Counter[tuple[int, int]] = Counter()
    for address, held in observed.items():
        if address in at:
            votes[at[address], held.identity] += 1
        if address in forwarded:
            votes[forwarded[address], held.forwarded] += 1
    for (place, number), _ in sorted(votes.items(), key=lambda vote: (-vote[1], classes.keys[vote[0][0]], vote[0][1])):
        if place not in numbers and number >= FIRST_LOCAL and number not in taken:
            numbers[place] = number
            taken.add(number)
    seen = [held.identity for held in observed.values()] + [held.forwarded for held in observed.values()]
    top = max([FIRST_LOCAL - 1, highest, *taken, *known, *seen])
    fresh = (place for place in range(len(classes.keys)) if place not in numbers)
    for place in sorted(fresh, key=classes.keys.__getitem__):
        top += 1
        numbers[place] = top
    return numbers, top
