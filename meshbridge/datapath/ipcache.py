"""Who holds which address, as the kernel looks it up: exact addresses first, then the longest prefix, then the world
of the address's family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from meshbridge import abi
from meshbridge.identity.model import IpAddress, IpNetwork

Prefix = tuple[int, bytes]
"""Bits and address of a prefix in the 16-byte form, ``struct ipcache_cidr_key``."""

WORLD_IPV4: Final = int(abi.ReservedIdentity.IDENTITY_WORLD_IPV4)
WORLD_IPV6: Final = int(abi.ReservedIdentity.IDENTITY_WORLD_IPV6)
EVERY_IPV4: Final[Prefix] = (96, abi.V4_MAPPED + bytes(4))
EVERY_ADDRESS: Final[Prefix] = (0, bytes(16))
"""The prefix of all IPv6 addresses, which in this form also covers every IPv4 address that no longer one does."""

_ADDRESS_BITS: Final = 128


class Identities(NamedTuple):
    """A value of the ipcache: who the holder is, and who it is when its packet was forwarded (0: the same)."""

    identity: int
    forwarded_identity: int = 0

    @property
    def forwarded(self) -> int:
        return self.forwarded_identity or self.identity


_NOBODY_IPV4: Final = Identities(WORLD_IPV4)
_NOBODY_IPV6: Final = Identities(WORLD_IPV6)


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
        nobody = _NOBODY_IPV4 if address.startswith(abi.V4_MAPPED) else _NOBODY_IPV6
        return self.exact.get(address) or self.covering((_ADDRESS_BITS, address)) or nobody

    def covering(self, prefix: Prefix) -> Identities | None:
        """The identities of those addresses of ``prefix`` for which nothing more specific is written."""
        longest, address = prefix
        for bits in self._lengths:
            if bits <= longest:
                found = self.prefixes.get((bits, masked(address, bits)))
                if found is not None:
                    return found
        return None


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
            for nobody in _worlds(prefix):
                yield before.covering(prefix) or nobody, after.covering(prefix) or nobody


def _worlds(prefix: Prefix) -> tuple[Identities, ...]:
    """Who is behind addresses of this prefix that nobody holds."""
    bits, address = prefix
    if bits < EVERY_IPV4[0]:
        return (_NOBODY_IPV4, _NOBODY_IPV6)
    return (_NOBODY_IPV4,) if address.startswith(abi.V4_MAPPED) else (_NOBODY_IPV6,)
