"""Pods for tests with real Envoys: network namespaces, Istio's redirection, certificates, and an ADS server."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, TypeVar

import envoy
import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2

from meshbridge.identity.model import ProxyClass, Workload
from meshbridge.xds.auth import Caller, TokenKey, mint_token, pod_caller
from meshbridge.xds.bootstrap import BootstrapInputs, bootstrap_json
from meshbridge.xds.names import SECRET_CERTIFICATE, SECRET_ROOT_CA
from meshbridge.xds.resources import sidecar_resources
from meshbridge.xds.server import DeltaServer, start_server
from meshbridge.xds.sidecar import Sidecar
from meshbridge.xds.snapshot import Resource, Snapshot
from meshbridge.xds.types import SECRET

ENVOY = Path(envoy.__path__[0]) / "_bin" / "envoy"
PROXY_UID = 1337
CLONE_NEWNET = 0x40000000
SYS_SETRESUID = 117 if os.uname().machine == "x86_64" else 147

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def enter_netns(name: str) -> None:
    """Move the calling thread into the namespace; sockets it makes stay there."""
    with open(f"/run/netns/{name}") as handle:
        if _libc.setns(handle.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")


def in_netns(name: str, function: Callable[[], T]) -> T:
    """Call ``function`` in a thread that has entered the namespace; sockets it makes stay there."""
    with futures.ThreadPoolExecutor(1, initializer=enter_netns, initargs=(name,)) as pool:
        return pool.submit(function).result()


@dataclass(frozen=True, slots=True)
class Pod:
    """One end of a veth pair with Istio's rules inside."""

    netns: str
    workload: Workload
    v4: IPv4Address
    v6: IPv6Address

    def connect(self, host: str, port: int, timeout_s: float = 5, source: str | None = None) -> socket.socket:
        bind = (source, 0) if source else None
        return in_netns(self.netns, lambda: socket.create_connection((host, port), timeout_s, bind))

    def connect_as_proxy(self, host: str, port: int) -> socket.socket:
        """Connect with the proxy's uid, which redirection lets pass. Only this thread changes: a raw system call."""

        def connect() -> socket.socket:
            if _libc.syscall(SYS_SETRESUID, -1, PROXY_UID, -1):
                raise OSError(ctypes.get_errno(), "setresuid")
            return socket.create_connection((host, port), 5)

        return in_netns(self.netns, connect)

    def listen(self, host: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return in_netns(self.netns, lambda: socket.create_server((host, port), family=family))

    def curl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["nsenter", f"--net=/run/netns/{self.netns}", "curl", "-sS", "-m", "10", "-i", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    def stat(self, name: str) -> int:
        url = f"http://127.0.0.1:15000/stats?filter=^{name.replace('.', '[.]')}$"
        answer = run("nsenter", f"--net=/run/netns/{self.netns}", "curl", "-sS", "-g", url)
        return sum(int(line.rpartition(":")[2]) for line in answer.splitlines())


def workload(name: str, account: str, v4: IPv4Address, v6: IPv6Address, namespace: str = "finance") -> Workload:
    return Workload(
        namespace=namespace,
        name=name,
        uid=f"uid-{name}",
        node="node-a",
        addresses=(v4, v6),
        labels={"app": name},
        service_account=account,
        proxy=ProxyClass.SIDECAR,
    )


@contextlib.contextmanager
def shared_directory() -> Iterator[Path]:
    """A directory that Envoy's user may enter; pytest's own are closed again by every other run of pytest."""
    with tempfile.TemporaryDirectory(prefix="meshbridge-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@contextlib.contextmanager
def pod_pair(prefix: str) -> Iterator[tuple[Pod, Pod]]:
    """Two pods joined by a veth pair; both namespaces are gone afterwards, and no other test run has their names."""
    prefix = f"{prefix}-{os.getpid()}"
    server = Pod(
        f"{prefix}-srv",
        workload("server", "server", ip4 := IPv4Address("10.99.0.1"), ip6 := IPv6Address("fd99::1")),
        ip4,
        ip6,
    )
    client = Pod(
        f"{prefix}-cli",
        workload("client", "client", ip4 := IPv4Address("10.99.0.2"), ip6 := IPv6Address("fd99::2")),
        ip4,
        ip6,
    )
    try:
        for pod in (server, client):
            run("ip", "netns", "add", pod.netns)
        run("ip", "-n", server.netns, "link", "add", "eth0", "type", "veth", "peer", "eth0", "netns", client.netns)
        for pod in (server, client):
            _set_up(pod)
        yield server, client
    finally:
        for pod in (server, client):
            subprocess.run(["ip", "netns", "del", pod.netns], capture_output=True)


def _set_up(pod: Pod) -> None:
    def ip(*words: str) -> None:
        run("ip", "-n", pod.netns, *words)

    ip("link", "set", "lo", "up")
    ip("link", "set", "eth0", "up")
    ip("addr", "add", f"{pod.v4}/24", "dev", "eth0")
    ip("addr", "add", f"{pod.v6}/64", "dev", "eth0", "nodad")
    ip("addr", "add", "::6/128", "dev", "lo")
    for tool, passthrough, localhost in (
        ("iptables", "127.0.0.6/32", "127.0.0.1/32"),
        ("ip6tables", "::6/128", "::1/128"),
    ):
        for rule in (
            "-N ISTIO_INBOUND",
            "-N ISTIO_OUTPUT",
            "-A PREROUTING -p tcp -j ISTIO_INBOUND",
            "-A OUTPUT -j ISTIO_OUTPUT",
            *(f"-A ISTIO_INBOUND -p tcp --dport {port} -j RETURN" for port in (15008, 15090, 15021, 15020)),
            "-A ISTIO_INBOUND -p tcp -j REDIRECT --to-ports 15006",
            f"-A ISTIO_OUTPUT -o lo -s {passthrough} -j RETURN",
            f"-A ISTIO_OUTPUT -o lo ! -d {localhost} -p tcp ! --dport 15008 -m owner --uid-owner {PROXY_UID}"
            " -j REDIRECT --to-ports 15006",
            f"-A ISTIO_OUTPUT -o lo -m owner ! --uid-owner {PROXY_UID} -j RETURN",
            f"-A ISTIO_OUTPUT -m owner --uid-owner {PROXY_UID} -j RETURN",
            f"-A ISTIO_OUTPUT -d {localhost} -j RETURN",
            "-A ISTIO_OUTPUT -p tcp -j REDIRECT --to-ports 15001",
        ):
            run("nsenter", f"--net=/run/netns/{pod.netns}", tool, "-w", "-t", "nat", *rule.split())


class Authority:
    """A certificate authority of the mesh, alive as long as the test."""

    def __init__(self, trust_domain: str = "cluster.local") -> None:
        self.trust_domain = trust_domain
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"test {trust_domain}")])
        self._certificate = (
            self._builder(name, name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def root_pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, namespace: str, account: str, trust_domain: str = "") -> tuple[bytes, bytes]:
        """A certificate chain and its key, both PEM, for one service account."""
        key = ec.generate_private_key(ec.SECP256R1())
        uri = x509.UniformResourceIdentifier(
            f"spiffe://{trust_domain or self.trust_domain}/ns/{namespace}/sa/{account}"
        )
        certificate = (
            self._builder(x509.Name([]), self._certificate.subject, key.public_key())
            .add_extension(x509.SubjectAlternativeName([uri]), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return certificate.public_bytes(serialization.Encoding.PEM), key_pem

    def _builder(self, subject: x509.Name, issuer: x509.Name, key: Any) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(hours=1))
        )

    def secrets(self, subject: Workload) -> Mapping[str, bytes]:
        chain, key = self.issue(subject.namespace, subject.service_account)
        own = secret_pb2.Secret(name=SECRET_CERTIFICATE)
        own.tls_certificate.certificate_chain.inline_bytes = chain
        own.tls_certificate.private_key.inline_bytes = key
        root = secret_pb2.Secret(name=SECRET_ROOT_CA)
        root.validation_context.trusted_ca.inline_bytes = self.root_pem
        return {message.name: message.SerializeToString() for message in (own, root)}


class AdsServer:
    """Our own delta ADS server in a thread, with one pod to serve."""

    def __init__(self, path: Path, pod: Workload, resources: Mapping[str, Mapping[str, bytes]]) -> None:
        self._path, self._resources = path, resources
        self._key = secrets.token_bytes(32)
        self.caller = pod_caller(pod.node, pod.namespace, pod.name, pod.service_account, pod.uid)
        self.token = mint_token(self._key, self.caller, now=datetime.now(UTC))
        self.callers: list[Caller] = []
        self._feeds: list[OnePod] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(self._start())

    def open(self, caller: Caller, wake: Callable[[], None]) -> OnePod:
        self.callers.append(caller)
        self._feeds.append(feed := OnePod(_snapshot(self._resources), wake))
        return feed

    def update(self, resources: Mapping[str, Mapping[str, bytes]]) -> None:
        """Serve these from now on, to streams that are open too."""

        async def put() -> None:
            self._resources = resources
            for feed in self._feeds:
                feed.snapshot = _snapshot(resources)
                feed.wake()

        self._call(put())

    def stop(self) -> None:
        self._call(self._server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> grpc.aio.Server:
        return await start_server(DeltaServer(TokenKey(self._key), self), f"unix:{self._path}")

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


@dataclass
class OnePod:
    """The feed of the only client."""

    snapshot: Snapshot | None
    wake: Callable[[], None]
    refusal: str = ""

    def close(self) -> None:
        pass


def _snapshot(resources: Mapping[str, Mapping[str, bytes]]) -> Snapshot:
    return Snapshot(
        {type_url: {name: Resource.of(body) for name, body in bodies.items()} for type_url, bodies in resources.items()}
    )


@contextlib.contextmanager
def sidecar_envoy(
    pod: Pod, sidecar: Sidecar, authority: Authority, directory: Path, authz: Path
) -> Iterator[AdsServer]:
    """Run the pod's Envoy as uid 1337 in its namespace, configured over ADS, until it is ready; kill it afterwards."""
    xds_socket = directory / f"{pod.workload.name}-xds.sock"
    ads = AdsServer(xds_socket, pod.workload, {**sidecar_resources(sidecar), SECRET: authority.secrets(pod.workload)})
    text = bootstrap_json(BootstrapInputs(pod.workload, ads.token, str(xds_socket), str(authz)))
    try:
        with envoy_process(pod, text, directory):
            yield ads
    finally:
        ads.stop()


@contextlib.contextmanager
def envoy_process(pod: Pod, bootstrap_text: str, directory: Path, *options: str) -> Iterator[Path]:
    """Run an Envoy as uid 1337 in the pod's namespace until it is ready; kill it afterwards. Yields its log."""
    bootstrap = directory / f"{pod.workload.name}.json"
    bootstrap.write_text(bootstrap_text)
    bootstrap.chmod(0o600)
    os.chown(bootstrap, PROXY_UID, PROXY_UID)
    log_path = directory / f"{pod.workload.name}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                *("nsenter", f"--net=/run/netns/{pod.netns}"),
                *("setpriv", f"--reuid={PROXY_UID}", f"--regid={PROXY_UID}", "--clear-groups"),
                *(str(ENVOY), "-c", str(bootstrap), "--concurrency", "1", "-l", "info", "--use-dynamic-base-id"),
                *options,
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_ready(pod, process, log_path)
            yield log_path
        finally:
            process.kill()
            process.wait()


def _wait_ready(pod: Pod, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        answer = subprocess.run(
            ["nsenter", f"--net=/run/netns/{pod.netns}", "curl", "-s", "http://127.0.0.1:15000/ready"],
            capture_output=True,
            text=True,
        )
        if answer.stdout.strip() == "LIVE":
            return
        time.sleep(0.1)
    raise AssertionError(f"envoy of {pod.workload.name} is not ready:\n{log.read_text()[-4000:]}")


@contextlib.contextmanager
def tcp_server(pod: Pod, host: str, port: int, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Serve each connection in a thread of its own with ``serve``, which need not close it."""
    listener = pod.listen(host, port)

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            serve(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=handle, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
