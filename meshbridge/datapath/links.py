"""What the node's network namespace looks like: its addresses, links and routes to pods, and when they change.

Spec: rtnetlink(7).
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from meshbridge.datapath import netlink
from meshbridge.errors import MeshBridgeError
from meshbridge.identity.model import IpAddress

_RTM_NEWLINK, _RTM_GETLINK = 16, 18
_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINK, _IFLA_LINK_NETNSID, _IFLA_TARGET_NETNSID = 1, 3, 5, 37, 46
_IFLA_LINKINFO, _IFLA_INFO_KIND, _IFF_UP = 18, 1, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF = 1, 4
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # links, IPv4 and IPv6 addresses, IPv4 and IPv6 routes
_IFINFO: Final = struct.Struct("=BxHiII")
_IFADDR: Final = struct.Struct("=BBBBI")
_RTMSG: Final = struct.Struct("=BBBBBBBBI")
_DUMP_ATTEMPTS: Final = 5
_HOST_BITS: Final = {socket.AF_INET: 32, socket.AF_INET6: 128}
_RTN_UNICAST, _RT_TABLE_MAIN = 1, 254


class LinkError(MeshBridgeError):
    """The kernel did not tell what the network namespace looks like."""


@dataclass(frozen=True, slots=True)
class Link:
    """An interface of this namespace. ``peer_index`` and ``peer_netns`` say where the other end of a veth is.

    ``kind`` is the kernel's, such as ``veth`` or ``wireguard``; empty for hardware and loopback.
    """

    ifindex: int
    name: str
    peer_index: int = 0
    peer_netns: int | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class PodInterface:
    """An interface inside a pod. ``leads_out``: it is up, and hardware or tied to something outside of the pod."""

    ifindex: int
    leads_out: bool


@dataclass(frozen=True, slots=True)
class NodeNetwork:
    """One look at a network namespace.

    ``addresses`` are all of its own, loopback's too; ``pod_routes`` the interface behind each route to one address.
    """

    links: dict[int, Link]
    addresses: frozenset[IpAddress]
    pod_routes: dict[IpAddress, int]

    def by_name(self, name: str) -> Link | None:
        return next((link for link in self.links.values() if link.name == name), None)


def read_network() -> NodeNetwork:
    """The calling thread's network namespace as it is now.

    Raises:
        LinkError: the kernel refuses, or things change faster than they can be read.
    """
    links: dict[int, Link] = {}
    for body in _dump(_RTM_GETLINK, _RTM_NEWLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        link = _link(body)
        links[link.ifindex] = link
    addresses = frozenset(_addresses())
    routes: dict[IpAddress, int] = {}
    for family in _HOST_BITS:
        for body in _dump(_RTM_GETROUTE, _RTM_NEWROUTE, _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
            found = _pod_route(body)
            if found is not None:
                routes[found[0]] = found[1]
    return NodeNetwork(links, addresses, routes)


def pod_mac(link: Link) -> bytes | None:
    """The link-layer address of the other end of a veth, asked of the pod's namespace; None when it is not known."""
    if link.peer_netns is None or not link.peer_index:
        return None
    namespace = netlink.attribute(_IFLA_TARGET_NETNSID, struct.pack("=i", link.peer_netns))
    request = _IFINFO.pack(socket.AF_UNSPEC, 0, link.peer_index, 0, 0) + namespace
    try:
        for kind, body in netlink.ask(_RTM_GETLINK, request):
            if kind == _RTM_NEWLINK:
                mac = dict(netlink.attributes(body, _IFINFO.size)).get(_IFLA_ADDRESS, b"")
                return mac if len(mac) == 6 else None
    except OSError:
        pass  # the pod's end went away meanwhile; its hooks follow when the kernel tells that the link is gone
    return None


def pod_interfaces(namespace: int) -> dict[str, PodInterface]:
    """The interfaces inside a pod's network namespace, by name; loopback is left out.

    Args:
        namespace: as ``Link.peer_netns`` names it.

    Raises:
        LinkError: the kernel refuses, or there is no such namespace any more.
    """
    target = netlink.attribute(_IFLA_TARGET_NETNSID, struct.pack("=i", namespace))
    dump = _dump(_RTM_GETLINK, _RTM_NEWLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + target)
    return {link.name: _pod_interface(link, body) for body in dump if (link := _link(body)).name != "lo"}


def _pod_interface(link: Link, body: bytes) -> PodInterface:
    flags = _IFINFO.unpack_from(body)[3]
    return PodInterface(link.ifindex, bool(flags & _IFF_UP) and (not link.kind or link.peer_netns is not None))


class NetworkWatch:
    """Becomes readable when links, addresses or routes of the namespace changed; ``drain`` before reading them anew."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, netlink.NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._socket.bind((0, _GROUPS))

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> None:
        """Forget what was told so far. A receive buffer that overflowed tells the same: something changed."""
        while True:
            try:
                self._socket.recv(netlink.RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def close(self) -> None:
        self._socket.close()


def _link(body: bytes) -> Link:
    _, _, ifindex, _, _ = _IFINFO.unpack_from(body)
    found = dict(netlink.attributes(body, _IFINFO.size))
    netns = found.get(_IFLA_LINK_NETNSID)
    kind = dict(netlink.attributes(found.get(_IFLA_LINKINFO, b""))).get(_IFLA_INFO_KIND, b"")
    return Link(
        ifindex=ifindex,
        name=found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        peer_index=struct.unpack("=I", found[_IFLA_LINK])[0] if len(found.get(_IFLA_LINK, b"")) == 4 else 0,
        peer_netns=struct.unpack("=i", netns)[0] if netns is not None and len(netns) == 4 else None,
        kind=sys.intern(kind.rstrip(b"\0").decode(errors="replace")),
    )


def _addresses() -> Iterator[IpAddress]:
    for body in _dump(_RTM_GETADDR, _RTM_NEWADDR, _IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        found = dict(netlink.attributes(body, _IFADDR.size))
        # On a point-to-point link IFA_ADDRESS is the other end; IFA_LOCAL is ours wherever it is given.
        packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS, b"")
        if len(packed) == 4:
            yield IPv4Address(packed)
        elif len(packed) == 16:
            yield IPv6Address(packed)


def _pod_route(body: bytes) -> tuple[IpAddress, int] | None:
    family, bits, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(body)
    if kind != _RTN_UNICAST or table != _RT_TABLE_MAIN or bits != _HOST_BITS.get(family):
        return None
    found = dict(netlink.attributes(body, _RTMSG.size))
    packed, oif = found.get(_RTA_DST, b""), found.get(_RTA_OIF, b"")
    if len(oif) != 4 or len(packed) != bits // 8:
        return None
    address: IpAddress = IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
    return address, struct.unpack("=I", oif)[0]


def _dump(request: int, expected: int, payload: bytes) -> list[bytes]:
    """Every message of a dump; again when the kernel says that it changed meanwhile."""
    for _ in range(_DUMP_ATTEMPTS):
        try:
            return [body for kind, body in netlink.ask(request, payload, netlink.DUMP) if kind == expected]
        except InterruptedError:
            continue
        except OSError as error:
            raise LinkError(error.strerror or str(error), where="rtnetlink") from error
    raise LinkError("the network namespace changes faster than it can be read", where="rtnetlink")
