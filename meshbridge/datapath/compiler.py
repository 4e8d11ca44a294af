"""From ``bpf/*.c`` to bytecode that names its maps: BCC in a short-lived child, its output cached on disk.

A warm start reads the cache and needs neither LLVM nor kernel headers. The cache is code that root will load, so its
directory must be ours alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshbridge import abi
from meshbridge.datapath import bcc_child
from meshbridge.errors import MeshBridgeError

DEFAULT_CACHE: Final = Path("/var/cache/meshbridge")
SOURCE: Final = "pod.c"
PROGRAMS: Final = ("from_pod", "to_pod")
COMPILE_TIMEOUT_S: Final = 60
_FORMAT: Final = "1"
_PACKAGES: Final = "python3-bpfcc and linux-headers-amd64 (linux-headers-arm64 on arm64)"


class CompileError(MeshBridgeError):
    """The kernel programs could not be compiled."""


class CacheError(MeshBridgeError):
    """The cache directory cannot be trusted or used."""


@dataclass(frozen=True, slots=True)
class MapSpec:
    """A map as the source declares it."""

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class Bytecode:
    """One program; ``maps`` are the instructions that load a map, with its name."""

    name: str
    code: bytes
    maps: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class CompiledObject:
    """What one source became: its maps and its programs, by name."""

    maps: Mapping[str, MapSpec]
    programs: Mapping[str, Bytecode]


def compile_programs(cache: Path = DEFAULT_CACHE, *, source: Path | None = None, programs: Sequence[str] = PROGRAMS,
                     flags: Sequence[str] = ()) -> CompiledObject:  # fmt: skip
    """The compiled kernel programs, from the cache where it has them for exactly this source, flags and compiler.

    Raises:
        CompileError: Headers or BCC are missing, or the compiler refused the source.
        CacheError: The cache directory belongs to somebody else or others may write to it.
    """
    source = source or abi.bpf_directory() / SOURCE
    prepare_directory(cache)
    file = cache / f"{_digest(source, programs, flags)}.json"
    try:
        return _decode(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not compiled yet, or a file cut short: compiled again and replaced
    text = _run_child(source, programs, flags, header_tree(cache))
    compiled = _decode(json.loads(text))
    _write_atomically(file, text)
    return compiled


def prepare_directory(path: Path) -> None:
    """Make ``path`` a directory that only this user can enter, or refuse it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as failure:
        raise CacheError(f"cannot be used: {failure.strerror}", where=str(path), fix="choose another --cache") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise CacheError(
            f"must be a directory of user {os.geteuid()} with mode 0700, is mode {stat.filemode(status.st_mode)} "
            f"of user {status.st_uid}",
            where=str(path),
            fix="its content is loaded into the kernel: remove it, or choose another --cache",
        )


def header_tree(cache: Path) -> Path | None:
    """One tree of kernel headers for BCC: the running kernel's own, else the newest installed; made of links.

    None leaves the choice to BCC, where the caller has set BCC_KERNEL_SOURCE.

    Raises:
        CompileError: No kernel headers are installed.
    """
    if os.environ.get("BCC_KERNEL_SOURCE"):
        return None
    trees = _find_headers()
    name = hashlib.sha256("\n".join(map(str, trees)).encode()).hexdigest()[:16]
    tree = cache / f"headers-{name}"
    if not tree.exists():
        temporary = Path(tempfile.mkdtemp(dir=cache))
        _merge(temporary / "tree", trees)
        try:
            (temporary / "tree").rename(tree)
        except OSError:
            if not tree.exists():  # another process was faster: its tree is the same
                raise
        shutil.rmtree(temporary)
    return tree


def _find_headers(root: Path = Path("/")) -> tuple[Path, ...]:
    modules = root / "lib/modules" / platform.release()
    own = tuple(path.resolve() for path in (modules / "build", modules / "source") if path.exists())
    if own and (own[0] / "include/generated/autoconf.h").exists():
        return own
    built = [path.parents[2] for path in root.glob("usr/src/linux-headers-*/include/generated/autoconf.h")]
    for tree in sorted(built, key=_version, reverse=True):
        if (tree / "include/linux/kconfig.h").exists():
            return (tree,)
        prefix = tree.name.rpartition("-")[0]
        for common in (tree.with_name(f"{prefix}-common"), tree.with_name(prefix)):
            if (common / "include/linux/kconfig.h").exists():
                return (tree, common)
    raise CompileError("no kernel headers found", where="/usr/src", fix=f"install the Debian packages {_PACKAGES}")


def _version(tree: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", tree.name)]


def _merge(target: Path, trees: Iterable[Path]) -> None:
    """Make ``target`` show all trees at once: links, and directories only where two trees have one of that name."""
    target.mkdir()
    present: dict[str, list[Path]] = {}
    for tree in trees:
        for child in tree.iterdir():
            present.setdefault(child.name, []).append(child)
    for name, children in present.items():
        directories = [child for child in children if child.is_dir()]
        if len(directories) > 1:
            _merge(target / name, directories)
        else:
            (target / name).symlink_to(children[0])


def _digest(source: Path, programs: Sequence[str], flags: Sequence[str]) -> str:
    version = Path(bcc_child.DIST_PACKAGES, "bcc/version.py")
    compiler = version.read_bytes() if version.exists() else b"no bcc"
    parts = [_FORMAT, platform.machine(), *programs, "--", *flags, compiler.decode(), str(source)]
    files = sorted(path for path in source.parent.rglob("*") if path.suffix in (".c", ".h"))
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in (Path(bcc_child.__file__), *files):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _run_child(source: Path, programs: Sequence[str], flags: Sequence[str], headers: Path | None) -> str:
    environment = dict(os.environ)
    if headers is not None:
        environment["BCC_KERNEL_SOURCE"] = str(headers)
    command = [sys.executable, "-m", bcc_child.__name__, str(source), *programs, "--",
               f"-I{source.parent}", "-Wno-macro-redefined", *flags]  # fmt: skip
    try:
        child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False,
                               timeout=COMPILE_TIMEOUT_S, stdin=subprocess.DEVNULL)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CompileError(f"took more than {COMPILE_TIMEOUT_S} s", where=str(source)) from None
    if "No module named 'bcc'" in child.stderr:
        raise CompileError("BCC is not installed", where=bcc_child.DIST_PACKAGES,
                           fix=f"install the Debian packages {_PACKAGES}")  # fmt: skip
    if child.returncode != 0:
        tail = "\n".join(child.stderr.rstrip().splitlines()[-20:])
        raise CompileError(f"BCC failed with status {child.returncode}\n{tail}", where=str(source))
    return child.stdout


def _decode(data: Mapping[str, Any]) -> CompiledObject:
    maps = {item["name"]: MapSpec(**item) for item in data["maps"]}
    programs = {
        name: Bytecode(name, base64.b64decode(item["code"]), tuple((index, map_) for index, map_ in item["maps"]))
        for name, item in data["programs"].items()
    }
    return CompiledObject(maps, programs)


def _write_atomically(file: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(temporary, file)
