"""Probes: frames put onto the host's side of a pod's interface, and a look into the pod at what arrives of them.

A probe goes through the tc egress hook as every packet to the pod does, and is judged there by the source it claims. It
is a SYN whose checksum is wrong on purpose: the programs do not look at checksums, but the pod's kernel throws it away
before it looks for a socket, so nothing answers and no application hears of it (docs/adr/0200).
"""

from __future__ import annotations

import ctypes
import errno
import secrets
import socket
import struct
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Self

from meshbridge import abi
from meshbridge.abi import address_bytes
from meshbridge.datapath.maps import Map
from meshbridge.datapath.redirect import in_namespace
from meshbridge.errors import MeshBridgeError
from meshbridge.identity.model import IpAddress

PROTOCOL: Final = socket.IPPROTO_TCP
FIRST_PORT: Final = 61000
"""Source ports from here on: Linux gives none of them to clients by itself."""
NONCE_BYTES: Final = 16
_MAGIC_BYTES: Final = 4
_ETH, _IPV4, _IPV6, _TCP = 14, 20, 40, 20
_ETH_P_ALL, _ETH_P_IP, _ETH_P_IPV6 = 0x0003, 0x0800, 0x86DD
_SYN: Final = 0x02
_HOPS: Final = 64
_WRONG: Final = 0x00FF
"""What the checksum is off by. 0 and 0xffff are the same checksum; this never turns one into the other."""
_SO_ATTACH_FILTER: Final = 26
_FRAME_BYTES: Final = 2048
_ATTEMPTS: Final = 16


class ProbeError(MeshBridgeError):
    """A probe cannot be sent, or nobody can look at what arrives of it."""


@dataclass(frozen=True, slots=True)
class ProbeFlow:
    """What a probe claims to be: the first packet of this TCP connection."""

    source: IpAddress
    source_port: int
    destination: IpAddress
    destination_port: int


@dataclass(frozen=True, slots=True)
class Sent:
    """A probe that was sent. ``taken``: the interface took it. ``opened``: it had opened a flow, which is forgotten;
    ``left``: one is open all the same."""

    flow: ProbeFlow
    frame: bytes
    taken: bool
    opened: bool
    left: bool


Flows = Map[abi.ConntrackKey, abi.ConntrackValue]


def unused_flow(flows: Flows, source: IpAddress, destination: IpAddress, port: int) -> ProbeFlow:
    """A flow that a pod has not open, neither this way nor the other.

    Raises:
        ProbeError: none was found.
    """
    for _ in range(_ATTEMPTS):
        source_port = FIRST_PORT + secrets.randbelow(65536 - FIRST_PORT)
        flow = ProbeFlow(source, source_port, destination, port)
        if not is_open(flows, flow):
            return flow
    raise ProbeError("no unused port was found", where=f"probe from {source}", fix="nothing: it is tried again")


def is_open(flows: Flows, flow: ProbeFlow) -> bool:
    """Whether the pod's flow table knows the flow, in either direction."""
    return any(flows.get(key) is not None for key in _keys(flow))


def forget_flow(flows: Flows, flow: ProbeFlow) -> bool:
    """The flow is not open any more; whether it was."""
    return flows.delete(_keys(flow)[0])


def _keys(flow: ProbeFlow) -> tuple[abi.ConntrackKey, abi.ConntrackKey]:
    """Of the flow, and of the one whose replies its packets would be."""
    source, destination = (
        (ctypes.c_uint8 * 16)(*address_bytes(address)) for address in (flow.source, flow.destination)
    )
    own = abi.ConntrackKey(
        source=source, destination=destination, source_port=flow.source_port, destination_port=flow.destination_port,
        protocol=PROTOCOL, direction=int(abi.Direction.DIR_INGRESS),
    )  # fmt: skip
    reverse = abi.ConntrackKey(
        source=destination, destination=source, source_port=flow.destination_port, destination_port=flow.source_port,
        protocol=PROTOCOL, direction=int(abi.Direction.DIR_EGRESS),
    )  # fmt: skip
    return own, reverse


