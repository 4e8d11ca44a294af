from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store
from envoy.extensions.transport_sockets.tls.v3.secret_pb2 import Secret

from meshbridge.errors import SettingsError
from meshbridge.xds.secrets import ROTATE_AFTER, SVID_LIFETIME, SecretStore, SpiffeId, load_or_create_authority

NOW = datetime(2026, 11, 24, 7, 0, tzinfo=UTC)
CLIENT = SpiffeId("cluster.local", "finance", "client")


def test_a_certificate_speaks_for_one_spiffe_id_and_verifies_against_the_root(tmp_path: Path) -> None:
    authority = load_or_create_authority(tmp_path, "cluster.local", NOW)
    svid = authority.issue(CLIENT, NOW)
    leaf = x509.load_pem_x509_certificate(svid.chain)
    roots = Store([x509.load_pem_x509_certificate(authority.root_pem)])
    verified = PolicyBuilder().store(roots).time(NOW).build_client_verifier().verify(leaf, [])
    assert [str(name.value) for name in verified.subjects or ()] == ["spiffe://cluster.local/ns/finance/sa/client"]
    assert load_pem_private_key(svid.key, None).public_key() == leaf.public_key()
    assert leaf.not_valid_after_utc - NOW == SVID_LIFETIME
    assert "PRIVATE" not in repr(svid)


def test_the_root_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = load_or_create_authority(state, "cluster.local", NOW)
    assert load_or_create_authority(state, "cluster.local", NOW).root_pem == first.root_pem
    assert sorted(path.name for path in state.iterdir()) == ["ca.crt", "ca.key"]
    assert stat.S_IMODE((state / "ca.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def break_mode(state: Path) -> None:
    (state / "ca.key").chmod(0o640)


def break_key(state: Path) -> None:
    (state / "ca.key").write_bytes(b"nonsense")


def break_pair(state: Path) -> None:
    other = state / "other"
    load_or_create_authority(other, "cluster.local", NOW)
    (other / "ca.crt").rename(state / "ca.crt")


def break_certificate(state: Path) -> None:
    (state / "ca.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\n")


@pytest.mark.parametrize("harm", [break_mode, break_key, break_pair, break_certificate])
def test_state_that_cannot_be_trusted_stops_the_start(tmp_path: Path, harm: object) -> None:
    load_or_create_authority(tmp_path, "cluster.local", NOW)
    assert callable(harm)
    harm(tmp_path)
    with pytest.raises(SettingsError):
        load_or_create_authority(tmp_path, "cluster.local", NOW)


def test_an_expired_root_stops_the_start(tmp_path: Path) -> None:
    load_or_create_authority(tmp_path, "cluster.local", NOW)
    with pytest.raises(SettingsError, match="expired"):
        load_or_create_authority(tmp_path, "cluster.local", NOW + timedelta(days=3660))


def test_secrets_stay_until_half_their_life_is_over(tmp_path: Path) -> None:
    store = SecretStore(load_or_create_authority(tmp_path, "cluster.local", NOW))
    first = store.secrets(CLIENT, NOW)
    assert store.next_rotation() == NOW + SVID_LIFETIME * ROTATE_AFTER
    assert store.secrets(CLIENT, NOW + SVID_LIFETIME * ROTATE_AFTER - timedelta(seconds=1)) == first
    second = store.secrets(CLIENT, NOW + SVID_LIFETIME * ROTATE_AFTER)
    assert second["default"] != first["default"]
    assert second["ROOTCA"] == first["ROOTCA"]
    store.keep_only(set())
    assert store.next_rotation() is None


def test_the_resources_are_what_envoy_asks_for(tmp_path: Path) -> None:
    authority = load_or_create_authority(tmp_path, "cluster.local", NOW)
    secrets = SecretStore(authority).secrets(CLIENT, NOW)
    own, root = Secret.FromString(secrets["default"]), Secret.FromString(secrets["ROOTCA"])
    assert own.name == "default"
    assert own.tls_certificate.certificate_chain.inline_bytes.startswith(b"-----BEGIN CERTIFICATE")
    assert root.validation_context.trusted_ca.inline_bytes == authority.root_pem
    assert not root.HasField("tls_certificate")
