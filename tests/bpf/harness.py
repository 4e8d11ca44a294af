"""Packets for the real kernel programs, without a network: build one, run it, see what became of it.

    with Harness.open() as h:                       # maps and programs of its own, nothing attached
        h.endpoint(pod, addresses=[POD4, POD6])   # on a veth of a namespace of its own
        h.policy_set(7, network=allow_all())
        h.run(h.pod, TO_POD, tcp(CLIENT, POD4, 40000, 80, SYN))  → Outcome(passed, reason, events)

A run costs some 15 µs with its event; ``run`` without ``events`` less.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, Self

from meshbridge import abi
from meshbridge.datapath import compiler, syscall
from meshbridge.datapath.events import EventReader
from meshbridge.datapath.loader import Datapath, load_program
from meshbridge.datapath.maps import Index, MapSizes, open_maps
from meshbridge.datapath.policysets import SET_ID, EntryKey, EntryValue, LayerValue, pack_entries
from meshbridge.datapath.tables import TableName, kernel_tables

IpAddress = IPv4Address | IPv6Address
CACHE = Path(os.environ.get("MESHBRIDGE_TEST_CACHE", "/var/cache/meshbridge"))
PIN_ROOT = Path("/sys/fs/bpf/meshbridge-tests")

FROM_POD, TO_POD = "from_pod", "to_pod"
HOOKS = (FROM_POD, TO_POD)
FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
ICMP, TCP, UDP, ICMP6, SCTP = 1, 6, 17, 58, 132
PASSED, DROPPED = -1, 2  # TC_ACT_UNSPEC, TC_ACT_SHOT

SMALL = MapSizes(endpoints=64, endpoint_addresses=256, ipcache=65536, ipcache_cidr=4096, policy=131072,
                 policy_sets=1024, conntrack=64, conntrack_per_endpoint=4096, fragments=1024,
                 events=1 << 20)  # fmt: skip


class SkBuff(ctypes.Structure):
    """struct __sk_buff, as far as a test run accepts it."""

    _fields_ = [("len", ctypes.c_uint32), ("pkt_type", ctypes.c_uint32), ("mark", ctypes.c_uint32),
                ("queue_mapping", ctypes.c_uint32), ("protocol", ctypes.c_uint32), ("vlan_present", ctypes.c_uint32),
                ("vlan_tci", ctypes.c_uint32), ("vlan_proto", ctypes.c_uint32), ("priority", ctypes.c_uint32),
                ("ingress_ifindex", ctypes.c_uint32), ("ifindex", ctypes.c_uint32),
                ("rest", ctypes.c_uint32 * 37)]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one packet. ``reason`` is that of its drop (or 0); ``events`` what it told, oldest first."""

    passed: bool
    reason: abi.DropReason
    events: tuple[abi.FlowEvent, ...]

    @property
    def event(self) -> abi.FlowEvent:
        assert len(self.events) == 1, f"{len(self.events)} events: {self.events}"
        return self.events[0]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a policy set: ``(identity, protocol, port, prefix) → PolicyValue``, and what holds without."""

    entries: Mapping[tuple[int, int, int, int], abi.PolicyValue] = field(default_factory=dict)
    default: int = int(abi.PolicyVerdict.POLICY_ALLOW)
    rule_id: int = 0
    deny_reason: int = 0
    flags: int = 0


ALLOW_ALL = Layer()
DENY_ALL = Layer(default=int(abi.PolicyVerdict.POLICY_DENY), rule_id=9000)


def entry(verdict: abi.PolicyVerdict = abi.PolicyVerdict.POLICY_ALLOW, *, precedence: int = 100, rule_id: int = 1,
          deny_reason: int = 0, flags: int = 0) -> abi.PolicyValue:  # fmt: skip
    """A policy value, an allow unless said otherwise."""
    return abi.PolicyValue(
        precedence=precedence, rule_id=rule_id, verdict=verdict, flags=flags, deny_reason=deny_reason
    )


class Harness:
    """Maps and programs of their own, and interfaces in a network namespace of their own that carry nothing.

    The namespace is entered by the calling thread only for the moment of a run that needs its interfaces.
    """

    def __init__(self, datapath: Datapath, pin_dir: Path, interfaces: tuple[int, ...], namespace: Namespace) -> None:
        self.datapath, self.maps, self.interfaces = datapath, datapath.maps, interfaces
        self._pin_dir, self._namespace = pin_dir, namespace
        self._programs = {FROM_POD: datapath.from_pod, TO_POD: datapath.to_pod}
        self._reader = EventReader(datapath.maps.events_fd)
        self._incarnations = itertools.count(1)
        self._context = SkBuff()
        self._sets = kernel_tables(datapath.maps)[TableName.POLICY_SETS]

    @classmethod
    def open(cls, *, interfaces: int = 2, sizes: MapSizes = SMALL, replaced: Mapping[str, int] | None = None,
             cache: Path = CACHE) -> Self:  # fmt: skip
        """Load the programs onto fresh maps. ``replaced`` puts other maps in the place of named ones (descriptors)."""
        pin_dir = PIN_ROOT / f"mbdp-{os.getpid()}-{threading.get_ident()}-{next(_serial)}"
        namespace, ifindexes = _veths(interfaces)
        try:
            compiled = compiler.compile_programs(cache)
            maps = open_maps(pin_dir, compiled.maps, sizes)
            descriptors = {**maps.descriptors, **(replaced or {})}
            programs = [load_program(compiled, name, descriptors) for name in HOOKS]
            return cls(Datapath(maps, *programs), pin_dir, ifindexes, namespace)
        except BaseException:
            namespace.close()
            remove_pins(pin_dir)
            raise

    def close(self) -> None:
        """Take everything back: descriptors, pins, namespace."""
        self._reader.close()
        self.datapath.close()
        self._namespace.close()
        remove_pins(self._pin_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- state -------------------------------------------------------------------------------------------------

    def endpoint(self, ifindex: int, addresses: Iterable[IpAddress | str], *, sets: tuple[int, int, int, int],
                 identity: int = 300, revision: int = 1, incarnation: int | None = None, mac: bytes = b"",
                 flags: int | None = None, endpoint_id: int | None = None) -> int:  # fmt: skip
        """Make an interface a pod's, ready, and return its incarnation. ``sets``: ingress v4, v6, egress v4, v6."""
        incarnation = next(self._incarnations) if incarnation is None else incarnation
        flow_table = self.maps.conntrack.create(incarnation)
        for address in addresses:
            key = abi.EndpointAddressKey(ifindex=ifindex, address=packed(address))
            self.maps.endpoint_addresses.put(key, abi.EndpointAddressValue(incarnation=incarnation))
        if flags is None:
            flags = abi.EndpointFlags.ENDPOINT_F_READY | (abi.EndpointFlags.ENDPOINT_F_MAC if mac else 0)
        value = abi.EndpointValue(ifindex=ifindex, ifindex_again=ifindex, id=endpoint_id or ifindex,
                                  incarnation=incarnation, identity=identity, flow_table=flow_table,
                                  revision=revision, flags=int(flags), mac=mac or bytes(6))  # fmt: skip
        value.policy_set[:] = sets
        self.maps.endpoints.put(abi.EndpointKey(ifindex=ifindex), value)
        return incarnation

    def change(self, ifindex: int, /, **fields: Any) -> None:
        """Change fields of an endpoint (``sets``, ``revision``, ``flags``, …) in one write."""
        key = abi.EndpointKey(ifindex=ifindex)
        value = self.maps.endpoints.get(key)
        assert value is not None
        for name, content in fields.items():
            if name == "sets":
                value.policy_set[:] = content
            else:
                setattr(value, name, content)
        self.maps.endpoints.put(key, value)

    def policy_set(self, set_id: int, network: Layer = ALLOW_ALL, mesh: Layer = ALLOW_ALL) -> None:
        """Write a whole set, in the place of one of that number."""
        entries = {
            EntryKey(identity, port, protocol, prefix, number): EntryValue(
                value.precedence, value.rule_id, value.verdict, value.flags, value.deny_reason
            )
            for number, layer in enumerate((network, mesh))
            for (identity, protocol, port, prefix), value in layer.entries.items()
        }
        one, other = (
            LayerValue(0, 0, layer.rule_id, layer.default, layer.deny_reason, layer.flags) for layer in (network, mesh)
        )
        self._sets.put([(SET_ID.pack(set_id), pack_entries(entries, (one, other)).content)])

    def peer(self, address: IpAddress | str, identity: int, *, forwarded: int = 0) -> None:
        """Give an exact address, or a CIDR, an identity."""
        value = abi.IpcacheValue(identity=identity, forwarded_identity=forwarded)
        if isinstance(address, str) and "/" in address:
            bits, raw = abi.network_bytes(ip_network(address))
            self.maps.ipcache_cidr.put(abi.IpcacheCidrKey(prefix_bits=bits, address=raw), value)
        else:
            self.maps.ipcache.put(abi.IpcacheKey(address=packed(address)), value)

    def flows(self, incarnation: int) -> dict[abi.ConntrackKey, abi.ConntrackValue]:
        """The flow table of an incarnation."""
        with self.maps.conntrack.flows(incarnation) as table:
            return table.snapshot()

    def age(self, incarnation: int, seconds: float) -> None:
        """Make every flow of an incarnation look as if its last packet was that much longer ago."""
        with self.maps.conntrack.flows(incarnation) as table:
            for key, value in table.snapshot().items():
                value.seen_ns = (value.seen_ns - int(seconds * 1e9)) % 2**64  # the clock may be younger than that
                table.put(key, value)

    def clear(self) -> None:
        """Empty every map but the counters."""
        for table in (self.maps.endpoints, self.maps.endpoint_addresses, self.maps.ipcache, self.maps.ipcache_cidr,
                      self.maps.fragments):  # fmt: skip
            table.clear()
        self._sets.delete([key for key, _ in self._sets.read()])
        for incarnation in self.maps.conntrack.tables():
            self.maps.conntrack.remove(incarnation)
        while self._reader.read():
            pass

    # --- packets -----------------------------------------------------------------------------------------------

    def run(self, ifindex: int, hook: str, packet: bytes, *, ingress_ifindex: int | None = None,
            limited: bool = False) -> Outcome:  # fmt: skip
        """Run one packet. ``ingress_ifindex`` None: it came in by another interface (to_pod) or by this (from_pod).

        The event limiter is reset before, so that every packet may tell its event, unless ``limited``.
        """
        if not limited:
            self.reset_limiter()
        verdict = self.verdict(ifindex, hook, packet, ingress_ifindex=ingress_ifindex)
        events = tuple(self._reader.read())
        drops = [event for event in events if event.type == abi.EventType.EVENT_DROP]
        if not limited:
            assert (verdict == DROPPED) == bool(drops), "a drop and its event go together"
        return Outcome(verdict == PASSED, abi.DropReason(drops[-1].reason if drops else 0), events)

    def verdict(self, ifindex: int, hook: str, packet: bytes, *, ingress_ifindex: int | None = None) -> int:
        """What the program returns for one packet: PASSED or DROPPED. Events stay in the ring."""
        return self.measure(ifindex, hook, packet, ingress_ifindex=ingress_ifindex).verdict

    def measure(self, ifindex: int, hook: str, packet: bytes, *, ingress_ifindex: int | None = None,
                repeat: int = 1) -> syscall.TestRun:  # fmt: skip
        """Run one packet several times; the mean duration is in the result."""
        context = self._context
        context.ifindex = ifindex
        context.ingress_ifindex = ifindex if ingress_ifindex is None else ingress_ifindex
        with self._namespace:
            run = syscall.program_test_run(self._programs[hook], packet, context, repeat=repeat)
        assert run.verdict in (PASSED, DROPPED), f"unknown verdict {run.verdict}"
        return run

    def events(self) -> list[abi.FlowEvent]:
        """The events that wait."""
        return self._reader.read()

    def reset_limiter(self) -> None:
        """A fresh window with nothing lost, on every CPU."""
        self.maps.event_limiter.put_all(Index(number=0), abi.EventLimiter())


