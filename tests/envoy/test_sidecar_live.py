"""Two real Envoys with our listeners in two namespaces with Istio's redirection; the judge is a script in the test."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from google.rpc import status_pb2
from meshnet import AdsServer, Authority, Pod, pod_pair, shared_directory, sidecar_envoy, tcp_server

from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import EffectiveMtls, JwtRule, MtlsMode
from meshbridge.policy.model import Origin
from meshbridge.xds.sidecar import MtlsDestination, Sidecar

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("envoy")]

ORIGIN = Origin("RequestAuthentication", "finance", "jwt")
GREETING = b"220 hello from the server\n"

HTTP, TCP, AUTO, STRICT_TCP, PLAIN_HTTP, GREETER, MYSQL = 8080, 9000, 7000, 9443, 8081, 9025, 3306
AUTO_ECHO = 7007
JWT_KEY = ec.generate_private_key(ec.SECP256R1())


@dataclass
class Judge(external_auth_pb2_grpc.AuthorizationServicer):
    """Answers as the test says and keeps every question."""

    path: Path
    allow: Callable[[Any], bool] = lambda request: True
    questions: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        external_auth_pb2_grpc.add_AuthorizationServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self.path}")
        self._server.start()
        self.path.chmod(0o666)

    def stop(self) -> None:
        self._server.stop(0).wait()

    def Check(self, request: Any, context: Any) -> Any:
        self.questions.append(request)
        code = 0 if self.allow(request) else 7
        return external_auth_pb2.CheckResponse(status=status_pb2.Status(code=code))


class _Http(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps({"path": self.path, "headers": dict(self.headers), "peer": self.client_address[0]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def http_app(connection: socket.socket) -> None:
    _Http(connection, connection.getpeername(), None)  # type: ignore[arg-type]


def echo_app(connection: socket.socket) -> None:
    while data := connection.recv(4096):
        connection.sendall(data)


def greeting_app(connection: socket.socket) -> None:
    connection.sendall(GREETING)
    echo_app(connection)


@dataclass
class Mesh:
    server: Pod
    client: Pod
    judge: Judge
    authority: Authority
    ads: AdsServer

    def get(self, port: int, *arguments: str, v6: bool = False) -> tuple[int, str]:
        host = f"[{self.server.v6}]" if v6 else str(self.server.v4)
        result = self.client.curl("-g", f"http://{host}:{port}/", *arguments)
        status = int(result.stdout.split()[1]) if result.stdout else 0
        return status, result.stdout or result.stderr


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with shared_directory() as made:
        yield made


@pytest.fixture(scope="module")
def mesh(directory: Path) -> Iterator[Mesh]:
    judge = Judge(directory / "authz.sock")
    authority = Authority()
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(JWT_KEY.public_key()))
    rule = JwtRule("https://issuer.test", ORIGIN, jwks=json.dumps({"keys": [{**public, "kid": "k1"}]}))
    keyless = JwtRule("https://keyless.test", ORIGIN, jwks="{broken")
    with pod_pair("mbenv") as (server, client):
        server_side = Sidecar(
            server.workload,
            mtls=EffectiveMtls(
                MtlsMode.PERMISSIVE,
                None,
                {STRICT_TCP: (MtlsMode.STRICT, ORIGIN), PLAIN_HTTP: (MtlsMode.DISABLE, ORIGIN)},
            ),
            protocols={
                HTTP: AppProtocol.HTTP,
                PLAIN_HTTP: AppProtocol.HTTP,
                TCP: AppProtocol.TCP,
                GREETER: AppProtocol.TCP,
                STRICT_TCP: AppProtocol.TCP,
                MYSQL: AppProtocol.TCP,
            },
            server_first_ports=frozenset({MYSQL}),
            jwt_rules=(rule, keyless),
            restricted=True,
        )
        to_server = [
            MtlsDestination(address, except_ports=frozenset({PLAIN_HTTP})) for address in (server.v4, server.v6)
        ]
        client_side = Sidecar(client.workload, destinations=tuple(to_server))
        apps = {HTTP: http_app, PLAIN_HTTP: http_app, AUTO: http_app, STRICT_TCP: echo_app, TCP: echo_app}
        apps |= {AUTO_ECHO: echo_app, GREETER: greeting_app, MYSQL: greeting_app}
        with (
            sidecar_envoy(server, server_side, authority, directory, judge.path) as ads,
            sidecar_envoy(client, client_side, authority, directory, judge.path),
        ):
            with contextlib.ExitStack() as stack:
                for port, app in apps.items():
                    for host in (str(server.v4), str(server.v6)):
                        stack.enter_context(tcp_server(server, host, port, app))
                yield Mesh(server, client, judge, authority, ads)
            for pod in (server, client):
                assert pod.stat("cluster_manager.cds.update_rejected") == 0
                assert pod.stat("listener_manager.lds.update_rejected") == 0
    judge.stop()


@pytest.fixture(autouse=True)
def forget_questions(mesh: Mesh) -> None:
    mesh.judge.questions.clear()
    mesh.judge.allow = lambda request: True


@pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
def test_sidecar_to_sidecar_is_mtls_with_the_clients_principal(mesh: Mesh, v6: bool) -> None:
    status, answer = mesh.get(HTTP, v6=v6)
    assert status == 200, answer
    [question] = mesh.judge.questions
    attributes = question.attributes
    assert attributes.source.principal == "spiffe://cluster.local/ns/finance/sa/client"
    assert attributes.destination.principal == "spiffe://cluster.local/ns/finance/sa/server"
    assert attributes.destination.address.socket_address.port_value == HTTP
    assert attributes.destination.address.socket_address.address == str(mesh.server.v6 if v6 else mesh.server.v4)
    assert attributes.source.address.socket_address.address == str(mesh.client.v6 if v6 else mesh.client.v4)


def test_permissive_port_takes_plaintext_without_a_principal(mesh: Mesh) -> None:
    with plaintext(mesh, HTTP) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    [question] = mesh.judge.questions
    assert question.attributes.source.principal == ""


def own_hello() -> bytes:
    """What a client of TLS that is no part of the mesh sends first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="elsewhere.test")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


