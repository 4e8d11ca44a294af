"""Both programs on a real veth, in both attach modes: real sockets and frames, swaps under traffic, kill -9."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bpf"))

from harness import (
    CACHE,
    DENY_ALL,
    FROM_POD,
    PIN_ROOT,
    POD_MAC,
    SYN,
    TO_POD,
    Harness,
    Layer,
    Namespace,
    entry,
    ethernet,
    frames,
    ip,
    ipv4,
    remove_pins,
    tcp,
    tcp_header,
)

from meshbridge.abi import DropReason, EventType, PolicyVerdict
from meshbridge.datapath import clsact, syscall
from meshbridge.datapath.attach import Attacher, AttachMode, detect_mode
from meshbridge.datapath.loader import open_datapath

pytestmark = pytest.mark.root
HOST4, POD4, HOST6, POD6 = "10.88.0.1", "10.88.0.5", "fd88::1", "fd88::5"
ALLOW, DENY, ONE_PORT = 1, 2, 3
OPEN_PORT, CLOSED_PORT = 7000, 7001


@dataclass
class Node:
    """A node's namespace and a pod's, joined by a veth; the programs sit on the node's end."""

    kernel: Harness
    host: Namespace
    pod: Namespace
    ifindex: int
    attacher: Attacher
    pin_dir: Path

    def counted(self, reason: DropReason, direction: int) -> int:
        return self.kernel.maps.counters().get((reason, direction), (0, 0))[0]

    def allow_one_port(self) -> None:
        self.kernel.policy_set(ONE_PORT, Layer({(0, 17, OPEN_PORT, 16): entry(), (0, 6, OPEN_PORT, 16): entry()},
                                               default=PolicyVerdict.POLICY_DENY))  # fmt: skip
        self.kernel.change(self.ifindex, sets=(ONE_PORT, ONE_PORT, ALLOW, ALLOW), revision=2)

    def raw(self, frame: bytes) -> None:
        """Put a frame on the pod's end of the wire."""
        with self.pod, socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind(("mbdppod", 0))
            wire.send(frame)


@pytest.fixture(params=list(AttachMode), ids=str)
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    mode: AttachMode = request.param
    with contextlib.ExitStack() as stack:
        kernel = stack.enter_context(Harness.open(interfaces=0))
        host = Namespace("ip link set lo up", "ip link add mbdphost type veth peer name mbdppod",
                         f"ip addr add {HOST4}/24 dev mbdphost", f"ip addr add {HOST6}/64 dev mbdphost nodad",
                         "ip link set mbdphost up")  # fmt: skip
        stack.callback(host.close)
        pod = Namespace("ip link set lo up")
        stack.callback(pod.close)
        with host:
            ifindex = socket.if_nametoindex("mbdphost")
            subprocess.run(["ip", "link", "set", "mbdppod", "address", POD_MAC.hex(":"), "netns",
                            f"/proc/{os.getpid()}/fd/{pod.fd}"], check=True, pass_fds=[pod.fd])  # fmt: skip
        pod.command(f"ip addr add {POD4}/24 dev mbdppod", f"ip addr add {POD6}/64 dev mbdppod nodad",
                    "ip link set mbdppod up")  # fmt: skip
        kernel.policy_set(ALLOW)
        kernel.policy_set(DENY, DENY_ALL)
        for address in (HOST4, HOST6):
            kernel.peer(address, 500)
        kernel.endpoint(ifindex, [POD4, POD6], sets=(ALLOW,) * 4, mac=POD_MAC)
        pin_dir = PIN_ROOT / f"mbdp-attach-{os.getpid()}"
        stack.callback(remove_pins, pin_dir)
        attacher = Attacher(pin_dir, from_pod=kernel.datapath.from_pod, to_pod=kernel.datapath.to_pod, mode=mode)
        with host:
            attacher.attach(ifindex)
        yield Node(kernel, host, pod, ifindex, attacher, pin_dir)


def udp_socket(namespace: Namespace, address: str, port: int = 0) -> socket.socket:
    with namespace:
        endpoint = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    endpoint.bind((address, port))
    endpoint.settimeout(1)
    return endpoint


def listen(namespace: Namespace, address: str, port: int) -> socket.socket:
    with namespace:
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen()
    listener.settimeout(2)
    return listener


def connect(namespace: Namespace, address: str, port: int, timeout_s: float = 2) -> socket.socket:
    with namespace:
        client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(timeout_s)
    try:
        client.connect((address, port))
    except OSError:
        client.close()
        raise
    return client


