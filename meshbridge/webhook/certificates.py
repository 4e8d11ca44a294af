"""The webhook's own certificates in a state directory; see ``xds.certificates`` for what is made, and when."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from meshbridge.errors import SettingsError
from meshbridge.xds.auth import write_private_file
from meshbridge.xds.certificates import SERVING, is_kept, renewed

OWNER = "webhook"


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
        kept = {path.name: _read(path) for path in self._state.glob("*.pem") if is_kept(path.name)}
        certificates = renewed(kept, self._names, now, OWNER, f"webhook's state directory {self._state}")
        for name in sorted(certificates.files):  # a CA before what it signs
            if certificates.files[name] != kept.get(name):
                write_private_file(self._state / name, certificates.files[name])
        for name in kept.keys() - certificates.files.keys():
            (self._state / name).unlink(missing_ok=True)
        self.bundle = certificates.bundle


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot be read: {error.strerror}", where=str(path), fix="let its user read it") from None
