"""Certificates that a server makes for itself: a CA, and a serving certificate by it, both renewed in time.

Every CA that has not expired is in the bundle that clients are given. A new one is made a year before the last ends,
and signs nothing before the bundle has had a week to get where it is needed. All that follows from the dates in the
certificates, so replicas that keep them in one place agree without another word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshbridge.errors import SettingsError
from meshbridge.xds.keys import key_pem, key_usage

CA_LIFETIME: Final = timedelta(days=3650)
CA_RENEWED_BEFORE_END: Final = timedelta(days=365)
CA_SIGNS_AFTER: Final = timedelta(days=7)
SERVING_LIFETIME: Final = timedelta(days=90)
SERVING_RENEWED_AFTER: Final = timedelta(days=30)
CLOCK_SKEW: Final = timedelta(minutes=5)

SERVING: Final = "serving.pem"
_AUTHORITY_PREFIX: Final = "ca-"


@dataclass(frozen=True, slots=True)
class Certificates:
    """What a server keeps, by file name, each a certificate with its key; ``repr`` shows no key.

    ``bundle`` is what verifies whatever is served now and in the week to come.
    """

    files: Mapping[str, bytes]
    bundle: bytes

    @property
    def serving(self) -> bytes:
        return self.files[SERVING]

    def __repr__(self) -> str:
        return f"Certificates({sorted(self.files)})"


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA with its key. ``repr`` shows no key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return f"Authority(until={self.certificate.not_valid_after_utc.isoformat()})"

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM) + key_pem(self.key)


def is_kept(name: str) -> bool:
    """Whether a file of this name is one of ``Certificates.files``, whatever else lies beside them."""
    return name == SERVING or (name.startswith(_AUTHORITY_PREFIX) and name.endswith(".pem"))


def renewed(kept: Mapping[str, bytes], names: Sequence[str], now: datetime, owner: str, where: str) -> Certificates:
    """What is to be kept from now on: what is kept, without what has expired and with what is due; again, the same.

    Args:
        kept: By names for which ``is_kept``.
        owner: Whose they are, as the certificates' subjects say it: ``webhook``.
        where: The place they are kept, for whoever has to mend it.

    Raises:
        SettingsError: what is kept as a CA is none.
    """
    found = {name: _read_authority(kept[name], f"{where}, {name}") for name in sorted(kept.keys() - {SERVING})}
    found = {name: a for name, a in found.items() if a.certificate.not_valid_after_utc > now}
    authorities = sorted(found.values(), key=lambda authority: authority.certificate.not_valid_before_utc)
    newest = max((a.certificate.not_valid_after_utc for a in authorities), default=now)
    files = {name: kept[name] for name in found}
    if newest - now < CA_RENEWED_BEFORE_END:
        authorities.append(new_authority(now, owner))
        files[f"{_AUTHORITY_PREFIX}{authorities[-1].certificate.serial_number:x}.pem"] = authorities[-1].pem
    serving = kept.get(SERVING, b"")
    if not _is_good(serving, authorities, names, now):
        serving = serving_certificate(signing_authority(authorities, now), names, now, owner)
    bundle = b"".join(a.certificate.public_bytes(Encoding.PEM) for a in authorities)
    return Certificates({**files, SERVING: serving}, bundle)


def _is_good(serving: bytes, authorities: Iterable[Authority], names: Sequence[str], now: datetime) -> bool:
    """Whether it names the same names, is signed by a CA of the bundle, has its key, and is not to be renewed yet."""
    try:
        certificate = x509.load_pem_x509_certificate(serving)
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = load_pem_private_key(serving, password=None)
    except (ValueError, TypeError, x509.ExtensionNotFound):
        return False
    if found != _alternative_names(names) or now - certificate.not_valid_before_utc > SERVING_RENEWED_AFTER:
        return False
    if certificate.not_valid_before_utc > now + CLOCK_SKEW or certificate.not_valid_after_utc <= now:
        return False
    issuers = {authority.certificate.subject for authority in authorities}
    return certificate.issuer in issuers and key.public_key() == certificate.public_key()


def signing_authority(authorities: Sequence[Authority], now: datetime) -> Authority:
    """The newest CA that has been in the bundle for long enough, or the only one."""
    old = [a for a in authorities if now - a.certificate.not_valid_before_utc >= CA_SIGNS_AFTER]
    return max(old or authorities[:1], key=lambda a: a.certificate.not_valid_before_utc)


def new_authority(now: datetime, owner: str) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # each has a name of its own, by which a verifier tells it from the one before
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"meshbridge {owner} CA {serial:x}"[:64])])
    builder = _builder(name, name, key.public_key(), serial, now, CA_LIFETIME)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(key_usage(sign_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def serving_certificate(authority: Authority, names: Sequence[str], now: datetime, owner: str) -> bytes:
    """A new key and a certificate of these host names and addresses for it, PEM, in one piece."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"meshbridge {owner}")])
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


def _read_authority(content: bytes, where: str) -> Authority:
    try:
        key = load_pem_private_key(content, password=None)
        certificate = x509.load_pem_x509_certificate(content)
    except (ValueError, TypeError) as error:
        raise SettingsError(
            f"cannot be read: {type(error).__name__}", where=where, fix="remove it to have it made anew"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise SettingsError("its key is another's", where=where, fix="remove it to have it made anew")
    return Authority(certificate, key)
