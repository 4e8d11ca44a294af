"""Two namespaces joined by veths, servers that say who they are, and what a capture state says of each packet."""

from __future__ import annotations

import contextlib
import ctypes
import selectors
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.redirect_config import restore_text
from meshbridge.bypass.state import CaptureState
from meshbridge.datapath.redirect import in_namespace
from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.policy.model import Direction

POD, PEER = "mbbyp-pod", "mbbyp-peer"
NETNS = Path("/run/netns")
ADDRESSES = {IpFamily.IPV4: ("10.231.7.1", "10.231.7.2"), IpFamily.IPV6: ("fd00:231:7::1", "fd00:231:7::2")}
PORTS = (80, 120, 8080, 9090, 15006, 15008, 15020, 15021, 15090)
ENVOY_PORTS = (15001, 15006)
_libc = ctypes.CDLL(None, use_errno=True)
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75


def run(*command: str, text: str | None = None, check: bool = True) -> None:
    subprocess.run(command, check=check, input=text, text=True, capture_output=True, timeout=20)


def in_pod(*command: str, text: str | None = None) -> None:
    run("nsenter", f"--net={NETNS / POD}", *command, text=text)


@dataclass
class Listener:
    """A socket that answers every connection with who it is: ``envoy`` or the port that was asked for."""

    sock: socket.socket
    name: bytes


class Answering(threading.Thread):
    """Accepts on all listeners and says which one it was."""

    def __init__(self, listeners: list[Listener]) -> None:
        super().__init__(daemon=True)
        self.listeners, self.stopping = listeners, threading.Event()

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for listener in self.listeners:
                selector.register(listener.sock, selectors.EVENT_READ, listener.name)
            while not self.stopping.is_set():
                for key, _ in selector.select(0.05):
                    with contextlib.suppress(OSError):
                        connection, _ = key.fileobj.accept()  # type: ignore[union-attr]
                        connection.sendall(key.data)
                        connection.close()

    def close(self) -> None:
        self.stopping.set()
        self.join()
        for listener in self.listeners:
            listener.sock.close()


