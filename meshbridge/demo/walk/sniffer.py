"""Counting what passes an interface, independently of everything that is being judged: a packet socket."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType
from typing import Self

from meshbridge.demo.netns import inside

_ETH_P_ALL = 3
_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_OUTGOING = 4


@dataclass(slots=True)
class Sniffer:
    """TCP packets on ``interface`` in ``netns`` that come in (or with ``outgoing`` go out), and the payload in them.

    ``lost`` counts packets that the socket had no room for: counts are worth something only when it is zero.
    """

    netns: str
    interface: str
    sources: Iterable[str]
    destinations: Iterable[str] = ()
    port: int | None = None
    outgoing: bool = False
    packets: int = 0
    payload_bytes: int = 0
    lost: int = 0
    _socket: socket.socket | None = None
    _thread: threading.Thread | None = None
    _wanted_sources: frozenset[bytes] = frozenset()
    _wanted_destinations: frozenset[bytes] = frozenset()

    def __enter__(self) -> Self:
        self._wanted_sources = frozenset(ip_address(address).packed for address in self.sources)
        self._wanted_destinations = frozenset(ip_address(address).packed for address in self.destinations)
        self._socket = inside(self.netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
        self._socket.settimeout(0.1)
        self._socket.bind((self.interface, _ETH_P_ALL))
        self._thread = threading.Thread(target=self._count, name=f"sniff-{self.interface}")
        self._stop = False
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        assert self._thread is not None
        assert self._socket is not None
        self._thread.join()
        _seen, self.lost = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self._socket.close()

    _stop: bool = False

    def _count(self) -> None:
        assert self._socket is not None
        while True:
            try:
                packet, address = self._socket.recvfrom(256)
            except TimeoutError:
                if self._stop:
                    return
                continue
            if (address[2] == _OUTGOING) == self.outgoing and packet:
                self._look(packet)

    def _look(self, packet: bytes) -> None:
        version = packet[0] >> 4
        if version == 4 and len(packet) >= 20:
            source, destination = packet[12:16], packet[16:20]
            protocol, offset = packet[9], (packet[0] & 15) * 4
            total = int.from_bytes(packet[2:4], "big")
        elif version == 6 and len(packet) >= 40:
            source, destination = packet[8:24], packet[24:40]
            protocol, offset = packet[6], 40
            total = 40 + int.from_bytes(packet[4:6], "big")
        else:
            return
        if source not in self._wanted_sources:
            return
        if self._wanted_destinations and destination not in self._wanted_destinations:
            return
        if protocol != socket.IPPROTO_TCP or len(packet) < offset + 20:
            return
        if self.port is not None and int.from_bytes(packet[offset + 2 : offset + 4], "big") != self.port:
            return
        self.packets += 1
        self.payload_bytes += max(0, total - offset - (packet[offset + 12] >> 4) * 4)
