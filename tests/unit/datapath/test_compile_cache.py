"""What surrounds the compiler: whom the cache trusts, which headers are taken, what the child's answer becomes."""

from __future__ import annotations

import base64
import json
import os
import platform
import struct
import subprocess
from pathlib import Path

import pytest

from meshbridge.datapath import bcc_child, compiler
from meshbridge.datapath.compiler import Bytecode, CacheError, CompileError, prepare_directory
from meshbridge.datapath.loader import resolve

ANSWER = json.dumps({
    "maps": [{"name": "m", "type": 1, "key_size": 4, "value_size": 8, "max_entries": 16, "flags": 1}],
    "programs": {"from_pod": {"code": base64.b64encode(b"\x95" + bytes(7)).decode(), "maps": [[0, "m"]]}},
})  # fmt: skip


def instruction(opcode: int, registers: int, immediate: int) -> bytes:
    return struct.pack("<BBhi", opcode, registers, 0, immediate)


def source(directory: Path, text: str = "int x;") -> Path:
    (directory / "src").mkdir(exist_ok=True)
    (directory / "src" / "pod.c").write_text(text)
    return directory / "src" / "pod.c"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A compiler that always answers the same, and the sources it was asked for."""
    asked: list[Path] = []

    def child(path: Path, *_: object) -> str:
        asked.append(path)
        return ANSWER

    monkeypatch.setattr(compiler, "_run_child", child)
    monkeypatch.setattr(compiler, "header_tree", lambda _cache: None)
    return asked


def test_the_same_source_is_compiled_once(tmp_path: Path, compiled: list[Path]) -> None:
    cache, path = tmp_path / "cache", source(tmp_path)
    first = compiler.compile_programs(cache, source=path)
    assert compiler.compile_programs(cache, source=path) == first
    assert first.programs["from_pod"].maps == ((0, "m"),)
    assert len(compiled) == 1


def test_a_change_of_source_header_or_flag_compiles_anew(tmp_path: Path, compiled: list[Path]) -> None:
    cache = tmp_path / "cache"
    compiler.compile_programs(cache, source=source(tmp_path))
    compiler.compile_programs(cache, source=source(tmp_path, "int y;"))
    (tmp_path / "src" / "abi.h").write_text("int z;")
    compiler.compile_programs(cache, source=source(tmp_path, "int y;"))
    compiler.compile_programs(cache, source=source(tmp_path, "int y;"), flags=["-DX"])
    assert len(compiled) == 4


@pytest.mark.parametrize("rubbish", ["", "{", '{"maps": 1}', "\x00"], ids=["empty", "cut", "other", "binary"])
def test_a_cache_file_that_cannot_be_read_is_replaced(tmp_path: Path, compiled: list[Path], rubbish: str) -> None:
    cache, path = tmp_path / "cache", source(tmp_path)
    compiler.compile_programs(cache, source=path)
    (file,) = cache.glob("*.json")
    file.write_text(rubbish)
    compiler.compile_programs(cache, source=path)
    assert file.read_text() == ANSWER


def test_the_cache_is_nobody_elses(tmp_path: Path) -> None:
    prepare_directory(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(CacheError, match="mode 0700"):
        prepare_directory(tmp_path / "open")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(CacheError):
        prepare_directory(tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError):
        prepare_directory(tmp_path / "file")


def tree(root: Path, name: str, *files: str) -> None:
    for file in files:
        path = root / "usr/src" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_the_newest_headers_are_taken_with_their_common_part(tmp_path: Path) -> None:
    for version in ("6.1.0-9", "6.1.0-56"):
        tree(tmp_path, f"linux-headers-{version}-amd64", "include/generated/autoconf.h")
        tree(tmp_path, f"linux-headers-{version}-common", "include/linux/kconfig.h")
    found = [path.name for path in compiler._find_headers(tmp_path)]
    assert found == ["linux-headers-6.1.0-56-amd64", "linux-headers-6.1.0-56-common"]


def test_the_running_kernels_own_headers_come_first(tmp_path: Path) -> None:
    tree(tmp_path, "linux-headers-9.9.9-amd64", "include/generated/autoconf.h", "include/linux/kconfig.h")
    own = tmp_path / "lib/modules" / platform.release() / "build"
    (own / "include/generated").mkdir(parents=True)
    (own / "include/generated/autoconf.h").write_text("")
    assert compiler._find_headers(tmp_path) == (own.resolve(),)


def test_missing_headers_are_named_with_the_packages_that_bring_them(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"no kernel headers.*linux-headers-amd64"):
        compiler._find_headers(tmp_path)


def test_trees_are_shown_as_one(tmp_path: Path) -> None:
    tree(tmp_path, "a", "include/generated/x.h", "Makefile")
    tree(tmp_path, "b", "include/linux/y.h", "include/generated/z.h")
    trees = [tmp_path / "usr/src/a", tmp_path / "usr/src/b"]
    compiler._merge(tmp_path / "one", trees)
    shown = {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*.h")}
    assert "include/generated/x.h" in shown
    assert "include/generated/z.h" in shown
    assert (tmp_path / "one/include/linux/y.h").read_text() == "b"
    assert (tmp_path / "one/Makefile").read_text() == "a"


def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "header_tree", lambda _cache: None)
    done = subprocess.CompletedProcess([], -6, "", "pod.c:3: error: no such thing\nLLVM ERROR: out of patience\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(CompileError, match=r"(?s)status -6.*no such thing.*out of patience"):
        compiler.compile_programs(tmp_path / "cache", source=source(tmp_path))
    done = subprocess.CompletedProcess([], 1, "", "ModuleNotFoundError: No module named 'bcc'\n")
    with pytest.raises(CompileError, match=r"python3-bpfcc"):
        compiler.compile_programs(tmp_path / "cache", source=source(tmp_path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_map_references_are_found_and_filled_in() -> None:
    code = (instruction(0xB7, 0, 5) + instruction(0x18, 0x11, 7) + instruction(0, 0, 0)
            + instruction(0x18, 0x01, 9) + instruction(0, 0, 0) + instruction(0x95, 0, 0))  # fmt: skip
    found = bcc_child.relocations(code, {7: "policy"})
    assert found == [(1, "policy")], "a plain 64-bit constant is no map"
    filled = resolve(Bytecode("p", code, tuple(found)), {"policy": 42})
    assert filled[8:16] == instruction(0x18, 0x11, 42)
    assert filled[24:32] == instruction(0x18, 0x01, 9)


def test_ownership_is_checked_for_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_directory(tmp_path / "mine")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(CacheError, match="of user"):
        prepare_directory(tmp_path / "mine")


@pytest.fixture
def shipped(tmp_path: Path, compiled: list[Path]) -> Path:
    """A directory as an image ships it, for ``source(tmp_path)``."""
    if os.geteuid() != 0:
        pytest.skip("needs root: what is shipped is root's")
    directory = tmp_path / "shipped"
    directory.mkdir(mode=0o755)
    compiler.ship_programs(directory, source=source(tmp_path))
    compiled.clear()
    return directory


def test_what_an_image_ships_needs_no_compiler_and_no_cache(
    tmp_path: Path, shipped: Path, compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(bcc_child, "DIST_PACKAGES", str(tmp_path / "no-bcc-here"))
    found = compiler.compile_programs(tmp_path / "cache", source=source(tmp_path / "elsewhere"), shipped=shipped)
    assert found.programs["from_pod"].maps == ((0, "m"),)
    assert compiled == []
    assert not (tmp_path / "cache").exists()


def test_what_an_image_ships_counts_for_its_own_source_only(
    tmp_path: Path, shipped: Path, compiled: list[Path]
) -> None:
    compiler.compile_programs(tmp_path / "cache", source=source(tmp_path, "int y;"), shipped=shipped)
    compiler.compile_programs(tmp_path / "cache", source=source(tmp_path), flags=["-DX"], shipped=shipped)
    assert len(compiled) == 2


def test_what_an_image_ships_is_not_loaded_when_others_may_write_it(tmp_path: Path, shipped: Path) -> None:
    (file,) = shipped.iterdir()
    for path in (shipped, file):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        with pytest.raises(CacheError, match="nobody else's to write"):
            compiler.compile_programs(tmp_path / "cache", source=source(tmp_path), shipped=shipped)
        path.chmod(mode)
    os.chown(file, 65534, 0)
    with pytest.raises(CacheError, match="of user 65534"):
        compiler.compile_programs(tmp_path / "cache", source=source(tmp_path), shipped=shipped)
    file.rename(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(CacheError, match="must be root's"):
        compiler.compile_programs(tmp_path / "cache", source=source(tmp_path), shipped=shipped)


def test_a_damaged_program_of_an_image_is_said_and_not_replaced(tmp_path: Path, shipped: Path) -> None:
    (file,) = shipped.iterdir()
    file.write_text("{")
    with pytest.raises(CacheError, match="build the image again"):
        compiler.compile_programs(tmp_path / "cache", source=source(tmp_path), shipped=shipped)
