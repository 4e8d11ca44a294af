"""Identities and ipcache of the node, kept up with single changes: a new pod must not cost a pass over all peers.

What it says differs from a numbering of the same peers from scratch in numbers only, and in identities that no address
has any more; those go at the next renumbering.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from meshbridge.datapath.ipcache import Identities, Ipcache, ipcache_key, ipcache_prefix
from meshbridge.identity.model import Entity, IpAddress, IpNetwork, Peer
from meshbridge.identity.networks import NetworkIndex
from meshbridge.identity.numbering import Held, class_of, number_peers

_SPARE: Final = 1024
"""Identities that may be left over before all are numbered anew."""


@dataclass(slots=True)
class PeerNumbers:
    """``identities`` and ``ipcache`` are replaced, never changed, so whoever holds them may compare."""

    identities: Mapping[int, Peer] = field(default_factory=dict)
    ipcache: Ipcache = field(default_factory=lambda: Ipcache({}, {}))
    highest: int = 0
    _networks: NetworkIndex = field(default_factory=lambda: NetworkIndex(()))
    _numbers: dict[tuple[object, ...], int] = field(default_factory=dict)
    _spare: int = _SPARE

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
        self._numbers = {class_of(peer): number for number, peer in numbering.identities.items()}
        self._spare = _SPARE

    def change(self, changed: Mapping[bytes, Peer | None]) -> bool:
        """These addresses have new holders, or none. False: too much is left over, ``renumber`` instead."""
        exact = dict(self.ipcache.exact)
        added: dict[int, Peer] = {}
        for address, peer in changed.items():
            if peer is None:
                exact.pop(address, None)
                self._spare -= 1
                continue
            forwarded = 0
            if Entity.HOST in peer.entities:
                forwarded = self._number(replace(peer, masqueraded=True), address, added)
            exact[address] = Identities(self._number(peer, address, added), forwarded)
        if added:
            self.identities = {**self.identities, **added}
            self._spare -= len(added)
        self.ipcache = Ipcache(exact, self.ipcache.prefixes)
        return self._spare > 0

    def _number(self, peer: Peer, address: bytes, added: dict[int, Peer]) -> int:
        networks = self._networks.containing(address)
        if networks != peer.networks:
            peer = replace(peer, networks=networks)
        key = class_of(peer)
        number = self._numbers.get(key)
        if number is None:
            self.highest += 1
            number = self._numbers[key] = self.highest
            added[number] = peer
        return number
