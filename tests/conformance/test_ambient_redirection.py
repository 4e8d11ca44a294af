"""The rules that Istio's node agent writes for a pod in ambient mode, by its own code, and real packets.

What stands for ztunnel listens on its ports in the pod's namespace, where ztunnel's own sockets are; what is asserted
is who receives the bytes, and that the capture state says so, by the annotations and by the rules that were read.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from goprograms import built
from redirect_harness import (
    ADDRESSES,
    ENVOY_PORTS,
    NETNS,
    PEER,
    POD,
    PORTS,
    Answering,
    Listener,
    ask,
    listening,
    run,
)

from meshbridge.bypass import annotations as a
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.findings import FindingCode
from meshbridge.bypass.state import CaptureState, Span, Truth
from meshbridge.datapath.redirect import RedirectReader, in_namespace
from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.policy.capture import PortClass
from meshbridge.policy.model import Direction

pytest_plugins = ("redirect_harness",)
pytestmark = pytest.mark.root
PROBES = {IpFamily.IPV4: "169.254.7.127", IpFamily.IPV6: "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"}
ON_NET1 = {IpFamily.IPV4: ("10.231.8.1", "10.231.8.2")}
TCP, UDP = 6, 17
BACKENDS = ("nft", "legacy", "nftables")
"""iptables on nftables and the old one; and rules that the agent writes without iptables."""
SO_MARK_OF_ZTUNNEL = 1337


@pytest.fixture(scope="module")
def ambient() -> Path:
    return built(Path(__file__).parent / "ambient")


@pytest.fixture
def probes(pair: None) -> Iterator[None]:
    """The addresses that the node's kubelet gets on the way into a pod in ambient mode."""
    for address in PROBES.values():
        length, bits = ("128", ["nodad"]) if ":" in address else ("32", [])
        run("ip", "-n", PEER, "address", "add", f"{address}/{length}", "dev", "eth0", *bits)
        run("ip", "-n", POD, "route", "add", f"{address}/{length}", "dev", "eth0")
    yield
    for address in PROBES.values():
        length = "128" if ":" in address else "32"
        run("ip", "-n", POD, "route", "del", f"{address}/{length}", "dev", "eth0")
        run("ip", "-n", PEER, "address", "del", f"{address}/{length}", "dev", "eth0")


@pytest.fixture
def unmarked(pair: None) -> Iterator[None]:
    """Without what the agent adds beside the rules in tables that ``clean`` knows."""
    yield
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        for action in ("-F", "-X"):
            run("nsenter", f"--net={NETNS / POD}", tool, "-t", "raw", action, check=False)
    for family in ("-4", "-6"):
        run("ip", "-n", POD, family, "rule", "del", "fwmark", "0x111/0xfff", check=False)
        run("ip", "-n", POD, family, "route", "flush", "table", "100", check=False)


def pod(annotations: dict[str, str] | None = None) -> Workload:
    return Workload(
        "shop", "web", "u", "n", tuple(ip_address(pair_of[0]) for pair_of in ADDRESSES.values()),
        annotations=annotations or {}, proxy=ProxyClass.AMBIENT,
    )  # fmt: skip


