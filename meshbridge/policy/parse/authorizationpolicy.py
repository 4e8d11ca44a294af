"""AuthorizationPolicy into rules over conditions.

Spec: ISTIO.md §a. What Istio's webhook rejects is refused, but for a ``when`` key nobody knows: that rule is left out,
as pilot does, and said so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from meshbridge.policy.mesh import (
    Action,
    Attribute,
    AuthorizationPolicy,
    AuthorizationRule,
    Clause,
    Condition,
)
from meshbridge.policy.model import Document, Notice, Severity
from meshbridge.policy.parse.labels import match_labels_only
from meshbridge.policy.parse.parsed import Parsed, contradiction_notices, origin_of, refused_mesh, spec_of
from meshbridge.policy.parse.reader import Invalid, Reader, shown
from meshbridge.policy.parse.targets import target_refs
from meshbridge.policy.selectors import Selector

DRY_RUN = "istio.io/dry-run"

UNKNOWN_WHEN_KEY: Final = "MB0101"
CUSTOM_DRY_RUN: Final = "MB0115"
UNREADABLE_DRY_RUN: Final = "MB0116"

_SOURCE = {
    "principals": Attribute.PRINCIPALS,
    "requestPrincipals": Attribute.REQUEST_PRINCIPALS,
    "namespaces": Attribute.NAMESPACES,
    "serviceAccounts": Attribute.SERVICE_ACCOUNTS,
    "trustDomains": Attribute.TRUST_DOMAINS,
    "ipBlocks": Attribute.IP_BLOCKS,
    "remoteIpBlocks": Attribute.REMOTE_IP_BLOCKS,
}
_OPERATION = {
    "hosts": Attribute.HOSTS,
    "ports": Attribute.PORTS,
    "methods": Attribute.METHODS,
    "paths": Attribute.PATHS,
}
_WHEN = {
    "source.ip": Attribute.IP_BLOCKS,
    "remote.ip": Attribute.REMOTE_IP_BLOCKS,
    "source.namespace": Attribute.NAMESPACES,
    "source.principal": Attribute.PRINCIPALS,
    "source.serviceAccount": Attribute.SERVICE_ACCOUNTS,
    "source.trustDomain": Attribute.TRUST_DOMAINS,
    "request.auth.principal": Attribute.REQUEST_PRINCIPALS,
    "request.auth.audiences": Attribute.AUDIENCES,
    "request.auth.presenter": Attribute.PRESENTER,
    "destination.ip": Attribute.DESTINATION_IP,
    "destination.port": Attribute.PORTS,
    "connection.sni": Attribute.SNI,
}
_NETWORKS = (Attribute.IP_BLOCKS, Attribute.REMOTE_IP_BLOCKS, Attribute.DESTINATION_IP)
_NOT_IN_CUSTOM = (
    Attribute.PRINCIPALS,
    Attribute.NAMESPACES,
    Attribute.SERVICE_ACCOUNTS,
    Attribute.TRUST_DOMAINS,
    Attribute.REQUEST_PRINCIPALS,
    Attribute.AUDIENCES,
    Attribute.PRESENTER,
    Attribute.CLAIM,
)
_KEYS = f"{', '.join(_WHEN)}, request.headers[…], request.auth.claims[…], experimental.envoy.filters.…[…]"
_CONSEQUENCE = {
    Action.ALLOW: "it allows nothing",
    Action.DENY: "it denies nothing",
    Action.AUDIT: "it audits nothing",
    Action.CUSTOM: "nobody is asked",
}
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_HEADER_KEY = re.compile(r"request\.headers\[([!#$%&'*+.^_`|~0-9A-Za-z:-]+)\]")
_CLAIM_KEY = re.compile(r"request\.auth\.claims((?:\[[^\[\]]+\])+)")
_METADATA_KEY = re.compile(r"experimental\.(envoy\.filters\.[^\[\]]+)\[([^\[\]]+)\]")
_PREFIXES = ("request.headers", "request.auth.claims", "experimental.envoy.filters.")
_MAX_ACCOUNTS, _MAX_ACCOUNT = 16, 320
_ACCOUNT = re.compile(r"([^/*]+/)?[^/*]+")
_METHOD = re.compile(r"[^\s]+")


def parse_authorization_policy(document: Document) -> Parsed:
    """One policy; refused as a whole when one part is not understood."""
    selector = Selector()
    try:
        spec = Reader(spec_of(document), "spec").fields(
            "selector", "targetRef", "targetRefs", "rules", "action", "provider"
        )
        targets = target_refs(spec)
        if "selector" in spec:
            selector = Selector.of(match_labels_only(spec["selector"]))
        action = Action(spec["action"].text(list(Action)) if "action" in spec else "ALLOW")
        provider = _provider(spec, action)
        written = spec["rules"].items() if "rules" in spec else []
        if not written and action in (Action.DENY, Action.CUSTOM):
            Reader(None, "spec.rules").refuse(f"{action} without rules never matches", "write a rule")
        notices: list[Notice] = []
        rules = tuple(filter(None, [_rule(item, document, action, notices) for item in written]))
    except Exception as raised:
        error = Invalid.of(raised)
        return refused_mesh(document, error, _reach(document, selector), may_deny=not _only_allows(document))
    policy = AuthorizationPolicy(
        document.namespace,
        document.name,
        action,
        rules,
        origin_of(document, ""),
        selector,
        provider,
        _is_dry_run(document, action, notices),
        targets,
    )
    notices += contradiction_notices(document, [("spec.selector", selector)])
    return Parsed(document, authorization=(policy,), notices=tuple(notices))


def _only_allows(document: Document) -> bool:
    """Whether a refused policy says of itself, readably, that its action is ALLOW."""
    spec = document.data.get("spec")
    return isinstance(spec, dict) and spec.get("action", "ALLOW") == "ALLOW"


def _reach(document: Document, read: Selector) -> Selector:
    """What a refused policy may select: by its selector where that can be read, else everything it could."""
    if read.requirements:
        return read
    spec = document.data.get("spec")
    if not isinstance(spec, dict):
        return read
    try:
        return Selector.of(match_labels_only(Reader(spec.get("selector", {}), "spec.selector")))
    except Invalid:
        return Selector()


def _provider(spec: dict[str, Reader], action: Action) -> str:
    if action is Action.CUSTOM:
        if "provider" not in spec:
            Reader(None, "spec").refuse("CUSTOM has no provider", "write provider: {name: …}")
        fields = spec["provider"].fields("name")
        return fields["name"].text() if "name" in fields else spec["provider"].refuse("has no name", "write name")
    if "provider" in spec:
        spec["provider"].refuse(f"a provider has no meaning for {action}", "delete it, or use action: CUSTOM")
    return ""


def _is_dry_run(document: Document, action: Action, notices: list[Notice]) -> bool:
    """What cannot be read as true is enforced (ISTIO.md §a, "dry-run")."""
    metadata = document.data.get("metadata")
    annotations = metadata.get("annotations") if isinstance(metadata, dict) else None
    value = annotations.get(DRY_RUN) if isinstance(annotations, dict) else None
    if value is None:
        return False
    path = f"metadata.annotations.{DRY_RUN}"
    dry_run = value in _TRUE if isinstance(value, str) else False
    if not dry_run and value not in _FALSE:
        text = f"{shown(value)} is neither true nor false, so the policy is enforced"
        notices.append(Notice(document, text, path, Severity.ERROR, UNREADABLE_DRY_RUN))
    elif dry_run and action is Action.CUSTOM:
        text = "Istio has Envoy enforce the rules of a CUSTOM policy in dry-run as a DENY; delete the annotation"
        notices.append(Notice(document, text, path, Severity.ERROR, CUSTOM_DRY_RUN))
    return dry_run and action is not Action.AUDIT


def _rule(at: Reader, document: Document, action: Action, notices: list[Notice]) -> AuthorizationRule | None:
    """The rule; None where Istio leaves it out."""
    fields = at.fields("from", "to", "when")
    sources = _clauses(fields.get("from"), "source", _SOURCE)
    operations = _clauses(fields.get("to"), "operation", _OPERATION)
    conditions = [_when(item) for item in fields["when"].items()] if "when" in fields else []
    known = tuple(condition for condition in conditions if isinstance(condition, Condition))
    rule = AuthorizationRule(origin_of(document, at.path), sources, operations, known)
    if action is Action.CUSTOM:
        for condition in rule.all_conditions:
            if condition.attribute in _NOT_IN_CUSTOM:
                at.refuse(f"{condition.attribute} cannot be used with CUSTOM", "use ALLOW or DENY")
    unknown = [condition for condition in conditions if isinstance(condition, _UnknownKey)]
    for key in unknown:
        text = f"unknown key {shown(key.key)}, so Istio leaves out the whole rule; {_CONSEQUENCE[action]}"
        notices.append(Notice(document, text, key.path, Severity.ERROR, UNKNOWN_WHEN_KEY))
    return None if unknown else rule


def _clauses(at: Reader | None, name: str, attributes: dict[str, Attribute]) -> tuple[Clause, ...]:
    if at is None:
        return ((),)
    found = []
    for item in at.items(at_least=1):
        fields = item.fields(name)
        if name not in fields:
            item.refuse(f"has no {name}", f"write {name}")
        negated = {f"not{key[0].upper()}{key[1:]}": key for key in attributes}
        parts = fields[name].fields(*attributes, *negated)
        if not parts:
            fields[name].refuse("is empty", "write a field, or delete the element")
        conditions = []
        for key, attribute in attributes.items():
            positive, negative = parts.get(key), parts.get(f"not{key[0].upper()}{key[1:]}")
            if positive is not None or negative is not None:
                conditions.append(
                    Condition(attribute, _values(positive, attribute, 1), _values(negative, attribute, 1))
                )
        asked = {condition.attribute for condition in conditions}
        if Attribute.SERVICE_ACCOUNTS in asked and asked & {Attribute.PRINCIPALS, Attribute.NAMESPACES}:
            fields[name].refuse("serviceAccounts stands beside principals or namespaces", "write two sources")
        found.append(tuple(conditions))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _UnknownKey:
    key: str
    path: str


def _when(at: Reader) -> Condition | _UnknownKey:
    fields = at.fields("key", "values", "notValues")
    if "key" not in fields:
        at.refuse("has no key", "write key")
    key = fields["key"].text()
    if not key:
        fields["key"].refuse("is empty", f"use one of: {_KEYS}")
    if key not in _WHEN and not key.startswith(_PREFIXES):
        return _UnknownKey(key, fields["key"].path)
    attribute, name = _when_key(fields["key"], key)
    values = _values(fields.get("values"), attribute, 0)
    not_values = _values(fields.get("notValues"), attribute, 0)
    if not values and not not_values:
        at.refuse("has neither values nor notValues", "write values")
    return Condition(attribute, values, not_values, name)


def _when_key(at: Reader, key: str) -> tuple[Attribute, tuple[str, ...]]:
    if key in _WHEN:
        return _WHEN[key], ()
    if header := _HEADER_KEY.fullmatch(key):
        return Attribute.HEADER, (header[1].lower(),)
    if claim := _CLAIM_KEY.fullmatch(key):
        return Attribute.CLAIM, tuple(re.findall(r"\[([^\[\]]+)\]", claim[1]))
    if metadata := _METADATA_KEY.fullmatch(key):
        return Attribute.METADATA, (metadata[1], metadata[2])
    return at.refuse(f"{shown(key)} has no name in brackets", f"use one of: {_KEYS}")


def _values(at: Reader | None, attribute: Attribute, at_least: int) -> tuple[str, ...]:
    if at is None:
        return ()
    items = at.items(at_least)
    if attribute is Attribute.SERVICE_ACCOUNTS and len(items) > _MAX_ACCOUNTS:
        at.refuse(f"{len(items)} service accounts are more than {_MAX_ACCOUNTS}", "write several sources")
    return tuple(sorted({_checked(item, attribute) for item in items}))


def _checked(at: Reader, attribute: Attribute) -> str:
    if attribute in _NETWORKS:
        return str(at.network(bare_address=True))
    text = at.text()
    if not text:
        at.refuse("is empty", "write a value, or '*' for any")
    if attribute is Attribute.PORTS:
        if not text.isascii() or not text.isdigit() or len(text) > 5 or int(text) > 65535:
            at.refuse(f"{shown(text)} is no port", "use 0..65535, without a range")
        return str(int(text))
    if attribute is Attribute.SERVICE_ACCOUNTS and not (_ACCOUNT.fullmatch(text) and len(text) <= _MAX_ACCOUNT):
        at.refuse(f"{shown(text)} is no service account", "write namespace/name or name, without wildcards")
    if attribute is Attribute.PATHS and ("{" in text or "}" in text):
        _check_template(at, text)
    if attribute is Attribute.TRUST_DOMAINS and (
        "/" in text or "*" in text.removeprefix("*").removesuffix("*") or text.count("*") > 1
    ):
        at.refuse(f"{shown(text)} is no trust domain", "write one, with a wildcard at one end at most")
    if attribute is Attribute.METHODS and not _METHOD.fullmatch(text):
        at.refuse(f"{shown(text)} is no method", "write GET, POST, …")
    return text


def _check_template(at: Reader, text: str) -> None:
    """``{*}`` and ``{**}`` are whole segments, ``{**}`` the last operator; no other wildcard stands beside them."""
    segments = text.split("/")
    operators = [segment for segment in segments if "{" in segment or "}" in segment]
    plain = "".join(segment for segment in segments if segment not in operators)
    if (
        any(operator not in ("{*}", "{**}") for operator in operators)
        or "*" in plain
        or "{**}" in operators[:-1]
        or not text.startswith("/")
    ):
        at.refuse(f"{shown(text)} is no path template", "use {*} and {**} as whole segments, {**} last")
