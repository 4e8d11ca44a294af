"""Counting what passes an interface, independently of everything that is being judged: a packet socket."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import TracebackType
from typing import Self

from meshbridge.demo.netns import make_socket

_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_OUTGOING = 4


@dataclass(slots=True)
class Sniffer:
    """Packets that arrive on ``interface`` in ``netns`` from one of ``sources``, and the TCP payload in them.

    ``lost`` counts packets that the socket had no room for: a count of zero is worth something only when that is zero.
    """

    netns: str
    interface: str
    sources: Iterable[str]
    port: int | None = None
    packets: int = 0
    payload_bytes: int = 0
    lost: int = 0
    _socket: socket.socket | None = None
    _thread: threading.Thread | None = None
    _wanted: set[bytes] = field(default_factory=set)

    def __enter__(self) -> Self:
        self._wanted = {ip_address(source).packed for source in self.sources}
        self._socket = make_socket(self.netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
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
            if address[2] != _OUTGOING and packet:
                self._look(packet)

    def _look(self, packet: bytes) -> None:
        version = packet[0] >> 4
        if version == 4 and len(packet) >= 20:
            source, protocol, offset = packet[12:16], packet[9], (packet[0] & 15) * 4
            total = int.from_bytes(packet[2:4], "big")
        elif version == 6 and len(packet) >= 40:
            source, protocol, offset = packet[8:24], packet[6], 40
            total = 40 + int.from_bytes(packet[4:6], "big")
        else:
            return
        if source not in self._wanted or protocol != socket.IPPROTO_TCP or len(packet) < offset + 20:
            return
        if self.port is not None and int.from_bytes(packet[offset + 2 : offset + 4], "big") != self.port:
            return
        self.packets += 1
        self.payload_bytes += max(0, total - offset - (packet[offset + 12] >> 4) * 4)
