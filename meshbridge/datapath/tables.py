"""The tables the reconciler writes, and the grace period between two writes."""

from __future__ import annotations

import ctypes
import errno
import platform
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final, Protocol

from meshbridge.datapath import syscall
from meshbridge.datapath.maps import Maps
from meshbridge.datapath.policytable import PolicyTable
from meshbridge.datapath.rawtables import Item, KernelTable

_MEMBARRIER_NUMBERS: Final = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356}
_MEMBARRIER_CMD_GLOBAL: Final = 1


class TableName(StrEnum):
    """The tables that follow the desired state. POLICY_SETS holds whole sets, the others are a map each."""

    ENDPOINTS = "endpoints"
    ADDRESSES = "endpoint_addresses"
    IPCACHE = "ipcache"
    IPCACHE_CIDR = "ipcache_cidr"
    POLICY_SETS = "policy_sets"


class Table(Protocol):
    """One map; what a call wrote is in force when it returns."""

    def read(self) -> Iterable[Item]:
        """Every entry."""

    def put(self, items: Sequence[Item]) -> None:
        """Write entries in this order; one that is there is replaced at once."""

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove entries in this order; one that is not there does not matter."""


def kernel_tables(maps: Maps) -> dict[TableName, Table]:
    """The tables of open maps."""
    return {
        name: PolicyTable(maps) if name is TableName.POLICY_SETS else KernelTable(getattr(maps, name.value))
        for name in TableName
    }


def wait_for_packets() -> None:
    """Return when every packet that was being judged at the time of the call has its verdict.

    A packet looks up its endpoint's set, then identities, then entries; between two steps that must not meet in one
    packet there has to be a grace period. ``membarrier`` waits for one, as no other call from user space promises.
    """
    number = _MEMBARRIER_NUMBERS.get(platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    if number is None or libc.syscall(number, _MEMBARRIER_CMD_GLOBAL, 0, 0) != 0:
        raise syscall.error(ctypes.get_errno() or errno.ENOSYS, "membarrier(2)", "grace period")
