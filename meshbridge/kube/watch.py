"""Follow directories of manifests with inotify, without trusting it: everything is listed again now and then."""

from __future__ import annotations

import asyncio
import contextlib
import math
import stat
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from asyncinotify import Inotify, Mask

from meshbridge.kube.manifests import YOUTH_S, Changes, Listing, Manifests, is_manifest

SETTLE_S: Final = 0.004  # files that change together are taken in together
RELIST_S: Final = 5.0

_WHOLE = Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.MOVED_FROM | Mask.DELETE
_OTHER = Mask.CREATE | Mask.DELETE_SELF | Mask.MOVE_SELF


async def watch(manifests: Manifests) -> AsyncIterator[Changes]:
    """Yield at once everything there is, then again, possibly empty, after every change, once its writer has closed it.

    Lost events, a directory that vanishes and comes back, and an overflowing queue only cost time: all directories are
    listed again every few seconds, and at once where inotify does not say which file is whole.
    """
    async with _Watches(manifests.directories) as watches:
        changes = manifests.refresh(time.monotonic(), time.time(), manifests.listing())
        yield changes
        listing: _ListingUnderWay | None = None
        wake_at_s, relist_at_s = _deadlines(changes)
        while True:
            closed = await watches.changed(min(wake_at_s, relist_at_s) - time.monotonic())
            changes = manifests.refresh(time.monotonic(), time.time(), closed)
            if closed or changes.documents:
                yield changes
            wake_at_s, _ = _deadlines(changes)
            if listing is not None:
                listing.skip.update(map(str, closed))
                if listing.done:
                    changes = manifests.refresh(time.monotonic(), listing.began_at_s, listing.result())
                    yield changes
                    listing = None
                    wake_at_s, relist_at_s = _deadlines(changes)
            elif watches.unsure or time.monotonic() >= relist_at_s:
                watches.renew()
                listing = _ListingUnderWay(manifests, watches.nudge)
                relist_at_s = math.inf


def _deadlines(changes: Changes) -> tuple[float, float]:
    """When to look again at files that are about to vanish, and when to list all."""
    now_s = time.monotonic()
    if changes.look_again_s is None:
        return math.inf, now_s + RELIST_S
    return now_s + changes.look_again_s, now_s + YOUTH_S


class _ListingUnderWay:
    """A listing made by a thread, since thousands of files take long; what inotify tells meanwhile is newer."""

    def __init__(self, manifests: Manifests, when_done: Callable[[], None]) -> None:
        self.began_at_s = time.time()  # files written to since then are taken for younger than they are
        self.skip: set[str] = set()
        self._task = asyncio.create_task(asyncio.to_thread(manifests.listing), name="list-manifests")
        self._task.add_done_callback(lambda _: when_done())

    @property
    def done(self) -> bool:
        return self._task.done()

    def result(self) -> Listing:
        listing = self._task.result()
        listing.skip = self.skip
        return listing


def _next_listing(changes: Changes) -> float:
    return time.monotonic() + (RELIST_S if changes.look_again_s is None else changes.look_again_s)


class _Watches:
    """What inotify says about some directories, gathered for a moment so that what belongs together stays together."""

    def __init__(self, directories: tuple[str, ...]) -> None:
        self._directories = directories
        self._inotify = Inotify(cache_size=256)
        self._closed: set[Path] = set()
        self._news = asyncio.Event()
        self.unsure = False

    async def __aenter__(self) -> _Watches:
        self._add_watches()
        self._reader = asyncio.create_task(self._read(), name="read-inotify")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._inotify.close()

    async def changed(self, timeout_s: float) -> set[Path]:
        """The files that became whole or vanished; empty after ``timeout_s``, a nudge, or when ``unsure`` was set."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(timeout_s, 0) if math.isfinite(timeout_s) else None):
                await self._news.wait()
        if self._news.is_set():
            await asyncio.sleep(SETTLE_S)
        self._news.clear()
        closed, self._closed = self._closed, set()
        return closed

    def nudge(self) -> None:
        """Have ``changed`` return."""
        self._news.set()

    def renew(self) -> None:
        """Watch what is at the directories' paths now; what follows from here on is sure again."""
        self.unsure = False
        self._add_watches()

    def _add_watches(self) -> None:
        for directory in self._directories:
            with contextlib.suppress(OSError):  # the listing that follows says so
                self._inotify.add_watch(directory, _WHOLE | _OTHER | Mask.ONLYDIR)

    async def _read(self) -> None:
        async for event in self._inotify:
            path, mask = event.path, event.mask
            if event.name is None or path is None:
                self.unsure |= not mask & Mask.IGNORED
            elif is_manifest(path.name):
                if mask & _WHOLE or _is_link(path):  # any other new file is still being written
                    self._closed.add(path)
            elif mask & Mask.MOVED_TO:
                self.unsure = True  # links of manifests may lead through it, as in a mounted ConfigMap
            if self.unsure or self._closed:
                self._news.set()


def _is_link(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISLNK(status.st_mode) or status.st_nlink > 1