@pytest.mark.parametrize(("host", "pod"), [(HOST4, POD4), (HOST6, POD6)], ids=["v4", "v6"])
def test_real_connections_pass_or_do_not(node: Node, host: str, pod: str) -> None:
    node.allow_one_port()
    with listen(node.pod, pod, OPEN_PORT) as server, connect(node.host, pod, OPEN_PORT) as client:
        accepted, _ = server.accept()
        accepted.sendall(b"x" * 300_000)  # large enough to travel as joined segments
        received = b""
        while len(received) < 300_000:
            received += client.recv(1 << 16)
        accepted.close()
    with listen(node.pod, pod, CLOSED_PORT), pytest.raises(TimeoutError):
        connect(node.host, pod, CLOSED_PORT, 0.3)
    assert node.counted(DropReason.DROP_POLICY, 0) >= 1
    with listen(node.host, host, CLOSED_PORT), connect(node.pod, host, CLOSED_PORT):
        pass
    assert node.counted(DropReason.DROP_INVALID_PACKET, 0) == node.counted(DropReason.DROP_INVALID_PACKET, 1) == 0


def test_an_open_connection_is_cut(node: Node) -> None:
    with listen(node.pod, POD4, OPEN_PORT) as server, connect(node.host, POD4, OPEN_PORT) as client:
        accepted, _ = server.accept()
        accepted.settimeout(0.3)
        client.sendall(b"before")
        assert accepted.recv(10) == b"before"
        node.kernel.change(node.ifindex, sets=(DENY, DENY, ALLOW, ALLOW), revision=2)
        client.sendall(b"after")
        with pytest.raises(TimeoutError):
            accepted.recv(10)
        accepted.sendall(b"the server's own")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(20)
        with pytest.raises(TimeoutError):
            accepted.recv(10)
        accepted.close()


def test_before_the_endpoint_is_ready_nothing_passes(node: Node) -> None:
    node.kernel.maps.endpoints.clear()
    with listen(node.pod, POD4, OPEN_PORT), pytest.raises(TimeoutError):
        connect(node.host, POD4, OPEN_PORT, 0.3)
    assert node.counted(DropReason.DROP_ENDPOINT_NOT_READY, 0) >= 1


def test_the_sender_of_a_real_packet_is_known(node: Node) -> None:
    node.kernel.reset_limiter()
    node.kernel.events()
    with node.pod, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind((POD4, 0))
        os.fchown(client.fileno(), 1337, -1)  # a socket's uid is that of its inode
        client.sendto(b"x", (HOST4, 9))
    sent = [event for event in node.kernel.events() if event.destination_port == 9]
    assert [(event.type, event.uid) for event in sent] == [(EventType.EVENT_VERDICT, 1337)]


def test_a_tag_that_the_kernel_took_out_of_the_frame_is_still_a_tag(node: Node) -> None:
    """Before tc ingress the kernel moves the tag from the frame into the socket buffer: what is left looks plain."""
    plain = frame_to_host(node, OPEN_PORT)
    with udp_socket(node.host, HOST4, OPEN_PORT) as receiver:
        node.raw(plain)
        assert receiver.recv(10) == b"data"
        receiver.settimeout(0.1)
        for number, tag in enumerate((b"\x81\x00\x00\x05", b"\x81\x00\x00\x00", b"\x88\xa8\x00\x05"), 1):
            node.raw(plain[:12] + tag + plain[12:])
            assert node.counted(DropReason.DROP_VLAN, 1) == number
        with pytest.raises(TimeoutError):
            receiver.recv(10)


def test_every_cut_frame_is_dropped_and_counted(node: Node) -> None:
    packet = ip(POD4, HOST4, 6, tcp_header(40000, OPEN_PORT, SYN, options=b"\x02\x04\x05\xb4"), options=bytes(4))
    before = node.counted(DropReason.DROP_INVALID_PACKET, 1)
    cuts = [packet[:size] for size in range(14, len(packet))]
    for cut in cuts:
        with contextlib.suppress(OSError):  # the kernel itself may refuse to send a header without anything
            node.raw(cut)
    refused = len(cuts) - (node.counted(DropReason.DROP_INVALID_PACKET, 1) - before)
    assert refused <= 1
    assert list(frames(packet))[-1] == cuts[-1]


