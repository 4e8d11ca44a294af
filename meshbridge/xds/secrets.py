"""The mesh CA: one root key on disk, short-lived SPIFFE certificates in memory, sent to their own pods over SDS.

Only the root key is ever written; a workload's key lives in the controller and in the pod's Envoy. Nothing here is
logged.

Spec: SPIFFE X.509-SVID; envoy.extensions.transport_sockets.tls.v3.Secret.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from envoy.config.core.v3.base_pb2 import DataSource
from envoy.extensions.transport_sockets.tls.v3.common_pb2 import CertificateValidationContext, TlsCertificate
from envoy.extensions.transport_sockets.tls.v3.secret_pb2 import Secret

from meshbridge.errors import SettingsError
from meshbridge.xds.auth import write_private_file
from meshbridge.xds.keys import key_pem, key_usage
from meshbridge.xds.names import SECRET_CERTIFICATE, SECRET_ROOT_CA

ROOT_LIFETIME: Final = timedelta(days=3650)
SVID_LIFETIME: Final = timedelta(hours=1)
ROTATE_AFTER: Final = 0.5  # of the lifetime, so that a controller may be away for the other half
CLOCK_SKEW: Final = timedelta(minutes=2)


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """Who a certificate speaks for."""

    trust_domain: str
    namespace: str
    service_account: str

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"


@dataclass(frozen=True, slots=True)
class Svid:
    """A certificate chain with its key, PEM. ``repr`` shows neither."""

    chain: bytes
    key: bytes
    rotate_at: datetime
    expires_at: datetime

    def __repr__(self) -> str:
        return f"Svid(expires_at={self.expires_at.isoformat()})"


class CertificateAuthority:
    """Issues certificates that every workload of the mesh verifies against one root."""

    def __init__(
        self, key: ec.EllipticCurvePrivateKey, root: x509.Certificate, lifetime: timedelta = SVID_LIFETIME
    ) -> None:
        self._key, self._root, self._lifetime = key, root, lifetime
        self.root_pem = root.public_bytes(Encoding.PEM)

    def issue(self, identity: SpiffeId, now: datetime) -> Svid:
        """A new key and a certificate for it, valid for client and server, with the SPIFFE ID as its only name."""
        key = ec.generate_private_key(ec.SECP256R1())
        expires_at = min(now + self._lifetime, self._root.not_valid_after_utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._root.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(expires_at)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(sign_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))]), critical=True
            )  # critical, as the subject is empty
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        return Svid(
            chain=certificate.public_bytes(Encoding.PEM),
            key=key_pem(key),
            rotate_at=now + (expires_at - now) * ROTATE_AFTER,
            expires_at=expires_at,
        )


class SecretStore:
    """The SDS resources of every identity in use; renewed when half their life is over."""

    def __init__(self, authority: CertificateAuthority) -> None:
        self._authority = authority
        self._svids: dict[SpiffeId, Svid] = {}
        self._root = _root_secret(authority.root_pem)

    def secrets(self, identity: SpiffeId, now: datetime) -> Mapping[str, bytes]:
        """The resources of one workload, by name: its own certificate, and the root its peers are verified against."""
        svid = self._svids.get(identity)
        if svid is None or svid.rotate_at <= now:
            svid = self._svids[identity] = self._authority.issue(identity, now)
        return {SECRET_CERTIFICATE: _certificate_secret(svid), SECRET_ROOT_CA: self._root}

    def next_rotation(self) -> datetime | None:
        """When ``secrets`` will next give something new for an identity it gave before."""
        return min((svid.rotate_at for svid in self._svids.values()), default=None)

    def keep_only(self, identities: set[SpiffeId]) -> None:
        """Forget the keys of everybody else."""
        self._svids = {identity: svid for identity, svid in self._svids.items() if identity in identities}


def load_or_create_authority(
    state: Path, trust_domain: str, now: datetime, lifetime: timedelta = SVID_LIFETIME
) -> CertificateAuthority:
    """The CA whose root key is in ``state``; made there, mode 0600, when there is none.

    Raises:
        SettingsError: the key is readable by others, not an EC key, expired, or not the one of the certificate.
    """
    key_path, root_path = state / "ca.key", state / "ca.crt"
    if not key_path.exists():
        write_private_file(key_path, key_pem(ec.generate_private_key(ec.SECP256R1())), keep_existing=True)
    key = _load_key(key_path)
    if not root_path.exists():
        write_private_file(
            root_path, _self_signed(key, trust_domain, now).public_bytes(Encoding.PEM), keep_existing=True
        )
    try:
        root = x509.load_pem_x509_certificate(root_path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"cannot be read: {error}", where=f"CA certificate {root_path}", fix="remove it to have it made anew"
        ) from None
    if root.public_key() != key.public_key():
        raise SettingsError(
            "belongs to another key", where=f"CA certificate {root_path}", fix=f"restore {key_path}, or remove both"
        )
    if root.not_valid_after_utc <= now:
        raise SettingsError("has expired", where=f"CA certificate {root_path}", fix="remove it to have it made anew")
    return CertificateAuthority(key, root, lifetime)


def _self_signed(key: ec.EllipticCurvePrivateKey, trust_domain: str, now: datetime) -> x509.Certificate:
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "MeshBridge"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"mesh root {trust_domain}"[:64]),
        ]
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + ROOT_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    where = f"CA key {path}"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = load_pem_private_key(file.read(), password=None)
    except OSError as error:
        raise SettingsError(f"cannot be read: {error.strerror}", where=where, fix="restore it") from error
    except (ValueError, TypeError):
        raise SettingsError("is no PEM private key", where=where, fix="restore it, or remove it with ca.crt") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"mode {stat.S_IMODE(mode):04o} lets others read it", where=where, fix=f"chmod 600 {path}")
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SettingsError("is no EC key", where=where, fix="restore it, or remove it with ca.crt")
    return key


def _certificate_secret(svid: Svid) -> bytes:
    certificate = TlsCertificate(
        certificate_chain=DataSource(inline_bytes=svid.chain), private_key=DataSource(inline_bytes=svid.key)
    )
    return bytes(Secret(name=SECRET_CERTIFICATE, tls_certificate=certificate).SerializeToString(deterministic=True))


def _root_secret(root_pem: bytes) -> bytes:
    context = CertificateValidationContext(trusted_ca=DataSource(inline_bytes=root_pem))
    return bytes(Secret(name=SECRET_ROOT_CA, validation_context=context).SerializeToString(deterministic=True))
