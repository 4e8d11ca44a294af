"""The server on a TCP port: whose certificates it takes, that it follows its own, and who is told about what."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from envoy.service.auth.v3.external_auth_pb2_grpc import AuthorizationStub

from meshbridge.authz.caller import LOCAL, Caller, caller_of, why_not
from meshbridge.authz.judge import Judge
from meshbridge.authz.server import SERVICE, AuthzServer
from meshbridge.authz.tls import TlsFiles, server_credentials
from meshbridge.authz.view import CurrentView, NodeView
from meshbridge.cli.authz import command
from meshbridge.errors import MeshBridgeError, SettingsError
from meshbridge.identity.model import Workload
from meshbridge.policy.mesh import MeshSettings
from meshbridge.policy.policyset import PolicySet

POD = Workload("shop", "web", "uid", "node-a", (ip_address("10.1.0.7"), ip_address("fd00::7")), service_account="web")
MESH = MeshSettings(trust_domain="prod.example", trust_domain_aliases=("old.example",))
OWN = "spiffe://prod.example/ns/shop/sa/web"

CALLERS = {
    "over a Unix socket": (LOCAL, True),
    "from the pod's address": (Caller(ip_address("10.1.0.7")), True),
    "from its other address": (Caller(ip_address("fd00::7")), True),
    "from a sidecar before the server": (Caller(ip_address("127.0.0.6")), True),
    "from another pod": (Caller(ip_address("10.1.0.8")), False),
    "with the pod's name": (Caller(ip_address("10.1.0.7"), OWN, certified=True), True),
    "with its name in an alias": (Caller(ip_address("10.1.0.7"), OWN.replace("prod", "old"), certified=True), True),
    "with its name of another mesh": (Caller(ip_address("10.1.0.7"), OWN.replace("prod", "x"), certified=True), False),
    "with another account's name": (Caller(ip_address("10.1.0.7"), f"{OWN}-2", certified=True), False),
    "with another namespace's name": (Caller(ip_address("10.1.0.7"), OWN.replace("shop", "x"), certified=True), False),
    "with a certificate without a name": (Caller(ip_address("10.1.0.7"), certified=True), False),
    "with its name from another address": (Caller(ip_address("10.1.0.8"), OWN, certified=True), False),
}  # fmt: skip


@pytest.mark.parametrize(("caller", "told"), CALLERS.values(), ids=CALLERS.keys())
def test_an_envoy_is_told_about_its_own_pod_alone(caller: Caller, told: bool) -> None:
    assert (why_not(caller, POD, MESH) == "") is told


PEERS = {
    "IPv4": ("ipv4:10.1.0.7:40000", "10.1.0.7"),
    "IPv6": ("ipv6:[fd00::7]:40000", "fd00::7"),
    "IPv6, escaped": ("ipv6:%5Bfd00::7%5D:40000", "fd00::7"),
    "IPv4 on a socket of both families": ("ipv6:[::ffff:10.1.0.7]:40000", "10.1.0.7"),
    "link-local": ("ipv6:[fe80::1%25eth0]:40000", "fe80::1"),
}


@pytest.mark.parametrize(("peer", "address"), PEERS.values(), ids=PEERS.keys())
def test_the_callers_address_has_one_form(peer: str, address: str) -> None:
    assert caller_of(peer, {}) == Caller(ip_address(address))


class Authority:
    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mesh")])
        basic = x509.BasicConstraints(ca=True, path_length=0)
        self.root = _pem(self._builder(self.name, self.key).add_extension(basic, critical=True).sign(self.key, _SHA))

    def issue(self, principal: str) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(principal), x509.DNSName("authz")])
        built = self._builder(x509.Name([]), key).add_extension(names, critical=True)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return _pem(built.sign(self.key, _SHA)), private

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(key.public_key())
        return (
            builder.serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(hours=1))
        )


_SHA = hashes.SHA256()


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> TlsFiles:
    found = TlsFiles(tmp_path / "cert-chain.pem", tmp_path / "key.pem", tmp_path / "root-cert.pem")
    write(found, authority, "spiffe://prod.example/ns/meshbridge-system/sa/meshbridge-authz")
    return found


def write(files: TlsFiles, authority: Authority, principal: str) -> None:
    chain, key = authority.issue(principal)
    files.certificate.write_bytes(chain)
    files.key.write_bytes(key)
    assert files.client_ca is not None
    files.client_ca.write_bytes(authority.root)


@contextmanager
def serving(check: Callable[[bytes, Caller], bytes], files: TlsFiles | None, *, ready: bool = True) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    server = AuthzServer(listen, check, credentials=server_credentials(files) if files else None)
    server.start()
    if ready:
        server.set_ready()
    try:
        yield listen
    finally:
        server.drain()


def ask(listen: str, authority: Authority, client: tuple[bytes, bytes] | None, data: bytes = b"") -> bytes:
    chain, key = client or (None, None)
    credentials = grpc.ssl_channel_credentials(authority.root, key, chain)
    with grpc.secure_channel(listen, credentials, [("grpc.ssl_target_name_override", "authz")]) as channel:
        answer: bytes = channel.unary_unary(f"/{SERVICE}/Check")(data, timeout=5)
        return answer


def test_the_name_in_a_clients_certificate_is_known(authority: Authority, files: TlsFiles) -> None:
    with serving(lambda _, caller: f"{caller.certified} {caller.principal}".encode(), files) as listen:
        assert ask(listen, authority, authority.issue(OWN)) == f"True {OWN}".encode()


def test_clients_without_the_meshs_certificate_are_not_talked_to(authority: Authority, files: TlsFiles) -> None:
    with serving(lambda _, __: b"told", files) as listen:
        for client in (None, Authority().issue(OWN)):
            with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
                ask(listen, authority, client)


def test_a_renewed_certificate_is_used_without_a_restart(authority: Authority, files: TlsFiles) -> None:
    client = authority.issue(OWN)
    with serving(lambda _, __: b"told", files) as listen:
        assert ask(listen, authority, client) == b"told"
        files.key.write_bytes(b"half a file")
        assert ask(listen, authority, client) == b"told"
        other = Authority()
        write(files, other, OWN)
        assert ask(listen, other, other.issue(OWN)) == b"told"
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            ask(listen, authority, client)


def test_files_that_come_later_are_waited_for(authority: Authority, files: TlsFiles) -> None:
    files.key.rename(files.key.with_suffix(".later"))
    with pytest.raises(SettingsError, match="No such file"):
        server_credentials(files)
    threading.Timer(0.3, files.key.with_suffix(".later").rename, [files.key]).start()
    server_credentials(files, wait_s=20)


def test_a_key_that_is_not_the_certificates_is_refused(authority: Authority, files: TlsFiles) -> None:
    files.key.write_bytes(authority.issue(OWN)[1])
    with pytest.raises(SettingsError, match="not the certificate's"):
        server_credentials(files)


def test_a_stranger_is_refused_before_any_policy_is_named() -> None:
    current = CurrentView()
    current.set(NodeView.of(1, [POD], {}, PolicySet.of([], MESH)))
    request = CheckRequest()
    for end, address in ((request.attributes.source, "10.1.0.9"), (request.attributes.destination, "10.1.0.7")):
        end.address.socket_address.address = address
        end.address.socket_address.port_value = 8080
    request.attributes.request.http.method = "GET"
    # Its caller is 127.0.0.1 here, as a sidecar's would be.
    with serving(Judge(current).check, None) as listen, grpc.insecure_channel(listen) as channel:
        assert AuthorizationStub(channel).Check(request, timeout=5).status.code == 0
    strange = Judge(current).check(request.SerializeToString(), Caller(ip_address("10.1.0.9")))
    answer = CheckResponse.FromString(strange)
    assert answer.status.code != 0
    headers = {each.header.key: each.header.value for each in answer.denied_response.headers}
    assert headers == {"x-meshbridge-reason": "caller-differs"}


def test_before_the_first_policies_there_is_no_answer_so_that_fail_open_decides() -> None:
    with (
        serving(Judge(CurrentView()).check, None, ready=False) as listen,
        grpc.insecure_channel(listen) as channel,
        pytest.raises(grpc.RpcError, match="no policies from the controller yet"),
    ):
        AuthorizationStub(channel).Check(CheckRequest(), timeout=5)


LISTENING = {
    "TCP without TLS": ([], "give --tls-cert and --tls-key, or --plaintext"),
    "a name in place of an address": (["--listen", "authz:9191"], "is no address"),
    "IPv6 without brackets": (["--listen", "fd00::7:9191"], "is no address"),
    "both forms": (["--plaintext", "--client-ca", "x"], "leave one of them out"),
    "TLS on a Unix socket": (["--listen", "unix:/x", "--tls-key", "x"], "TLS settings for a Unix socket"),
}


@pytest.mark.parametrize(("arguments", "expected"), LISTENING.values(), ids=LISTENING.keys())
def test_what_cannot_be_listened_on_is_said(arguments: list[str], expected: str) -> None:
    base = ["--node", "a", "--controller", "unix:/x", "--token-file", "x", "--listen", "0.0.0.0:9191"]
    result = CliRunner().invoke(command, [*base, *arguments])
    assert isinstance(result.exception, MeshBridgeError), result.output
    assert expected in str(result.exception)
