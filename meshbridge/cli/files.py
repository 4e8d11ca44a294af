"""Manifests that a person names on the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from meshbridge.errors import MeshBridgeError
from meshbridge.kube.manifests import MAX_FILE_BYTES, is_manifest
from meshbridge.kube.objects import FileContent, read_objects
from meshbridge.kube.yaml import YamlError
from meshbridge.policy.model import Document

MAX_FILES = 4096
STDIN: Final = Path("-")


class ManifestError(MeshBridgeError):
    """A manifest cannot be read."""


def read_manifests(paths: Iterable[Path]) -> list[Document]:
    """Every object of the files and directories; ``-`` is standard input.

    Raises:
        ManifestError: A file is no manifest; where, and how to mend it.
    """
    return [document for path in manifest_files(paths) for document in read_manifest(path).documents]


def manifest_files(paths: Iterable[Path]) -> list[Path]:
    """The files themselves, and those of directories that are read.

    Raises:
        ManifestError: They are too many.
    """
    found: list[Path] = []
    for path in paths:
        found += sorted(entry for entry in path.iterdir() if is_manifest(entry.name)) if path.is_dir() else [path]
    if len(found) > MAX_FILES:
        raise ManifestError(f"{len(found)} files are more than {MAX_FILES}", fix="name fewer directories")
    return found


def read_manifest(path: Path) -> FileContent:
    """Every object of one file, and what of it is passed over.

    Raises:
        ManifestError: It is no manifest.
    """
    try:
        if path == STDIN:
            content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ManifestError(f"larger than {MAX_FILE_BYTES} bytes", where=str(path), fix="split it")
        return read_objects(content, str(path))
    except YamlError as error:
        raise ManifestError(error.what, where=f"{path}:{error.line}", fix=error.fix) from error
    except OSError as error:
        raise ManifestError(f"cannot be read: {error.strerror}", where=str(path)) from error
