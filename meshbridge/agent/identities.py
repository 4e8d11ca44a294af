"""Identities and ipcache of the node, kept up with single changes: a new pod must not cost a pass over all peers.

What it says differs from a numbering of the same peers from scratch in numbers only, and in identities that no address
has any more; those go at the next renumbering.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network
from itertools import chain
from typing import Final

from meshbridge.abi import V4_MAPPED, address_bytes
from meshbridge.datapath.ipcache import Identities, Ipcache, Prefix, ipcache_key, ipcache_prefix
from meshbridge.identity.model import Entity, IpAddress, IpNetwork, Peer
from meshbridge.identity.networks import NetworkIndex
from meshbridge.identity.numbering import Held, class_of, number_peers, worlds

_SPARE: Final = 1024
"""Identities that may be left over before all are numbered anew; of many, a quarter."""

_MAX_MOVED: Final = 16
"""CIDRs that come or go at once, for each of which all addresses are looked at."""


@dataclass(slots=True)
class PeerNumbers:
    """``identities`` and ``ipcache`` are replaced, never changed, so whoever holds them may compare."""

    identities: Mapping[int, Peer] = field(default_factory=dict)
    ipcache: Ipcache = field(default_factory=lambda: Ipcache({}, {}))
    highest: int = 0
    _networks: NetworkIndex = field(default_factory=lambda: NetworkIndex(()))
    _numbers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The identities by the hash of their class: ten thousand classes themselves would be half a kilobyte each."""
    _held: Counter[int] = field(default_factory=Counter)
    """How many addresses and prefixes are each identity's."""

    @property
    def networks(self) -> frozenset[IpNetwork]:
        """The CIDRs peers are told apart by."""
        return self._networks.networks

    def of(self, address: IpAddress) -> int | None:
        """The identity of an address whose holder is known."""
        held = self.ipcache.exact.get(ipcache_key(address))
        return held.identity if held else None

    def number(self, address: bytes) -> int | None:
        """The same, for an address in the ipcache's form."""
        held = self.ipcache.exact.get(address)
        return held.identity if held else None

    def renumber(
        self,
        holders: Mapping[bytes, Peer],
        networks: Iterable[IpNetwork],
        observed: Mapping[bytes, Held] | None = None,
        highest: int = 0,
    ) -> None:
        """Number all peers; a class that is known keeps its number.

        Args:
            holders: by the address as the ipcache has it, ``observed`` too; the others as of ``number_peers``.
        """
        self._networks = NetworkIndex(networks)
        numbering = number_peers(
            holders,
            self._networks.networks,
            known=self.identities,
            observed=observed,
            highest=max(highest, self.highest),
        )
        shared: dict[tuple[int, int], Identities] = {}
        exact = {
            address: shared.setdefault((held.identity, held.forwarded), Identities(held.identity, held.forwarded))
            for address, held in numbering.addresses.items()
        }
        prefixes = {ipcache_prefix(network): Identities(number) for network, number in numbering.networks.items()}
        self.identities, self.highest = numbering.identities, numbering.highest
        self.ipcache = Ipcache(exact, prefixes)
        self._numbers = {}
        for number, peer in numbering.identities.items():
            self._enter(number, peer)
        self._held = Counter(chain.from_iterable(map(_numbers_of, chain(exact.values(), prefixes.values()))))

    def change(self, changed: Mapping[bytes, Peer | None]) -> bool:
        """These addresses have new holders, or none. False: too much is left over, ``renumber`` instead.

        It costs a copy of the table of addresses, and no look at them.
        """
        exact = dict(self.ipcache.exact)
        added: dict[int, Peer] = {}
        for address, peer in changed.items():
            if peer is None:
                self._replace(exact.pop(address, None), None)
                continue
            networks = self._networks.containing(address)
            forwarded = 0
            if Entity.HOST in peer.entities:
                forwarded = self._number(replace(peer, masqueraded=True), networks, added)
            now = Identities(self._number(peer, networks, added), forwarded)
            self._replace(exact.get(address), now)
            exact[address] = now
        return self._put(exact, self.ipcache.prefixes, added)

    def tell_apart(self, networks: Iterable[IpNetwork]) -> bool:
        """Peers are told apart by these CIDRs now. False: that changes too much, ``renumber`` instead.

        It costs a look at the addresses for each CIDR that came or went, and what is inside of it.
        """
        index = NetworkIndex(networks)
        differing = index.networks ^ self._networks.networks
        if len(differing) > _MAX_MOVED:
            return False
        self._networks = index
        exact = dict(self.ipcache.exact)
        added: dict[int, Peer] = {}
        known: dict[tuple[Identities, frozenset[IpNetwork]], Identities] = {}
        for address, moved in _inside(exact, differing).items():
            held = exact[address]
            now = known.get((held, moved))
            if now is None:
                of = (held.identity, held.forwarded_identity)
                now = known[held, moved] = Identities(*(self._moved(n, moved, added) if n else 0 for n in of))
            self._replace(held, now)
            exact[address] = now
        prefixes = {
            ipcache_prefix(network): Identities(self._number(peer, peer.networks, added))
            for network, peer in worlds(index).items()
        }
        for prefix in self.ipcache.prefixes.keys() | prefixes.keys():
            self._replace(self.ipcache.prefixes.get(prefix), prefixes.get(prefix))
        return self._put(exact, prefixes, added)

    def _put(
        self, exact: Mapping[bytes, Identities], prefixes: Mapping[Prefix, Identities], added: Mapping[int, Peer]
    ) -> bool:
        """Whether few identities are left over."""
        if added:
            self.identities = {**self.identities, **added}
        self.ipcache = Ipcache(exact, prefixes)
        return len(self.identities) - len(self._held) <= max(_SPARE, len(self._held) // 4)

    def _replace(self, held: Identities | None, now: Identities | None) -> None:
        for number in _numbers_of(now) if now is not None else ():
            self._held[number] += 1
        for number in _numbers_of(held) if held is not None else ():
            self._held[number] -= 1
            if not self._held[number]:
                del self._held[number]

    def _moved(self, number: int, moved: frozenset[IpNetwork], added: dict[int, Peer]) -> int:
        """The identity of a peer that is inside of CIDRs that it was not in, or the reverse."""
        peer = added.get(number) or self.identities[number]
        return self._number(peer, peer.networks ^ moved, added)

    def _number(self, peer: Peer, networks: frozenset[IpNetwork], added: dict[int, Peer]) -> int:
        if networks != peer.networks:
            peer = replace(peer, networks=networks)
        for number in self._numbers.get(hash(class_of(peer)), ()):
            if (added.get(number) or self.identities[number]) == peer:
                return number
        self.highest += 1
        added[self.highest] = peer
        self._enter(self.highest, peer)
        return self.highest

    def _enter(self, number: int, peer: Peer) -> None:
        key = hash(class_of(peer))
        self._numbers[key] = (*self._numbers.get(key, ()), number)


def _numbers_of(held: Identities) -> Iterable[int]:
    return (held.identity, held.forwarded_identity) if held.forwarded_identity else (held.identity,)


def _inside(addresses: Iterable[bytes], networks: Iterable[IpNetwork]) -> dict[bytes, frozenset[IpNetwork]]:
    """In which of these CIDRs addresses are, for those that are in any."""
    found: dict[bytes, frozenset[IpNetwork]] = {}
    for network in networks:
        first, last = address_bytes(network.network_address), address_bytes(network.broadcast_address)
        alone = frozenset({network})
        of_family = isinstance(network, IPv4Network)
        for address in addresses:
            if first <= address <= last and address.startswith(V4_MAPPED) is of_family:
                found[address] = found[address] | alone if address in found else alone
    return found
