"""inotify and listing together, on real files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meshbridge.kube import watch as watching
from meshbridge.kube.manifests import Manifests
from meshbridge.kube.watch import watch


def namespace(value: str) -> str:
    return f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{v: '{value}'}}}}\n"


class Watched:
    def __init__(self, directory: Path) -> None:
        self.manifests = Manifests([directory])
        self.changed = asyncio.Condition()

    async def follow(self) -> None:
        async for _ in watch(self.manifests):
            async with self.changed:
                self.changed.notify_all()

    def value(self) -> str | None:
        return next((d.data["metadata"]["labels"]["v"] for ds in self.manifests.documents.values() for d in ds), None)

    async def until(self, condition: Callable[[], bool]) -> float:
        start_s = time.monotonic()
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(condition)
        return time.monotonic() - start_s


def run(directory: Path, test: Callable[[Watched], object]) -> None:
    async def body() -> None:
        watched = Watched(directory)
        task = asyncio.create_task(watched.follow())
        await asyncio.sleep(0.05)
        try:
            await test(watched)  # type: ignore[misc]
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(body())


def test_a_change_is_seen_within_milliseconds(tmp_path: Path) -> None:
    async def body(watched: Watched) -> None:
        took = []
        for number in range(20):
            (tmp_path / "a.yaml").write_text(namespace(str(number)))
            took.append(await watched.until(lambda number=number: watched.value() == str(number)))
        assert sorted(took)[10] < 0.05

    run(tmp_path, body)


def test_files_replaced_by_renaming_linked_and_removed_are_seen(tmp_path: Path) -> None:
    async def body(watched: Watched) -> None:
        path = tmp_path / "a.yaml"
        (tmp_path / ".a.tmp").write_text(namespace("renamed"))
        (tmp_path / ".a.tmp").rename(path)
        await watched.until(lambda: watched.value() == "renamed")
        path.unlink()
        await watched.until(lambda: watched.value() is None)
        (tmp_path / ".real").write_text(namespace("linked"))
        (tmp_path / "b.yaml").hardlink_to(tmp_path / ".real")
        await watched.until(lambda: watched.value() == "linked")

    run(tmp_path, body)


def test_a_change_inotify_did_not_tell_of_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "RELIST_S", 0.2)
    monkeypatch.setattr(watching, "_WHOLE", watching.Mask.MOVED_TO)
    monkeypatch.setattr(watching, "_OTHER", watching.Mask.MOVE_SELF)

    async def body(watched: Watched) -> None:
        (tmp_path / "a.yaml").write_text(namespace("lost"))
        assert await watched.until(lambda: watched.value() == "lost") > 0.05

    run(tmp_path, body)


def test_a_directory_that_comes_later_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "RELIST_S", 0.1)

    async def body(watched: Watched) -> None:
        assert watched.manifests.problems
        (tmp_path / "later").mkdir()
        (tmp_path / "later" / "a.yaml").write_text(namespace("1"))
        await watched.until(lambda: watched.value() == "1")
        monkeypatch.setattr(watching, "RELIST_S", 100)
        await asyncio.sleep(0.3)
        (tmp_path / "later" / "a.yaml").write_text(namespace("2"))
        await watched.until(lambda: watched.value() == "2")

    run(tmp_path / "later", body)


def test_a_file_being_written_is_not_read_before_it_is_closed(tmp_path: Path) -> None:
    async def body(watched: Watched) -> None:
        path = tmp_path / "a.yaml"
        path.write_text(namespace("1"))
        await watched.until(lambda: watched.value() == "1")
        with path.open("w") as file:
            file.flush()
            (tmp_path / "b.yaml").write_text("")
            await asyncio.sleep(0.05)
            assert watched.value() == "1"
            file.write(namespace("2"))
        await watched.until(lambda: watched.value() == "2")

    run(tmp_path, body)
