"""Kernel state of a chosen size for one endpoint, and packets that meet it."""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from meshbridge import abi
from meshbridge.datapath.maps import Maps
from meshbridge.datapath.policysets import SET_ID as packed_number
from meshbridge.datapath.policysets import EntryKey, EntryValue, LayerValue, PackedSet, pack_entries
from meshbridge.datapath.tables import TableName, kernel_tables

POD = IPv4Address("10.200.0.1")
PEER_BASE = int(IPv4Address("10.100.0.0"))
LOOPBACK_IFINDEX = 1  # the device of a test run without a context
INCARNATION = 1
SET_ID = 1
REVISION = 1
FIRST_PORT = 1000
PORTS_PER_IDENTITY = 10
_ADDRESS = ctypes.c_ubyte * 16


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is: policy entries of the endpoint, addresses in the ipcache, endpoints on the node."""

    entries: int = 10
    addresses: int = 10
    endpoints: int = 1

    @property
    def identities(self) -> int:
        return max(1, self.entries // PORTS_PER_IDENTITY)


def program(maps: Maps, size: Size) -> None:
    """Fresh maps hold an endpoint isolated by ``size.entries`` allows, and the peers they name.

    Entries are ten ports for each identity, as a policy of ten ports for each of n peers compiles. Addresses are
    shared out among the identities; the other endpoints have a set of their own with one entry each.
    """
    sets = {SET_ID: _allowing(size.entries), **dict.fromkeys(range(SET_ID + 1, SET_ID + size.endpoints), _allowing(1))}
    kernel_tables(maps)[TableName.POLICY_SETS].put(
        [(packed_number.pack(number), packed.content) for number, packed in sets.items()]
    )
    maps.ipcache.put_many(
        (abi.IpcacheKey(address=address_bytes(peer_address(index))), abi.IpcacheValue(identity=identity(index, size)))
        for index in range(max(size.addresses, size.identities))
    )
    for number in range(size.endpoints):
        _endpoint(maps, number)


def _allowing(entries: int) -> PackedSet:
    """A set that isolates, with so many allows: ten ports for each identity."""
    allow = EntryValue(precedence=1, rule_id=1, verdict=abi.PolicyVerdict.POLICY_ALLOW, flags=0, deny_reason=0)
    network = LayerValue(0, 0, 0, abi.PolicyVerdict.POLICY_DENY, 0, 0)
    mesh = LayerValue(0, 0, 0, abi.PolicyVerdict.POLICY_ALLOW, 0, 0)
    return pack_entries({_key(index): allow for index in range(entries)}, (network, mesh))


def _endpoint(maps: Maps, number: int) -> None:
    set_id, ifindex = SET_ID + number, LOOPBACK_IFINDEX + number
    incarnation = INCARNATION + number
    flow_table = maps.conntrack.create(incarnation)
    address = address_bytes(POD + number)
    maps.endpoint_addresses.put(
        abi.EndpointAddressKey(ifindex=ifindex, address=address), abi.EndpointAddressValue(incarnation=incarnation)
    )
    value = abi.EndpointValue(
        ifindex=ifindex, ifindex_again=ifindex, id=number + 1, incarnation=incarnation,
        identity=1_000_000 + number, revision=REVISION, flags=abi.EndpointFlags.ENDPOINT_F_READY,
        flow_table=flow_table,
    )  # fmt: skip
    for index in range(4):
        value.policy_set[index] = set_id
    maps.endpoints.put(abi.EndpointKey(ifindex=ifindex), value)


def _key(index: int) -> EntryKey:
    return EntryKey(
        identity=abi.ReservedIdentity.IDENTITY_FIRST_LOCAL + index // PORTS_PER_IDENTITY,
        port=FIRST_PORT + index % PORTS_PER_IDENTITY,
        protocol=6,
        prefix=abi.POLICY_PREFIX_PORT,
        layer=abi.PolicyLayer.LAYER_NETWORK,
    )


def peer_address(index: int) -> IPv4Address:
    return IPv4Address(PEER_BASE + index)


def identity(address_index: int, size: Size) -> int:
    return abi.ReservedIdentity.IDENTITY_FIRST_LOCAL + address_index % size.identities


def address_bytes(address: IPv4Address) -> ctypes.Array[ctypes.c_ubyte]:
    return _ADDRESS.from_buffer_copy(abi.address_bytes(address))


def openings(size: Size, count: int, seed: int = 1) -> Iterator[bytes]:
    """SYNs that the state allows, each from a random peer to a random one of its ports, never the same flow twice."""
    generator = random.Random(seed)
    for number in range(count):
        source = generator.randrange(max(size.addresses, size.identities))
        port = FIRST_PORT + generator.randrange(min(PORTS_PER_IDENTITY, size.entries))
        yield tcp_packet(peer_address(source), POD, 10_000 + number % 50_000, port, _SYN)


_SYN, _ACK = 0x02, 0x10


def established() -> tuple[bytes, bytes]:
    """A SYN that opens a flow, and a packet of that flow."""
    opening, packet = (tcp_packet(peer_address(0), POD, 9_999, FIRST_PORT, flags) for flags in (_SYN, _ACK))
    return opening, packet


def tcp_packet(source: IPv4Address, destination: IPv4Address, source_port: int, port: int, flags: int) -> bytes:
    """An Ethernet frame with IPv4 and TCP; checksums are left out, since nothing on the way checks them."""
    ethernet = b"\x02\0\0\0\0\x02" + b"\x02\0\0\0\0\x01" + b"\x08\x00"
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 1, 0x4000, 64, 6, 0, source.packed, destination.packed)
    tcp = struct.pack("!HHIIBBHHH", source_port, port, 1, 1, 0x50, flags, 1024, 0, 0)
    return ethernet + ip + tcp
