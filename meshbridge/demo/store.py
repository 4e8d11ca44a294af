"""The runtime copy of the manifests: what `demo apply` and `demo delete` change, and the controller watches.

Files stay as they were written, byte for byte, so that the lines in messages are those of the reader's own file. Only
when an object moves to another file, or leaves one that holds several, is its document cut out of the old file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from meshbridge.demo.errors import DemoError
from meshbridge.kube.objects import CLUSTER_SCOPED

# Kind, namespace, name: what makes it the same object.
Key = tuple[str, str, str]

_SEPARATOR = re.compile(r"^---(?=\s|$)[^\n]*\n?", re.MULTILINE)
_CLUSTER_SCOPED = frozenset(kind for _, kind in CLUSTER_SCOPED)
_YAML = frozenset({".yaml", ".yml"})


@dataclass(frozen=True, slots=True)
class Part:
    """One document of a file, as text and as what it says."""

    text: str
    data: Mapping[str, Any]

    @property
    def key(self) -> Key:
        metadata = self.data.get("metadata") or {}
        kind = str(self.data.get("kind"))
        namespace = "" if kind in _CLUSTER_SCOPED else str(metadata.get("namespace") or "default")
        return kind, namespace, str(metadata.get("name"))


def parts(text: str) -> list[Part]:
    """The documents of a file; those that hold nothing but comments are left out.

    Raises:
        yaml.YAMLError: Some document cannot be read.
    """
    found = []
    for chunk in _SEPARATOR.split(text):
        data = yaml.safe_load(chunk)
        if isinstance(data, dict):
            found.append(Part(chunk, data))
    return found


@dataclass(frozen=True, slots=True)
class Store:
    """One directory of manifests."""

    directory: Path

    def version(self) -> tuple[tuple[str, int, int, int], ...]:
        """A value that changes when any file does, for the price of looking at the directory."""
        found = []
        for path in self.files():
            with suppress(FileNotFoundError):  # removed since it was listed
                state = path.stat()
                found.append((path.name, state.st_ino, state.st_size, state.st_mtime_ns))
        return tuple(found)

    def objects(self) -> list[Mapping[str, Any]]:
        """Every readable object; files that cannot be read are the controller's to name."""
        return [part.data for path in self.files() for part in _readable(path)]

    def apply(self, source: Path) -> list[Key]:
        """Put a copy of ``source`` in force and return the keys of its objects; an object lives in one file only.

        A file that cannot be read as YAML is copied too: refusing it, by name, is the product's work.
        """
        content = _read(source)
        target = self.directory / (source.name if source.suffix in _YAML else f"{source.name}.yaml")
        try:
            keys = [part.key for part in parts(content.decode())]
        except (UnicodeDecodeError, yaml.YAMLError):
            keys = []
        self._cut(set(keys), keep=target)
        write(target, content)
        return keys

    def delete(self, source: Path) -> list[Key]:
        """Take every object named in ``source`` out of force and return the keys of those that were there.

        Raises:
            DemoError: It is not YAML, and is not the content of an applied file of that name either.
        """
        content = _read(source)
        try:
            return sorted(self._cut({part.key for part in parts(content.decode())}))
        except (UnicodeDecodeError, yaml.YAMLError):
            path = self.directory / source.name
            if not path.is_file() or path.read_bytes() != content:
                raise DemoError("is not readable YAML, and was not applied", where=str(source)) from None
            path.unlink()
            return []

    def _cut(self, keys: set[Key], keep: Path | None = None) -> set[Key]:
        removed = set()
        for path in self.files():
            held = _readable(path)
            stay = [part for part in held if part.key not in keys]
            if path == keep or len(stay) == len(held):
                continue
            removed |= {part.key for part in held} & keys
            if stay:
                write(path, "---\n".join(part.text for part in stay).encode())
            else:
                path.unlink()
        return removed

    def files(self) -> list[Path]:
        """The files in force, by name."""
        return sorted(path for path in self.directory.glob("*") if path.suffix in _YAML and path.name[0] != ".")


def write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace ``path`` in one step: a watcher sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)


def _readable(path: Path) -> list[Part]:
    try:
        return parts(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []


def _read(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as error:
        raise DemoError(error.strerror or str(error), where=str(source), fix="name a readable file") from error
