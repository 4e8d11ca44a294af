"""What is in force while files come, change, break, move and go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshbridge.kube.kept import KeptContent
from meshbridge.kube.manifests import REMOVAL_GRACE_S, YOUTH_S, Changes, Manifests
from meshbridge.kube.problems import ProblemReason

NAMESPACE = ("", "Namespace", "", "shop")
POLICY = ("cilium.io", "CiliumNetworkPolicy", "shop", "web")


def namespace(value: str = "1", name: str = "shop") -> str:
    return f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{v: '{value}'}}}}\n"


def policy(port: str = "80") -> str:
    spec = f"spec: {{endpointSelector: {{}}, ingress: [{{toPorts: [{{ports: [{{port: '{port}'}}]}}]}}]}}"
    return f"apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: web, namespace: shop}}\n{spec}\n"


class Reader:
    """Manifests with a clock the test moves; every listing is far from the files' own times."""

    def __init__(self, *directories: Path, kept: KeptContent | None = None) -> None:
        self.manifests = Manifests(directories, kept)
        self.now_s = 100.0

    def read(self, closed: list[Path] | None = None) -> Changes:
        return self.manifests.refresh(self.now_s, 1e12, self.manifests.listing() if closed is None else closed)

    def labels(self) -> list[str]:
        return [d.data["metadata"]["labels"]["v"] for d in self.manifests.documents.get(NAMESPACE, ())]

    def reasons(self) -> list[ProblemReason]:
        return sorted(problem.reason for problem in self.manifests.problems)

    def problem(self) -> str:
        (problem,) = self.manifests.problems
        return problem.text


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


def test_files_added_changed_and_removed_take_effect(tmp_path: Path, reader: Reader) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(namespace("1"))
    assert set(reader.read().documents) == {NAMESPACE}
    path.write_text(namespace("2"))
    reader.read()
    assert reader.labels() == ["2"]
    assert reader.read().documents == {}
    path.unlink()
    assert reader.read().look_again_s == pytest.approx(REMOVAL_GRACE_S)
    assert reader.labels() == ["2"], "an editor may be about to put it back"
    reader.now_s += REMOVAL_GRACE_S
    assert reader.read([]).documents == {NAMESPACE: ()}
    assert reader.manifests.documents == {}