def test_headers_outside_the_linear_part_are_judged_all_the_same(node: Node) -> None:
    """A packet socket's ring, joined by PACKET_MMAP, leaves all but the link layer header in page fragments."""
    node.kernel.change(node.ifindex, sets=(ALLOW, ALLOW, ONE_PORT, ONE_PORT), revision=2)
    node.kernel.policy_set(ONE_PORT, Layer({(0, 17, OPEN_PORT, 16): entry()}, default=PolicyVerdict.POLICY_DENY))
    with udp_socket(node.host, HOST4, OPEN_PORT) as allowed, udp_socket(node.host, HOST4, CLOSED_PORT) as denied:
        for port in (OPEN_PORT, CLOSED_PORT):
            send_by_ring(node.pod, "mbdppod", frame_to_host(node, port))
        assert allowed.recv(100) == b"data"
        denied.settimeout(0.2)
        with pytest.raises(TimeoutError):
            denied.recv(100)
    assert node.counted(DropReason.DROP_POLICY, 1) == 1


def frame_to_host(node: Node, port: int) -> bytes:
    with node.host:
        link = subprocess.run(["ip", "-o", "link", "show", "mbdphost"], capture_output=True, text=True, check=True)
    mac = bytes.fromhex(link.stdout.split("link/ether ")[1].split()[0].replace(":", ""))
    body = struct.pack("!HHHH", 5555, port, 12, 0) + b"data"
    return ethernet(ipv4(POD4, HOST4, 17, body), 0x0800, destination=mac)


def send_by_ring(namespace: Namespace, device: str, frame: bytes) -> None:
    """Send one frame by PACKET_TX_RING: the socket buffer's linear part then holds the link layer header only."""
    import mmap

    packet_version, packet_tx_ring, tpacket_v2 = 10, 13, 1
    with namespace, socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.setsockopt(263, packet_version, tpacket_v2)
        wire.setsockopt(263, packet_tx_ring, struct.pack("IIII", 4096, 1, 2048, 2))
        wire.bind((device, 0x0800))
        with mmap.mmap(wire.fileno(), 4096) as ring:
            header_bytes = 32  # TPACKET2_HDRLEN less sockaddr_ll
            ring[header_bytes : header_bytes + len(frame)] = frame
            ring[0:8] = struct.pack("II", 1, len(frame))  # TP_STATUS_SEND_REQUEST, length
            wire.send(b"")
            deadline = time.monotonic() + 2
            while struct.unpack("I", ring[0:4])[0] and time.monotonic() < deadline:
                time.sleep(0.01)


def test_swapping_programs_under_traffic_loses_nothing_and_lets_nothing_through(node: Node) -> None:
    node.allow_one_port()
    second = open_again(node)
    attachers = [node.attacher, second]
    stop, swaps = threading.Event(), 0

    def swap() -> None:
        nonlocal swaps
        with node.host:
            while not stop.is_set():
                attachers[swaps % 2].attach(node.ifindex)
                swaps += 1

    swapper = threading.Thread(target=swap)
    with udp_socket(node.pod, POD4, OPEN_PORT) as allowed, udp_socket(node.pod, POD4, CLOSED_PORT) as denied, \
            udp_socket(node.host, HOST4) as sender:  # fmt: skip
        sender.sendto(b"warm up", (POD4, OPEN_PORT))
        allowed.recv(100)
        swapper.start()
        rounds = 0
        until = time.monotonic() + 3
        while time.monotonic() < until:
            for _ in range(20):
                sender.sendto(rounds.to_bytes(8, "big"), (POD4, CLOSED_PORT))
                sender.sendto(rounds.to_bytes(8, "big"), (POD4, OPEN_PORT))
            for _ in range(20):
                assert allowed.recv(100) == rounds.to_bytes(8, "big")
            rounds += 1
        stop.set()
        swapper.join()
        denied.settimeout(0.1)
        with pytest.raises(TimeoutError):
            denied.recv(100)
    assert swaps > 100
    assert rounds > 20


def open_again(node: Node) -> Attacher:
    """The same programs, loaded once more onto the same maps, as a new agent would."""
    from meshbridge.datapath import compiler
    from meshbridge.datapath.loader import load_program

    compiled = compiler.compile_programs(CACHE)
    programs = {name: load_program(compiled, name, node.kernel.maps.descriptors) for name in (FROM_POD, TO_POD)}
    return Attacher(node.pin_dir, **programs, mode=node.attacher.mode)


