from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import pytest

from meshbridge.errors import SettingsError
from meshbridge.xds import auth
from meshbridge.xds.auth import AuthenticationError, mint_token, node_caller, pod_caller, verify_token

KEY = b"0123456789abcdef0123456789abcdef"
NOW = datetime.now(UTC)
POD = pod_caller("node-a", "finance", "client-0", "client", "uid-1")
GOOD = jwt.decode(mint_token(KEY, POD, now=NOW), options={"verify_signature": False})


@pytest.mark.parametrize("caller", [node_caller("node-a"), POD], ids=str)
def test_a_token_names_who_it_was_minted_for(caller: auth.Caller) -> None:
    assert verify_token(KEY, mint_token(KEY, caller, now=NOW)) == caller


def forged(**claims: object) -> str:
    return jwt.encode({name: value for name, value in (GOOD | claims).items() if value is not None}, KEY, "HS256")


BAD = {
    "empty": "",
    "not a token": "a.b.c",
    "too long": "x" * 5_000,
    "another key": mint_token(b"x" * 32, POD, now=NOW),
    "expired": mint_token(KEY, POD, now=NOW - timedelta(hours=3)),
    "not valid yet": mint_token(KEY, POD, now=NOW + timedelta(hours=1)),
    "another audience": forged(aud="istio-ca"),
    "no audience": forged(aud=None),
    "another issuer": forged(iss="someone"),
    "never expires": forged(exp=None),
    "no subject": forged(sub=None),
    "unsigned": jwt.encode(GOOD, "", "none"),
    "another algorithm": jwt.encode(GOOD, KEY * 2, "HS512"),
    "no caller": forged(**{auth.CLAIM: None}),
    "caller of a wrong type": forged(**{auth.CLAIM: ["node"]}),
    "caller with a wrong field": forged(**{auth.CLAIM: GOOD[auth.CLAIM] | {"pod": 7}}),
    "unknown kind": forged(**{auth.CLAIM: GOOD[auth.CLAIM] | {"kind": "admin"}}),
    "a pod without UID": forged(**{auth.CLAIM: GOOD[auth.CLAIM] | {"uid": ""}}),
    "a node without name": forged(**{auth.CLAIM: GOOD[auth.CLAIM] | {"kind": "node", "node": ""}}),
}


@pytest.mark.parametrize("token", BAD.values(), ids=BAD.keys())
def test_a_bad_token_is_refused_without_being_quoted(token: str) -> None:
    with pytest.raises(AuthenticationError) as refused:
        verify_token(KEY, token)
    assert not token or token not in str(refused.value)


def test_the_key_file_is_created_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "token.key"
    key = auth.load_or_create_key(path)
    assert auth.load_or_create_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["token.key"]


def test_a_key_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token.key"
    path.write_bytes(KEY)
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        auth.load_key(path)


def test_a_short_or_missing_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token.key"
    with pytest.raises(SettingsError, match="cannot be read"):
        auth.load_key(path)
    auth.write_private_file(path, b"short")
    with pytest.raises(SettingsError, match="too few"):
        auth.load_key(path)
