"""RequestAuthentication: whose tokens a workload takes, and where it finds them. Verifying them is ``authz``'s work."""

from __future__ import annotations

import json
import re

from meshbridge.policy.mesh import JwtLocation, JwtRule, RequestAuthentication
from meshbridge.policy.model import Document, Notice, Severity
from meshbridge.policy.parse.labels import match_labels_only
from meshbridge.policy.parse.parsed import Parsed, contradiction_notices, origin_of, refused_mesh, spec_of
from meshbridge.policy.parse.reader import Invalid, Reader, shown
from meshbridge.policy.parse.targets import target_refs
from meshbridge.policy.selectors import Selector

_NOT_FETCHED = "jwksUri is not fetched, so every token of issuer {!r} is refused; write the key set under jwks"
_MAX_JWKS = 256 * 1024
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
    except Invalid as error:
        return refused_mesh(document, error, selector)
    origin = origin_of(document, "")
    policy = RequestAuthentication(document.namespace, document.name, rules, origin, selector, targets)
    notices = contradiction_notices(document, [("spec.selector", selector)]) + tuple(
        Notice(document, _NOT_FETCHED.format(rule.issuer), rule.origin.rule, Severity.ERROR, "MB0114")
        for rule in rules
        if rule.jwks_uri
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
    )
    if "issuer" not in fields or not fields["issuer"].text():
        at.refuse("has no issuer", "write issuer")
    if ("jwks" in fields) == ("jwksUri" in fields):
        at.refuse("needs one of jwks and jwksUri", "write the key set under jwks, or its address under jwksUri")
    return JwtRule(
        issuer=fields["issuer"].text(),
        origin=origin_of(document, at.path),
        jwks=_jwks(fields["jwks"]) if "jwks" in fields else "",
        jwks_uri=_uri(fields["jwksUri"]) if "jwksUri" in fields else "",
        audiences=fields["audiences"].texts() if "audiences" in fields else (),
        locations=_locations(fields),
        output_payload_to_header=_header(fields["outputPayloadToHeader"]) if "outputPayloadToHeader" in fields else "",
        output_claims_to_headers=_claim_headers(fields.get("outputClaimToHeaders")),
        forward_original_token="forwardOriginalToken" in fields and fields["forwardOriginalToken"].boolean(),
    )


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
    if not text.startswith(("https://", "http://")):
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
    for parameter in fields["fromParams"].texts() if "fromParams" in fields else ():
        found.append(JwtLocation(parameter=parameter))
    for cookie in fields["fromCookies"].texts() if "fromCookies" in fields else ():
        found.append(JwtLocation(cookie=cookie))
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
