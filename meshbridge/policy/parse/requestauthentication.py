"""RequestAuthentication: whose tokens a workload takes, and where it finds them. Verifying them is ``authz``'s work.

Spec: istio, security.istio.io/v1 JWTRule; validateJwtRule. Of jwks and jwksUri the former counts; with neither the keys
are where the issuer says.
"""

from __future__ import annotations

import json
import re
from typing import Final
from urllib.parse import urlsplit

from meshbridge.policy.mesh import JwtLocation, JwtRule, RequestAuthentication
from meshbridge.policy.model import Document, Notice, Severity
from meshbridge.policy.parse.labels import match_labels_only
from meshbridge.policy.parse.parsed import Parsed, contradiction_notices, origin_of, refused_mesh, spec_of
from meshbridge.policy.parse.reader import Invalid, Reader, shown
from meshbridge.policy.parse.targets import target_refs
from meshbridge.policy.selectors import Selector

_NO_KEYS = "nothing says where the keys of issuer {!r} are, so every token of it is refused; write jwks or jwksUri"
KEYS_NOT_FOUND: Final = "MB0114"
_MAX_JWKS = 256 * 1024
_TIMEOUT_S, _MAX_TIMEOUT_S = 5.0, 60
_PART = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m)")
_DURATION = re.compile(rf"({_PART.pattern})+")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0}
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def parse_request_authentication(document: Document) -> Parsed:
    """One policy; without rules it has no effect."""
    selector = Selector()
    try:
        spec = Reader(spec_of(document), "spec").fields("selector", "targetRef", "targetRefs", "jwtRules")
        targets = target_refs(spec)
        if "selector" in spec:
            selector = Selector.of(match_labels_only(spec["selector"]))
        rules = tuple(_rule(item, document) for item in spec["jwtRules"].items()) if "jwtRules" in spec else ()
    except Exception as raised:
        error = Invalid.of(raised)
        return refused_mesh(document, error, selector)
    origin = origin_of(document, "")
    policy = RequestAuthentication(document.namespace, document.name, rules, origin, selector, targets)
    notices = contradiction_notices(document, [("spec.selector", selector)]) + tuple(
        Notice(document, _NO_KEYS.format(rule.issuer), rule.origin.rule, Severity.ERROR, KEYS_NOT_FOUND)
        for rule in rules
        if not rule.jwks and rule.key_source is None
    )
    return Parsed(document, request_authentication=(policy,), notices=notices)


def _rule(at: Reader, document: Document) -> JwtRule:
    fields = at.fields(
        "issuer",
        "audiences",
        "jwksUri",
        "jwks",
        "fromHeaders",
        "fromParams",
        "fromCookies",
        "outputPayloadToHeader",
        "outputClaimToHeaders",
        "forwardOriginalToken",
        "timeout",
        "spaceDelimitedClaims",
    )
    issuer = fields["issuer"].text() if "issuer" in fields else ""
    if not issuer and "jwksUri" not in fields:
        at.refuse("has no issuer", "write issuer, or jwksUri if tokens of any issuer are meant")
    return JwtRule(
        issuer=issuer,
        origin=origin_of(document, at.path),
        jwks=_jwks(fields["jwks"]) if "jwks" in fields else "",
        jwks_uri=_uri(fields["jwksUri"]) if "jwksUri" in fields else "",
        audiences=_names(fields.get("audiences")),
        locations=_locations(fields),
        output_payload_to_header=_header(fields["outputPayloadToHeader"]) if "outputPayloadToHeader" in fields else "",
        output_claims_to_headers=_claim_headers(fields.get("outputClaimToHeaders")),
        forward_original_token="forwardOriginalToken" in fields and fields["forwardOriginalToken"].boolean(),
        timeout_s=_seconds(fields["timeout"]) if "timeout" in fields else _TIMEOUT_S,
        space_delimited=_names(fields.get("spaceDelimitedClaims")),
    )


def _names(at: Reader | None) -> tuple[str, ...]:
    for item in at.items() if at else ():
        if not item.text():
            item.refuse("is empty", "write a value, or delete the element")
    return at.texts() if at else ()


def _seconds(at: Reader) -> float:
    """A duration as protobuf's JSON has it, or as Go writes it."""
    text = at.text()
    parts = _DURATION.fullmatch(text)
    seconds = sum(float(amount) * _UNITS[unit] for amount, unit in _PART.findall(text)) if parts else 0.0
    if not 0.001 <= seconds <= _MAX_TIMEOUT_S:
        at.refuse(f"{shown(text)} is no time to wait", f"write a duration of 1ms to {_MAX_TIMEOUT_S}s, e.g. 5s")
    return seconds


def _jwks(at: Reader) -> str:
    """The key set as written; that every key can be used is found out by who uses it."""
    text = at.text()
    if len(text) > _MAX_JWKS:
        at.refuse(f"a key set of {len(text)} characters", f"use at most {_MAX_JWKS}")
    try:
        keys = json.loads(text)
    except (ValueError, RecursionError):
        at.refuse("is no JSON", 'write {"keys": […]}')
    found = keys.get("keys") if isinstance(keys, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(key, dict) for key in found):
        at.refuse("has no keys", 'write {"keys": […]}')
    if any("d" in key or key.get("kty") == "oct" for key in found):
        at.refuse("holds a private or symmetric key", "publish public keys only, and replace this one")
    return text


def _uri(at: Reader) -> str:
    text = at.text()
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not text.isascii() or not text.isprintable() or " " in text:
        at.refuse(f"{shown(text)} is no http address", "write https://…")
    return text


def _locations(fields: dict[str, Reader]) -> tuple[JwtLocation, ...]:
    found: list[JwtLocation] = []
    for item in fields["fromHeaders"].items() if "fromHeaders" in fields else []:
        parts = item.fields("name", "prefix")
        if "name" not in parts:
            item.refuse("has no name", "write the header's name")
        found.append(
            JwtLocation(header=_header(parts["name"]), prefix=parts["prefix"].text() if "prefix" in parts else "")
        )
    found += [JwtLocation(parameter=parameter) for parameter in _names(fields.get("fromParams"))]
    found += [JwtLocation(cookie=cookie) for cookie in _names(fields.get("fromCookies"))]
    return tuple(found)


def _header(at: Reader) -> str:
    name = at.text()
    if not _HEADER.fullmatch(name):
        at.refuse(f"{shown(name)} is no header name", "use letters, digits and '-'")
    return name.lower()


def _claim_headers(at: Reader | None) -> tuple[tuple[str, str], ...]:
    found = []
    for item in at.items() if at else []:
        parts = item.fields("header", "claim")
        if "header" not in parts or "claim" not in parts:
            item.refuse("needs header and claim", "write both")
        found.append((_header(parts["header"]), parts["claim"].text()))
    return tuple(found)
