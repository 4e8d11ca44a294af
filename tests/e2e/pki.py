"""The cluster's certificate authority, and who it vouches for."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Authority:
    """A directory of keys and certificates, and the authority that signs them."""

    directory: Path

    @classmethod
    def create(cls, directory: Path) -> Authority:
        directory.mkdir(mode=0o700, parents=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("meshbridge-e2e-ca", ())
        _write(directory, "ca", key, _builder(name, name, key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256()))  # fmt: skip
        service_accounts = ec.generate_private_key(ec.SECP256R1())
        _write_key(directory / "sa.key", service_accounts)
        return cls(directory)

    @property
    def certificate(self) -> Path:
        return self.directory / "ca.crt"

    def issue(self, file: str, user: str, groups: Iterable[str] = (), names: Iterable[str] = ()) -> None:
        """``FILE.crt`` and ``FILE.key``, for a client ``user`` in ``groups`` and a server of ``names``."""
        authority = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        signer = serialization.load_pem_private_key((self.directory / "ca.key").read_bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(user, groups), authority.subject, key)
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if alternatives := [_alternative(each) for each in names]:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        _write(self.directory, file, key, builder.sign(signer, hashes.SHA256()))

    def kubeconfig(self, user: str, server: str, groups: Iterable[str] = ()) -> str:
        """A kubeconfig that holds all it needs."""
        file = user.replace(":", "-")
        self.issue(file, user, groups)
        read = {each: (self.directory / f"{file}.{each}").read_text() for each in ("crt", "key")}
        return json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "e2e",
            "clusters": [{"name": "e2e", "cluster": {
                "server": server, "certificate-authority-data": _base64(self.certificate.read_text())}}],
            "users": [{"name": user, "user": {
                "client-certificate-data": _base64(read["crt"]), "client-key-data": _base64(read["key"])}}],
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": user}}],
        })  # fmt: skip


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _name(user: str, groups: Iterable[str]) -> x509.Name:
    organizations = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, each) for each in groups]
    return x509.Name([*organizations, x509.NameAttribute(NameOID.COMMON_NAME, user)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + LIFETIME)
    )  # fmt: skip


def _write(directory: Path, file: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    _write_key(directory / f"{file}.key", key)
    (directory / f"{file}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
