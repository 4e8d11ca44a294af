"""One real Envoy in a network namespace with every pod's address, and clients that ask it.

Each server has a listener for each of its ports; what stands in their filter chains the tests say.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from envoy_data_plane.envoy.config.core.v3 import DataSource
from envoy_data_plane.envoy.config.listener.v3 import Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter
from envoy_data_plane.envoy.config.route.v3 import (
    DirectResponseAction,
    Route,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)
from envoy_data_plane.envoy.extensions.filters.listener.tls_inspector.v3 import TlsInspector
from envoy_data_plane.envoy.extensions.filters.network.echo.v3 import Echo
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpConnectionManager
from envoy_data_plane.google.protobuf import Any as AnyMessage
from envoy_policies import token
from envoy_world import CLIENTS, MeshOptions, Point, Server
from meshnet import ENVOY, AdsServer, Authority, enter_netns, run

from meshbridge.identity.model import ProxyClass, Workload
from meshbridge.xds.bootstrap import BootstrapInputs, bootstrap, static_cluster
from meshbridge.xds.filters import router
from meshbridge.xds.names import CLUSTER_INBOUND
from meshbridge.xds.transport import downstream_tls, socket_address
from meshbridge.xds.types import CLUSTER, LISTENER, SECRET

UPSTREAM = ("127.0.0.1", 18000)
CLIENT_THREADS = 4
GREETING = b"conformance"
TIMEOUT_S = 10


@dataclass(frozen=True)
class Chains:
    """The network filters of one port: on connections of mesh peers, and in the clear; None closes those."""

    tls: Sequence[Filter] | None
    plaintext: Sequence[Filter] | None


def echo() -> Filter:
    """The application behind a TCP port: a byte that comes back was let through."""
    return Filter(name="envoy.filters.network.echo", typed_config=AnyMessage.pack(Echo()))


def listener(server: Server, port: int, chains: Chains, options: MeshOptions) -> Listener:
    """A port of a server."""
    tls = downstream_tls(options.trust_domains, ())
    found = []
    if chains.tls is not None:
        match = FilterChainMatch(transport_protocol="tls")
        found.append(FilterChain(filter_chain_match=match, filters=list(chains.tls), transport_socket=tls))
    if chains.plaintext is not None:
        match = FilterChainMatch(transport_protocol="raw_buffer")
        found.append(FilterChain(filter_chain_match=match, filters=list(chains.plaintext)))
    inspector = ListenerFilter(name="tls_inspector", typed_config=AnyMessage.pack(TlsInspector()))
    return Listener(
        name=f"{server.name}-{port}",
        address=socket_address(server.address, port),
        filter_chains=found,
        listener_filters=[inspector],
    )


def _upstream() -> Listener:
    """The application behind every HTTP port."""
    answer = DirectResponseAction(status=200, body=DataSource(inline_string="ok"))
    route = Route(match=RouteMatch(prefix="/"), direct_response=answer)
    hosts = [VirtualHost(name="application", domains=["*"], routes=[route])]
    manager = HttpConnectionManager(
        stat_prefix="application",
        route_config=RouteConfiguration(name="application", virtual_hosts=hosts),
        http_filters=[router()],
    )
    filters = [Filter(name="hcm", typed_config=AnyMessage.pack(manager))]
    return Listener(name="application", address=socket_address(*UPSTREAM), filter_chains=[FilterChain(filters=filters)])


@dataclass
class Proxy:
    """A running Envoy; ``ask`` tells what it does with points."""

    ads: AdsServer
    options: MeshOptions
    netns: str
    directory: Path
    authority: Authority
    secrets: Mapping[str, bytes]
    served: Mapping[str, bytes] = field(default_factory=dict)
    contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, chains: Mapping[tuple[Server, int], Chains]) -> None:
        """Listen with these and nothing else; returns when all of them are in force."""
        listeners = [_upstream(), *(listener(server, port, c, self.options) for (server, port), c in chains.items())]
        served = {each.name: bytes(each) for each in listeners}
        if served == self.served:
            return
        self.served = served
        before = self._stat("listener_manager.lds.update_success")
        cluster = static_cluster(CLUSTER_INBOUND, socket_address(*UPSTREAM))
        self.ads.update({CLUSTER: {CLUSTER_INBOUND: bytes(cluster)}, LISTENER: served, SECRET: self.secrets})
        self._wait(
            lambda: (
                self._stat("listener_manager.lds.update_success") > before
                and self._stat("listener_manager.total_listeners_warming") == 0
                and self._stat("listener_manager.total_listeners_active") >= len(listeners)
            )
        )

    def ask(self, points: Sequence[Point]) -> list[bool]:
        """Whether each connection or request gets to the application."""
        groups = [list(group) for _, group in groupby(points, key=lambda point: point.connection)]
        with ThreadPoolExecutor(CLIENT_THREADS, initializer=enter_netns, initargs=(self.netns,)) as pool:
            return [answer for answers in pool.map(self._ask_connection, groups) for answer in answers]

    def _ask_connection(self, points: list[Point]) -> list[bool]:
        answers: list[bool] = []
        while len(answers) < len(points):
            asked = points[len(answers) :]
            with contextlib.ExitStack() as stack:
                connection = self._connect(stack, asked[0])
                if connection is None:
                    return [*answers, *(False for _ in asked)]
                if not asked[0].is_http:
                    answers.append(_echoes(connection))
                    continue
                for point in asked:
                    allowed, keeps = _request(connection, point)
                    answers.append(allowed)
                    if not keeps:
                        break
        return answers

    def _connect(self, stack: contextlib.ExitStack, point: Point) -> socket.socket | None:
        """The connection, or None where Envoy has no filter chain for it."""
        flow = point.flow
        raw = socket.create_connection((flow["dst_ip"], flow["port"]), TIMEOUT_S, (flow["src_ip"], 0))
        stack.enter_context(raw)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if flow["peer_principal"] is None:
            return raw
        context = self._context(flow["peer_principal"])
        try:
            return stack.enter_context(context.wrap_socket(raw, server_hostname=flow["sni"] or None))
        except (ssl.SSLEOFError, ConnectionError):
            return None

    def _context(self, principal: str) -> ssl.SSLContext:
        with self.lock:
            if principal not in self.contexts:
                domain, _, namespace, _, account = principal.removeprefix("spiffe://").split("/")
                pem = self.directory / f"{domain}-{namespace}-{account}.pem"
                pem.write_bytes(b"".join(self.authority.issue(namespace, account, domain)))
                context = ssl.create_default_context(cadata=self.authority.root_pem.decode())
                context.check_hostname = False
                context.load_cert_chain(pem)
                self.contexts[principal] = context
            return self.contexts[principal]

    def _stat(self, name: str) -> int:
        answer = run(
            "curl", "-sS", "--unix-socket", str(self.directory / "admin.sock"), f"http://a/stats?filter=^{name}$"
        )
        return int(answer.rpartition(":")[2] or 0)

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            log = (self.directory / "envoy.log").read_text()
            assert time.monotonic() < deadline, f"Envoy does not take the configuration:\n{log[-4000:]}"
            time.sleep(0.05)


def _echoes(connection: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
        connection.sendall(GREETING)
        return connection.recv(len(GREETING)) == GREETING
    return False


def _request(connection: socket.socket, point: Point) -> tuple[bool, bool]:
    """Whether the request was answered by the application, and whether the connection can be used again."""
    http = point.flow["http"]
    lines = [f"{http['method']} {http['path']} HTTP/1.1", f"host: {http['host']}", "content-length: 0"]
    for name, values in http["headers"].items():
        lines += [f"{name}: {value}" for value in (values if isinstance(values, list) else [values])]
    if point.claims is not None:
        lines.append(f"authorization: Bearer {token(point.claims, good=point.signed)}")
    received = b""
    with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        while b"\r\n\r\n" not in received and (chunk := connection.recv(65536)):
            received += chunk
    if not received:
        return False, False
    head, _, body = received.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in fields)
    length = int(headers["content-length"])
    while len(body) < length and (chunk := connection.recv(65536)):
        body += chunk
    code = int(status.split(" ")[1])
    assert code in (200, 401, 403), f"{status} for {point}"
    return code == 200, headers.get("connection") != "close"


@contextlib.contextmanager
def envoy_proxy(options: MeshOptions, servers: Iterable[Server]) -> Iterator[Proxy]:
    """Run an Envoy in a namespace that has the addresses of servers and clients; both are gone afterwards."""
    netns = f"mbconf-{os.getpid()}"
    addresses = [server.address for server in servers] + [address for each in CLIENTS for address in each.addresses]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshbridge-conformance-")))
        run("ip", "netns", "add", netns)
        stack.callback(subprocess.run, ["ip", "netns", "del", netns], capture_output=True)
        batch = ["link set lo up"]
        batch += [f"addr add {a}/128 dev lo nodad" if ":" in a else f"addr add {a}/32 dev lo" for a in addresses]
        subprocess.run(["ip", "-n", netns, "-batch", "-"], input="\n".join(batch), text=True, check=True)
        authority = Authority(options.trust_domain)
        pod = Workload("conformance", "envoy", "uid-envoy", "one", (), proxy=ProxyClass.SIDECAR)
        secrets = dict(authority.secrets(pod))
        ads = AdsServer(directory / "xds.sock", pod, {LISTENER: {}, CLUSTER: {}, SECRET: secrets})
        stack.callback(ads.stop)
        stack.enter_context(_envoy(netns, directory, pod, ads))
        yield Proxy(ads, options, netns, directory, authority, secrets)


@contextlib.contextmanager
def _envoy(netns: str, directory: Path, pod: Workload, ads: AdsServer) -> Iterator[None]:
    config = bootstrap(BootstrapInputs(pod, ads.token, str(directory / "xds.sock"), str(directory / "authz.sock")))
    assert config.static_resources is not None
    config.static_resources.listeners = []
    text = config.to_dict() | {"admin": {"address": {"pipe": {"path": str(directory / "admin.sock")}}}}
    (directory / "bootstrap.json").write_text(json.dumps(text))
    command = ["nsenter", f"--net=/run/netns/{netns}", str(ENVOY), "-c", str(directory / "bootstrap.json")]
    with (directory / "envoy.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 30
        while not ads.callers:
            assert time.monotonic() < deadline, (directory / "envoy.log").read_text()[-4000:]
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()
