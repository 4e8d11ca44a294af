"""Network namespaces for nodes and pods, wired as a point-to-point CNI plugin does: nothing leaves the machine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import combinations
from pathlib import Path

from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import GATEWAY_IPV4, GATEWAY_IPV6, NETNS, NodeLayout
from meshbridge.demo.netns import inside

_NODE_SYSCTLS = {
    "net.ipv4.ip_forward": "1",
    "net.ipv6.conf.all.forwarding": "1",
    "net.ipv4.conf.all.rp_filter": "0",
    "net.ipv4.conf.default.rp_filter": "0",
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.default.accept_ra": "0",
}
_POD_SYSCTLS = {
    "net.ipv6.conf.all.disable_ipv6": "0",
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.default.accept_ra": "0",
}


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """A pod's place in the network: its namespace, the host side of its veth, its addresses."""

    netns: str
    interface: str
    ipv4: IPv4Address
    ipv6: IPv6Address


def create_nodes(nodes: Iterable[NodeLayout]) -> None:
    """Every node has its namespace, a link to every other node, and routes to the others' pods.

    The links of one node hang on one bridge-less namespace: with two nodes, that is a single veth pair.
    """
    nodes = tuple(nodes)
    for node in nodes:
        _ip(f"netns add {node.netns}")
        _sysctl(node.netns, _NODE_SYSCTLS)
        _batch(node.netns, ["link set lo up"])
    for left, right in combinations(nodes, 2):
        _batch(left.netns, [f"link add to-{right.name} type veth peer name to-{left.name} netns {right.netns}"])
        for node, other in ((left, right), (right, left)):
            device = f"to-{other.name}"
            _batch(
                node.netns,
                [
                    f"addr add {node.ipv4} dev {device}",
                    f"addr add {node.ipv6} dev {device} nodad",
                    f"link set {device} up",
                    f"route add {other.pods_ipv4} via {other.ipv4.ip} src {node.ipv4.ip}",
                    f"route add {other.pods_ipv6} via {other.ipv6.ip} dev {device} src {node.ipv6.ip}",
                ],
            )


def create_pod(node: NodeLayout, pod: PodNetwork, sysctls: Mapping[str, str] | None = None) -> None:
    """The pod has its namespace, with ``sysctls``, and a veth into its node; the default routes go through the node.

    Both sides are up afterwards: the agent has to be told before anything runs in it.
    """
    _ip(f"netns add {pod.netns}")
    _sysctl(pod.netns, {**_POD_SYSCTLS, **(sysctls or {})})
    _batch(node.netns, [f"link add {pod.interface} type veth peer name eth0 netns {pod.netns}"])
    _batch(
        pod.netns,
        [
            "link set lo up",
            f"addr add {pod.ipv4}/32 dev eth0",
            f"addr add {pod.ipv6}/128 dev eth0 nodad",
            "link set eth0 up",
            f"route add {GATEWAY_IPV4} dev eth0 scope link",
            f"route add default via {GATEWAY_IPV4} dev eth0 src {pod.ipv4}",
            f"route add default via {GATEWAY_IPV6} dev eth0 src {pod.ipv6}",
        ],
    )
    _batch(
        node.netns,
        [
            f"addr add {GATEWAY_IPV4}/32 dev {pod.interface} scope link",
            f"addr add {GATEWAY_IPV6}/64 dev {pod.interface} nodad",
            f"link set {pod.interface} up",
            f"route add {pod.ipv4} dev {pod.interface} src {node.ipv4.ip}",
            f"route add {pod.ipv6} dev {pod.interface} src {node.ipv6.ip}",
        ],
    )


def add_loopback_address(netns: str, address: str) -> None:
    _batch(netns, [f"addr add {address} dev lo nodad"])


def delete_pod(node: NodeLayout, pod: PodNetwork) -> None:
    """Neither the veth nor the namespace of the pod is left; repeating it is no error."""
    if namespace_exists(node.netns):
        subprocess.run(["ip", "-n", node.netns, "link", "del", pod.interface], capture_output=True, check=False)
    delete_namespace(pod.netns)


def delete_namespace(netns: str) -> None:
    """The namespace has no name any more; it ends with its last process."""
    if namespace_exists(netns):
        _ip(f"netns del {netns}")


def namespace_exists(netns: str) -> bool:
    return (NETNS / netns).exists()


def _batch(netns: str, commands: list[str]) -> None:
    _run(["ip", "-n", netns, "-batch", "-"], "\n".join(commands))


def _ip(command: str) -> None:
    _run(["ip", *command.split()], "")


def _sysctl(netns: str, values: Mapping[str, str]) -> None:
    def write() -> None:  # /proc/sys/net shows the namespace of whoever opens it
        for key, value in values.items():
            (Path("/proc/sys") / key.replace(".", "/")).write_text(value)

    inside(netns, write)


def _run(argv: list[str], stdin: str) -> None:
    done = subprocess.run(argv, input=stdin, text=True, capture_output=True, check=False)
    if done.returncode:
        where = f"{' '.join(argv)}{f' <<< {stdin!r}' if stdin else ''}"
        raise DemoError(
            done.stderr.strip() or f"exit code {done.returncode}", where=where, fix="try `meshbridge demo down` first"
        )