FIRST_BYTES = {"no HTTP": b"hello\n", "a TLS hello that is not the mesh's": own_hello()}


@pytest.mark.parametrize("first", FIRST_BYTES.values(), ids=FIRST_BYTES.keys())
@pytest.mark.parametrize("port", [TCP, AUTO_ECHO], ids=["declared", "undeclared"])
def test_permissive_port_passes_on_what_it_does_not_know(mesh: Mesh, port: int, first: bytes) -> None:
    with plaintext(mesh, port) as connection:
        connection.sendall(first)
        assert read_exactly(connection, len(first)) == first
    [question] = mesh.judge.questions
    assert question.attributes.source.principal == ""


def plaintext(mesh: Mesh, port: int) -> socket.socket:
    """A connection past the client's sidecar, as a process with the proxy's uid makes one."""
    return mesh.client.connect_as_proxy(str(mesh.server.v4), port)


def test_strict_port_closes_plaintext_without_a_byte(mesh: Mesh) -> None:
    before = mesh.server.stat("listener.inbound.no_filter_chain_match")
    with plaintext(mesh, STRICT_TCP) as connection:
        connection.sendall(b"hello\n")
        assert received(connection) == b""
    assert mesh.judge.questions == []
    assert mesh.server.stat("listener.inbound.no_filter_chain_match") == before + 1


def test_strict_port_takes_mtls(mesh: Mesh) -> None:
    with mesh.client.connect(str(mesh.server.v4), STRICT_TCP) as connection:
        connection.sendall(b"hello\n")
        assert connection.recv(100) == b"hello\n"
    [question] = mesh.judge.questions
    assert question.attributes.source.principal == "spiffe://cluster.local/ns/finance/sa/client"


