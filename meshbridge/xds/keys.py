"""What every certificate that we sign has in common: the usage of its key, and the form a private key is kept in."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


def key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    """A CA's key signs certificates and lists, any other signatures only."""
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The key as unencrypted PKCS #8; whoever writes it to a file keeps that to its owner."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
