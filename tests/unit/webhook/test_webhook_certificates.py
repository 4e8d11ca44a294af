"""Certificates that the webhook makes itself: renewed in time, and always verified by the bundle given out."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from meshbridge.errors import SettingsError
from meshbridge.webhook.certificates import OwnCertificates
from meshbridge.xds.certificates import CA_LIFETIME

START = datetime(2026, 11, 24, tzinfo=UTC)
NAME = "meshbridge-webhook.meshbridge-system.svc"
NAMES = (NAME, "127.0.0.1")


def serving(certificates: OwnCertificates) -> x509.Certificate:
    return x509.load_pem_x509_certificate(certificates.serving.read_bytes())


def verify(bundle: bytes, certificate: x509.Certificate, at: datetime) -> None:
    store = Store(x509.load_pem_x509_certificates(bundle))
    PolicyBuilder().store(store).time(at).build_server_verifier(x509.DNSName(NAME)).verify(certificate, [])


def test_what_is_made_is_private_and_verified_by_the_bundle(tmp_path: Path) -> None:
    certificates = OwnCertificates(tmp_path / "state", NAMES)
    certificates.renew(START)
    verify(certificates.bundle, serving(certificates), START)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()} == {0o600}


def test_a_restart_keeps_both_and_other_names_get_another_certificate(tmp_path: Path) -> None:
    first = OwnCertificates(tmp_path, NAMES)
    first.renew(START)
    before = serving(first)
    again = OwnCertificates(tmp_path, NAMES)
    again.renew(START + timedelta(days=1))
    assert (again.bundle, serving(again)) == (first.bundle, before)
    other = OwnCertificates(tmp_path, ("localhost",))
    other.renew(START)
    assert serving(other) != before
    assert other.bundle == first.bundle


def test_a_bundle_a_week_old_verifies_whatever_is_served_until_the_second_ca_ends(tmp_path: Path) -> None:
    """Twenty years, looked at every three days."""
    certificates = OwnCertificates(tmp_path, NAMES)
    bundles: list[bytes] = []
    used = set()
    for days in range(0, 2 * CA_LIFETIME.days - 400, 3):
        now = START + timedelta(days=days)
        certificates.renew(now)
        bundles.append(certificates.bundle)
        verify(bundles[max(0, len(bundles) - 3)], serving(certificates), now)
        used.add(serving(certificates).serial_number)
    assert len(used) > 200
    assert len(list(tmp_path.glob("ca-*.pem"))) == 2, "the first is over, the third is there"


def test_a_state_directory_of_something_else_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "ca-1.pem").write_text("nothing")
    with pytest.raises(SettingsError, match="cannot be read"):
        OwnCertificates(tmp_path, NAMES).renew(START)


def test_a_broken_serving_certificate_is_made_anew(tmp_path: Path) -> None:
    certificates = OwnCertificates(tmp_path, NAMES)
    certificates.renew(START)
    certificates.serving.write_text("nothing")
    certificates.renew(START)
    verify(certificates.bundle, serving(certificates), START)
