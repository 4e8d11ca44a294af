"""From ``bpf/*.c`` to bytecode that names its maps: shipped with an image, else BCC in a short-lived child and a cache.

Shipped bytecode and a warm cache need neither LLVM nor kernel headers. Both are code that root will load: the cache's
directory must be ours alone, the shipped one root's, and nobody else's to write.

Usage: ``python -m meshbridge.datapath.compiler DIRECTORY``, when an image is built, fills the directory it ships as
``/usr/lib/meshbridge/bytecode``.
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshbridge import abi
from meshbridge.datapath import bcc_child
from meshbridge.errors import MeshBridgeError

DEFAULT_CACHE: Final = Path("/var/cache/meshbridge")
SHIPPED: Final = Path("/usr/lib/meshbridge/bytecode")
SOURCE: Final = "pod.c"
PROGRAMS: Final = ("from_pod", "to_pod")
COMPILE_TIMEOUT_S: Final = 60
_FORMAT: Final = "2"
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
                     flags: Sequence[str] = (), shipped: Path = SHIPPED) -> CompiledObject:  # fmt: skip
    """The compiled kernel programs for exactly this source, machine and flags: shipped, else from the cache, else made.

    What is shipped counts whatever compiler made it; what is cached, for the compiler that is installed now. The cache
    is not touched where the programs are shipped, so that a read-only file system will do.

    Raises:
        CompileError: Headers or BCC are missing, or the compiler refused the source.
        CacheError: A directory belongs to somebody else or others may write to it.
    """
    source = source or abi.bpf_directory() / SOURCE
    of_source = _source_digest(source, programs, flags)
    if (found := _read_shipped(shipped, of_source)) is not None:
        return found
    prepare_directory(cache)
    file = cache / f"{_digest(of_source)}.json"
    try:
        return _decode(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not compiled yet, or a file cut short: compiled again and replaced
    text = _run_child(source, programs, flags, header_tree(cache))
    compiled = _decode(json.loads(text))
    _write_atomically(file, text)
    return compiled


def ship_programs(directory: Path, *, source: Path | None = None) -> Path:
    """The file in ``directory`` that holds the programs, freshly compiled; what an image ships.

    Raises:
        CompileError: Headers or BCC are missing, or the compiler refused the source.
    """
    source = source or abi.bpf_directory() / SOURCE
    file = directory / f"{_source_digest(source, PROGRAMS, ())}.json"
    from tempfile import TemporaryDirectory  # 0.6 MB that an agent with a warm cache does not hold

    with TemporaryDirectory() as headers:
        text = _run_child(source, PROGRAMS, (), header_tree(Path(headers)))
    _decode(json.loads(text))
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        _write_atomically(file, text, 0o644)
    except OSError as failure:
        raise CacheError(f"cannot be written: {failure.strerror}", where=str(file)) from None
    return file


def _read_shipped(directory: Path, digest: str) -> CompiledObject | None:
    """What is shipped for this source; None when nothing is.

    Raises:
        CacheError: Somebody but root may write there, or the file is damaged; an image is then not what was built.
    """
    file = directory / f"{digest}.json"
    for path in (directory, file):
        try:
            status = path.lstat()
        except FileNotFoundError:
            return None
        except OSError as failure:
            raise CacheError(f"cannot be read: {failure.strerror}", where=str(path)) from None
        kind = stat.S_ISDIR if path is directory else stat.S_ISREG
        if not kind(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
            raise CacheError(
                f"must be root's and nobody else's to write, is mode {stat.filemode(status.st_mode)} "
                f"of user {status.st_uid}",
                where=str(path),
                fix="its content is loaded into the kernel: build the image again, or remove it",
            )
    try:
        return _decode(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise CacheError(f"is no compiled program: {failure}", where=str(file), fix="build the image again") from None


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
        from tempfile import mkdtemp

        temporary = Path(mkdtemp(dir=cache))
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


def _source_digest(source: Path, programs: Sequence[str], flags: Sequence[str]) -> str:
    """Names what is compiled, wherever it lies and whatever compiles it."""
    files = sorted(path for path in source.parent.rglob("*") if path.suffix in (".c", ".h"))
    digest = hashlib.sha256("\0".join([_FORMAT, platform.machine(), *programs, "--", *flags, source.name]).encode())
    digest.update(Path(bcc_child.__file__).read_bytes())
    for path in files:
        digest.update(f"\0{path.relative_to(source.parent)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _digest(of_source: str) -> str:
    version = Path(bcc_child.DIST_PACKAGES, "bcc/version.py")
    compiler = version.read_text(encoding="utf-8") if version.exists() else "no bcc"
    return hashlib.sha256(f"{of_source}\0{compiler}".encode()).hexdigest()


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
        raise CompileError(
            f"BCC is not installed, and no programs of this version for {platform.machine()} are in {SHIPPED}",
            where=bcc_child.DIST_PACKAGES,
            fix=f"install the Debian packages {_PACKAGES}",
        )
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


def _write_atomically(file: Path, text: str, mode: int = 0o600) -> None:
    from tempfile import mkstemp

    descriptor, temporary = mkstemp(dir=file.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        os.fchmod(stream.fileno(), mode)
    os.replace(temporary, file)


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{ship_programs(Path(sys.argv[1]))}\n")
    except MeshBridgeError as error:
        sys.exit(f"Error: {error}")
