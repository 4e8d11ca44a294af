"""Debian trees, made once by debootstrap: what hosts run on, and what images are made of."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from host import run

CACHE = Path("/var/cache/meshbridge/e2e")
KEPT = 3
"""How many of what is made anew with each version of its sources stay in the cache."""
MIRROR, SUITE = "http://deb.debian.org/debian", "bookworm"
_BASE = ("ca-certificates", "curl", "iproute2", "iptables", "iputils-ping", "procps", "python3")
_NODE = (
    "conntrack", "containerd", "containernetworking-plugins", "ethtool", "ipset", "kmod", "nftables", "runc", "socat",
    "util-linux",
)  # fmt: skip


@contextlib.contextmanager
def alone(what: str) -> Iterator[None]:
    """Nobody else on this machine makes, or runs, the same meanwhile."""
    CACHE.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (CACHE / f".{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def forget_old(directory: Path, pattern: str) -> None:
    """Remove all but the newest that match."""
    found = sorted(directory.glob(pattern), key=lambda each: each.stat().st_mtime, reverse=True)
    for each in found[KEPT:]:
        shutil.rmtree(each) if each.is_dir() else each.unlink()


def base() -> Path:
    """What images hold beside their own program."""
    return _tree("base", _BASE)


def node() -> Path:
    """What hosts run on."""
    return _tree("node", (*_BASE, *_NODE))


def _tree(name: str, packages: tuple[str, ...]) -> Path:
    key = hashlib.sha256(" ".join((SUITE, *sorted(packages))).encode()).hexdigest()[:12]
    tree = CACHE / "trees" / f"{name}-{key}"
    if tree.exists():
        return tree
    print(f"e2e: making a Debian tree for {name} (a minute or two)", flush=True)
    making, packed = tree.with_suffix(".making"), CACHE / "debs"
    shutil.rmtree(making, ignore_errors=True)
    for each in (making, packed):
        each.mkdir(parents=True)
    try:
        run(
            ["debootstrap", "--variant=minbase", f"--cache-dir={packed}", f"--include={','.join(packages)}",
             SUITE, making, MIRROR],
            timeout_s=900, where=f"the Debian tree of {name}",
        )  # fmt: skip
    finally:
        shutil.rmtree(packed)
    for unneeded in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"):
        shutil.rmtree(making / unneeded, ignore_errors=True)
    making.rename(tree)
    return tree
