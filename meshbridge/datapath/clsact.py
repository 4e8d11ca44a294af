"""Classifiers on a clsact qdisc by rtnetlink: the way to attach before kernel 6.6, which has no TCX.

``replace`` with the same priority and handle swaps the program without a gap; the qdisc itself is made once and never
removed, since both would lose packets.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from enum import IntEnum
from typing import Final

from meshbridge.datapath import netlink, syscall

PRIORITY: Final = 1
HANDLE: Final = 0x6D62
"""Not 1, so that nobody else's filter of the same priority is ever replaced."""

_RTM_NEWQDISC: Final = 36
_RTM_NEWTFILTER: Final = 44
_RTM_DELTFILTER: Final = 45
_RTM_GETTFILTER: Final = 46
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
_TCMSG: Final = struct.Struct("=BBHiIII")


class Parent(IntEnum):
    """Where on the qdisc a filter sits."""

    INGRESS = 0xFFFFFFF2
    EGRESS = 0xFFFFFFF3


def replace(ifindex: int, parent: Parent, program_fd: int, name: str) -> None:
    """Attach a program, or swap the one this module attached before; no packet passes unseen in between."""
    with contextlib.suppress(syscall.BpfExistsError):  # there already, ours or another's: both are fine
        qdisc = _tcmsg(ifindex, _CLSACT_HANDLE, _TC_H_CLSACT, 0) + netlink.attribute(_TCA_KIND, b"clsact\0")
        _ask(_RTM_NEWQDISC, netlink.CREATE | netlink.EXCLUSIVE, qdisc, ifindex)
    options = (
        netlink.attribute(_TCA_BPF_FD, struct.pack("=I", program_fd))
        + netlink.attribute(_TCA_BPF_NAME, name.encode() + b"\0")
        + netlink.attribute(_TCA_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
    )
    message = (
        _filter(ifindex, parent) + netlink.attribute(_TCA_KIND, b"bpf\0") + netlink.attribute(_TCA_OPTIONS, options)
    )
    _ask(_RTM_NEWTFILTER, netlink.CREATE, message, ifindex)


def remove(ifindex: int, parent: Parent) -> None:
    """Take this module's filter off; nothing happens when it is not there."""
    with contextlib.suppress(syscall.BpfNotFoundError, syscall.BpfUnsupportedError):  # no such filter, or no qdisc
        _ask(_RTM_DELTFILTER, 0, _filter(ifindex, parent) + netlink.attribute(_TCA_KIND, b"bpf\0"), ifindex)


def attached_program(ifindex: int, parent: Parent) -> int | None:
    """The number of the program this module attached there, or None."""
    with contextlib.suppress(syscall.BpfNotFoundError, syscall.BpfUnsupportedError):  # no device, or no qdisc on it
        for payload in _ask(_RTM_GETTFILTER, netlink.DUMP, _tcmsg(ifindex, 0, parent, 0), ifindex):
            handle = _TCMSG.unpack_from(payload)[4]
            attributes = dict(netlink.attributes(payload, _TCMSG.size))
            if handle == HANDLE and attributes.get(_TCA_KIND) == b"bpf\0":
                options = dict(netlink.attributes(attributes.get(_TCA_OPTIONS, b"")))
                if _TCA_BPF_ID in options:
                    return int(struct.unpack("=I", options[_TCA_BPF_ID])[0])
    return None


def _filter(ifindex: int, parent: Parent) -> bytes:
    return _tcmsg(ifindex, HANDLE, parent, PRIORITY << 16 | socket.htons(_ETH_P_ALL))


def _tcmsg(ifindex: int, handle: int, parent: int, info: int) -> bytes:
    return _TCMSG.pack(socket.AF_UNSPEC, 0, 0, ifindex, handle, parent, info)


def _ask(request: int, flags: int, payload: bytes, ifindex: int) -> list[bytes]:
    try:
        return [body for _, body in netlink.ask(request, payload, flags)]
    except OSError as error:
        raise _refused(error.errno or errno.EIO, ifindex) from error


def _refused(code: int, ifindex: int) -> syscall.BpfError:
    where = f"interface {ifindex}, clsact"
    if code == errno.ENODEV:
        return syscall.BpfNotFoundError(f"no such interface: {os.strerror(code)}", errno=code, where=where)
    return syscall.error(code, "rtnetlink refused the filter", where)
