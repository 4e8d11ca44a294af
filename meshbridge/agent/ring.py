"""The last flows of the node, encoded once, and the clients that follow them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from meshbridge.observe.flow import Flow, FlowKind, FlowVerdict, LostBy
from meshbridge.observe.messages import encode_flow

KEPT_FLOWS: Final = 4096
CLIENT_BACKLOG: Final = 4096
MAX_CLIENTS: Final = 64


@dataclass(slots=True, eq=False)
class Follower:
    """One client's backlog. A client that is too slow loses the oldest and is told how many."""

    node: str
    _backlog: deque[bytes] = field(default_factory=lambda: deque(maxlen=CLIENT_BACKLOG))
    _lost: int = 0
    _waiting: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, record: bytes) -> None:
        if len(self._backlog) == CLIENT_BACKLOG:
            self._lost += 1
        self._backlog.append(record)
        self._waiting.set()

    async def records(self) -> AsyncIterator[bytes]:
        """The records offered, in order, until the task is cancelled."""
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            while self._backlog or self._lost:
                if self._lost:
                    lost, self._lost = self._lost, 0
                    yield encode_flow(
                        Flow(
                            time.time_ns(), self.node, FlowKind.LOST, FlowVerdict.DROPPED, lost=lost,
                            lost_by=LostBy.CLIENT,
                        )
                    )  # fmt: skip
                if self._backlog:
                    yield self._backlog.popleft()


@dataclass(slots=True)
class FlowRing:
    """Belongs to the event loop's thread."""

    node: str
    lost: int = 0
    seen: int = 0
    _kept: deque[bytes] = field(default_factory=lambda: deque(maxlen=KEPT_FLOWS))
    _followers: set[Follower] = field(default_factory=set)

    def add(self, flow: Flow) -> None:
        """Keep a flow and hand it to everybody who follows."""
        self.seen += 1
        self.lost += flow.lost
        record = encode_flow(flow)
        self._kept.append(record)
        for follower in self._followers:
            follower.offer(record)

    def past(self, last: int) -> list[bytes]:
        """The last records kept, oldest first; all of them for 0."""
        return list(self._kept)[-last:] if last else list(self._kept)

    def follow(self) -> Follower | None:
        """A new follower of what comes from now on; None when there are too many."""
        if len(self._followers) >= MAX_CLIENTS:
            return None
        follower = Follower(self.node)
        self._followers.add(follower)
        return follower

    def leave(self, follower: Follower) -> None:
        self._followers.discard(follower)
