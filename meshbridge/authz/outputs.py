"""What jwt_authn does to the headers of a request it lets through, done by us where it does not stand behind us.

Spec: Envoy, jwt_authn JwtProvider ``forward``, ``forward_payload_header``, ``claim_to_headers``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any, Final

from meshbridge.authz.tokens import Verified
from meshbridge.policy.mesh import Claims, JwtRule

MAX_VALUE_BYTES: Final = 8 * 1024
"""Longer values are left out, rather than have Envoy refuse the request."""

Headers = tuple[tuple[str, str], ...]


def outputs_of(rules: Iterable[JwtRule], token: Verified | None) -> tuple[Headers, tuple[str, ...]]:
    """The headers to set and those to remove.

    A header that some rule fills from a token is never the client's own, whether there is a token or not.
    """
    sets: dict[str, str] = {}
    removed = {name for rule in rules for name in _filled_by(rule)}
    if token is not None:
        rule = token.rule
        if rule.output_payload_to_header:
            sets[rule.output_payload_to_header] = token.payload
        for header, claim in rule.output_claims_to_headers:
            value = _text(_found(token.claims, claim))
            if value is not None:
                sets[header] = value
        if not rule.forward_original_token and token.location.header:
            removed.add(token.location.header)
    sets = {name: value for name, value in sets.items() if len(value) <= MAX_VALUE_BYTES}
    return tuple(sorted(sets.items())), tuple(sorted(removed - set(sets)))


def _filled_by(rule: JwtRule) -> Iterable[str]:
    if rule.output_payload_to_header:
        yield rule.output_payload_to_header
    for header, _ in rule.output_claims_to_headers:
        yield header


def _found(claims: Claims, path: str) -> Any:
    """A claim by its name, or one inside another by names with dots between."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for name in path.split("."):
        if not isinstance(found, dict) or name not in found:
            return None
        found = found[name]
    return found


def _text(value: Any) -> str | None:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case str():
            return value if value.isascii() and value.isprintable() else None
        case list() | dict():
            packed = json.dumps(value, separators=(",", ":")).encode()
            return base64.urlsafe_b64encode(packed).decode().rstrip("=")
    return None
