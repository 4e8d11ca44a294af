"""The image of this work tree, built once and unpacked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from container import REPO, Image


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("cannot run in CI: needs root", pytrace=False)
        pytest.skip("needs root: it makes a root file system")
    directory = tmp_path_factory.mktemp("image")
    archive = directory / "meshbridge.tar"
    subprocess.run([REPO / "scripts/image", "-o", archive], check=True)
    root = directory / "root"
    root.mkdir()
    with tarfile.open(archive) as whole:
        (manifest,) = json.load(_member(whole, "manifest.json"))
        config = json.load(_member(whole, manifest["Config"]))
        for layer in manifest["Layers"]:
            _unpack(root, lambda layer=layer: _member(whole, layer))
    yield Image(archive, root, config, directory)
    shutil.rmtree(directory, ignore_errors=True)


def _member(archive: tarfile.TarFile, name: str) -> Any:
    found = archive.extractfile(name)
    assert found is not None, name
    return found


def _unpack(root: Path, layer: Callable[[], Any]) -> None:
    """A layer over those before it: what it says is gone goes first."""
    with tarfile.open(fileobj=layer()) as names:
        gone = [Path(each.name) for each in names if Path(each.name).name.startswith(".wh.")]
    for each in gone:
        directory, name = root / each.parent, each.name.removeprefix(".wh.")
        for path in directory.iterdir() if name == ".wh..opq" else [directory / name]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    with subprocess.Popen(["tar", "-x", "--exclude=.wh.*", "-C", root], stdin=subprocess.PIPE) as tar:
        assert tar.stdin is not None
        shutil.copyfileobj(layer(), tar.stdin)
        tar.stdin.close()
    assert tar.returncode == 0
