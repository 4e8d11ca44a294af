"""The last readable content of files that hold policies, on disk, so that a restart loses none to a broken file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


class KeptContent:
    """One file for each kept file, named by its path's digest, readable for its owner alone."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def save(self, path: str, content: bytes) -> None:
        """Keep ``content`` as what ``path`` said last.

        Raises:
            OSError: it cannot be written; what was kept before still is.
        """
        kept = self._kept(path)
        if self.load(path) == content:
            return
        scratch = kept.with_suffix(".new")
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        scratch.replace(kept)

    def load(self, path: str) -> bytes | None:
        """What ``path`` said last; None when nothing was kept of it."""
        try:
            return self._kept(path).read_bytes()
        except OSError:
            return None

    def forget(self, path: str) -> None:
        """Keep nothing of ``path`` any more."""
        self._kept(path).unlink(missing_ok=True)

    def forget_all_but(self, paths: Iterable[str]) -> None:
        """Keep nothing of files that are gone."""
        wanted = {self._kept(path).name for path in paths}
        for kept in self._directory.iterdir():
            if kept.name not in wanted:
                kept.unlink(missing_ok=True)

    def _kept(self, path: str) -> Path:
        return self._directory / hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()
