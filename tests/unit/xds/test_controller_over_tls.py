"""The controller on TCP: its certificate is checked before a token is shown, and everything travels encrypted."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from test_delta_grpc import KEY, Source, run, token, until

from meshbridge.errors import SettingsError
from meshbridge.identity.model import IpFamily, TcpPorts
from meshbridge.protos.agent_pb2 import Policy
from meshbridge.xds import types as xds
from meshbridge.xds.auth import TokenKey
from meshbridge.xds.client import ControllerClient, read_ca
from meshbridge.xds.nodereport import NodeReport
from meshbridge.xds.reports import ReportServer
from meshbridge.xds.server import DeltaServer, ServerCertificate, start_server


class Authority:
    """Somebody who signs certificates."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        self._root = self._build(self._name, self._key).add_extension(constraints, critical=True)
        self.certificate = _pem(self._root.sign(self._key, hashes.SHA256()))

    def server(self, name: str = "127.0.0.1", valid_from: timedelta = -timedelta(minutes=1)) -> ServerCertificate:
        """A key and a certificate for an address or a host's name, for an hour."""
        return ServerCertificate(*self.pair(name, valid_from), "test")

    def pair(self, host: str, valid_from: timedelta = -timedelta(minutes=1)) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        of = x509.IPAddress(ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
        names = x509.SubjectAlternativeName([of])
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "controller")])
        built = self._build(name, key, valid_from).add_extension(names, critical=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return _pem(built.sign(self._key, hashes.SHA256())), private

    def _build(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, valid_from: timedelta = -timedelta(minutes=1)
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + valid_from)
            .not_valid_after(now + valid_from + timedelta(hours=1))
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


class Sink:
    def __init__(self) -> None:
        self.told: list[NodeReport] = []

    def report(self, _node: str, report: NodeReport) -> None:
        self.told.append(report)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"127.0.0.1:{listening.getsockname()[1]}"


def test_an_agent_follows_and_reports_over_tls(tmp_path: Path) -> None:
    async def body() -> None:
        source, sink, ours, address = Source(), Sink(), Authority("ours"), free_address()
        source.put(1, {xds.POLICY: {"a": Policy(name="a")}})
        servers = DeltaServer(TokenKey(KEY), source), ReportServer(TokenKey(KEY), sink)
        server = await start_server(servers[0], address, ours.server(), servers[1])
        try:
            (tmp_path / "ca").write_bytes(ours.certificate)
            client = ControllerClient(address, "node-a", token, tmp_path / "ca")
            client.report(NodeReport({"uid": (TcpPorts(IpFamily.IPV4, 8080, 8080),)}))
            updates = client.updates()
            assert set((await anext(updates)).changed[xds.POLICY]) == {"a"}
            source.put(2, {xds.POLICY: {"b": Policy(name="b")}})
            assert (await anext(updates)).removed[xds.POLICY] == {"a"}
            await until(lambda: bool(sink.told))
            await updates.aclose()
        finally:
            await server.stop(0)

    run(body)


SHIFTED = {"expired": -timedelta(hours=2), "not valid yet, or our clock is late": timedelta(hours=2)}


@pytest.mark.parametrize("wrong", ["signed by another", "for another address", "no TLS at all", *SHIFTED])
def test_no_token_is_shown_to_whoever_is_not_the_controller(
    tmp_path: Path, wrong: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async def body() -> None:
        source, ours, address = Source(), Authority("ours"), free_address()
        source.put(1, {xds.POLICY: {"a": Policy(name="a")}})
        signer = Authority("another") if wrong == "signed by another" else ours
        if wrong == "no TLS at all":
            server = grpc.aio.server()
            server.add_insecure_port(address)
            await server.start()
        else:
            files = signer.server("192.0.2.1" if wrong == "for another address" else "127.0.0.1",
                                  SHIFTED.get(wrong, -timedelta(minutes=1)))  # fmt: skip
            server = await start_server(DeltaServer(TokenKey(KEY), source), address, files)
        try:
            (tmp_path / "ca").write_bytes(ours.certificate)
            client = ControllerClient(address, "node-a", token, tmp_path / "ca")
            updates = client.updates()
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await anext(updates)
            assert not client.connected
            assert not source.callers
            assert capfd.readouterr().out.count("controller.disconnected") == 1, "said once, and not at every attempt"
        finally:
            await server.stop(0)

    run(body)


NAME = "meshbridge-controller.meshbridge-system.svc"


def test_the_controller_is_known_by_the_services_name_whatever_its_address(tmp_path: Path) -> None:
    """As in a pod: no DNS, and a CA that is mounted later than the agent starts."""

    async def body() -> None:
        source, ours, address = Source(), Authority("ours"), free_address()
        source.put(1, {xds.POLICY: {"a": Policy(name="a")}})
        server = await start_server(DeltaServer(TokenKey(KEY), source), address, ours.server(NAME))
        updates = ControllerClient(address, "node-a", token, tmp_path / "ca", NAME).updates()
        first = asyncio.ensure_future(anext(updates))
        try:
            await asyncio.sleep(0.5)
            assert not source.callers
            (tmp_path / "ca").write_bytes(ours.certificate)
            async with asyncio.timeout(20):
                assert set((await first).changed[xds.POLICY]) == {"a"}
        finally:
            first.cancel()
            await server.stop(0)

    run(body)


def test_certificate_and_ca_change_without_a_restart_of_either(tmp_path: Path) -> None:
    async def body() -> None:
        source, before, after, address = Source(), Authority("before"), Authority("after"), free_address()
        source.put(1, {xds.POLICY: {"a": Policy(name="a")}})
        certificate = before.server(NAME)
        servicer = DeltaServer(TokenKey(KEY), source)
        server = await start_server(servicer, address, certificate)
        (tmp_path / "ca").write_bytes(before.certificate)
        client = ControllerClient(address, "node-a", token, tmp_path / "ca", NAME)
        updates = client.updates()
        try:
            async with asyncio.timeout(20):
                await anext(updates)
                certificate.use(*after.pair(NAME), "test")
                source.put(2, {xds.POLICY: {"b": Policy(name="b")}})
                assert (await anext(updates)).revision == 2, "a connection goes on with what it began with"
                (tmp_path / "ca").write_bytes(after.certificate)
                servicer.drain()
                await until(lambda: not client.connected)
                source.put(3, {xds.POLICY: {"c": Policy(name="c")}})
                assert (await anext(updates)).revision == 3
            stranger = ControllerClient(address, "node-a", token, tmp_path / "old", NAME)
            (tmp_path / "old").write_bytes(before.certificate)
            old = stranger.updates()
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await anext(old)
            assert not stranger.connected, "new connections get the new certificate only"
            await old.aclose()
        finally:
            await updates.aclose()
            await server.stop(0)

    run(body)


def test_a_certificate_that_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    ours = Authority("ours")
    certificate = ours.server(NAME)
    chain, _ = ours.pair(NAME)
    _, key = ours.pair(NAME)
    with pytest.raises(SettingsError, match="another certificate's"):
        certificate.use(chain, key, "test")
    with pytest.raises(SettingsError, match="cannot be used"):
        certificate.use(b"rubbish", key, "test")


def test_plaintext_reaches_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        source, address = Source(), free_address()
        server = await start_server(DeltaServer(TokenKey(KEY), source), address, Authority("ours").server())
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(channel.channel_ready(), 0.5)
        finally:
            await server.stop(0)

    run(body)


def test_tcp_needs_a_ca(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="TCP without a CA"):
        ControllerClient("10.0.0.1:15010", "node-a", token)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_ca(tmp_path / "missing")
    (tmp_path / "key").write_text("-----BEGIN PRIVATE KEY-----")
    with pytest.raises(SettingsError, match="holds no certificate"):
        read_ca(tmp_path / "key")
