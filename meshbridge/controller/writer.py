"""What the leader writes into the cluster: it looks at a picture of it, and brings the objects to what it sees.

Everything is desired state: a write that fails or comes too late is made by the next look, by whichever replica leads
then. So nothing is lost while the API server is away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import structlog
from prometheus_client import Counter

from meshbridge.controller.picture import Picture
from meshbridge.errors import MeshBridgeError
from meshbridge.kube.api import CONFLICT, FORBIDDEN, NOT_FOUND, RefusedError
from meshbridge.kube.problems import Problem, ProblemReason

log = structlog.get_logger()

SETTLE_S: Final = 0.5
"""Changes that come together are looked at together."""
LOOK_AGAIN_S: Final = 30.0
"""What follows from time alone, such as an acceptance that expires, is seen this late at most."""
RETRY_S: Final = 2.0
IDLE_RATIO: Final = 4.0
"""A look that took long is followed by a pause this many times as long: serving xDS comes first."""
WRITES_PER_S: Final = 20.0
BURST: Final = 100.0
TOO_MANY, BROKEN = 429, 500

WRITES = Counter("meshbridge_controller_writes_total", "Objects written into the cluster.", ["what", "result"])


class NotLeadingError(Exception):
    """The lease is another's, or soon will be: nothing may be written any more."""


class Part(Protocol):
    """One kind of thing that is written. It remembers what it wrote only to save work."""

    def write(self, picture: Picture, out: Outbox, now: datetime) -> None:
        """What follows from ``picture`` is written, as far as ``out`` lets it."""


class Outbox:
    """The only way to write: while this replica leads, and not too fast.

    What is not permitted is remembered as a problem, and nothing else is kept from being written by it.
    """

    def __init__(
        self, held_for_s: Callable[[], float], stopped: Callable[[], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._held_for_s, self._stopped, self._clock = held_for_s, stopped, clock
        self._tokens, self._filled_at = BURST, clock()
        self.problems: set[Problem] = set()
        self.unfinished = False
        """Whether something is left that should be tried again soon."""

    def write(self, what: str, act: Callable[[], Mapping[str, Any] | None], where: str) -> Mapping[str, Any] | None:
        """What the server has now; None where it said no, which the next look may see differently.

        Args:
            what: the kind of object as roles name it, with the verb, e.g. ``patch bypasspolicies/status``.
            where: the object, for people.

        Raises:
            NotLeadingError: another replica may write by now.
            MeshBridgeError: the server cannot be reached.
        """
        self._wait_for_turn()
        if self._stopped() or self._held_for_s() <= 0:
            raise NotLeadingError
        try:
            answer = act()
        except RefusedError as refused:
            self._refused(what, where, refused)
            return None
        WRITES.labels(what, "done").inc()
        log.debug("object.written", what=what, object=where)
        return answer if answer is not None else {}

    def read(self, what: str, ask: Callable[[], Mapping[str, Any] | None], where: str) -> Mapping[str, Any] | None:
        """What is there; None where nothing is, or where it may not be read.

        Raises:
            NotLeadingError: another replica may write by now, so there is nothing to read for.
            MeshBridgeError: the server cannot be reached.
        """
        if self._stopped() or self._held_for_s() <= 0:
            raise NotLeadingError
        try:
            return ask()
        except RefusedError as refused:
            self._refused(what, where, refused)
            return None

    def _refused(self, what: str, where: str, refused: RefusedError) -> None:
        WRITES.labels(what, str(refused.code)).inc()
        if refused.code == FORBIDDEN and "being terminated" not in refused.message:
            kind = f"may not {what}"
            if not any(kind in problem.text for problem in self.problems):  # one of each kind says it all
                text = (
                    f"{where}: {kind}: {refused.message[:200]}; give the controller's role the verb, as in "
                    "deploy/kustomize/base; until then only /problems tells, and policy is in force"
                )
                self.problems.add(Problem(ProblemReason.UNWRITABLE, text))
            return
        log.info("write.refused", what=what, object=where, code=refused.code, reason=refused.message)
        if refused.code not in (CONFLICT, FORBIDDEN, NOT_FOUND):
            text = (
                f"{where}: cannot be written ({what}): the API server answers {refused.code}: {refused.message[:300]}"
            )
            self.problems.add(
                Problem(ProblemReason.UNWRITABLE, f"{text}; are the definitions of this version installed?")
            )
        self.unfinished |= refused.code == TOO_MANY or refused.code >= BROKEN  # any other answer stays the same

    def _wait_for_turn(self) -> None:
        while True:
            now = self._clock()
            self._tokens = min(BURST, self._tokens + (now - self._filled_at) * WRITES_PER_S)
            self._filled_at = now
            if self._tokens >= 1:
                self._tokens -= 1
                return
            if self._stopped():
                raise NotLeadingError
            time.sleep((1 - self._tokens) / WRITES_PER_S)


class ClusterWriter:
    """Looks at the cluster whenever it changed, in a thread, and has every part write what follows."""

    def __init__(
        self,
        picture: Callable[[], Picture | None],
        changed: asyncio.Event,
        parts: Callable[[], Sequence[Part]],
        held_for_s: Callable[[], float],
        report: Callable[[frozenset[Problem]], None],
    ) -> None:
        """
        Args:
            picture: what to look at; None while nobody knows the cluster.
            parts: made anew each time this replica begins to lead: what others wrote meanwhile is not remembered.
            report: is told what may not be written, after every look.
        """
        self._picture, self._changed, self._parts = picture, changed, parts
        self._held_for_s, self._report = held_for_s, report

    async def write_until(self, stop: asyncio.Event) -> None:
        """Write what is to be written, until ``stop``; nothing is under way any more when it returns."""
        parts, outbox = self._parts(), Outbox(self._held_for_s, stop.is_set)
        self._changed.set()
        while not stop.is_set():
            await _first(stop.wait(), self._changed.wait(), timeout_s=LOOK_AGAIN_S)
            await _first(stop.wait(), timeout_s=SETTLE_S)
            self._changed.clear()
            picture = self._picture()
            if stop.is_set() or picture is None:
                continue
            began = time.monotonic()
            outbox.problems, outbox.unfinished = set(), False
            again = await asyncio.to_thread(_look, parts, picture, outbox)
            self._report(frozenset(outbox.problems))
            pause_s = IDLE_RATIO * (time.monotonic() - began)
            await _first(stop.wait(), timeout_s=max(pause_s, RETRY_S) if again else pause_s)
            if again:
                self._changed.set()


def _look(parts: Sequence[Part], picture: Picture, outbox: Outbox) -> bool:
    """Have each part write; whether something is left that should be tried again soon."""
    now = datetime.now(UTC)
    again = False
    for part in parts:
        try:
            part.write(picture, outbox, now)
        except NotLeadingError:
            return False
        except MeshBridgeError as error:
            log.warning("write.failed", part=type(part).__name__, reason=str(error))
            return True
        except Exception:  # one object that trips us must not keep all others from being written
            log.exception("write.failed", part=type(part).__name__)
            again = True
    return again or outbox.unfinished


async def _first(*waits: Any, timeout_s: float) -> None:
    """Return when the first of them has come, or the time is over."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
