"""``toPorts[].rules`` of a CiliumNetworkPolicy: HTTP rules, which ext_authz judges; everything else is refused."""

from __future__ import annotations

import re

from meshbridge.policy.model import HttpMatch, PortMatch
from meshbridge.policy.parse.ports import PROTOCOLS
from meshbridge.policy.parse.reader import Reader, shown

_MAX_PATTERN = 512
_MAX_REPEATS = 2
_REPEAT = re.compile(r"(?<!\\)(?:\*|\+|\{)")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_EXTENSION = re.compile(r"\(\?|\\[0-9A-Za-z]|\[[:.=]|(?<!\\)[*+?}]\+|\{,")


def http_matches(at: Reader, ports: tuple[PortMatch, ...]) -> tuple[HttpMatch, ...]:
    """The HTTP rules of one toPorts element; none are no restriction.

    Raises:
        Invalid: Rules of another protocol, ports that are not TCP, or an expression too costly to run per request.
    """
    fields = at.fields("http", "dns", "kafka", "l7proto", "l7")
    for name in ("dns", "kafka", "l7proto", "l7"):
        if name in fields and fields[name].value != []:
            fields[name].refuse(f"{name} rules are not enforced", "delete them")
    items = fields["http"].items() if "http" in fields else []
    if not items:
        return ()
    if any(match.protocol != PROTOCOLS["TCP"] for match in ports):
        at.refuse("http rules need TCP ports", "write the ports with protocol: TCP")
    if any(match.first == 0 for match in ports if not match.name):
        at.refuse("http rules need a port other than 0", "write the port")
    return tuple(_http(item) for item in items)


def _http(at: Reader) -> HttpMatch:
    fields = at.fields("method", "path", "host", "headers", "headerMatches")
    headers: list[tuple[str, str | None]] = []
    for item in fields["headers"].items() if "headers" in fields else []:
        name, separator, value = item.text().partition(" ")
        headers.append((name.removesuffix(":").lower(), value.strip() if separator else None))
    for item in fields["headerMatches"].items() if "headerMatches" in fields else []:
        parts = item.fields("name", "value", "mismatch", "secret")
        for name in ("mismatch", "secret"):
            if name in parts:
                parts[name].refuse(f"{name} is not enforced", "delete it")
        if "name" not in parts:
            item.refuse("has no name", "write the header's name")
        headers.append((parts["name"].text().lower(), parts["value"].text() if "value" in parts else None))
    return HttpMatch(
        method=_pattern(fields.get("method")),
        path=_pattern(fields.get("path")),
        host=_pattern(fields.get("host")),
        headers=tuple(sorted(set(headers), key=lambda header: (header[0], header[1] or ""))),
    )


def _pattern(at: Reader | None) -> str:
    """A regular expression whose cost stays bounded and that Python reads as Envoy's RE2 does."""
    if at is None:
        return ""
    pattern = at.text()
    fix = "use literals, classes, alternatives and at most two repeats"
    if len(pattern) > _MAX_PATTERN:
        at.refuse(f"an expression of {len(pattern)} characters", f"use at most {_MAX_PATTERN}")
    if not pattern.isascii() or not pattern.isprintable():
        at.refuse(f"{shown(pattern)} is not printable ASCII", fix)
    if len(_REPEAT.findall(pattern)) > _MAX_REPEATS or _REPEATED_GROUP.search(pattern) or _EXTENSION.search(pattern):
        at.refuse(f"{shown(pattern)} may cost too much, or mean another thing to Envoy", fix)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        at.refuse(f"{shown(pattern)} is no regular expression", fix)
    return pattern
