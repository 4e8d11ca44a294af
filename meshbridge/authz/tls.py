"""The server's certificate from files, read again for each new connection; and whose clients' certificates it takes.

Spec: the files are those that Istio's agent writes with OUTPUT_CERTS, or a Secret's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from meshbridge.errors import SettingsError

log = structlog.get_logger()

POLL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. With ``client_ca`` a client has to have a certificate of one of its authorities."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def present(self) -> bool:
        return all(path.exists() for path in (self.certificate, self.key, self.client_ca) if path)

    @property
    def times(self) -> tuple[int, ...]:
        """When they were last changed; of files that are replaced by links that move, too."""
        return tuple(path.stat().st_mtime_ns for path in (self.certificate, self.key, self.client_ca) if path)


def server_credentials(files: TlsFiles, *, wait_s: float = 0) -> grpc.ServerCredentials:
    """Credentials that follow the files: a renewed certificate is used from the next connection on.

    Files that cannot be used change nothing then, and are logged.

    Args:
        wait_s: how long to wait for files that are not there yet, as Istio's agent writes them when it has started.

    Raises:
        SettingsError: they cannot be used now.
    """
    reader = _Reader(files)
    if wait_s and not files.present:
        log.info("certificate.awaited", file=str(files.certificate), at_most_s=wait_s)
    deadline = time.monotonic() + wait_s
    while not files.present and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return grpc.dynamic_ssl_server_credentials(
        reader.read(), reader.changed, require_client_authentication=files.client_ca is not None
    )


class _Reader:
    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._times: tuple[int, ...] = ()

    def read(self) -> grpc.ServerCertificateConfiguration:
        files = self._files
        where = f"{files.certificate} and {files.key}"
        try:
            self._times = files.times
            chain, key = files.certificate.read_bytes(), files.key.read_bytes()
            roots = files.client_ca.read_bytes() if files.client_ca else None
            public = [
                each.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
                for each in (
                    x509.load_pem_x509_certificates(chain)[0].public_key(),
                    load_pem_private_key(key, None).public_key(),
                )
            ]
            if roots is not None:
                x509.load_pem_x509_certificates(roots)
        except OSError as error:
            fix = "mount the files, or name others"
            raise SettingsError(f"{error.filename}: {error.strerror}", where="--tls-cert", fix=fix) from error
        except (ValueError, TypeError) as error:
            raise SettingsError(
                f"cannot be read: {error}", where=where, fix="use PEM, the key not encrypted"
            ) from error
        if public[0] != public[1]:
            raise SettingsError(
                "the key is not the certificate's", where=where, fix="give the two that belong together"
            )
        return grpc.ssl_server_certificate_configuration([(key, chain)], roots)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC at each new connection; None keeps what is in use."""
        try:
            if self._files.times == self._times:
                return None
            found = self.read()
        except (SettingsError, OSError) as error:
            log.warning("certificate.kept", reason=str(error))
            return None
        log.info("certificate.renewed", file=str(self._files.certificate))
        return found