def write(
    ambient: Path, workload: Workload, *, ipv6: bool = True, dns_capture: bool = False, backend: str = "nft"
) -> CaptureState:
    """Have Istio's code write the pod's rules; what is computed from them."""
    asked = {
        "annotations": dict(workload.annotations), "ipv6": ipv6, "dns_capture": dns_capture, "backend": backend,
    }  # fmt: skip
    done = subprocess.run(
        ["nsenter", f"--net={NETNS / POD}", ambient, json.dumps(asked)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    state = capture_state(workload, seen=RedirectReader().read(NETNS / POD))
    assert state.truth is Truth.RULES
    odd = {FindingCode.RULES_MISSING, FindingCode.RULES_CONTRADICT, FindingCode.RULE_NOT_UNDERSTOOD}
    assert not odd & {finding.code for finding in state.findings}, state.findings
    return state


def span_of(
    state: CaptureState, direction: Direction, family: IpFamily, port: int, *, protocol: int = TCP, source: str = "",
    destination: str = "", interface: str = "eth0", uid: int = 1000, intended: bool = False,
) -> Span:  # fmt: skip
    """The one span that a packet is in."""
    own, peer = ADDRESSES[family]
    ends = (peer, own) if direction is Direction.INGRESS else (own, peer)
    given = [int(ip_address(text or default)) for text, default in zip((source, destination), ends, strict=True)]
    (span,) = [
        span
        for span in state.of(direction, family, intended=intended)
        if protocol in span.box.protocol
        and port in span.box.port
        and interface in (span.box.input if direction is Direction.INGRESS else span.box.output)
        and given[0] in span.box.source
        and given[1] in span.box.destination
        and (direction is Direction.INGRESS or (uid in span.box.uid and uid in span.box.gid))
    ]
    return span


def receiver(span: Span, otherwise: str) -> str:
    return f"envoy {span.listener}" if span.listener else otherwise


def check(state: CaptureState) -> None:
    """Who answers each connection, in and out, is who the capture state says it is."""
    for family, (own, peer) in ADDRESSES.items():
        for port in PORTS:
            if port not in ENVOY_PORTS:
                inbound = span_of(state, Direction.INGRESS, family, port)
                assert ask(PEER, own, port) == receiver(inbound, str(port)), (family, port, inbound)
            for uid in (1000, 1337):
                outbound = span_of(state, Direction.EGRESS, family, port, uid=uid)
                assert ask(POD, peer, port, uid, uid) == receiver(outbound, f"peer {port}"), (family, port, outbound)


def classes(state: CaptureState, *, intended: bool) -> dict[tuple[Direction, IpFamily, int], PortClass]:
    """What the packets of ``check`` count as."""
    return {
        (direction, family, port): span_of(state, direction, family, port, intended=intended).port_class
        for direction in Direction
        for family in IpFamily
        for port in PORTS
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_and_out_go_to_ztunnel_whoever_sends(
    ambient: Path, servers: None, clean: None, unmarked: None, backend: str
) -> None:
    state = write(ambient, pod(), backend=backend)
    check(state)
    # by uid nobody is let go, unlike with a sidecar
    assert ask(POD, ADDRESSES[IpFamily.IPV4][1], 8080, 1337, 1337) == "envoy 15001"
    assert classes(state, intended=False) == classes(state, intended=True)
    assert span_of(state, Direction.INGRESS, IpFamily.IPV4, 15008).port_class is PortClass.TUNNEL


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kubelets_probes_go_past_ztunnel_by_their_source(
    ambient: Path, servers: None, clean: None, unmarked: None, probes: None, backend: str
) -> None:
    state = write(ambient, pod(), backend=backend)
    for family, (own, _) in ADDRESSES.items():
        span = span_of(state, Direction.INGRESS, family, 8080, source=PROBES[family])
        assert asked_from(PROBES[family], own, 8080) == receiver(span, "8080") == "8080"
        assert span.port_class is PortClass.UNGUARDED
        assert ask(PEER, own, 8080) == "envoy 15006"


def asked_from(source: str, address: str, port: int) -> str:
    return asked_with(PEER, lambda sock: sock.bind((source, 0)), address, port)


def asked_with(namespace: str, prepare: Callable[[socket.socket], object], address: str, port: int) -> str:
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    with in_namespace(str(NETNS / namespace), lambda: socket.socket(kind, socket.SOCK_STREAM)) as sock:
        prepare(sock)
        sock.settimeout(2)
        try:
            sock.connect((address, port))
            return sock.recv(64).decode()
        except OSError:
            return ""


BOOLEANS = {"true": True, "TRUE": True, "1": True, "t": True, "false": False, "yes": False, "on": False, "": False}


@pytest.mark.parametrize(("value", "bypasses"), BOOLEANS.items(), ids=[repr(value) for value in BOOLEANS])
def test_bypass_inbound_capture_is_read_as_istio_reads_it(
    ambient: Path, servers: None, clean: None, unmarked: None, value: str, bypasses: bool
) -> None:
    workload = pod({a.AMBIENT_BYPASS_INBOUND: value})
    state = write(ambient, workload)
    check(state)
    assert classes(state, intended=False) == classes(state, intended=True)
    span = span_of(state, Direction.INGRESS, IpFamily.IPV4, 8080)
    assert span.port_class is (PortClass.EXCLUDED if bypasses else PortClass.CAPTURED)
    assert [ask(PEER, own, 8080) for own, _ in ADDRESSES.values()] == ["8080" if bypasses else "envoy 15006"] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_inbound_capture_the_tunnel_and_probes_reach_the_pod_as_well(
    ambient: Path, servers: None, clean: None, unmarked: None, probes: None, backend: str
) -> None:
    state = write(ambient, pod({a.AMBIENT_BYPASS_INBOUND: "true"}), backend=backend)
    check(state)
    for family, (own, _) in ADDRESSES.items():
        span = span_of(state, Direction.INGRESS, family, 8080, source=PROBES[family])
        assert asked_from(PROBES[family], own, 8080) == receiver(span, "8080") == "8080"


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_carries_ztunnels_mark_is_let_go(
    ambient: Path, servers: None, clean: None, unmarked: None, backend: str
) -> None:
    write(ambient, pod(), backend=backend)
    for _, peer in ADDRESSES.values():
        marked = asked_with(
            POD, lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, SO_MARK_OF_ZTUNNEL), peer, 8080
        )
        assert marked == "peer 8080"
        assert ask(POD, peer, 8080) == "envoy 15001"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pods_own_addresses_are_reached_past_ztunnel(
    ambient: Path, servers: None, clean: None, unmarked: None, backend: str
) -> None:
    state = write(ambient, pod(), backend=backend)
    for family, (own, _) in ADDRESSES.items():
        loopback = "127.0.0.1" if family is IpFamily.IPV4 else "::1"
        for address in (own, loopback):
            span = span_of(state, Direction.EGRESS, family, 8080, source=address, destination=address, interface="lo")
            assert ask(POD, address, 8080, 1000, 1000) == receiver(span, "8080") == "8080"
            assert span.port_class is PortClass.UNGUARDED


def test_without_ipv6_rules_all_of_it_goes_past_ztunnel(
    ambient: Path, servers: None, clean: None, unmarked: None
) -> None:
    state = write(ambient, pod(), ipv6=False)
    check(state)
    assert [ask(PEER, own, 8080) for own, _ in ADDRESSES.values()] == ["envoy 15006", "8080"]
    assert span_of(state, Direction.INGRESS, IpFamily.IPV6, 8080).port_class is PortClass.EXCLUDED
    assert span_of(state, Direction.EGRESS, IpFamily.IPV6, 8080).port_class is PortClass.EXCLUDED


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_arrives_on_a_rerouted_interface_counts_as_sent(
    ambient: Path, servers: None, clean: None, unmarked: None, backend: str
) -> None:
    workload = pod({a.REROUTE_INTERFACES: " net1, "})
    state = write(ambient, workload, backend=backend)
    check(state)
    own, peer = ON_NET1[IpFamily.IPV4]
    span = span_of(state, Direction.INGRESS, IpFamily.IPV4, 8080, source=peer, destination=own, interface="net1")
    assert ask(PEER, own, 8080) == receiver(span, "8080") == "envoy 15001"


def test_a_pod_that_opted_out_has_no_rules_and_nothing_is_captured(servers: None, clean: None) -> None:
    workload = replace(pod(), proxy=ProxyClass.NONE, labels={"istio.io/dataplane-mode": "none"})
    state = capture_state(workload, seen=RedirectReader().read(NETNS / POD))
    check(state)
    assert {span.port_class for span in state.spans} == {PortClass.UNGUARDED}


def test_rules_that_were_flushed_are_followed(ambient: Path, servers: None, clean: None, unmarked: None) -> None:
    write(ambient, pod())
    run("nsenter", f"--net={NETNS / POD}", "nft", "flush", "ruleset")
    state = capture_state(pod(), seen=RedirectReader().read(NETNS / POD))
    check(state)
    assert span_of(state, Direction.INGRESS, IpFamily.IPV4, 8080).port_class is PortClass.EXCLUDED


CAPTURES_DNS = {
    "by the agent's setting": ({}, True, True),
    "by the annotation": ({a.AMBIENT_DNS_CAPTURE: "true"}, False, True),
    "not by the annotation, although the agent is set to": ({a.AMBIENT_DNS_CAPTURE: "false"}, True, False),
    "not at all": ({}, False, False),
}
ANSWERS_UDP = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as sock:
    if family == socket.AF_INET6: sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((sys.argv[1], int(sys.argv[2])))
    print("bound", flush=True)
    while True:
        data, peer = sock.recvfrom(64)
        sock.sendto(sys.argv[3].encode(), peer)
"""


@pytest.fixture
def resolvers(servers: None) -> Iterator[None]:
    """Those of the peer on port 53, and what stands for ztunnel's DNS proxy in the pod: over TCP and UDP."""
    processes, sockets = [], []
    for family, (_, peer) in ADDRESSES.items():
        own = "127.0.0.1" if family is IpFamily.IPV4 else "::1"  # as ztunnel's
        for namespace, address, port, name in ((PEER, peer, 53, "peer 53"), (POD, own, 15053, "envoy 15053")):
            command = ["nsenter", f"--net={NETNS / namespace}", sys.executable, "-S", "-c", ANSWERS_UDP, address]
            process = subprocess.Popen([*command, str(port), name], stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "bound\n"
            sockets.append(Listener(listening(namespace, family, address, port), name.encode()))
    answering = Answering(sockets)
    answering.start()
    yield
    answering.close()
    for process in processes:
        process.kill()
        process.wait(5)


def asked_by_udp(address: str, port: int) -> str:
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    with in_namespace(str(NETNS / POD), lambda: socket.socket(kind, socket.SOCK_DGRAM)) as sock:
        sock.settimeout(2)
        sock.connect((address, port))
        sock.send(b"?")
        try:
            return sock.recv(64).decode()
        except OSError:
            return ""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("annotations", "setting", "captures"), CAPTURES_DNS.values(), ids=CAPTURES_DNS.keys())
def test_dns_is_captured(
    ambient: Path, resolvers: None, clean: None, unmarked: None, annotations: dict[str, str], setting: bool,
    captures: bool, backend: str,
) -> None:  # fmt: skip
    state = write(ambient, pod(annotations), dns_capture=setting, backend=backend)
    for family, (_, peer) in ADDRESSES.items():
        by_udp = span_of(state, Direction.EGRESS, family, 53, protocol=UDP)
        assert asked_by_udp(peer, 53) == receiver(by_udp, "peer 53") == ("envoy 15053" if captures else "peer 53")
        assert by_udp.port_class is PortClass.UNGUARDED
        by_tcp = span_of(state, Direction.EGRESS, family, 53)
        assert ask(POD, peer, 53, 1000, 1000) == receiver(by_tcp, "peer 53")
        assert by_tcp.listener == (15053 if captures else 15001)


@pytest.mark.parametrize("backend", BACKENDS)
def test_udp_goes_past_ztunnel(ambient: Path, servers: None, clean: None, unmarked: None, backend: str) -> None:
    state = write(ambient, pod(), backend=backend)
    for family, (_, peer) in ADDRESSES.items():
        command = [
            "nsenter",
            f"--net={NETNS / PEER}",
            sys.executable,
            "-S",
            "-c",
            ANSWERS_UDP,
            peer,
            "8080",
            "peer 8080",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "bound\n"
            span = span_of(state, Direction.EGRESS, family, 8080, protocol=UDP)
            assert asked_by_udp(peer, 8080) == receiver(span, "peer 8080") == "peer 8080"
            process.kill()
        inbound = span_of(state, Direction.INGRESS, family, 8080, protocol=UDP)
        assert (inbound.listener, inbound.port_class) == (0, PortClass.UNGUARDED)