@pytest.mark.parametrize("authority", [Authority(), Authority("elsewhere.test")], ids=["another CA", "foreign domain"])
def test_certificate_of_another_authority_is_refused(mesh: Mesh, tmp_path: Path, authority: Authority) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        own_tls(mesh, tmp_path, STRICT_TCP, authority.issue("finance", "client"))
    assert mesh.judge.questions == []


def test_tls_without_a_certificate_is_refused_in_strict_mode(mesh: Mesh, tmp_path: Path) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        own_tls(mesh, tmp_path, STRICT_TCP, None)
    assert mesh.judge.questions == []


def test_own_tls_client_with_a_mesh_certificate_is_known_by_it(mesh: Mesh, tmp_path: Path) -> None:
    assert own_tls(mesh, tmp_path, STRICT_TCP, mesh.authority.issue("finance", "stolen")) == b"hello\n"
    [question] = mesh.judge.questions
    assert question.attributes.source.principal == "spiffe://cluster.local/ns/finance/sa/stolen"


def own_tls(mesh: Mesh, tmp_path: Path, port: int, identity: tuple[bytes, bytes] | None) -> bytes:
    """Speak TLS past the client's sidecar, without ALPN; what the echo answers."""
    context = ssl.create_default_context(cadata=mesh.authority.root_pem.decode())
    context.check_hostname = False
    if identity:
        for name, pem in zip(("chain.pem", "key.pem"), identity, strict=True):
            (tmp_path / name).write_bytes(pem)
        context.load_cert_chain(tmp_path / "chain.pem", tmp_path / "key.pem")
    with context.wrap_socket(plaintext(mesh, port)) as tls:
        tls.sendall(b"hello\n")
        data = tls.recv(100)
        if not data:
            raise ConnectionError("closed")
        return data


def test_port_with_mtls_disabled_gets_plaintext_from_the_clients_sidecar(mesh: Mesh) -> None:
    status, answer = mesh.get(PLAIN_HTTP)
    assert status == 200, answer
    assert mesh.judge.questions[0].attributes.source.principal == ""


def test_undeclared_port_is_judged_as_http_when_http_is_spoken(mesh: Mesh) -> None:
    status, answer = mesh.get(AUTO)
    assert status == 200, answer
    [question] = mesh.judge.questions
    assert question.attributes.request.http.method == "GET"
    assert question.attributes.source.principal == "spiffe://cluster.local/ns/finance/sa/client"


def test_the_application_sees_the_connection_from_127_0_0_6(mesh: Mesh) -> None:
    _, answer = mesh.get(HTTP)
    assert '"peer": "127.0.0.6"' in answer


def token(scope: str = "transactions", issuer: str = "https://issuer.test", **overrides: Any) -> str:
    claims = {"iss": issuer, "sub": "me", "scope": scope, "exp": int(time.time()) + 60} | overrides
    return jwt.encode(claims, JWT_KEY, algorithm="ES256", headers={"kid": "k1"})


def test_valid_token_reaches_the_judge_as_claims_and_not_the_application(mesh: Mesh) -> None:
    status, answer = mesh.get(HTTP, "-H", f"authorization: Bearer {token('read transactions')}")
    assert status == 200, answer
    metadata = mesh.judge.questions[0].attributes.metadata_context.filter_metadata["envoy.filters.http.jwt_authn"]
    payload = metadata.fields["payload"].struct_value
    assert payload.fields["sub"].string_value == "me"
    assert [word.string_value for word in payload.fields["scope"].list_value.values] == ["read", "transactions"]
    assert "Bearer" not in answer


BAD_TOKENS = {
    "expired": lambda: token(exp=int(time.time()) - 3600),
    "of an unknown issuer": lambda: token(issuer="https://other.test"),
    "of an issuer whose keys cannot be used": lambda: token(issuer="https://keyless.test"),
    "with a changed signature": lambda: token()[:-6] + "AAAAAA",
    "not a token": lambda: "x.y.z",
}


