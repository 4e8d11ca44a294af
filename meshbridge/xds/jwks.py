"""Key sets for jwt_authn: only what Envoy is sure to take, since one bad set would cost the whole listener."""

from __future__ import annotations

import json
from typing import Any, Final

import jwt

# A key nobody holds (a point of P-256 found by hashing a sentence). A rule without usable keys verifies against it, so
# that every token of its issuer is refused.
UNUSABLE_JWKS: Final = (
    '{"keys":[{"kty":"EC","crv":"P-256","kid":"none",'
    '"x":"COh1FZdQ2ezH3GKjcPi88hpmhOylehG9y65x4J52CnY",'
    '"y":"cx16HGLJ2uMvJdAjRNY84qtOdcHtmZCnHmp-4wyxL_Y"}]}'
)

MAX_JWKS_BYTES: Final = 256 * 1024


def usable_jwks(text: str) -> str:
    """The keys of ``text`` that verify signatures, as a key set; one nobody holds where there are none."""
    keys = [key for key in _keys(text) if _verifies(key)]
    return json.dumps({"keys": keys}) if keys else UNUSABLE_JWKS


def _keys(text: str) -> list[dict[str, Any]]:
    if len(text) > MAX_JWKS_BYTES:
        return []
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return []
    keys = document.get("keys") if isinstance(document, dict) else None
    return [key for key in keys if isinstance(key, dict)] if isinstance(keys, list) else []


def _verifies(key: dict[str, Any]) -> bool:
    try:
        return jwt.PyJWK(key).key_type in {"RSA", "EC", "OKP"}
    # A hostile key makes the libraries below pyjwt raise whatever they like; all of it means "not a key".
    except Exception:
        return False
