"""Classifiers on a clsact qdisc by rtnetlink: the way to attach before kernel 6.6, which has no TCX.

Written out here because pyroute2 costs the agent 25 MB. ``replace`` with the same priority and handle swaps the program
without a gap; the qdisc itself is made once and never removed, since both would lose packets.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final

from meshbridge.datapath import syscall

PRIORITY: Final = 1
HANDLE: Final = 0x6D62
"""Not 1, so that nobody else's filter of the same priority is ever replaced."""

_RTM_NEWQDISC: Final = 36
_RTM_NEWTFILTER: Final = 44
_RTM_DELTFILTER: Final = 45
_RTM_GETTFILTER: Final = 46
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_REQUEST: Final = 0x01
_ACK: Final = 0x04
_DUMP: Final = 0x300
_EXCL: Final = 0x200
_CREATE: Final = 0x400
_TC_H_CLSACT: Final = 0xFFFFFFF1
_CLSACT_HANDLE: Final = 0xFFFF0000
_TCA_KIND: Final = 1
_TCA_OPTIONS: Final = 2
_TCA_BPF_FD: Final = 6
_TCA_BPF_NAME: Final = 7
_TCA_BPF_FLAGS: Final = 8
_TCA_BPF_ID: Final = 11
_DIRECT_ACTION: Final = 1
_ETH_P_ALL: Final = 0x0003
_NLA_TYPE_MASK: Final = 0x3FFF
_HEADER: Final = struct.Struct("=IHHII")
_TCMSG: Final = struct.Struct("=BBHiIII")
_ATTRIBUTE: Final = struct.Struct("=HH")


class Parent(IntEnum):
    """Where on the qdisc a filter sits."""

    INGRESS = 0xFFFFFFF2
    EGRESS = 0xFFFFFFF3


def replace(ifindex: int, parent: Parent, program_fd: int, name: str) -> None:
    """Attach a program, or swap the one this module attached before; no packet passes unseen in between."""
    with contextlib.suppress(syscall.BpfExistsError):  # there already, ours or another's: both are fine
        _transact(_RTM_NEWQDISC, _CREATE | _EXCL, _tcmsg(ifindex, _CLSACT_HANDLE, _TC_H_CLSACT, 0)
                  + _attribute(_TCA_KIND, b"clsact\0"), ifindex)  # fmt: skip
    options = (
        _attribute(_TCA_BPF_FD, struct.pack("=I", program_fd))
        + _attribute(_TCA_BPF_NAME, name.encode() + b"\0")
        + _attribute(_TCA_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
    )
    message = _filter(ifindex, parent) + _attribute(_TCA_KIND, b"bpf\0") + _attribute(_TCA_OPTIONS, options)
    _transact(_RTM_NEWTFILTER, _CREATE, message, ifindex)


def remove(ifindex: int, parent: Parent) -> None:
    """Take this module's filter off; nothing happens when it is not there."""
    with contextlib.suppress(syscall.BpfNotFoundError, syscall.BpfUnsupportedError):  # no such filter, or no qdisc
        _transact(_RTM_DELTFILTER, 0, _filter(ifindex, parent) + _attribute(_TCA_KIND, b"bpf\0"), ifindex)


def attached_program(ifindex: int, parent: Parent) -> int | None:
    """The number of the program this module attached there, or None."""
    with contextlib.suppress(syscall.BpfNotFoundError, syscall.BpfUnsupportedError):  # no device, or no qdisc on it
        for payload in _dump(_tcmsg(ifindex, 0, parent, 0), ifindex):
            handle = _TCMSG.unpack_from(payload)[4]
            attributes = dict(_attributes(payload[_TCMSG.size :]))
            if handle == HANDLE and attributes.get(_TCA_KIND) == b"bpf\0":
                options = dict(_attributes(attributes.get(_TCA_OPTIONS, b"")))
                if _TCA_BPF_ID in options:
                    return int(struct.unpack("=I", options[_TCA_BPF_ID])[0])
    return None


def _filter(ifindex: int, parent: Parent) -> bytes:
    return _tcmsg(ifindex, HANDLE, parent, PRIORITY << 16 | socket.htons(_ETH_P_ALL))


def _tcmsg(ifindex: int, handle: int, parent: int, info: int) -> bytes:
    return _TCMSG.pack(socket.AF_UNSPEC, 0, 0, ifindex, handle, parent, info)


def _attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + b"\0" * (-len(data) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _NLA_TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) // 4 * 4


_sequence = itertools.count(1)


def _transact(kind: int, flags: int, body: bytes, ifindex: int) -> None:
    """Send one request and wait for its acknowledgement."""
    for _ in _exchange(kind, flags | _REQUEST | _ACK, body, ifindex):
        pass


def _dump(body: bytes, ifindex: int) -> Iterator[bytes]:
    return _exchange(_RTM_GETTFILTER, _REQUEST | _DUMP, body, ifindex)


def _exchange(kind: int, flags: int, body: bytes, ifindex: int) -> Iterator[bytes]:
    """Yield the payload of every answer until the acknowledgement or the end of the dump."""
    number = next(_sequence) & 0xFFFFFFFF
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as channel:
        channel.bind((0, 0))
        channel.sendall(_HEADER.pack(_HEADER.size + len(body), kind, flags, number, 0) + body)
        while True:
            data = channel.recv(1 << 16)
            offset = 0
            while offset + _HEADER.size <= len(data):
                length, answer, _, sequence, _ = _HEADER.unpack_from(data, offset)
                payload = data[offset + _HEADER.size : offset + length]
                offset += (length + 3) // 4 * 4
                if sequence != number:
                    continue
                if answer == _NLMSG_DONE:
                    return
                if answer == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", payload)[0]
                    if code:
                        raise _refused(code, ifindex)
                    return
                yield payload


def _refused(code: int, ifindex: int) -> syscall.BpfError:
    where = f"interface {ifindex}, clsact"
    if code == errno.ENODEV:
        return syscall.BpfNotFoundError(f"no such interface: {os.strerror(code)}", errno=code, where=where)
    return syscall.error(code, "rtnetlink refused the filter", where)
