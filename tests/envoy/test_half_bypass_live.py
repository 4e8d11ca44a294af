"""Who captures, times what PeerAuthentication says: two real Envoys, Istio's own rules, and the bytes that arrive.

Every row of ISTIO.md's table is a port of its own, so that all rows stand at once: each side's annotation excludes its
ports, Istio's init container's rules are made from it, and what is computed of a row beforehand comes from those rules.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from meshnet import Pod, envoy_process, in_netns, pod_pair, shared_directory, tcp_server
from test_mesh_live import killed_afterwards, manifest, process, until

from meshbridge.bypass.halfreport import client_captures, half_bypasses
from meshbridge.bypass.halves import Delivered, Delivery, Side, delivery
from meshbridge.bypass.inventory import Inventory, inventory
from meshbridge.datapath.redirect import RedirectReader
from meshbridge.demo import istio_init
from meshbridge.identity.model import IpFamily
from meshbridge.policy.capture import PortClass
from meshbridge.policy.lowering import guard_of
from meshbridge.policy.mesh import DEFAULT_MESH
from meshbridge.policy.model import Document
from meshbridge.xds.auth import load_or_create_key, mint_token, node_caller, pod_caller
from meshbridge.xds.bootstrap import BootstrapInputs, bootstrap_json

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("envoy")]

RAW = b"hello from the client\n"
HTTP = b"GET /half HTTP/1.1\r\nhost: server\r\nconnection: close\r\n\r\n"
ANSWERS = {RAW: b"ok", HTTP: b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"}
FIRST_PORT = 9101
OUR_SIDECARS = replace(DEFAULT_MESH, own_sidecars=True)
MTLS, PLAINTEXT, BROKEN = Delivered.MTLS, Delivered.PLAINTEXT, Delivered.BROKEN
NOTHING, REQUEST, HELLO = "nothing", "the request", "a TLS hello"


@dataclass(frozen=True)
class Row:
    """Which sides capture the port, its mode, and what then happens; ``arrives`` at the application."""

    client_captures: bool
    server_captures: bool
    mode: str
    outcome: Delivered
    arrives: str


TABLE = {
    "both capture, STRICT": Row(True, True, "STRICT", MTLS, REQUEST),
    "both capture, PERMISSIVE": Row(True, True, "PERMISSIVE", MTLS, REQUEST),
    "both capture, DISABLE": Row(True, True, "DISABLE", PLAINTEXT, REQUEST),
    "only the client captures, STRICT": Row(True, False, "STRICT", BROKEN, HELLO),
    "only the client captures, PERMISSIVE": Row(True, False, "PERMISSIVE", BROKEN, HELLO),
    "only the client captures, DISABLE": Row(True, False, "DISABLE", PLAINTEXT, REQUEST),
    "only the server captures, STRICT": Row(False, True, "STRICT", BROKEN, NOTHING),
    "only the server captures, PERMISSIVE": Row(False, True, "PERMISSIVE", PLAINTEXT, REQUEST),
    "only the server captures, DISABLE": Row(False, True, "DISABLE", PLAINTEXT, REQUEST),
    "neither captures, STRICT": Row(False, False, "STRICT", PLAINTEXT, REQUEST),
    "neither captures, PERMISSIVE": Row(False, False, "PERMISSIVE", PLAINTEXT, REQUEST),
    "neither captures, DISABLE": Row(False, False, "DISABLE", PLAINTEXT, REQUEST),
}
ETH_P_ALL, SYN = 3, 2
PORTS = {name: FIRST_PORT + number for number, name in enumerate(TABLE)}


def is_tls_hello(data: bytes) -> bool:
    """A TLS record of type handshake that starts with a ClientHello."""
    return len(data) > 5 and data[:2] == b"\x16\x03" and data[5] == 1


@dataclass
class Application:
    """The server's application: what it was sent, by port, in order of connections."""

    received: dict[int, list[bytes]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        data = connection.recv(65536)
        with self._lock:
            self.received.setdefault(connection.getsockname()[1], []).append(data)
        if data.startswith(b"GET "):
            connection.sendall(ANSWERS[HTTP])
        elif data == RAW:
            connection.sendall(ANSWERS[RAW])


class Wire:
    """What came in by a pod's interface, before the pod's own rules and Envoy saw it."""

    def __init__(self, pod: Pod) -> None:
        self._socket = in_netns(pod.netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
        self._socket.bind(("eth0", ETH_P_ALL))
        self._socket.setblocking(False)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def read(self, port: int) -> list[bytes]:
        """What each connection to ``port`` carried that was opened since the last call."""
        streams: dict[bytes, bytes] = {}
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, address = self._socket.recvfrom(65536)
                segment = tcp_segment(packet)
                if address[2] == socket.PACKET_OUTGOING or int.from_bytes(segment[2:4], "big") != port:
                    continue
                if segment[13] & SYN:
                    streams[segment[:2]] = b""
                elif segment[:2] in streams:
                    streams[segment[:2]] += segment[(segment[12] >> 4) * 4 :]
        return list(streams.values())


def tcp_segment(packet: bytes) -> bytes:
    """The TCP segment in an IP packet without extension headers; empty for anything else."""
    if packet[0] >> 4 == 4:
        protocol, start, end = packet[9], (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
    else:
        protocol, start, end = packet[6], 40, 40 + int.from_bytes(packet[4:6], "big")
    return packet[start:end] if protocol == socket.IPPROTO_TCP else b""


@dataclass
class Halves:
    server: Pod
    client: Pod
    application: Application
    wire: Wire
    documents: list[Document]

    def look(self) -> Inventory:
        """The cluster as the product sees it, with the rules that are in the pods' namespaces."""
        reader = RedirectReader()
        seen = {pod.workload.key: reader.read(f"/run/netns/{pod.netns}") for pod in (self.server, self.client)}
        return inventory(self.documents, mesh=OUR_SIDECARS, seen=seen)

    def predict(self, port: int, family: IpFamily) -> Delivery:
        """What is computed of a connection before anybody makes it."""
        known = self.look()
        workloads = {workload.key: workload for workload in known.workloads}
        server, client = workloads[self.server.workload.key], workloads[self.client.workload.key]
        address = [a for a in server.addresses if IpFamily.of(a) is family]
        captured = known.states[server.key].inbound()[family].at(port) is PortClass.CAPTURED
        mode, _ = guard_of(server, known.policies.selecting(server)).mtls.at(port)
        found = delivery(Side(True, client_captures(known, client, address, port)), Side(True, captured), mode)
        assert found is not None
        return found

    def ask(self, port: int, family: IpFamily, request: bytes) -> tuple[bytes, list[bytes], list[bytes]]:
        """What came back to the client, what connections carried on the wire, what the application's were sent."""
        self.application.received.pop(port, None)
        self.wire.read(port)
        answer = b""
        with self.client.connect(str(self.server.v4 if family is IpFamily.IPV4 else self.server.v6), port) as sock:
            sock.settimeout(10)
            with contextlib.suppress(ConnectionError):
                sock.sendall(request)
                while part := sock.recv(4096):
                    answer += part
        return answer, self.wire.read(port), self.application.received.get(port, [])


def annotations() -> tuple[dict[str, str], dict[str, str]]:
    """The server's and the client's: each excludes the ports of the rows where it does not capture."""
    inbound = [str(PORTS[name]) for name, row in TABLE.items() if not row.server_captures]
    outbound = [str(PORTS[name]) for name, row in TABLE.items() if not row.client_captures]
    return (
        {istio_init.TRAFFIC + "excludeInboundPorts": ",".join(inbound)},
        {istio_init.TRAFFIC + "excludeOutboundPorts": ",".join(outbound)},
    )


def pod_manifest(pod: Pod, extra: dict[str, str]) -> dict[str, Any]:
    found = manifest(pod, pod.workload.name)
    found["metadata"]["annotations"] |= extra
    found["spec"]["initContainers"][0]["args"] = list(istio_init.render(extra, pod.workload.key))
    found["spec"]["containers"][0]["ports"] = [{"containerPort": port} for port in PORTS.values()]
    return found


def redirect(pod: Pod, pod_object: dict[str, Any]) -> None:
    """What Istio's init container does with the arguments of this pod, for both families."""
    arguments = istio_init.parse(pod_object["spec"]["initContainers"][0]["args"][1:])
    for family, tool in ((IpFamily.IPV4, "iptables-restore"), (IpFamily.IPV6, "ip6tables-restore")):
        command = ["nsenter", f"--net=/run/netns/{pod.netns}", tool, "-w"]
        text = istio_init.rules(arguments, family)
        subprocess.run(command, input=text, text=True, check=True, capture_output=True)


def authentication() -> dict[str, Any]:
    modes = {str(PORTS[name]): {"mode": row.mode} for name, row in TABLE.items() if row.mode != "STRICT"}
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "modes", "namespace": "finance"},
        "spec": {
            "selector": {"matchLabels": {"app": "server"}}, "mtls": {"mode": "STRICT"}, "portLevelMtls": modes,
        },
    }  # fmt: skip


def documents_of(objects: list[dict[str, Any]]) -> list[Document]:
    return [
        Document(o["kind"], o["apiVersion"], o["metadata"].get("namespace", ""), o["metadata"]["name"], o)
        for o in objects
    ]


@pytest.fixture(scope="module")
def halves() -> Iterator[Halves]:
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(shared_directory())
        server, client = stack.enter_context(pod_pair("mbhlf"))
        of_server, of_client = annotations()
        pods = {pod: pod_manifest(pod, extra) for pod, extra in ((server, of_server), (client, of_client))}
        for pod, pod_object in pods.items():
            redirect(pod, pod_object)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "finance"}}
        objects = [namespace, authentication(), *pods.values()]
        _run_mesh(stack, directory, (server, client), objects)
        application = Application()
        for address in (str(server.v4), str(server.v6)):
            for port in PORTS.values():
                stack.enter_context(tcp_server(server, address, port, application.serve))
        wire = stack.enter_context(Wire(server))
        found = Halves(server, client, application, wire, documents_of(objects))
        for family in IpFamily:
            until(
                lambda family=family: found.ask(FIRST_PORT, family, RAW)[0] == ANSWERS[RAW],  # type: ignore[misc]
                "the Envoys know each other",
            )
        yield found