def frame(flow: ProbeFlow, magic: bytes, *, source_mac: bytes, destination_mac: bytes) -> bytes:
    """The frame of a probe, unlike any other; a ``Tap`` of the same ``magic`` sees it."""
    source, destination = flow.source.packed, flow.destination.packed
    nonce = magic + secrets.token_bytes(NONCE_BYTES - _MAGIC_BYTES)
    ports = flow.source_port, flow.destination_port
    tcp = struct.pack(">HHIIBBHHH", *ports, secrets.randbits(32), 0, _TCP // 4 << 4, _SYN, 0xFFFF, 0, 0)
    length = _TCP + NONCE_BYTES
    pseudo = source + destination + struct.pack(">II", length, PROTOCOL)
    checksum = _checksum(pseudo + tcp + nonce) ^ _WRONG
    segment = tcp[:16] + struct.pack(">H", checksum) + tcp[18:] + nonce
    if flow.destination.version == 6:
        kind = _ETH_P_IPV6
        header = struct.pack(">IHBB", 6 << 28, length, PROTOCOL, _HOPS) + source + destination
    else:
        kind = _ETH_P_IP
        total = _IPV4 + length
        header = struct.pack(">BBHHHBBH", 0x45, 0, total, secrets.randbits(16), 0, _HOPS, PROTOCOL, 0)
        header += source + destination
        header = header[:10] + struct.pack(">H", _checksum(header)) + header[12:]
    return destination_mac + source_mac + struct.pack(">H", kind) + header + segment


def _checksum(data: bytes) -> int:
    """Spec: RFC 1071."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class _OpenSocket:
    """Whatever holds a packet socket, until it is closed."""

    _socket: socket.socket

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sender(_OpenSocket):
    """Puts frames onto an interface of the calling thread's network namespace, on their way to the pod behind it."""

    def __init__(self, ifindex: int) -> None:
        """
        Raises:
            ProbeError: there is no such interface.
        """
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
            self._socket.bind((socket.if_indextoname(ifindex), 0))
        except OSError as error:
            raise ProbeError(f"no probe can be sent: {error.strerror}", where=f"interface {ifindex}") from error
        self._ifindex = ifindex
        self.mac: bytes = self._socket.getsockname()[4]

    def send(self, data: bytes) -> bool:
        """Whether the interface took the frame; when this returns the programs on it have judged it.

        False: it was dropped on its way out, by whatever sits there.

        Raises:
            ProbeError: the interface is down or gone.
        """
        try:
            self._socket.send(data)
            return True
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return False
            raise ProbeError(f"no probe can be sent: {error.strerror}", where=f"interface {self._ifindex}") from error


class Tap(_OpenSocket):
    """Sees the probes of one ``magic`` that arrive on an interface inside of a pod, and no other packet."""

    def __init__(self, netns: str, ifindex: int) -> None:
        """
        Raises:
            NamespaceError: the namespace cannot be entered.
            ProbeError: there is no such interface in it.
        """
        self.magic = secrets.token_bytes(_MAGIC_BYTES)
        try:
            self._socket = in_namespace(netns, lambda: _tap_socket(ifindex, self.magic))
        except OSError as error:
            where = f"network namespace {netns}, interface {ifindex}"
            raise ProbeError(f"what arrives in the pod cannot be seen: {error.strerror}", where=where) from error

    def receive(self, awaited: Collection[bytes], timeout_s: float) -> set[bytes]:
        """The frames that arrived so far; returns once all of ``awaited`` are among them, or the time is over.

        Raises:
            ProbeError: the interface is down or gone.
        """
        found: set[bytes] = set()
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            self._socket.settimeout(max(left, 0.0))
            try:
                found.add(self._socket.recv(_FRAME_BYTES))
            except (TimeoutError, BlockingIOError):
                return found
            except OSError as error:
                raise ProbeError(
                    f"what arrives cannot be seen: {error.strerror}", where="the pod's interface"
                ) from error
            if found.issuperset(awaited):
                timeout_s, deadline = 0.0, time.monotonic()


def _tap_socket(ifindex: int, magic: bytes) -> socket.socket:
    """Runs inside of the pod's namespace. The filter is there before the first packet is."""
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        _attach_filter(tap, _filter(magic))
        tap.bind((socket.if_indextoname(ifindex), _ETH_P_ALL))
    except BaseException:
        tap.close()
        raise
    return tap


def _filter(magic: bytes) -> list[tuple[int, int, int, int]]:
    """Classic BPF: frames with ``magic`` where a probe has it.

    Spec: include/uapi/linux/bpf_common.h.
    """
    load_half, load_word, equal, answer = 0x28, 0x20, 0x15, 0x06
    (wanted,) = struct.unpack(">I", magic)
    return [
        (load_half, 0, 0, 12),
        (equal, 0, 2, _ETH_P_IP),
        (load_word, 0, 0, _ETH + _IPV4 + _TCP),
        (equal, 3, 4, wanted),
        (equal, 0, 3, _ETH_P_IPV6),
        (load_word, 0, 0, _ETH + _IPV6 + _TCP),
        (equal, 0, 1, wanted),
        (answer, 0, 0, _FRAME_BYTES),
        (answer, 0, 0, 0),
    ]


def _attach_filter(tap: socket.socket, program: list[tuple[int, int, int, int]]) -> None:
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    tap.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(buffer)))
