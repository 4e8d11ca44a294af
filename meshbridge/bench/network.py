"""Namespaces the load runs in: a node with two pods on it, wired as a point-to-point CNI plugin does."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from meshbridge.bench.errors import BenchError

NETNS = Path("/run/netns")
PREFIX = "mbben"
GATEWAY = "169.254.1.1"
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Netns:
    """A named network namespace of this bench."""

    name: str

    @property
    def path(self) -> Path:
        return NETNS / self.name

    def socket(self, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        """A socket inside the namespace; made by a thread that enters it, so this process never leaves its own."""
        made: list[socket.socket | OSError] = []

        def make() -> None:
            try:
                handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if _libc.setns(handle, _CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(self.path))
                finally:
                    os.close(handle)
                made.append(socket.socket(family, kind))
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=make, name=self.name)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise BenchError(str(made[0]), where=f"network namespace {self.name}") from made[0]
        return made[0]


@dataclass(frozen=True, slots=True)
class Pod:
    """A namespace behind a veth whose host side, ``interface``, is in the node's namespace."""

    netns: Netns
    interface: str
    address: str


@dataclass(frozen=True, slots=True)
class Node:
    """A namespace that routes between its pods; its name is also that of the node an agent runs for."""

    netns: Netns
    address: str
    pods: tuple[Pod, ...]

    @property
    def name(self) -> str:
        return self.netns.name

    @property
    def client(self) -> Pod:
        return self.pods[0]

    @property
    def server(self) -> Pod:
        return self.pods[1]


def create_node(stack: ExitStack, name: str, number: int, pods: Sequence[str] = ("client", "server")) -> Node:
    """A node at 10.88.NUMBER.1 with pods at .2, .3, …; nothing of it is left when ``stack`` closes.

    Args:
        number: 0..255, so that several nodes can exist side by side.
    """
    netns = create_netns(stack, name, forwards=True)
    address = f"10.88.{number}.1"
    batch(netns, [f"addr add {address}/32 dev lo"])
    made: list[Pod] = []
    for index, pod_name in enumerate(pods):
        pod = Pod(create_netns(stack, f"{name}-{pod_name}", forwards=False), f"p{index}", f"10.88.{number}.{index + 2}")
        connect_pod(netns, pod)
        made.append(pod)
    return Node(netns, address, tuple(made))


def create_netns(stack: ExitStack, name: str, *, forwards: bool) -> Netns:
    netns = Netns(f"{PREFIX}-{os.getpid()}-{name}")
    _run(["ip", "netns", "add", netns.name])
    stack.callback(delete_netns, netns)
    batch(netns, ["link set lo up"])
    sysctl = ["net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0"]
    if forwards:
        sysctl += ["net.ipv4.ip_forward=1"]
    _run(["nsenter", f"--net={netns.path}", "sysctl", "-qw", *sysctl])
    return netns


def connect_pod(node: Netns, pod: Pod) -> None:
    """The pod reaches whatever its node routes to, and the node reaches the pod."""
    batch(node, [f"link add {pod.interface} type veth peer name eth0 netns {pod.netns.name}"])
    batch(
        pod.netns,
        [
            f"addr add {pod.address}/32 dev eth0",
            "link set eth0 up",
            f"route add {GATEWAY} dev eth0 scope link",
            f"route add default via {GATEWAY} dev eth0 src {pod.address}",
        ],
    )
    batch(
        node,
        [
            f"addr add {GATEWAY}/32 dev {pod.interface} scope link",
            f"link set {pod.interface} up",
            f"route add {pod.address} dev {pod.interface}",
        ],
    )


def delete_netns(netns: Netns) -> None:
    """The namespace has no name any more; repeating it is no error."""
    if netns.path.exists():
        _run(["ip", "netns", "del", netns.name])


def stale_names(names: Iterable[str], running: Iterable[int]) -> list[str]:
    """Of ``names``, those that a bench gave to what it made and whose process is not among ``running``."""
    alive = set(running)
    stale = []
    for name in names:
        prefix, _, rest = name.partition("-")
        pid = rest.partition("-")[0]
        if prefix == PREFIX and pid.isdigit() and int(pid) not in alive:
            stale.append(name)
    return sorted(stale)


def running_processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def batch(netns: Netns, commands: Sequence[str]) -> None:
    """Run several ``ip`` commands in a namespace at once."""
    _run(["ip", "-n", netns.name, "-batch", "-"], "\n".join(commands))


def _run(argv: Sequence[str], stdin: str = "") -> None:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(done.stderr.strip() or f"exit code {done.returncode}", where=" ".join(argv))
