"""The loop that writes: what trips one part keeps no other from writing, nothing is lost, and nothing is hurried."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any

import pytest

from meshbridge.controller import writer as module
from meshbridge.controller.picture import Picture
from meshbridge.controller.writer import BURST, ClusterWriter, NotLeadingError, Outbox, Part
from meshbridge.kube.api import CONFLICT, FORBIDDEN, ClusterError, RefusedError
from meshbridge.kube.problems import Problem

PICTURE = Picture({}, {}, (), (), {})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.0)
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 30.0)


class Acting:
    """A part that does what the test says, one thing at each look, and then the last again."""

    def __init__(self, *acts: Callable[[], Any]) -> None:
        self.acts, self.looks = list(acts), 0

    def write(self, picture: Picture, out: Outbox, now: datetime) -> None:
        self.looks += 1
        act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
        out.write("patch things", act, "Thing a")


def raising(error: Exception) -> Callable[[], Any]:
    def act() -> None:
        raise error

    return act


class Running:
    def __init__(self, *parts: Part, held_for_s: float = 10.0) -> None:
        self.changed, self.stop = asyncio.Event(), asyncio.Event()
        self.told: list[frozenset[Problem]] = []
        self.picture: Picture | None = PICTURE
        self.writer = ClusterWriter(
            lambda: self.picture, self.changed, lambda: list(parts), lambda: held_for_s, self.told.append
        )

    async def __aenter__(self) -> Running:
        self.task = asyncio.create_task(self.writer.write_until(self.stop))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop.set()
        await asyncio.wait_for(self.task, 5)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is watched has no event of its own
        await asyncio.sleep(0.005)


def test_a_part_that_fails_keeps_no_other_from_writing_and_is_tried_again() -> None:
    async def body() -> None:
        odd, good = Acting(raising(KeyError("a defect")), dict), Acting(dict)
        async with Running(odd, good) as running:
            await until(lambda: odd.looks >= 2 and good.looks >= 2)
            looks = good.looks
            await asyncio.sleep(0.2)
            assert good.looks == looks, "what went well is not done again"
            running.changed.set()
            await until(lambda: good.looks == looks + 1)

    run(body)


def test_an_api_server_that_is_away_is_asked_again_until_it_is_back() -> None:
    async def body() -> None:
        away = Acting(*[raising(ClusterError("cannot be reached"))] * 3, dict)
        async with Running(away):
            await until(lambda: away.looks == 4)
            await asyncio.sleep(0.2)
            assert away.looks == 4

    run(body)


AGAIN = {"a conflict stays one": (CONFLICT, 1), "a server that is overloaded is asked again": (503, 2)}


@pytest.mark.parametrize(("code", "looks"), AGAIN.values(), ids=AGAIN.keys())
def test_what_the_server_refuses(code: int, looks: int) -> None:
    async def body() -> None:
        refused = Acting(raising(RefusedError(code, "no")), dict)
        async with Running(refused):
            await until(lambda: refused.looks == looks)
            await asyncio.sleep(0.2)
            assert refused.looks == looks

    run(body)


def test_what_is_not_permitted_is_one_problem_until_it_is() -> None:
    async def body() -> None:
        async with Running(Acting(raising(RefusedError(FORBIDDEN, "not you")), dict)) as running:
            await until(lambda: len(running.told) == 1)
            (problem,) = running.told[0]
            assert "may not patch things: not you" in problem.text
            running.changed.set()
            await until(lambda: len(running.told) == 2)
            assert running.told[1] == frozenset()

    run(body)


def test_who_does_not_lead_writes_nothing() -> None:
    async def body() -> None:
        written: list[int] = []
        part = Acting(lambda: written.append(1))
        async with Running(part, held_for_s=0.0):
            await until(lambda: part.looks == 1)
        assert not written

    run(body)


def test_nothing_is_looked_at_before_the_cluster_is_known() -> None:
    async def body() -> None:
        part = Acting(dict)
        running = Running(part)
        running.picture = None
        async with running:
            await asyncio.sleep(0.1)
            assert part.looks == 0
            running.picture = PICTURE
            running.changed.set()
            await until(lambda: part.looks == 1)

    run(body)


def test_a_write_that_is_under_way_is_waited_for_and_no_other_is_begun() -> None:
    async def body() -> None:
        begun, go_on = threading.Event(), threading.Event()

        def slow() -> dict[str, Any]:
            begun.set()
            assert go_on.wait(10)
            return {}

        second = Acting(dict)
        running = Running(Acting(slow), second)
        async with running:
            await until(begun.is_set)
            running.stop.set()
            await asyncio.sleep(0.05)
            assert not running.task.done()
            go_on.set()
            await running.task
        assert second.looks == 1
        assert module.WRITES.labels("patch things", "done")._value.get() >= 1

    run(body)


def test_no_more_is_written_at_once_than_a_burst() -> None:
    now = [0.0]
    out = Outbox(lambda: 10.0, lambda: now[0] > 0, lambda: now[0])
    for _ in range(int(BURST)):
        out.write("patch things", dict, "Thing a")
    now[0] = 0.001  # from here on it is stopped, so it does not wait for its turn
    with pytest.raises(NotLeadingError):
        out.write("patch things", dict, "Thing a")
