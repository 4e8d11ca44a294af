"""Applying and deleting files: an object lives in one place, and untouched files keep every byte."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest

from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import INPUTS
from meshbridge.demo.store import Store

INPUT_HASHES = {
    "ccnp-prometheus-scrape-access.yaml": "0b387a1e3209092d6aa5814b426f3fecf63ce42b732ae26f162bf3ad54ea0021",
    "cilium-l4-policy.yaml": "eeb1f6d5096bd798f02a71a47b04acc8947123927cc63a9740b364ebebd3fdf8",
    "istio-l7-policy.yaml": "c5c0098860b309cc1ea351752a1b3b625dc08dc88f2a78f74096b62b6f4f1da3",
    "prometheus-deployment.yaml": "6f33e3b4cbbcff801c31d6be53efbd1dcc3ebe0412ea4ff8fd62082230459098",
}


def obj(name: str, note: str = "") -> str:
    return f"# {note}\nkind: Service\nmetadata:\n  name: {name}\n  namespace: shop\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    directory = tmp_path / "store"
    directory.mkdir()
    return Store(directory)


def write(tmp_path: Path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_the_users_files_are_theirs_byte_for_byte() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in INPUTS.glob("*.yaml")}
    assert found == INPUT_HASHES


def test_an_applied_file_keeps_every_byte(store: Store, tmp_path: Path) -> None:
    text = f"---\n{obj('a', 'comment')}\n---\n\n{obj('b')}# end"
    assert store.apply(write(tmp_path, "two.yaml", text)) == [("Service", "shop", "a"), ("Service", "shop", "b")]
    assert (store.directory / "two.yaml").read_text() == text


def test_an_object_moves_to_the_file_that_was_applied_last(store: Store, tmp_path: Path) -> None:
    store.apply(write(tmp_path, "two.yaml", f"{obj('a')}---\n{obj('b')}"))
    store.apply(write(tmp_path, "one.yaml", obj("a", "newer")))
    assert "name: a" not in (store.directory / "two.yaml").read_text()
    assert sorted(item["metadata"]["name"] for item in store.objects()) == ["a", "b"]


def test_deleting_takes_objects_out_of_whatever_file_holds_them(store: Store, tmp_path: Path) -> None:
    store.apply(write(tmp_path, "two.yaml", f"{obj('a')}---\n{obj('b')}"))
    assert store.delete(write(tmp_path, "other.yaml", obj("a"))) == [("Service", "shop", "a")]
    assert [item["metadata"]["name"] for item in store.objects()] == ["b"]
    store.delete(write(tmp_path, "other.yaml", obj("b")))
    assert list(store.directory.iterdir()) == []


def test_deleting_what_is_not_there_says_so(store: Store, tmp_path: Path) -> None:
    assert store.delete(write(tmp_path, "x.yaml", obj("a"))) == []


UNREADABLE = {"no YAML": b"kind: [", "invalid UTF-8": b"kind: \xff\xfe"}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_file_is_put_in_place_and_can_be_taken_back(store: Store, tmp_path: Path, content: bytes) -> None:
    store.apply(write(tmp_path, "good.yaml", obj("a")))
    path = write(tmp_path, "bad.yaml", content)
    assert store.apply(path) == []
    assert (store.directory / "bad.yaml").read_bytes() == content
    assert [item["metadata"]["name"] for item in store.objects()] == ["a"]
    store.delete(path)
    assert not (store.directory / "bad.yaml").exists()


def test_an_unreadable_file_that_was_not_applied_cannot_be_deleted(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="not applied"):
        store.delete(write(tmp_path, "bad.yaml", b"kind: ["))


def test_the_version_changes_with_every_file_and_only_then(store: Store, tmp_path: Path) -> None:
    versions = [store.version()]
    for act in (
        lambda: store.apply(write(tmp_path, "one.yaml", obj("a"))),
        lambda: store.apply(write(tmp_path, "one.yaml", obj("b"))),
        lambda: store.apply(write(tmp_path, "two.yaml", obj("c"))),
        lambda: store.delete(write(tmp_path, "two.yaml", obj("c"))),
    ):
        act()
        assert store.version() == store.version()
        versions.append(store.version())
    assert versions[1] not in versions[2:]
    assert all(one != two for one, two in pairwise(versions))