def running_programs(node: Node) -> set[int]:
    with node.host:
        if node.attacher.mode is AttachMode.CLSACT:
            return {number for parent in clsact.Parent
                    if (number := clsact.attached_program(node.ifindex, parent)) is not None}  # fmt: skip
    found = set()
    for pin in (node.pin_dir / "links").iterdir():
        fd = syscall.get_pinned(str(pin))
        found.add(syscall.link_info(fd).program_id)
        os.close(fd)
    return found


def test_attaching_twice_changes_nothing_and_another_load_replaces(node: Node) -> None:
    ours = {syscall.program_id(fd) for fd in (node.kernel.datapath.from_pod, node.kernel.datapath.to_pod)}
    assert running_programs(node) == ours
    with node.host:
        node.attacher.attach(node.ifindex)
        assert node.attacher.attached() == {node.ifindex}
        assert running_programs(node) == ours
        second = open_again(node)
        assert second.attached() == {node.ifindex}
        assert second.update_all() == {node.ifindex}
        assert not running_programs(node) & ours


def test_detaching_lets_packets_pass(node: Node) -> None:
    node.kernel.change(node.ifindex, sets=(DENY,) * 4, revision=2)
    with node.host:
        node.attacher.detach(node.ifindex)
        assert node.attacher.attached() == set()
        node.attacher.detach(node.ifindex)
    with udp_socket(node.pod, POD4, OPEN_PORT) as receiver, udp_socket(node.host, HOST4) as sender:
        sender.sendto(b"x", (POD4, OPEN_PORT))
        assert receiver.recv(10) == b"x"


def test_hooks_of_an_interface_that_is_gone_are_swept(node: Node) -> None:
    node.host.command("ip link del mbdphost")
    with node.host:
        assert node.attacher.attached() == set()
        expected = {node.ifindex} if node.attacher.mode is AttachMode.TCX else set()
        assert node.attacher.sweep() == expected
        assert node.attacher.sweep() == set()
        with pytest.raises(syscall.BpfNotFoundError):
            node.attacher.attach(node.ifindex)


CHILD = """
import os, sys
from pathlib import Path
from meshbridge.datapath.attach import Attacher, AttachMode
from meshbridge.datapath.loader import open_datapath
from meshbridge.datapath.maps import MapSizes
datapath = open_datapath(Path(sys.argv[1]), sizes=MapSizes(ipcache=1024, policy=1024), cache=Path(sys.argv[2]))
Attacher(Path(sys.argv[1]), from_pod=datapath.from_pod, to_pod=datapath.to_pod,
         mode=AttachMode(sys.argv[3])).attach(int(sys.argv[4]))
print("attached", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("mode", list(AttachMode), ids=str)
def test_what_a_killed_process_attached_stays_in_force(mode: AttachMode) -> None:
    pin_dir = PIN_ROOT / f"mbdp-killed-{os.getpid()}"
    host = Namespace("ip link add mbdpk type veth peer name mbdpkp", f"ip addr add {HOST4}/24 dev mbdpk",
                     "ip link set mbdpk up", "ip link set mbdpkp up")  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(remove_pins, pin_dir)
        stack.callback(host.close)
        with host:
            ifindex = socket.if_nametoindex("mbdpk")
            child = subprocess.Popen([sys.executable, "-c", CHILD, str(pin_dir), str(CACHE), mode, str(ifindex)],
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
        stack.callback(child.wait)
        stack.callback(child.kill)
        assert child.stdout is not None
        assert child.stdout.readline() == "attached\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
        with open_datapath(pin_dir, cache=CACHE) as datapath:
            before = sum(packets for packets, _ in datapath.maps.counters().values())
            with host, socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
                wire.bind(("mbdpkp", 0))
                for _ in range(10):
                    wire.send(tcp(POD4, HOST4, 40000, OPEN_PORT))
            dropped = datapath.maps.counters()[DropReason.DROP_ENDPOINT_NOT_READY, 1][0]
            assert dropped >= 10
            assert sum(packets for packets, _ in datapath.maps.counters().values()) - before >= 10
            with host:
                attacher = Attacher(pin_dir, from_pod=datapath.from_pod, to_pod=datapath.to_pod, mode=mode)
                assert attacher.attached() == {ifindex}
                assert attacher.update_all() == {ifindex}
                attacher.detach(ifindex)


def test_this_kernel_has_tcx(node: Node) -> None:
    """Stated so that a machine without it shows up; there the other half of this file is what counts."""
    assert detect_mode(node.kernel.datapath.from_pod) is AttachMode.TCX