def _run_mesh(
    stack: contextlib.ExitStack, directory: Path, pods: tuple[Pod, ...], objects: list[dict[str, Any]]
) -> None:
    manifests, state = directory / "manifests", directory / "state"
    xds, authz = directory / "xds.sock", directory / "authz.sock"
    manifests.mkdir()
    state.mkdir(mode=0o700)
    (manifests / "mesh.yaml").write_text(yaml.safe_dump_all(objects))
    key = load_or_create_key(state / "token.key")
    arguments: tuple[str, ...]
    arguments = ("controller", "--manifests", str(manifests), "--listen", f"unix:{xds}", "--state-dir", str(state))
    stack.enter_context(killed_afterwards([process(directory, "controller", *arguments)]))
    until(xds.exists, "controller listens")
    node_token = directory / "node.token"
    node_token.write_text(mint_token(key, node_caller("node-a"), now=datetime.now(UTC)))
    arguments = ("authz", "--node", "node-a", "--controller", f"unix:{xds}", "--token-file", str(node_token))
    arguments += ("--listen", f"unix:{authz}", "--metrics", "127.0.0.1:0")
    stack.enter_context(killed_afterwards([process(directory, "authz", *arguments)]))
    until(authz.exists, "authz listens")
    for pod in pods:
        w = pod.workload
        caller = pod_caller(w.node, w.namespace, w.name, w.service_account, w.uid)
        token = mint_token(key, caller, now=datetime.now(UTC))
        inputs = BootstrapInputs(w, token, str(xds), str(authz))
        stack.enter_context(envoy_process(pod, bootstrap_json(inputs), directory))


