"""How much memory the process holds, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import gc
import resource
from typing import Final

_M_ARENA_MAX: Final = -8
_libc = ctypes.CDLL(None)


def limit_arenas() -> None:
    """Let all threads share one heap; glibc would give each its own, none of which is ever given back."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return freed memory to the kernel: after a large update most of the heap is free, but still counted."""
    gc.collect()
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def resident_bytes() -> int:
    """The memory this process holds, as the kernel counts it."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
