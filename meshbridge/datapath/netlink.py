"""One netlink request and its answers, spoken directly: pyroute2 would cost the long-lived agent 25 MB.

Spec: netlink(7), rtnetlink(7).
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

NETLINK_ROUTE: Final = 0
NETLINK_SOCK_DIAG: Final = 4
DUMP: Final = 0x300
EXCLUSIVE: Final = 0x200
CREATE: Final = 0x400
RECEIVE_BYTES: Final = 1 << 16

_REQUEST: Final = 0x01
_ACKNOWLEDGE: Final = 0x04
_DUMP_INTERRUPTED: Final = 0x10
_ERROR, _DONE = 2, 3
_TYPE_MASK: Final = 0x3FFF  # the two highest bits of an attribute's type are flags
_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_TIMEOUT_S: Final = 5.0
_sequence = itertools.count(1)


def ask(request: int, payload: bytes, flags: int = 0, *, protocol: int = NETLINK_ROUTE) -> Iterator[tuple[int, bytes]]:
    """Yield kind and body of every answer in the calling thread's network namespace, until the kernel says it was all.

    Raises:
        InterruptedError: a dump whose content changed while it was made.
        OSError: what the kernel refuses with, or no answer in time.
    """
    number = next(_sequence) & 0xFFFFFFFF
    flags |= _REQUEST | (0 if flags & DUMP == DUMP else _ACKNOWLEDGE)
    interrupted = False
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as channel:
        channel.settimeout(_TIMEOUT_S)
        channel.send(_HEADER.pack(_HEADER.size + len(payload), request, flags, number, 0) + payload)
        while True:
            for kind, answer_flags, sequence, body in _messages(channel.recv(RECEIVE_BYTES)):
                if sequence != number:
                    continue
                interrupted |= bool(answer_flags & _DUMP_INTERRUPTED)
                if kind == _ERROR and (code := -struct.unpack_from("=i", body)[0]):
                    raise OSError(code, os.strerror(code))
                if kind in (_ERROR, _DONE):
                    if interrupted:
                        raise InterruptedError
                    return
                yield kind, body


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded so that another may follow."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + b"\0" * (-len(data) % 4)


def attributes(body: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Type and data of each attribute from ``start`` on; ends at the first that is cut short."""
    while start + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, start)
        if length < _ATTRIBUTE.size or start + length > len(body):
            return
        yield kind & _TYPE_MASK, body[start + _ATTRIBUTE.size : start + length]
        start += (length + 3) & ~3


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    start = 0
    while start + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, start)
        if length < _HEADER.size:
            return
        yield kind, flags, sequence, data[start + _HEADER.size : start + length]
        start += (length + 3) & ~3
