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
from typing import Final

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


@dataclass(frozen=True, slots=True)
class Held:
    """What the ipcache says of one address. ``forwarded`` is not 0 for the node's own addresses: who it is when its
    packet was forwarded, hence masqueraded."""

    identity: int
    forwarded: int = 0


@dataclass(frozen=True, slots=True)
class Numbering:
    """The identities of a node and the contents of both ipcache tables.

    ``highest`` is the highest number ever handed out; the next numbering starts above it, so that no entry left over
    from a class that is gone ever speaks for another one.
    """

    identities: Mapping[int, Peer]
    addresses: Mapping[IpAddress, Held]
    networks: Mapping[IpNetwork, int]
    highest: int


def number_peers(
    holders: Mapping[IpAddress, Peer],
    networks: Iterable[IpNetwork] = (),
    *,
    known: Mapping[int, Peer] | None = None,
    observed: Mapping[IpAddress, Held] | None = None,
    highest: int = 0,
) -> Numbering:
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
    prefixes: dict[IpNetwork, _Class] = {}
    for network in (*index.networks, *_EVERYTHING.values()):
        world = Peer(entities=_WORLD[IpFamily.of(network)])
        prefixes[network] = classes.of(world, index.covering(network))
    for peer in RESERVED.values():
        classes.of(peer, frozenset())
    numbers, top = _assign(classes, at, forwarded, known or {}, observed or {}, highest)
    return Numbering(
        identities={number: classes.peers[key] for key, number in sorted(numbers.items(), key=lambda item: item[1])},
        addresses={
            address: Held(numbers[key], numbers[forwarded[address]] if address in forwarded else 0)
            for address, key in at.items()
        },
        networks={network: numbers[key] for network, key in prefixes.items()},
        highest=top,
    )


class _Classes:
    """Peers by everything in them; a Peer's own hash leaves its labels out."""

    def __init__(self) -> None:
        self.peers: dict[_Class, Peer] = {}
        self._plain: dict[int, tuple[Peer, _Class]] = {}

    def of(self, peer: Peer, networks: frozenset[IpNetwork]) -> _Class:
        held = self._plain.get(id(peer))
        if held is None:
            held = self._plain[id(peer)] = (peer, class_of(replace(peer, networks=frozenset())))
        key = (*held[1][:-1], tuple(sorted(str(network) for network in networks))) if networks else held[1]
        if key not in self.peers:
            self.peers[key] = replace(peer, networks=networks)
        return key


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
        tuple(sorted((port.name, port.port, port.protocol) for port in peer.ports)),
        tuple(sorted(str(network) for network in peer.networks)),
    )


def _assign(
    classes: _Classes,
    at: Mapping[IpAddress, _Class],
    forwarded: Mapping[IpAddress, _Class],
    known: Mapping[int, Peer],
    observed: Mapping[IpAddress, Held],
    highest: int,
) -> tuple[dict[_Class, int], int]:
    numbers: dict[_Class, int] = {}
    for number, peer in RESERVED.items():
        numbers[class_of(peer)] = number
    for number, peer in sorted(known.items()):
        key = class_of(peer)
        if number >= FIRST_LOCAL and key in classes.peers:
            numbers.setdefault(key, number)
    taken = set(numbers.values())
    votes: Counter[tuple[_Class, int]] = Counter()
    for address, held in observed.items():
        if address in at:
            votes[at[address], held.identity] += 1
        if address in forwarded:
            votes[forwarded[address], held.forwarded] += 1
    for (key, number), _ in sorted(votes.items(), key=lambda vote: (-vote[1], vote[0])):
        if key not in numbers and number >= FIRST_LOCAL and number not in taken:
            numbers[key] = number
            taken.add(number)
    seen = [held.identity for held in observed.values()] + [held.forwarded for held in observed.values()]
    top = max([FIRST_LOCAL - 1, highest, *taken, *known, *seen])
    for key in sorted(classes.peers.keys() - numbers.keys()):
        top += 1
        numbers[key] = top
    return numbers, top
