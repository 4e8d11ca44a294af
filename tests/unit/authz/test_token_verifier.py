"""Tokens verified by ourselves: what Envoy's jwt_authn would take or refuse."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.authz.tokens import CACHE_SIZE, MAX_TOKEN_BYTES, BadToken, TokenVerifier
from meshbridge.policy.mesh import JwtLocation, JwtRule
from meshbridge.policy.model import Origin

NOW = 1_800_000_000
ISSUER = "https://issuer.test"
ORIGIN = Origin("RequestAuthentication", "finance", "jwt")
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)
ED_KEY = ed25519.Ed25519PrivateKey.generate()
OTHER_KEY = ec.generate_private_key(ec.SECP256R1())


def jwk(key: Any, kid: str | None = None) -> dict[str, Any]:
    algorithm = {
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    to_jwk = next(found for kind, found in algorithm.items() if isinstance(key, kind)).to_jwk
    return json.loads(to_jwk(key.public_key())) | ({"kid": kid} if kid else {})


def rule(*keys: dict[str, Any], **changes: Any) -> JwtRule:
    return JwtRule(ISSUER, ORIGIN, jwks=json.dumps({"keys": list(keys) or [jwk(EC_KEY, "a")]}), **changes)


def token(key: Any = EC_KEY, algorithm: str = "ES256", kid: str | None = "a", **claims: Any) -> str:
    payload = {"iss": ISSUER, "sub": "me", "exp": NOW + 60} | claims
    return jwt.encode(
        {name: value for name, value in payload.items() if value is not None},
        key,
        algorithm=algorithm,
        headers={"kid": kid} if kid else {},
    )


def claims(
    text: str | None, *rules: JwtRule, headers: Mapping[str, str] | None = None, path: str = "/", now_s: float = NOW
) -> Any:
    found = dict(headers or {})
    if text is not None:
        found["authorization"] = f"Bearer {text}"
    return TokenVerifier().claims_of(rules or (rule(),), found, path, now_s)


GOOD = {
    "ES256": (token(), rule()),
    "RS256": (token(RSA_KEY, "RS256"), rule(jwk(RSA_KEY, "a"))),
    "PS256": (token(RSA_KEY, "PS256"), rule(jwk(RSA_KEY, "a"))),
    "EdDSA": (token(ED_KEY, "EdDSA"), rule(jwk(ED_KEY, "a"))),
    "no key id in the token": (token(kid=None), rule(jwk(OTHER_KEY, "b"), jwk(EC_KEY, "a"))),
    "no key id in the set": (token(), rule(jwk(EC_KEY))),
    "a broken key beside the good one": (token(), rule({"kty": "XX"}, jwk(EC_KEY, "a"))),
    "no expiry": (token(exp=None), rule()),
    "expired within the clock skew": (token(exp=NOW - 30), rule()),
    "audience as text": (token(aud="shop"), rule(audiences=("shop", "other"))),
    "audience in a list": (token(aud=["x", "shop"]), rule(audiences=("shop",))),
    "audience nobody asks for": (token(aud="shop"), rule()),
}


@pytest.mark.parametrize(("text", "by"), GOOD.values(), ids=GOOD.keys())
def test_valid_token_gives_its_claims(text: str, by: JwtRule) -> None:
    assert claims(text, by)["sub"] == "me"


def unsigned(header: dict[str, Any], payload: dict[str, Any], signature: bytes = b"") -> str:
    parts = [json.dumps(header).encode(), json.dumps(payload).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


BAD = {
    "another key": (token(OTHER_KEY), rule()),
    "an unknown key id": (token(kid="z"), rule()),
    "expired": (token(exp=NOW - 61), rule()),
    "not valid yet": (token(nbf=NOW + 61), rule()),
    "another issuer": (token(iss="https://other.test"), rule()),
    "no issuer": (token(iss=None), rule()),
    "another audience": (token(aud="x"), rule(audiences=("shop",))),
    "no audience": (token(), rule(audiences=("shop",))),
    "algorithm none": (unsigned({"alg": "none"}, {"iss": ISSUER}), rule()),
    "a public key as shared secret": (
        unsigned({"alg": "HS256", "kid": "a"}, {"iss": ISSUER}, b"x" * 32),
        rule(),
    ),
    "an algorithm of another key type": (token(RSA_KEY, "RS256"), rule()),
    "expiry that is text": (token_with := unsigned({"alg": "ES256"}, {"iss": ISSUER, "exp": "soon"}), rule()),
    "empty": ("", rule()),
    "no token at all": ("garbage", rule()),
    "too long": ("x" * (MAX_TOKEN_BYTES + 1), rule()),
    "lone surrogates": ("\udcff.\udcff.\udcff", rule()),
    "no usable key": (token(), JwtRule(ISSUER, ORIGIN, jwks="{broken")),
    "keys to be fetched from elsewhere": (token(), JwtRule(ISSUER, ORIGIN, jwks_uri="https://keys.test")),
    "a set that is no set": (token(), JwtRule(ISSUER, ORIGIN, jwks='{"keys": {"a": 1}}')),
}


@pytest.mark.parametrize(("text", "by"), BAD.values(), ids=BAD.keys())
def test_bad_token_is_refused_with_a_reason_that_does_not_quote_it(text: str, by: JwtRule) -> None:
    found = claims(text, by)
    assert isinstance(found, BadToken)
    assert found.reason
    assert len(text) < 8 or text not in found.reason


@pytest.mark.parametrize("value", ["soon", True, -1, 10**400, float("nan"), None, [1]])
def test_expiry_that_is_no_time_is_refused(value: Any) -> None:
    signed = jwt.api_jws.encode(
        json.dumps({"iss": ISSUER, "exp": value}).encode(), EC_KEY, algorithm="ES256", headers={"kid": "a"}
    )
    assert isinstance(claims(signed), BadToken)


def test_absent_token_is_no_error() -> None:
    assert claims(None) is None


def test_default_places_are_the_authorization_header_and_access_token() -> None:
    assert claims(None, headers={"authorization": f"Bearer {token()}"})["sub"] == "me"
    assert claims(None, path=f"/x?access_token={token()}")["sub"] == "me"
    assert claims(None, headers={"authorization": f"Basic {token()}"}) is None


def test_written_places_replace_the_default_ones() -> None:
    own = rule(locations=(JwtLocation(header="X-Jwt", prefix="T "), JwtLocation(cookie="session")))
    assert claims(token(), own) is None
    assert claims(None, own, headers={"x-jwt": f"T {token()}"})["sub"] == "me"
    assert claims(None, own, headers={"cookie": f"a=b; session={token()}"})["sub"] == "me"


def test_one_valid_token_of_several_rules_is_enough() -> None:
    other = JwtRule("https://other.test", ORIGIN, jwks=json.dumps({"keys": [jwk(OTHER_KEY)]}))
    assert claims(token(), other, rule())["sub"] == "me"
    assert isinstance(claims(token(), other), BadToken)


def test_remembered_token_is_refused_once_expired() -> None:
    verifier, headers = TokenVerifier(), {"authorization": f"Bearer {token()}"}
    assert not isinstance(verifier.claims_of((rule(),), headers, "/", NOW), BadToken)
    assert not isinstance(verifier.claims_of((rule(),), headers, "/", NOW + 119), BadToken)
    assert isinstance(verifier.claims_of((rule(),), headers, "/", NOW + 121), BadToken)


def test_remembered_token_does_not_outlive_its_rules_keys() -> None:
    verifier, headers = TokenVerifier(), {"authorization": f"Bearer {token()}"}
    assert not isinstance(verifier.claims_of((rule(),), headers, "/", NOW), BadToken)
    assert isinstance(verifier.claims_of((rule(jwk(OTHER_KEY, "a")),), headers, "/", NOW), BadToken)


def test_memory_is_bounded() -> None:
    verifier = TokenVerifier()
    verifier._cache.update({(bytes([n % 256, n // 256]), rule()): None for n in range(CACHE_SIZE)})  # type: ignore[misc]
    verifier.claims_of((rule(),), {"authorization": f"Bearer {token()}"}, "/", NOW)
    assert len(verifier._cache) == CACHE_SIZE


@given(st.text(max_size=300), st.text(max_size=60))
def test_no_text_is_ever_a_valid_token(text: str, path: str) -> None:
    found = TokenVerifier().claims_of((rule(),), {"authorization": f"Bearer {text}"}, "/?" + path, NOW)
    assert found is None or isinstance(found, BadToken)
