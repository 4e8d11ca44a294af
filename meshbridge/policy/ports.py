"""Port ranges cut into the prefixes the kernel probes."""

from __future__ import annotations

from functools import lru_cache

PREFIX_PORT = 16
PREFIX_ANY = 17
"""Numbers as in bpf/abi.h, POLICY_PREFIX_*."""


@lru_cache(maxsize=1024)
def range_prefixes(first: int, last: int) -> tuple[tuple[int, int], ...]:
    """The fewest (port, prefix length) pairs that cover ``first``..``last`` exactly; every port is (0, 0)."""
    found = []
    while first <= last:
        size = first & -first or 1 << PREFIX_PORT
        while size > last - first + 1:
            size >>= 1
        found.append((first, PREFIX_PORT + 1 - size.bit_length()))
        first += size
    return tuple(found)


def masked(port: int, prefix: int) -> int:
    """The leading ``prefix`` bits of a port, the rest zero."""
    return port >> (PREFIX_PORT - prefix) << (PREFIX_PORT - prefix)