BROKEN = {
    "not YAML": b"a: [\n",
    "not UTF-8": b"\xff\xfe",
    "no name": b"apiVersion: v1\nkind: Namespace\nmetadata: {}\n",
    "half of it": policy().encode()[:-20],
    "one of two documents broken": namespace("2").encode() + b"---\nkind: x\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_breaks_keeps_its_last_readable_content(tmp_path: Path, reader: Reader, content: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(namespace("1"))
    (tmp_path / "b.yaml").write_text(policy())
    reader.read()
    path.write_bytes(content)
    assert reader.read().documents == {}
    assert reader.labels() == ["1"]
    assert POLICY in reader.manifests.documents
    assert reader.problem().startswith(f"{path}:")
    assert "its last readable content (1 objects) stays in force" in reader.problem()
    path.write_text(namespace("3"))
    reader.read()
    assert (reader.labels(), reader.reasons()) == (["3"], [])


def test_a_broken_file_that_is_removed_takes_its_objects_with_it(tmp_path: Path, reader: Reader) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(namespace())
    reader.read()
    path.write_text("a: [")
    reader.read()
    path.unlink()
    reader.read()
    reader.now_s += 1
    reader.read()
    assert (reader.manifests.documents, reader.reasons()) == ({}, [])


def test_a_later_directory_replaces_and_gives_back(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "a.yaml").write_text(namespace("spec"))
    (second / "z.yaml").write_text(namespace("status"))
    reader = Reader(first, second)
    reader.read()
    assert (reader.labels(), reader.reasons()) == (["status"], [])
    (second / "z.yaml").unlink()
    reader.read()
    reader.now_s += 1
    reader.read()
    assert reader.labels() == ["spec"]


def test_a_policy_defined_twice_in_different_words_is_refused_whichever_came_first(
    tmp_path: Path, reader: Reader
) -> None:
    (tmp_path / "a.yaml").write_text(policy("80"))
    (tmp_path / "b.yaml").write_text(policy("443"))
    reader.read()
    first, second = reader.manifests.documents[POLICY]
    assert (
        first.fault == second.fault == f"is defined more than once: {tmp_path / 'a.yaml'}:1 and {tmp_path / 'b.yaml'}:1"
    )
    assert "refused" in reader.problem()
    (tmp_path / "b.yaml").write_text(policy("80"))
    reader.read()
    (only,) = reader.manifests.documents[POLICY]
    assert only.fault == ""
    assert "they are equal" in reader.problem()


def test_a_policy_defined_twice_in_one_file_is_refused(tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "a.yaml").write_text(policy("80") + "---\n" + policy("443"))
    reader.read()
    assert [bool(document.fault) for document in reader.manifests.documents[POLICY]] == [True, True]


def test_another_object_defined_twice_counts_once_and_is_reported(tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "a.yaml").write_text(namespace("1"))
    (tmp_path / "b.yaml").write_text(namespace("2"))
    reader.read()
    assert (reader.labels(), reader.reasons()) == (["1"], [ProblemReason.DUPLICATE])


def test_a_renamed_file_is_never_a_duplicate_nor_gone(tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "a.yaml").write_text(policy("80"))
    reader.read()
    (tmp_path / "a.yaml").rename(tmp_path / "b.yaml")
    (tmp_path / "b.yaml").write_text(policy("443"))
    for _ in range(3):
        reader.read()
        (only,) = reader.manifests.documents[POLICY]
        assert (only.fault, only.source.file) == ("", str(tmp_path / "b.yaml"))
        reader.now_s += REMOVAL_GRACE_S


def test_an_editor_that_saves_by_renaming_never_lifts_a_policy(tmp_path: Path, reader: Reader) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(policy("80"))
    reader.read()
    path.rename(tmp_path / "a.yaml~")
    assert reader.read([path]).documents == {}
    path.write_text(policy("443"))
    reader.read([path])
    (only,) = reader.manifests.documents[POLICY]
    assert only.data["spec"]["ingress"][0]["toPorts"][0]["ports"][0]["port"] == "443"


def test_a_file_found_by_listing_is_left_alone_while_it_may_be_written_to(tmp_path: Path, reader: Reader) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(namespace("1"))
    reader.read()
    path.write_text("")  # somebody truncated it and is about to write
    written_s = path.stat().st_mtime
    changes = reader.manifests.refresh(reader.now_s, written_s + YOUTH_S / 2, reader.manifests.listing())
    assert (changes.documents, changes.look_again_s) == ({}, YOUTH_S)
    assert reader.labels() == ["1"]
    assert reader.manifests.refresh(reader.now_s, written_s + 2 * YOUTH_S, reader.manifests.listing()).documents == {
        NAMESPACE: ()
    }


def unreadable_link(directory: Path) -> None:
    (directory / "x.yaml").symlink_to("/etc/hostname")


def link_to_nothing(directory: Path) -> None:
    (directory / "x.yaml").symlink_to(directory / "nothing")


def link_to_itself(directory: Path) -> None:
    (directory / "x.yaml").symlink_to(directory / "x.yaml")


def pipe(directory: Path) -> None:
    os.mkfifo(directory / "x.yaml")


def folder(directory: Path) -> None:
    (directory / "x.yaml").mkdir()


def huge(directory: Path) -> None:
    with (directory / "x.yaml").open("wb") as file:
        file.truncate(100 << 20)


@pytest.mark.parametrize("make", [unreadable_link, link_to_nothing, link_to_itself, pipe, folder, huge])
def test_what_is_no_readable_file_is_named_and_harms_no_other(tmp_path: Path, reader: Reader, make: object) -> None:
    (tmp_path / "a.yaml").write_text(namespace())
    assert callable(make)
    make(tmp_path)
    reader.read()
    reader.read()
    assert reader.labels() == ["1"]
    assert reader.reasons() == [ProblemReason.UNREADABLE]
    assert reader.problem().startswith(f"{tmp_path / 'x.yaml'}")


def test_a_link_inside_the_directory_is_followed(tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "a.yaml").write_text(namespace())
    (tmp_path / "a.yaml").symlink_to(Path("..data") / "a.yaml")
    reader.read()
    assert (reader.labels(), reader.reasons()) == (["1"], [])


def test_other_files_are_passed_over_and_folders_named(tmp_path: Path, reader: Reader) -> None:
    for name in (".a.yaml", "a.yaml~", "README.md", "a.yaml.swp"):
        (tmp_path / name).write_text("a: [")
    (tmp_path / "more").mkdir()
    reader.read()
    assert reader.reasons() == [ProblemReason.NOT_READ]


def test_a_directory_that_vanishes_keeps_what_was_read_from_it(tmp_path: Path) -> None:
    directory = tmp_path / "manifests"
    directory.mkdir()
    (directory / "a.yaml").write_text(namespace())
    reader = Reader(directory)
    reader.read()
    directory.rename(tmp_path / "elsewhere")
    reader.read()
    reader.now_s += 10
    reader.read()
    assert (reader.labels(), reader.reasons()) == (["1"], [ProblemReason.UNREADABLE])
    (tmp_path / "elsewhere").rename(directory)
    reader.read()
    assert (reader.labels(), reader.reasons()) == (["1"], [])


def test_a_listing_says_nothing_of_files_known_better(tmp_path: Path, reader: Reader) -> None:
    listing = reader.manifests.listing()
    path = tmp_path / "a.yaml"
    path.write_text(namespace("1"))
    reader.read([path])
    listing.skip = {str(path)}
    reader.manifests.refresh(reader.now_s, 1e12, listing)
    reader.now_s += 1
    reader.read([])
    assert reader.labels() == ["1"]


def test_a_policy_file_that_is_broken_at_start_keeps_what_it_said_before_the_restart(tmp_path: Path) -> None:
    manifests, state = tmp_path / "manifests", tmp_path / "state"
    manifests.mkdir()
    path = manifests / "a.yaml"
    path.write_text(policy("80"))
    Reader(manifests, kept=KeptContent(state)).read()
    path.write_text("a: [")
    restarted = Reader(manifests, kept=KeptContent(state))
    assert set(restarted.read().documents) == {POLICY}
    assert "its last readable content (1 objects) stays in force" in restarted.problem()
    path.write_text(policy("443"))
    restarted.read()
    assert restarted.reasons() == []
    assert [path.stat().st_mode & 0o777 for path in state.iterdir()] == [0o600]
    path.unlink()
    restarted.read()
    restarted.now_s += 1
    restarted.read()
    assert list(state.iterdir()) == []


def test_a_policy_file_removed_while_nobody_watched_is_gone(tmp_path: Path) -> None:
    manifests, state = tmp_path / "manifests", tmp_path / "state"
    manifests.mkdir()
    (manifests / "a.yaml").write_text(policy())
    Reader(manifests, kept=KeptContent(state)).read()
    (manifests / "a.yaml").unlink()
    restarted = Reader(manifests, kept=KeptContent(state))
    assert restarted.read().documents == {}
    assert list(state.iterdir()) == []
