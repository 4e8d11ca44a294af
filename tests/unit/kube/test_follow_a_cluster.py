"""Following an API server that lists, watches, forgets, fails, and knows a kind only later."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from queue import Queue
from typing import Any

import pytest

from meshbridge.errors import MeshBridgeError
from meshbridge.kube import follow
from meshbridge.kube.api import ClusterError, Event, Page, RefusedError, Resource
from meshbridge.kube.follow import Follower
from meshbridge.policy.model import Document

POLICY = ("cilium.io", "CiliumNetworkPolicy")


def document(name: str, port: int = 80) -> Document:
    return Document("CiliumNetworkPolicy", "cilium.io/v2", "shop", name, {"port": port})


class Script:
    """An API server that does what the test says, for one kind; it knows no other."""

    where = "cluster test"

    def __init__(self) -> None:
        self.known, self.listed, self.version = True, [document("a")], 1
        self.lists = 0
        self.events_now: Queue[Event | Exception | None] = Queue()
        self.failing: Exception | None = None
        self.starting = False

    def check_ready(self) -> None:
        if self.starting:
            raise ClusterError("is not ready yet")

    def discover(self, wanted: set[tuple[str, str]]) -> list[Resource]:
        if self.failing is not None:
            raise self.failing
        return [Resource(*POLICY[:1], "v2", "cnp", POLICY[1], True)] if self.known and POLICY in wanted else []

    def pages(self, resource: Resource, namespace: str = "", name: str = "") -> Iterator[Page]:
        self.lists += 1
        yield Page(tuple(self.listed), str(self.version))

    def events(
        self, resource: Resource, version: str, timeout_s: int, namespace: str = "", name: str = ""
    ) -> Iterator[Event]:
        while (event := self.events_now.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def error(self, refused: RefusedError) -> MeshBridgeError:
        return ClusterError(f"answers {refused.code}")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "ABSENT_AGAIN_S", 0.01)
    monkeypatch.setattr(follow, "_backoff_s", lambda failures: 0.01)


def run(script: Script, steps: Callable[[Follower, Any], Any]) -> None:
    async def whole() -> None:
        follower = Follower(script, "istio-system")  # type: ignore[arg-type]  # what it asks of an Api
        changes = follower.changes()
        try:
            async with asyncio.timeout(10):
                await steps(follower, changes)
        finally:
            await changes.aclose()
            script.events_now.put(None)

    asyncio.run(whole())


async def until(changes: Any, condition: Callable[[], bool]) -> None:
    while not condition():
        await anext(changes)


def names(follower: Follower) -> set[str]:
    return {key[3] for key in follower.documents}


def test_what_is_listed_and_what_happens_afterwards_is_told() -> None:
    async def steps(follower: Follower, changes: Any) -> None:
        await until(changes, lambda: names(follower) == {"a"})
        script.events_now.put(Event("2", document("b")))
        await until(changes, lambda: names(follower) == {"a", "b"})
        script.events_now.put(Event("3", document("a", 81)))
        key = document("a").key
        await until(changes, lambda: follower.documents[key][0].data["port"] == 81)
        script.events_now.put(Event("4"))  # a bookmark
        script.events_now.put(Event("5", document("a"), deleted=True))
        await until(changes, lambda: names(follower) == {"b"})
        assert script.lists == 1

    script = Script()
    run(script, steps)


@pytest.mark.parametrize("end", [None, RefusedError(410, "too old"), ClusterError("cannot be reached")], ids=str)
def test_after_a_watch_that_ended_nothing_is_missed(end: Exception | None) -> None:
    async def steps(follower: Follower, changes: Any) -> None:
        await until(changes, lambda: names(follower) == {"a"})
        script.listed = [document("c")]
        script.events_now.put(end)
        if end is None:  # the watch goes on where it was
            script.events_now.put(Event("2", document("c")))
            script.events_now.put(Event("3", document("a"), deleted=True))
        await until(changes, lambda: names(follower) == {"c"})
        assert script.lists == (1 if end is None else 2)
        await until(changes, lambda: not follower.problems) if follower.problems else None

    script = Script()
    run(script, steps)


@pytest.mark.parametrize("end", [None, RefusedError(410, "too old")], ids=["hangs up", "forgets"])
def test_a_server_that_ends_every_watch_at_once_is_asked_less_and_less_often(
    end: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: dict[int, list[int]] = {}

    def backoff_s(failures: int) -> float:
        # threads of other tests' followers may not have ended yet
        pauses.setdefault(threading.get_ident(), []).append(failures)
        return 0.01

    async def steps(follower: Follower, changes: Any) -> None:
        await until(changes, lambda: names(follower) == {"a"})
        for _ in range(5):
            script.events_now.put(end)
        script.events_now.put(Event("2", document("b")))
        await until(changes, lambda: "b" in names(follower))

    monkeypatch.setattr(follow, "_backoff_s", backoff_s)
    script = Script()
    run(script, steps)
    own = max(pauses.values(), key=len)[:4]
    assert own in ([1, 2, 3, 4], [2, 3, 4, 5])  # what is forgotten once is listed anew at once


def test_while_the_server_is_away_what_is_known_stays_and_the_problem_is_named() -> None:
    async def steps(follower: Follower, changes: Any) -> None:
        await until(changes, lambda: names(follower) == {"a"})
        script.failing = ClusterError("cannot be reached")
        script.events_now.put(ClusterError("went away"))
        await until(changes, lambda: bool(follower.problems))
        assert names(follower) == {"a"}
        assert "stays in force" in min(problem.text for problem in follower.problems)
        script.failing = None
        await until(changes, lambda: not follower.problems)

    script = Script()
    run(script, steps)


def test_nothing_is_told_before_everything_was_read() -> None:
    async def steps(follower: Follower, changes: Any) -> None:
        found = await anext(changes)
        assert not found.complete
        assert not found.documents
        assert not follower.synced
        assert follower.problems

    script = Script()
    script.failing = ClusterError("cannot be reached")
    run(script, steps)


def test_a_kind_that_vanishes_with_objects_keeps_them_in_force() -> None:
    async def steps(follower: Follower, changes: Any) -> None:
        await until(changes, lambda: names(follower) == {"a"})
        script.known = False
        script.events_now.put(RefusedError(404, "not found"))
        await until(changes, lambda: bool(follower.problems))
        assert names(follower) == {"a"}
        assert "were not deleted" in min(problem.text for problem in follower.problems)

    script = Script()
    run(script, steps)


def test_a_kind_that_comes_later_is_read_then() -> None:
    async def steps(follower: Follower, changes: Any) -> None:
        await anext(changes)
        assert names(follower) == set()
        script.known = True
        await until(changes, lambda: names(follower) == {"a"})

    script = Script()
    script.known = False
    run(script, steps)


def test_each_kind_has_a_thread_and_all_end_with_their_watch() -> None:
    before = threading.active_count()

    async def steps(follower: Follower, changes: Any) -> None:
        await until(changes, lambda: names(follower) == {"a"})

    run(Script(), steps)
    for thread in threading.enumerate():
        if thread.name.startswith("follow-"):
            thread.join(5)
    assert threading.active_count() <= before


def test_a_server_that_still_starts_is_not_believed_that_it_knows_no_kinds() -> None:
    async def steps(follower: Follower, changes: Any) -> None:
        async def complete() -> None:
            while not (await anext(changes)).complete:
                pass

        first = asyncio.ensure_future(complete())
        await asyncio.sleep(0.2)
        assert not first.done()
        script.known, script.starting = True, False
        await first
        await until(changes, lambda: names(follower) == {"a"})

    script = Script()
    script.known, script.starting = False, True
    run(script, steps)
