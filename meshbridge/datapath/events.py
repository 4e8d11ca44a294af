"""Flow events from the pinned ring buffer, read through the mapped pages without BCC.

Only one reader may exist at a time: reading moves the ring's consumer position for everybody.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from types import TracebackType
from typing import Final, Self

from meshbridge import abi
from meshbridge.datapath import syscall

_BUSY: Final = 1 << 31
_DISCARDED: Final = 1 << 30
_HEADER_BYTES: Final = 8
_EVENT_BYTES: Final = ctypes.sizeof(abi.FlowEvent)


class EventReader:
    """Takes events out of the ring; ``fileno`` becomes readable when some wait, so an event loop can watch it."""

    def __init__(self, events_fd: int) -> None:
        """Map the ring behind a descriptor (``Maps.events_fd``), which stays the caller's to close."""
        self._fd = events_fd
        self._size = syscall.map_info(events_fd).max_entries
        page = mmap.PAGESIZE
        self._consumer_page = mmap.mmap(events_fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        # The kernel maps the data twice in a row, so that a record is in one piece even across the end.
        self._ring = mmap.mmap(events_fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumer = memoryview(self._consumer_page)[:8].cast("Q")
        self._producer = memoryview(self._ring)[:8].cast("Q")
        self._data = memoryview(self._ring)[page:]

    def fileno(self) -> int:
        """The descriptor to poll: readable while events wait."""
        return self._fd

    def read(self, limit: int = 4096) -> list[abi.FlowEvent]:
        """The events that wait, oldest first, at most ``limit``; never blocks."""
        events: list[abi.FlowEvent] = []
        position, end = self._consumer[0], self._producer[0]
        while position < end and len(events) < limit:
            offset = position & (self._size - 1)
            header = int.from_bytes(self._data[offset : offset + 4], sys.byteorder)
            if header & _BUSY:
                break  # a CPU is still writing it
            length = header & ~(_BUSY | _DISCARDED)
            if not header & _DISCARDED and length == _EVENT_BYTES:
                start = offset + _HEADER_BYTES
                events.append(abi.FlowEvent.from_buffer_copy(self._data[start : start + _EVENT_BYTES]))
            position += (length + _HEADER_BYTES + 7) // 8 * 8
            self._consumer[0] = position
        return events

    def close(self) -> None:
        """Unmap the ring."""
        for view in (self._consumer, self._producer, self._data):
            view.release()
        self._consumer_page.close()
        self._ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None,
                 _trace: TracebackType | None) -> None:  # fmt: skip
        self.close()
