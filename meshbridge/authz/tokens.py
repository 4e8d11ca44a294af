"""Tokens verified by ourselves, where Envoy's jwt_authn stands behind us and has told nothing (Istio's CUSTOM action).

Spec: Istio, RequestAuthentication; Envoy, jwt_authn. No token is no error, a bad one always is.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import jwt

from meshbridge.authz.keysets import KeySets
from meshbridge.policy.mesh import Claims, JwtLocation, JwtRule

MAX_TOKEN_BYTES: Final = 16 * 1024
CLOCK_SKEW_S: Final = 60
CACHE_SIZE: Final = 4096
MAX_TIME_S: Final = 1 << 53

# Only signatures: "none" and shared secrets are not taken, whatever a key set says.
ALGORITHMS: Final[Mapping[str, tuple[str, ...]]] = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "EC": ("ES256", "ES384", "ES512"),
    "OKP": ("EdDSA",),
}

DEFAULT_LOCATIONS: Final = (
    JwtLocation(header="authorization", prefix="Bearer "),
    JwtLocation(parameter="access_token"),
)


@dataclass(frozen=True, slots=True)
class BadToken:
    """There was a token and it is not valid; ``reason`` names no part of it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Verified:
    """A valid token: its claims, the rule it is valid for, and where it stood."""

    claims: Claims
    rule: JwtRule
    location: JwtLocation
    payload: str


@dataclass(frozen=True, slots=True)
class _Cached:
    claims: Claims
    expires_s: float


@dataclass(frozen=True, slots=True)
class _Key:
    """A public key and the algorithms it may have signed with; ``key_id`` None fits every token."""

    key_id: str | None
    algorithms: tuple[str, ...]
    public: Any


