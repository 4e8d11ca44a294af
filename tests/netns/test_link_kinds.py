"""What kind a link is, as the kernel says it: the name alone makes no WireGuard of it."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from meshbridge.bypass.encryption import encryption_of_links
from meshbridge.datapath.links import NodeNetwork, read_network

pytestmark = pytest.mark.root

CLONE_NEWNET = 0x40000000


@pytest.fixture
def netns() -> Iterator[str]:
    name = f"mblk-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def network_of(netns: str) -> NodeNetwork:
    def look() -> NodeNetwork:
        with open(f"/run/netns/{netns}") as handle:
            assert ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET) == 0
        return read_network()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(look).result()


def test_a_link_has_the_kernels_kind(netns: str) -> None:
    for words in ("cilium_wg0 type veth peer name pair1", "wireguard.cali type bridge"):
        subprocess.run(["ip", "-n", netns, "link", "add", *words.split()], check=True)
    links = {link.name: link.kind for link in network_of(netns).links.values()}
    assert links.items() >= {"lo": "", "cilium_wg0": "veth", "wireguard.cali": "bridge"}.items()
    assert encryption_of_links("a", links.items()) is None


def test_a_wireguard_link_is_one(netns: str) -> None:
    made = subprocess.run(["ip", "-n", netns, "link", "add", "cilium_wg0", "type", "wireguard"], capture_output=True)
    if made.returncode:
        pytest.skip(f"this kernel has no WireGuard: {made.stderr.decode().strip()}")
    links = {link.name: link.kind for link in network_of(netns).links.values()}
    assert encryption_of_links("a", links.items()) is not None