def listening(namespace: str, family: IpFamily, address: str, port: int, transparent: bool = False) -> socket.socket:
    def make() -> socket.socket:
        kind = socket.AF_INET if family is IpFamily.IPV4 else socket.AF_INET6
        sock = socket.socket(kind, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is IpFamily.IPV6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if transparent:
            level = socket.SOL_IP if family is IpFamily.IPV4 else socket.IPPROTO_IPV6
            sock.setsockopt(level, IP_TRANSPARENT if family is IpFamily.IPV4 else IPV6_TRANSPARENT, 1)
        sock.bind((address, port))
        sock.listen(64)
        return sock

    return in_namespace(str(NETNS / namespace), make)


def as_owner(uid: int, gid: int, make: Callable[[], socket.socket]) -> Callable[[], socket.socket]:
    """Only the thread's file system ids change: they are what a socket's owner is taken from."""

    def owned() -> socket.socket:
        _libc.setfsgid(gid)
        _libc.setfsuid(uid)
        try:
            return make()
        finally:
            _libc.setfsuid(0)
            _libc.setfsgid(0)

    return owned


def ask(namespace: str, address: str, port: int, uid: int = 0, gid: int = 0) -> str:
    """Who answers a connection: ``envoy`` or the server of the port; empty when nobody does."""
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = in_namespace(str(NETNS / namespace), as_owner(uid, gid, lambda: socket.socket(kind, socket.SOCK_STREAM)))
    with sock:
        sock.settimeout(2)
        try:
            sock.connect((address, port))
            answer = b""
            while chunk := sock.recv(64):
                answer += chunk
        except OSError:
            return ""
    return answer.decode()


@pytest.fixture(scope="module")
def pair() -> Iterator[None]:
    for name in (POD, PEER):
        run("ip", "netns", "del", name, check=False)
        run("ip", "netns", "add", name)
    try:
        run("ip", "-n", POD, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", PEER)
        run("ip", "-n", POD, "link", "add", "net1", "type", "veth", "peer", "name", "net1", "netns", PEER)
        for name, index in ((POD, 0), (PEER, 1)):
            for link in ("lo", "eth0", "net1"):
                run("ip", "-n", name, "link", "set", link, "up")
            for pair_of in ADDRESSES.values():
                bits = ["nodad"] if ":" in pair_of[index] else []
                length = "64" if bits else "24"
                run("ip", "-n", name, "address", "add", f"{pair_of[index]}/{length}", "dev", "eth0", *bits)
            run("ip", "-n", name, "address", "add", f"10.231.8.{index + 1}/24", "dev", "net1")
            run("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
        yield
    finally:
        for name in (POD, PEER):
            run("ip", "netns", "del", name, check=False)


@pytest.fixture(scope="module")
def servers(pair: None) -> Iterator[None]:
    listeners = []
    for family, own in ADDRESSES.items():
        anywhere = "0.0.0.0" if family is IpFamily.IPV4 else "::"
        for port in PORTS:
            if port not in ENVOY_PORTS:
                listeners.append(Listener(listening(POD, family, anywhere, port), str(port).encode()))
            listeners.append(Listener(listening(PEER, family, own[1], port), f"peer {port}".encode()))
        for port in ENVOY_PORTS:
            listeners.append(Listener(listening(POD, family, anywhere, port, transparent=True), b"envoy %d" % port))
    answering = Answering(listeners)
    answering.start()
    yield
    answering.close()


@pytest.fixture
def clean(pair: None) -> Iterator[None]:
    yield
    in_pod("nft", "flush", "ruleset")
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        for table in ("nat", "mangle"):
            in_pod(tool, "-t", table, "-F")
            in_pod(tool, "-t", table, "-X")
    run("ip", "-n", POD, "rule", "del", "fwmark", "1337", check=False)


def workload(annotations: dict[str, str], dual_stack: bool = True) -> Workload:
    return Workload(
        "shop", "web", "u", "n", tuple(ip_address(pair_of[0]) for pair_of in ADDRESSES.values()),
        annotations=annotations, proxy=ProxyClass.SIDECAR, init_args=a.render_init_args(annotations, MeshDefaults()),
        init_env={"ISTIO_DUAL_STACK": "true"} if dual_stack else {},
    )  # fmt: skip


def apply_rules(pod: Workload, backend: str, families: tuple[IpFamily, ...] = tuple(IpFamily)) -> None:
    assert pod.init_args is not None
    config, _ = parse_init_args(pod.init_args, pod.init_env)
    for family in families:
        tool = ("iptables" if family is IpFamily.IPV4 else "ip6tables") + f"-{backend}-restore"
        in_pod(tool, "--noflush", text=restore_text(config, family))


def computed_inbound(state: CaptureState, family: IpFamily, port: int, interface: str = "eth0") -> bool:
    """Whether a packet from the peer is redirected, by the spans."""
    source, destination = (int(ip_address(address)) for address in reversed(ADDRESSES[family]))
    (span,) = [
        span
        for span in state.of(Direction.INGRESS, family)
        if 6 in span.box.protocol
        and port in span.box.port
        and interface in span.box.input
        and source in span.box.source
        and destination in span.box.destination
    ]
    return span.listener == 15006


def computed_outbound(state: CaptureState, family: IpFamily, address: str, port: int, owner: tuple[int, int]) -> bool:
    (span,) = [
        span
        for span in state.of(Direction.EGRESS, family)
        if 6 in span.box.protocol
        and port in span.box.port
        and "eth0" in span.box.output
        and int(ip_address(ADDRESSES[family][0])) in span.box.source
        and int(ip_address(address)) in span.box.destination
        and owner[0] in span.box.uid
        and owner[1] in span.box.gid
    ]
    return span.listener == 15001


ROUTES = {
    "nothing asked": {},
    "an excluded inbound port": {a.EXCLUDE_INBOUND_PORTS: "8080"},
    "an octal port": {a.EXCLUDE_INBOUND_PORTS: "0120"},
    "an include list, excludes ignored": {a.INCLUDE_INBOUND_PORTS: "80,9090", a.EXCLUDE_INBOUND_PORTS: "9090"},
    "an include list that names an Istio port": {a.INCLUDE_INBOUND_PORTS: "15021"},
    "an empty include list": {a.INCLUDE_INBOUND_PORTS: ""},
    "another status port": {a.STATUS_PORT: "9090"},
    "an excluded outbound port": {a.EXCLUDE_OUTBOUND_PORTS: "8080,0120"},
    "an excluded range": {a.EXCLUDE_OUTBOUND_RANGES: "10.231.7.0/30,fd00:231:7::/64"},
    "an included range elsewhere": {a.INCLUDE_OUTBOUND_RANGES: "10.99.0.0/16,fd99::/16"},
    "an included port beside no range": {a.INCLUDE_OUTBOUND_RANGES: "", a.INCLUDE_OUTBOUND_PORTS: "9090"},
    "an excluded interface": {a.EXCLUDE_INTERFACES: "eth0"},
}


def check_packets(state: CaptureState) -> None:
    """Who answers each connection, in and out, is who the capture state says: both families, three owners."""
    for family, (own, peer) in ADDRESSES.items():
        observed = {port: ask(PEER, own, port) for port in PORTS if port not in ENVOY_PORTS}
        expected = {port: "envoy 15006" if computed_inbound(state, family, port) else str(port) for port in observed}
        assert observed == expected
        for owner in ((1000, 1000), (1337, 1000), (1000, 1337)):
            sent = {port: ask(POD, peer, port, *owner) for port in PORTS}
            wanted = {
                port: "envoy 15001" if computed_outbound(state, family, peer, port, owner) else f"peer {port}"
                for port in PORTS
            }
            assert sent == wanted