@dataclass(slots=True)
class TokenVerifier:
    """Verifies tokens against key sets, and remembers the good ones until they expire or the keys change.

    ``now_s`` is the wall clock. Tokens themselves are not kept, only their digests. Threads may share it. ``key_sets``
    None: nothing is fetched.
    """

    key_sets: KeySets | None = None
    _cache: OrderedDict[tuple[bytes, JwtRule, str], _Cached] = field(default_factory=OrderedDict)
    _keys: dict[str, tuple[_Key, ...]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def claims_of(
        self, rules: Sequence[JwtRule], headers: Mapping[str, str], path: str, now_s: float | None = None
    ) -> Claims | BadToken | None:
        """The claims of a valid token, why the token there is is not valid, or None when there is none."""
        found = self.token_of(rules, headers, path, now_s)
        return found.claims if isinstance(found, Verified) else found

    def token_of(
        self, rules: Sequence[JwtRule], headers: Mapping[str, str], path: str, now_s: float | None = None
    ) -> Verified | BadToken | None:
        """A valid token, why the token there is is not valid, or None when there is none.

        Of several tokens one that is valid for its rule is enough.
        """
        now_s = time.time() if now_s is None else now_s
        failure: BadToken | None = None
        for rule in rules:
            for location, token in _tokens(rule.locations or DEFAULT_LOCATIONS, headers, path):
                found = self._verified(rule, token, now_s)
                if not isinstance(found, BadToken):
                    return Verified(found, rule, location, token.split(".")[1])
                failure = found
        return failure

    def _verified(self, rule: JwtRule, token: str, now_s: float) -> Claims | BadToken:
        encoded = token.encode("utf-8", "replace")
        if len(encoded) > MAX_TOKEN_BYTES:
            return BadToken(f"the token is longer than {MAX_TOKEN_BYTES} bytes")
        jwks = self._jwks(rule)
        entry = (hashlib.sha256(encoded).digest(), rule, jwks)
        with self._lock:
            cached = self._cache.get(entry)
            if cached is not None and now_s < cached.expires_s:
                self._cache.move_to_end(entry)
                return cached.claims
        claims = self._verify(rule, jwks, token, now_s)
        if isinstance(claims, BadToken):
            return claims
        with self._lock:
            self._cache[entry] = _Cached(claims, claims.get("exp", now_s) + CLOCK_SKEW_S)
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        return claims

    def _jwks(self, rule: JwtRule) -> str:
        source = rule.key_source
        return self.key_sets.text(source) if source is not None and self.key_sets is not None else rule.jwks

    def _no_keys(self, rule: JwtRule) -> BadToken:
        source = rule.key_source
        why = ""
        if source is not None:
            why = f": {self.key_sets.problem(source)}" if self.key_sets is not None else ": nothing is fetched here"
        return BadToken(f"no usable key is known for issuer {rule.issuer!r}{why}")

    def _verify(self, rule: JwtRule, jwks: str, token: str, now_s: float) -> Claims | BadToken:
        keys = self._key_set(jwks)
        if not keys:
            return self._no_keys(rule)
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
            fitting = [key for key in keys if key_id is None or key.key_id in (None, key_id)]
            if not fitting and (source := rule.key_source) is not None and self.key_sets is not None:
                self.key_sets.missed(source)
            claims = _first_valid(token, fitting)
        # Whatever a hostile token makes the libraries raise, it is not valid.
        except Exception as error:
            return BadToken(f"the token is not valid: {type(error).__name__}")
        if claims is None:
            return BadToken("the token is signed with no key of its issuer")
        return _check_claims(claims, rule, now_s) or rule.as_policies_see(claims)

    def _key_set(self, jwks: str) -> tuple[_Key, ...]:
        with self._lock:
            keys = self._keys.get(jwks)
        if keys is None:
            keys = _parse_keys(jwks)
            with self._lock:
                if len(self._keys) >= CACHE_SIZE:
                    self._keys.clear()
                self._keys[jwks] = keys
        return keys


def _parse_keys(jwks: str) -> tuple[_Key, ...]:
    try:
        document = json.loads(jwks)
        candidates = document["keys"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ()
    found = []
    for candidate in candidates if isinstance(candidates, list) else ():
        try:
            key = jwt.PyJWK(candidate)
        except Exception:  # noqa: S112 - one broken key costs itself only; the rule's other keys go on verifying
            continue
        # PyJWK insists on one algorithm where the key set names none, so only the bare key is kept.
        named = candidate.get("alg")
        algorithms = tuple(name for name in ALGORITHMS.get(key.key_type or "", ()) if named in (None, name))
        if algorithms:
            found.append(_Key(key.key_id, algorithms, key.key))
    return tuple(found)


def _first_valid(token: str, keys: Sequence[_Key]) -> Claims | None:
    """The payload under the first key that made the signature. Time and audience are looked at by the caller."""
    unchecked: Any = {"verify_signature": True} | dict.fromkeys(
        ("verify_exp", "verify_nbf", "verify_iat", "verify_aud", "verify_iss", "verify_sub", "verify_jti"), False
    )
    for key in keys:
        try:
            claims: Claims = jwt.decode(token, key.public, algorithms=key.algorithms, options=unchecked)
            return claims
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError, jwt.InvalidKeyError):
            continue
    return None


def _check_claims(claims: Claims, rule: JwtRule, now_s: float) -> BadToken | None:
    if rule.issuer and claims.get("iss") != rule.issuer:
        return BadToken("the token is of another issuer")
    for name in ("exp", "nbf"):
        if name in claims and not _is_time(claims[name]):
            return BadToken(f"claim {name} is not a time")
    if now_s > claims.get("exp", now_s) + CLOCK_SKEW_S:
        return BadToken("the token has expired")
    if now_s < claims.get("nbf", now_s) - CLOCK_SKEW_S:
        return BadToken("the token is not valid yet")
    if rule.audiences and _audiences(claims.get("aud")).isdisjoint(rule.audiences):
        return BadToken("the token is for another audience")
    return None


def _is_time(value: object) -> bool:
    """A number of seconds; JSON as Python reads it also has NaN, which no comparison ever rejects."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_TIME_S


def _audiences(value: object) -> set[str]:
    if isinstance(value, str):
        return {value}
    return {item for item in value if isinstance(item, str)} if isinstance(value, list) else set()


def _tokens(
    locations: Sequence[JwtLocation], headers: Mapping[str, str], path: str
) -> Iterator[tuple[JwtLocation, str]]:
    for location in locations:
        found: Iterable[str] = ()
        if location.header:
            value = headers.get(location.header.lower())
            if value is not None and value.startswith(location.prefix):
                found = [value[len(location.prefix) :].strip()]
        elif location.parameter:
            found = _query(path).get(location.parameter, ())
        elif location.cookie:
            found = _cookies(headers.get("cookie", ""), location.cookie)
        yield from ((location, token) for token in found)


def _query(path: str) -> Mapping[str, list[str]]:
    try:
        return parse_qs(urlsplit(path).query, max_num_fields=200)
    except ValueError:
        return {}


def _cookies(header: str, name: str) -> Iterator[str]:
    for part in header.split(";")[:200]:
        key, equals, value = part.strip().partition("=")
        if equals and key == name:
            yield value
