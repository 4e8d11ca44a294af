"""Images without a registry: one archive of all that share the base layer, and node disks with it already loaded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import trees
from control_plane import built
from node import PAUSE, boot_node, import_images, start_containerd

HERE = Path(__file__).parent
ANSWER, LOAD, PROBE = (f"/opt/e2e/{each}.py" for each in ("answer", "load", "probe"))
PROMETHEUS = "registry.local/prometheus:1"
ISTIO_HUB, ISTIO_TAG = "registry.local/istio", "e2e"
BASE, COREDNS = "registry.local/base:1", "registry.local/coredns:1"
IMAGES = trees.CACHE / "images"
ENVOY_BOOTSTRAP = "var/lib/istio/envoy/envoy_bootstrap_tmpl.json"
_DEBIANS_PROMETHEUS = Path("/var/cache/meshbridge/prometheus/current/usr/bin/prometheus")
_PROXY_USER = 1337
_PACKED_BY = 1
"""To be counted up when the same images come to be packed differently."""


@dataclass(frozen=True)
class Image:
    name: str
    entrypoint: tuple[str, ...] = ()
    files: dict[str, Path] = field(default_factory=dict)
    user: str = ""
    directories: tuple[str, ...] = ()
    """Made with the user as their owner."""


def images() -> tuple[Image, ...]:
    """What the cluster's own parts and tests run."""
    istio = built("istio")
    return (
        Image(PAUSE, ("sleep", "infinity")),
        Image(BASE, files={each.lstrip("/"): HERE / Path(each).name for each in (ANSWER, LOAD, PROBE)}),
        Image(PROMETHEUS, ("/usr/bin/prometheus",), {"usr/bin/prometheus": _DEBIANS_PROMETHEUS}),
        Image(COREDNS, ("/coredns",), {"coredns": built("coredns") / "bin/coredns"}),
        Image(
            f"{ISTIO_HUB}/pilot:{ISTIO_TAG}", ("/usr/local/bin/pilot-discovery",),
            {"usr/local/bin/pilot-discovery": istio / "bin/pilot-discovery"}, user=str(_PROXY_USER),
        ),
        Image(
            f"{ISTIO_HUB}/proxyv2:{ISTIO_TAG}", ("/usr/local/bin/pilot-agent",),
            {
                "usr/local/bin/pilot-agent": istio / "bin/pilot-agent",
                "usr/local/bin/envoy": _envoy(),
                ENVOY_BOOTSTRAP: istio / "share/envoy_bootstrap.json",
            },
            user=str(_PROXY_USER), directories=("var/lib/istio/data",),
        ),
        Image(
            f"{ISTIO_HUB}/install-cni:{ISTIO_TAG}", ("/usr/local/bin/install-cni",),
            {"usr/local/bin/install-cni": istio / "bin/install-cni", "opt/cni/bin/istio-cni": istio / "bin/istio-cni"},
        ),
    )  # fmt: skip


def disk() -> Path:
    """A containerd's files with all images loaded, made once for each set of images. Only to be copied from."""
    with trees.alone("images"):
        wanted = images()
        ready = IMAGES / f"{_version(wanted)}.disk"
        if not ready.exists():
            _make_disk(wanted, ready)
        os.utime(ready)
        trees.forget_old(IMAGES, "*.disk")
        return ready


def _make_disk(wanted: tuple[Image, ...], ready: Path) -> None:
    print("e2e: packing the images and loading them into a node's disk, once (a minute)", flush=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    making, archive = ready.with_suffix(".making"), ready.with_suffix(".tar")
    shutil.rmtree(making, ignore_errors=True)
    with tarfile.open(archive, "w") as packed:
        _pack(packed, trees.base(), wanted)
    host = boot_node("images", making, trees.node(), built("kubernetes") / "bin", lives_on=False)
    try:
        start_containerd(host)
        import_images(host, archive)
        host.stop("containerd")
    finally:
        host.shut_down()
    archive.unlink()
    (making / "containerd").rename(ready)
    shutil.rmtree(making)


def copy_disk(source: Path, target: Path) -> None:
    """A disk of its own: what containerd never writes again is linked, not copied."""
    shutil.copytree(source, target, symlinks=True, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    path = Path(source)
    if path.suffix == ".db" or path.is_symlink():
        shutil.copy2(source, target, follow_symlinks=False)
    else:
        Path(target).hardlink_to(path)


def _envoy() -> Path:
    import envoy

    found = [Path(place) / "_bin/envoy" for place in envoy.__path__]
    return next(each for each in found if each.is_file())


def _version(wanted: Iterable[Image]) -> str:
    """What tells one set of images from another."""
    described = [
        [each.name, each.entrypoint, each.user, each.directories, {to: _digest(of) for to, of in each.files.items()}]
        for each in wanted
    ]
    text = json.dumps([_PACKED_BY, trees.base().name, described])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _pack(packed: tarfile.TarFile, base: Path, wanted: Iterable[Image]) -> None:
    base_layer = _add_layer(packed, _tar_of_tree(base))
    manifest = []
    for image in wanted:
        layers = [base_layer]
        if image.files or image.directories:
            layers.append(_add_layer(packed, _tar_of_files(image)))
        config = json.dumps({
            "architecture": "amd64", "os": "linux",
            "config": {"Entrypoint": list(image.entrypoint), "User": image.user, "WorkingDir": "/", "Env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{each}" for each in layers]},
        }).encode()  # fmt: skip
        name = f"{hashlib.sha256(config).hexdigest()}.json"
        _add(packed, name, config)
        manifest.append({"Config": name, "RepoTags": [image.name], "Layers": [f"{each}/layer.tar" for each in layers]})
    _add(packed, "manifest.json", json.dumps(manifest).encode())


def _add_layer(packed: tarfile.TarFile, layer: bytes) -> str:
    digest = hashlib.sha256(layer).hexdigest()
    _add(packed, f"{digest}/layer.tar", layer)
    return digest


def _add(packed: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    packed.addfile(entry, io.BytesIO(content))


def _tar_of_tree(tree: Path) -> bytes:
    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if entry.ischr() or entry.isblk() or entry.name.startswith("./dev/") else entry

    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as opened:
        opened.add(tree, ".", filter=kept)
    return layer.getvalue()


def _tar_of_files(image: Image) -> bytes:
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as opened:
        for name in image.directories:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            entry.uid = entry.gid = int(image.user or 0)
            opened.addfile(entry)
        for name, path in image.files.items():
            opened.add(path, name, filter=_as_root)
    return layer.getvalue()


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry
