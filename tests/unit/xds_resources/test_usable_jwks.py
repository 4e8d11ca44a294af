"""Key sets that Envoy would refuse must not cost the listener, and must not let a token in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.xds.jwks import MAX_JWKS_BYTES, UNUSABLE_JWKS, usable_jwks

EC = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}

UNUSABLE = {
    "nothing": "",
    "no JSON": "{broken",
    "a list": "[]",
    "no keys": '{"keys": []}',
    "keys of a wrong type": '{"keys": 3}',
    "a key of a wrong type": '{"keys": [3, null, []]}',
    "a point that is not on the curve": json.dumps({"keys": [{**EC, "y": EC["x"]}]}),
    "a symmetric secret": '{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}',
    "an unknown type": '{"keys": [{"kty": "XX"}]}',
    "nested beyond reason": "[" * 100_000,
    "too large": json.dumps({"keys": [EC], "pad": "x" * MAX_JWKS_BYTES}),
}


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_set_without_a_verifying_key_becomes_one_nobody_can_sign_for(text: str) -> None:
    assert usable_jwks(text) == UNUSABLE_JWKS


def test_good_keys_survive_beside_bad_ones() -> None:
    text = json.dumps({"keys": [{"kty": "XX"}, {**EC, "kid": "good"}]})
    assert [key["kid"] for key in json.loads(usable_jwks(text))["keys"]] == ["good"]


def test_placeholder_key_is_itself_one_that_verifies() -> None:
    assert json.loads(usable_jwks(UNUSABLE_JWKS)) == json.loads(UNUSABLE_JWKS)


@given(st.text(max_size=200))
def test_any_text_gives_a_key_set(text: str) -> None:
    assert json.loads(usable_jwks(text))["keys"]