@pytest.mark.parametrize("request_sent", [RAW, HTTP], ids=["tcp", "http"])
@pytest.mark.parametrize("family", IpFamily, ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("name", TABLE)
def test_what_arrives_is_what_was_computed(halves: Halves, name: str, family: IpFamily, request_sent: bytes) -> None:
    row, port = TABLE[name], PORTS[name]
    predicted = halves.predict(port, family)
    answer, wire, received = halves.ask(port, family, request_sent)

    assert predicted.outcome is row.outcome
    assert predicted.half == (row.client_captures != row.server_captures)
    assert observed(wire, received) == (row.outcome, row.arrives), (answer, [data[:16] for data in wire], received)
    assert (b"ok" in answer) == (row.outcome is not BROKEN), answer
    if row.outcome is BROKEN:
        assert ("TLS hello" in predicted.why) == (row.arrives == HELLO)
        assert ("resets" in predicted.why) == (row.arrives == NOTHING)


def observed(wire: list[bytes], received: list[bytes]) -> tuple[Delivered, str]:
    """What became of one connection, by the bytes alone."""
    assert len(wire) == 1, wire
    if not any(received):
        return BROKEN, NOTHING
    if any(map(is_tls_hello, received)):
        return BROKEN, HELLO
    assert all(data == RAW or data.startswith(b"GET /half ") for data in received), received
    return (MTLS if all(map(is_tls_hello, wire)) else PLAINTEXT), REQUEST


def test_every_half_is_reported_beforehand_and_nothing_else_is(halves: Halves) -> None:
    reported = {half.port: half for half in half_bypasses(halves.look(), possible=True)}
    rows = {PORTS[name]: row for name, row in TABLE.items() if row.client_captures != row.server_captures}
    assert {port: half.delivery.outcome for port, half in reported.items()} == {
        port: row.outcome for port, row in rows.items()
    }
    assert {half.clients for half in reported.values()} == {(halves.client.workload.key,)}
    assert {half.server for half in reported.values()} == {halves.server.workload.key}
