"""Who holds which address, as the kernel looks it up: exact addresses first, then the longest prefix, then world."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from meshbridge import abi
from meshbridge.identity.model import IpAddress, IpNetwork

Prefix = tuple[int, bytes]
"""Bits and address of a prefix in the 16-byte form, ``struct ipcache_cidr_key``."""

WORLD: Final = int(abi.ReservedIdentity.IDENTITY_WORLD)
_ADDRESS_BITS: Final = 128


class Identities(NamedTuple):
    """A value of the ipcache: who the holder is, and who it is when its packet was forwarded (0: the same)."""

    identity: int
    forwarded_identity: int = 0

    @property
    def forwarded(self) -> int:
        return self.forwarded_identity or self.identity


UNKNOWN: Final = Identities(WORLD)
EVERYTHING: Final[Prefix] = (0, bytes(16))
"""The prefix that covers every address of both families."""


def ipcache_key(address: IpAddress) -> bytes:
    return abi.address_bytes(address)


def ipcache_prefix(network: IpNetwork) -> Prefix:
    return abi.network_bytes(network)


class Ipcache:
    """Both tables of one moment, and the lookup the kernel does on them."""

    __slots__ = ("_lengths", "exact", "prefixes")

    def __init__(self, exact: Mapping[bytes, Identities], prefixes: Mapping[Prefix, Identities]) -> None:
        self.exact, self.prefixes = exact, prefixes
        self._lengths = sorted({bits for bits, _ in prefixes}, reverse=True)

    def lookup(self, address: bytes) -> Identities:
        """The identities of an address."""
        found = self.exact.get(address)
        return self.covering((_ADDRESS_BITS, address)) if found is None else found

    def covering(self, prefix: Prefix) -> Identities:
        """The identities of those addresses of ``prefix`` for which nothing more specific is written."""
        longest, address = prefix
        for bits in self._lengths:
            if bits <= longest:
                found = self.prefixes.get((bits, masked(address, bits)))
                if found is not None:
                    return found
        return UNKNOWN


def masked(address: bytes, bits: int) -> bytes:
    """The first ``bits`` of an address, the rest zero."""
    shift = _ADDRESS_BITS - bits
    return (int.from_bytes(address, "big") >> shift << shift).to_bytes(16, "big")


def moves(before: Ipcache, after: Ipcache) -> set[tuple[int, int]]:
    """Every (identity before, identity after) that some address changes between, directly or when forwarded."""
    found: set[tuple[int, int]] = set()
    for old, new in _changed_lookups(before, after):
        if old != new:
            found |= {(old.identity, new.identity), (old.forwarded, new.forwarded)}
    return {(old_number, new_number) for old_number, new_number in found if old_number != new_number}


def _changed_lookups(before: Ipcache, after: Ipcache) -> Iterator[tuple[Identities, Identities]]:
    if before.exact is not after.exact:
        for address in before.exact.keys() | after.exact.keys():
            if before.exact.get(address) != after.exact.get(address):
                yield before.lookup(address), after.lookup(address)
    for prefix in before.prefixes.keys() | after.prefixes.keys():
        if before.prefixes.get(prefix) != after.prefixes.get(prefix):
            yield before.covering(prefix), after.covering(prefix)