class Namespace:
    """A network namespace, gone with ``close``; ``with`` puts the calling thread into it. Commands run inside."""

    def __init__(self, *commands: str) -> None:
        # A process holds the namespace until a descriptor does.
        holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; read _"], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE)  # fmt: skip
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            self.fd = os.open(f"/proc/{holder.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            holder.communicate(b"\n")
        self._homes: list[int] = []
        self.command(*commands)

    def command(self, *commands: str) -> None:
        """Run shell commands in the namespace, bpffs in sight."""
        with self:
            for line in commands:
                subprocess.run(line, shell=True, check=True)

    def __enter__(self) -> Self:
        self._homes.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        _setns(self.fd)
        return self

    def __exit__(self, *_: object) -> None:
        home = self._homes.pop()
        _setns(home)
        os.close(home)

    def close(self) -> None:
        """Let go of it; without sockets or processes in it, it is gone."""
        os.close(self.fd)


def _veths(count: int) -> tuple[Namespace, tuple[int, ...]]:
    """A namespace with veths that carry nothing, and their numbers."""
    names = [f"mbdp{number}" for number in range(count)]
    namespace = Namespace(*(f"ip link add {name} type veth peer name {name}p" for name in names))
    with namespace:
        return namespace, tuple(socket.if_nametoindex(name) for name in names)


_libc = ctypes.CDLL(None, use_errno=True)
_serial = itertools.count()


def _setns(fd: int) -> None:
    if _libc.setns(fd, 0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "setns")


def remove_pins(pin_dir: Path) -> None:
    """Unpin everything below a directory of a bpffs, and the directory."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(pin_dir)
    with contextlib.suppress(OSError):
        pin_dir.parent.rmdir()


# --- building packets --------------------------------------------------------------------------------------------

POD_MAC, HOST_MAC = bytes.fromhex("0a0000000001"), bytes.fromhex("0a00000000fe")


def packed(address: IpAddress | str) -> bytes:
    """An address as map keys hold it."""
    return abi.address_bytes(ip_address(address))


def ethernet(payload: bytes, ethertype: int, *, source: bytes = POD_MAC, destination: bytes = HOST_MAC) -> bytes:
    """An Ethernet frame."""
    return destination + source + struct.pack("!H", ethertype) + payload


def checksum(data: bytes) -> int:
    """The Internet checksum."""
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source: str, destination: str, protocol: int, payload: bytes, *, options: bytes = b"", identification: int = 1,
         offset: int = 0, more: bool = False, ttl: int = 64, total: int | None = None) -> bytes:  # fmt: skip
    """An IPv4 packet; ``offset`` in bytes."""
    assert len(options) % 4 == 0
    size = 20 + len(options)
    head = struct.pack("!BBHHHBBH4s4s", 0x40 | size // 4, 0, size + len(payload) if total is None else total,
                       identification, offset // 8 | (0x2000 if more else 0), ttl, protocol, 0,
                       IPv4Address(source).packed, IPv4Address(destination).packed) + options  # fmt: skip
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def ipv6(source: str, destination: str, next_header: int, payload: bytes, *, hop_limit: int = 64,
         length: int | None = None) -> bytes:  # fmt: skip
    """An IPv6 packet; extension headers are part of ``payload``."""
    return struct.pack("!IHBB16s16s", 6 << 28, len(payload) if length is None else length, next_header, hop_limit,
                       IPv6Address(source).packed, IPv6Address(destination).packed) + payload  # fmt: skip


def ip(source: str, destination: str, protocol: int, payload: bytes, **extra: Any) -> bytes:
    """An IP packet of the addresses' family, in its Ethernet frame."""
    if ":" in source:
        return ethernet(ipv6(source, destination, protocol, payload, **extra), 0x86DD)
    return ethernet(ipv4(source, destination, protocol, payload, **extra), 0x0800)


def tcp_header(source_port: int, destination_port: int, flags: int, *, options: bytes = b"") -> bytes:
    """A TCP header."""
    return struct.pack("!HHIIBBHHH", source_port, destination_port, 1, 1, (5 + len(options) // 4) << 4, flags, 8192,
                       0, 0) + options  # fmt: skip


def udp_header(source_port: int, destination_port: int, size: int = 0) -> bytes:
    """A UDP header for ``size`` bytes of data."""
    return struct.pack("!HHHH", source_port, destination_port, 8 + size, 0)


def tcp(source: str, destination: str, source_port: int, destination_port: int, flags: int = SYN,
        payload: bytes = b"") -> bytes:  # fmt: skip
    """A TCP segment in its frame."""
    return ip(source, destination, TCP, tcp_header(source_port, destination_port, flags) + payload)


def udp(source: str, destination: str, source_port: int, destination_port: int, payload: bytes = b"data") -> bytes:
    """A UDP datagram in its frame."""
    return ip(source, destination, UDP, udp_header(source_port, destination_port, len(payload)) + payload)


def sctp(source: str, destination: str, source_port: int, destination_port: int) -> bytes:
    """An SCTP packet in its frame."""
    return ip(source, destination, SCTP, struct.pack("!HHII", source_port, destination_port, 0, 0) + bytes(8))


def icmp(source: str, destination: str, kind: int, code: int = 0, identifier: int = 0, payload: bytes = b"",
         **extra: Any) -> bytes:  # fmt: skip
    """An ICMP or ICMPv6 message in its frame."""
    protocol = ICMP6 if ":" in source else ICMP
    return ip(source, destination, protocol, icmp_header(kind, code, identifier) + payload, **extra)


def icmp_header(kind: int, code: int = 0, identifier: int = 0) -> bytes:
    """The eight bytes every ICMP message starts with."""
    return struct.pack("!BBHHH", kind, code, 0, identifier, 1)


def ping(source: str, destination: str, identifier: int = 7, *, reply: bool = False) -> bytes:
    """An echo request or reply."""
    kinds = (128, 129) if ":" in source else (8, 0)
    return icmp(source, destination, kinds[reply], 0, identifier, b"ping")


def icmp_error(source: str, destination: str, quoted: bytes, kind: int | None = None) -> bytes:
    """Destination unreachable (or ``kind``) that quotes the start of a frame's IP packet."""
    return icmp(source, destination, (1 if ":" in source else 3) if kind is None else kind, 1, 0, quoted[14:][:576])


def fragment_header(next_header: int, offset: int, more: bool, identification: int = 1) -> bytes:
    """An IPv6 fragment header; ``offset`` in bytes."""
    return struct.pack("!BBHI", next_header, 0, offset & 0xFFF8 | more, identification)


def arp(operation: int, sender_ip: str, target_ip: str, *, sender_mac: bytes = POD_MAC, target_mac: bytes = bytes(6),
        source: bytes | None = None) -> bytes:  # fmt: skip
    """An ARP message in its frame."""
    body = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, operation, sender_mac, IPv4Address(sender_ip).packed,
                       target_mac, IPv4Address(target_ip).packed)  # fmt: skip
    return ethernet(body, 0x0806, source=source or sender_mac, destination=b"\xff" * 6)


def neighbour(kind: int, source: str, destination: str, target: str | None = None, options: bytes = b"", *,
              hop_limit: int = 255, code: int = 0, mac: bytes = POD_MAC) -> bytes:  # fmt: skip
    """A neighbour discovery message in its frame; ``kind`` 133..137."""
    body = icmp_header(kind, code) + (IPv6Address(target).packed if target else b"") + options
    return ethernet(ipv6(source, destination, ICMP6, body, hop_limit=hop_limit), 0x86DD, source=mac)


def mac_option(kind: int, mac: bytes) -> bytes:
    """A source (1) or target (2) link-layer address option."""
    return bytes((kind, 1)) + mac


def frames(packet: bytes) -> Iterator[bytes]:
    """The frame cut after each of its bytes; a test run takes no IP frame shorter than an IP header."""
    smallest = {b"\x08\x00": 34, b"\x86\xdd": 54}.get(packet[12:14], 15)
    for size in range(smallest, len(packet)):
        yield packet[:size]