@pytest.mark.parametrize("bad", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_bad_token_is_401_and_nobody_is_asked(mesh: Mesh, bad: Callable[[], str]) -> None:
    status, _ = mesh.get(HTTP, "-H", f"authorization: Bearer {bad()}")
    assert status == 401
    assert mesh.judge.questions == []


def test_absent_token_is_left_to_the_judge(mesh: Mesh) -> None:
    assert mesh.get(HTTP)[0] == 200
    assert not mesh.judge.questions[0].attributes.metadata_context.filter_metadata


def test_denied_request_is_403(mesh: Mesh) -> None:
    mesh.judge.allow = lambda request: False
    assert mesh.get(HTTP)[0] == 403


def test_path_is_normalised_before_it_is_judged(mesh: Mesh) -> None:
    mesh.client.curl("--path-as-is", f"http://{mesh.server.v4}:{HTTP}/public/../admin/./x?a=1")
    assert mesh.judge.questions[0].attributes.request.http.path == "/admin/x?a=1"


def test_http2_without_tls_of_its_own_is_judged_as_http(mesh: Mesh) -> None:
    mesh.judge.allow = lambda request: False
    for port in (HTTP, AUTO):
        assert mesh.get(port, "--http2-prior-knowledge")[0] == 403
    assert [question.attributes.request.http.protocol for question in mesh.judge.questions] == ["HTTP/2", "HTTP/2"]


def test_dead_judge_is_503_that_says_so(mesh: Mesh) -> None:
    mesh.judge.stop()
    try:
        status, answer = mesh.get(HTTP)
    finally:
        mesh.judge.start()
    assert status == 503
    assert "x-meshbridge-reason: authorization server gave no answer" in answer
    assert "authorization server of this node gave no answer" in answer
    deadline = time.monotonic() + 10
    while mesh.get(HTTP)[0] != 200 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert mesh.get(HTTP)[0] == 200


def test_denied_tcp_client_gets_neither_greeting_nor_echo(mesh: Mesh) -> None:
    mesh.judge.allow = lambda request: False
    with mesh.client.connect(str(mesh.server.v4), GREETER) as connection:
        connection.settimeout(1)
        with pytest.raises(TimeoutError):
            connection.recv(100)
        connection.sendall(b"hello\n")
        assert received(connection) == b""


def test_allowed_tcp_client_gets_greeting_after_its_first_byte(mesh: Mesh) -> None:
    with mesh.client.connect(str(mesh.server.v4), GREETER) as connection:
        connection.sendall(b"hello\n")
        assert read_exactly(connection, len(GREETING) + 6) == GREETING + b"hello\n"


def test_declared_server_first_protocol_speaks_first(mesh: Mesh) -> None:
    with mesh.client.connect(str(mesh.server.v4), MYSQL) as connection:
        assert read_exactly(connection, len(GREETING)) == GREETING


def test_dialling_the_listener_itself_leads_nowhere(mesh: Mesh) -> None:
    before = mesh.server.stat("tcp.blackhole.downstream_cx_total")
    with plaintext(mesh, 15006) as connection:
        connection.sendall(b"hello\n")
        assert received(connection) == b""
    assert mesh.server.stat("tcp.blackhole.downstream_cx_total") == before + 1


def test_health_and_metrics_answer_on_the_pods_address(mesh: Mesh) -> None:
    base = f"http://{mesh.server.v4}"
    assert "LIVE" in mesh.client.curl(f"{base}:15021/healthz/ready").stdout
    assert "envoy_listener_downstream_cx_total" in mesh.client.curl(f"{base}:15090/stats/prometheus").stdout
    assert "LIVE" not in mesh.client.curl(f"{base}:15090/ready").stdout


def test_admin_port_is_not_reachable_from_other_pods(mesh: Mesh) -> None:
    with plaintext(mesh, 15000) as connection:
        connection.sendall(b"GET /config_dump HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert b"200 OK" not in received(connection)


def test_ads_stream_carries_the_pods_token(mesh: Mesh) -> None:
    assert mesh.ads.callers == [mesh.ads.caller]


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes, which it must."""
    data = b""
    try:
        while chunk := connection.recv(4096):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def read_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = connection.recv(4096)
        assert chunk, f"closed after {data!r}"
        data += chunk
    return data
