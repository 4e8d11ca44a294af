"""Our plugin on the node: its program where runtimes look for them, and its place in the configuration they use.

A runtime takes the first configuration of the directory, by name. Whoever writes that anew finds us in it again
within seconds. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from meshbridge.agent.chainfile import PLUGIN, ChainError, UnreadableChainError, chained, unchained
from meshbridge.agent.cniserver import DEFAULT_SOCKET

log = structlog.get_logger()

PROGRAM: Final = Path("/usr/lib/meshbridge") / PLUGIN
CHECK_S: Final = 2.0
MAX_BYTES: Final = 1 << 20
_LIST: Final = ".conflist"
_SUFFIXES: Final = (".conf", _LIST, ".json")
_ORIGINAL: Final = ".meshbridge-original"
"""Behind the name of a configuration of one plugin that became a list: runtimes pass over it."""


@dataclass(slots=True)
class Chain:
    """The chain of a node. ``keep`` may be called again and again; ``problem`` is what a person has to mend."""

    configurations: Path
    programs: Path
    socket: Path = DEFAULT_SOCKET
    program: Path = PROGRAM
    problem: str = ""
    _seen: tuple[Any, ...] = field(default=())

    def keep(self) -> None:
        """Our program is installed and in the chain that the runtime uses; where it cannot be, ``problem`` says why."""
        seen = self._look()
        if seen == self._seen and not self.problem:
            return
        before = self.problem
        try:
            self.problem = self._install()
        except OSError as error:
            self.problem = f"{error.filename or self.configurations}: {error.strerror}"
        if self.problem and self.problem != before:
            log.error("chain.not_kept", reason=self.problem)
        self._seen = self._look()

    def remove(self) -> int:
        """Our plugin is in no configuration any more, and configurations that became lists are what they were.

        Program and socket are gone too; a socket outlives an agent that was killed.

        How many there were.
        """
        count = 0
        for path in list(self._files()):
            names = (path.with_suffix(suffix).name for suffix in _SUFFIXES if suffix != _LIST)
            originals = [found for name in names if (found := path.with_name(f"{name}{_ORIGINAL}")).is_file()]
            with contextlib.suppress(ChainError, OSError):
                without = unchained(_read(path))
                if without is None:
                    continue
                count += 1
                if originals:
                    originals[0].rename(originals[0].with_name(originals[0].name.removesuffix(_ORIGINAL)))
                    path.unlink()
                else:
                    _write(path, without, stat.S_IMODE(path.stat().st_mode))
        (self.programs / PLUGIN).unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)
        return count

    def _look(self) -> tuple[Any, ...]:
        """What changes when somebody writes there."""
        paths = [self.configurations, *self._files(), self.programs / PLUGIN]
        found = []
        for path in paths:
            with contextlib.suppress(OSError):
                status = path.lstat()
                found.append((str(path), status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)

    def _install(self) -> str:
        """Why we are in no chain; empty when we are."""
        program = self.program.read_bytes()
        installed = self.programs / PLUGIN
        if not installed.is_file() or installed.is_symlink() or installed.read_bytes() != program:
            _write(installed, program, 0o755)
            log.info("plugin.installed", path=str(installed))
        passed_over: list[str] = []
        for path in self._files():
            try:
                self._chain(path)
                return "; ".join(passed_over)
            except UnreadableChainError as error:
                passed_over.append(f"CNI configuration {path}: {error}; it is left as it is, as runtimes pass over it")
            except ChainError as error:
                return f"CNI configuration {path}: {error}; it is left as it is, and pods are attached late"
        return "; ".join(
            [*passed_over, f"no CNI configuration in {self.configurations} yet, so pods are attached late"]
        )

    def _chain(self, path: Path) -> None:
        content = _read(path)
        entry = {"type": PLUGIN} | ({"socket": str(self.socket)} if self.socket != DEFAULT_SOCKET else {})
        is_list = path.suffix == _LIST
        wanted = chained(content, entry, is_list=is_list)
        if wanted is None:
            return
        mode = stat.S_IMODE(path.stat().st_mode)
        target = path if is_list else path.with_suffix(_LIST)
        if target != path and target.exists() and not self._is_ours(target):
            raise ChainError(f"{target} is there as well", fix="remove one of the two")
        _write(target, wanted, mode)
        if target != path:
            path.rename(path.with_name(f"{path.name}{_ORIGINAL}"))
        log.info("chain.joined", path=str(target))

    def _is_ours(self, path: Path) -> bool:
        try:
            return unchained(_read(path)) is not None
        except (ChainError, OSError):
            return False

    def _files(self) -> Iterator[Path]:
        """The configurations, in the order in which runtimes try them."""
        with contextlib.suppress(OSError):
            yield from sorted(path for path in self.configurations.iterdir() if path.suffix in _SUFFIXES)


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ChainError(f"cannot be read: {error.strerror}", fix="make it a plain file") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnreadableChainError("is no plain file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UnreadableChainError(f"has more than {MAX_BYTES} bytes")
    return content


def _write(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all; a reader finds the old or the new."""
    import tempfile  # 0.6 MB, and agents seldom write

    descriptor, temporary = tempfile.mkstemp(prefix=".meshbridge-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
