"""The webhook's own certificates: a CA in a state directory, a serving certificate by it, both renewed in time.

Every CA that has not expired is in the bundle that API servers are given. A new one is made a year before the last
ends, and signs nothing before the bundle has had a week to get where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshbridge.errors import SettingsError
from meshbridge.xds.auth import write_private_file
from meshbridge.xds.keys import key_pem, key_usage

CA_LIFETIME: Final = timedelta(days=3650)
CA_RENEWED_BEFORE_END: Final = timedelta(days=365)
CA_SIGNS_AFTER: Final = timedelta(days=7)
SERVING_LIFETIME: Final = timedelta(days=90)
SERVING_RENEWED_AFTER: Final = timedelta(days=30)
CLOCK_SKEW: Final = timedelta(minutes=5)

SERVING: Final = "serving.pem"
_AUTHORITIES: Final = "ca-*.pem"


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA with its key. ``repr`` shows no key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return f"Authority(until={self.certificate.not_valid_after_utc.isoformat()})"


class OwnCertificates:
    """Certificates that are made here; ``renew`` makes what is due, and again changes nothing."""

    def __init__(self, state: Path, names: Sequence[str]) -> None:
        self._state, self._names = state, tuple(names)
        self.serving = state / SERVING
        self.bundle = b""

    def renew(self, now: datetime) -> None:
        """Have in ``serving`` a certificate with its key, valid for a while yet, and in ``bundle`` what verifies it.

        Raises:
            SettingsError: a file of the state directory is not what was written there.
        """
        authorities = self._authorities(now)
        newest = max(a.certificate.not_valid_after_utc for a in authorities) if authorities else now
        if newest - now < CA_RENEWED_BEFORE_END:
            authorities.append(self._make_authority(now))
        self.bundle = b"".join(a.certificate.public_bytes(Encoding.PEM) for a in authorities)
        if not self._is_good(authorities, now):
            write_private_file(self.serving, serving_certificate(signing_authority(authorities, now), self._names, now))

    def _authorities(self, now: datetime) -> list[Authority]:
        """Those that are valid, the oldest first; expired ones are removed."""
        found = []
        for path in sorted(self._state.glob(_AUTHORITIES)):
            authority = _read_authority(path)
            if authority.certificate.not_valid_after_utc <= now:
                path.unlink()
            else:
                found.append(authority)
        return sorted(found, key=lambda authority: authority.certificate.not_valid_before_utc)

    def _make_authority(self, now: datetime) -> Authority:
        authority = new_authority(now)
        name = f"ca-{authority.certificate.serial_number:x}.pem"
        write_private_file(
            self._state / name, authority.certificate.public_bytes(Encoding.PEM) + key_pem(authority.key)
        )
        return authority

    def _is_good(self, authorities: Iterable[Authority], now: datetime) -> bool:
        """Whether what is there names the same names, is signed by a CA of the bundle and not to be renewed yet."""
        try:
            certificate = x509.load_pem_x509_certificate(self.serving.read_bytes())
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (OSError, ValueError, x509.ExtensionNotFound):
            return False
        if names != _alternative_names(self._names) or now - certificate.not_valid_before_utc > SERVING_RENEWED_AFTER:
            return False
        if certificate.not_valid_before_utc > now + CLOCK_SKEW or certificate.not_valid_after_utc <= now:
            return False
        issuers = {authority.certificate.subject for authority in authorities}
        return certificate.issuer in issuers


def signing_authority(authorities: Sequence[Authority], now: datetime) -> Authority:
    """The newest CA that has been in the bundle for long enough, or the only one."""
    old = [a for a in authorities if now - a.certificate.not_valid_before_utc >= CA_SIGNS_AFTER]
    return max(old or authorities[:1], key=lambda a: a.certificate.not_valid_before_utc)


def new_authority(now: datetime) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # each has a name of its own, by which a verifier tells it from the one before
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"meshbridge webhook CA {serial:x}"[:64])])
    builder = _builder(name, name, key.public_key(), serial, now, CA_LIFETIME)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(key_usage(sign_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def serving_certificate(authority: Authority, names: Sequence[str], now: datetime) -> bytes:
    """A new key and a certificate of these host names and addresses for it, PEM, in one piece."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "meshbridge webhook")])
    issuer = authority.certificate.subject
    lifetime = min(SERVING_LIFETIME, authority.certificate.not_valid_after_utc - now)
    builder = _builder(subject, issuer, key.public_key(), x509.random_serial_number(), now, lifetime)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(key_usage(sign_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(_alternative_names(names), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False
    )
    certificate = builder.sign(authority.key, hashes.SHA256())
    return certificate.public_bytes(Encoding.PEM) + key_pem(key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    serial: int,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lifetime)
    )


def _alternative_names(names: Sequence[str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([_alternative_name(name) for name in names])


def _alternative_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _read_authority(path: Path) -> Authority:
    try:
        content = path.read_bytes()
        key = load_pem_private_key(content, password=None)
        certificate = x509.load_pem_x509_certificate(content)
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError(
            f"cannot be read: {type(error).__name__}", where=f"webhook CA {path}", fix="remove it to have it made anew"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise SettingsError("its key is another's", where=f"webhook CA {path}", fix="remove it to have it made anew")
    return Authority(certificate, key)
