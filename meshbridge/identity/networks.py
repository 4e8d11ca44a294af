"""Which of a set of CIDRs contain an address, without walking the set."""

from __future__ import annotations

from collections.abc import Iterable

from meshbridge.abi import parse_address
from meshbridge.identity.model import IpAddress, IpNetwork

_BITS = {4: 32, 6: 128}
_NONE: frozenset[IpNetwork] = frozenset()


class NetworkIndex:
    """CIDRs by family and prefix length: a lookup costs one probe per length in use, not one per CIDR."""

    __slots__ = ("_by_length", "networks")

    def __init__(self, networks: Iterable[IpNetwork]) -> None:
        self.networks = frozenset(networks)
        self._by_length: dict[tuple[int, int], dict[int, IpNetwork]] = {}
        for network in self.networks:
            bucket = self._by_length.setdefault((network.version, network.prefixlen), {})
            bucket[int(network.network_address)] = network

    def containing(self, address: IpAddress | bytes) -> frozenset[IpNetwork]:
        """Every CIDR of the index that contains ``address``, which may be in the 16-byte form of the ipcache."""
        if not self.networks:
            return _NONE
        if isinstance(address, bytes):
            address = parse_address(address)
        return self._containing(address.version, int(address), _BITS[address.version])

    def covering(self, network: IpNetwork) -> frozenset[IpNetwork]:
        """Every CIDR of the index that contains all of ``network``, itself included."""
        return self._containing(network.version, int(network.network_address), network.prefixlen)

    def _containing(self, version: int, value: int, longest: int) -> frozenset[IpNetwork]:
        bits = _BITS[version]
        found = []
        for (of_version, length), bucket in self._by_length.items():
            if of_version == version and length <= longest:
                shift = bits - length
                network = bucket.get(value >> shift << shift)
                if network is not None:
                    found.append(network)
        return frozenset(found)
