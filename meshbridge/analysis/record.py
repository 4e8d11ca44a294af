"""Findings as they are written for programs: the fields of ``istioctl analyze``, and SARIF 2.1.0."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Final
from urllib.parse import quote

from meshbridge.analysis.codes import CODES, DOCUMENTATION, Code
from meshbridge.analysis.finding import Finding
from meshbridge.policy.model import Origin, Severity

_SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS: Final = {Severity.INFO: "note", Severity.WARNING: "warning", Severity.ERROR: "error"}


def place(origin: Origin) -> str:
    """``file:line``, as far as both are known."""
    return f"{origin.file}:{origin.line}" if origin.file and origin.line else origin.file


def finding_record(found: Finding) -> dict[str, Any]:
    """One finding; ``code``, ``level``, ``origin``, ``reference``, ``message`` and ``documentationUrl`` as in Istio."""
    return {
        "code": found.code,
        "name": found.explained.name,
        "level": found.severity.value.capitalize(),
        "origin": found.resource,
        "path": found.origin.rule,
        "reference": place(found.origin),
        "message": found.text,
        "fix": found.fix,
        "related": [
            {"origin": f"{other.kind} {other.policy}", "path": other.rule, "reference": place(other)}
            for other in found.related
        ],
        "documentationUrl": found.explained.url,
    }


def sarif(findings: Sequence[Finding], version: str) -> dict[str, Any]:
    """A log of one run, with every code as a rule.

    Spec: OASIS SARIF 2.1.0.
    """
    indices = {code: index for index, code in enumerate(CODES)}
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "meshbridge",
                        "version": version,
                        "informationUri": DOCUMENTATION,
                        "rules": [_rule(code) for code in CODES.values()],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": [_result(found, indices[found.code]) for found in findings],
            }
        ],
    }


def _rule(code: Code) -> dict[str, Any]:
    return {
        "id": code.code,
        "name": code.name,
        "shortDescription": {"text": code.summary},
        "fullDescription": {"text": code.why},
        "help": {"text": code.fix},
        "helpUri": code.url,
        "defaultConfiguration": {"level": _LEVELS[code.severity]},
    }


def _result(found: Finding, index: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": found.code,
        "ruleIndex": index,
        "level": _LEVELS[found.severity],
        "message": {"text": f"{found.resource}: {found.text}\nFix: {found.fix}"},
        "locations": [_location(found.origin)],
        "partialFingerprints": {"meshbridge/v1": _fingerprint(found)},
    }
    if found.related:
        result["relatedLocations"] = [
            {"id": number, "message": {"text": str(other)}, **_location(other)}
            for number, other in enumerate(found.related, 1)
        ]
    return result


def _location(origin: Origin) -> dict[str, Any]:
    """Where it was written; from a cluster only which object it is."""
    name = f"{origin.kind} {origin.policy}".strip()
    location: dict[str, Any] = {}
    if origin.file:
        physical: dict[str, Any] = {"artifactLocation": {"uri": quote(origin.file)}}
        if origin.line:
            physical["region"] = {"startLine": origin.line}
        location["physicalLocation"] = physical
    if name:
        full = f"{name} {origin.rule}" if origin.rule else name
        location["logicalLocations"] = [{"name": name, "fullyQualifiedName": full, "kind": "object"}]
    return location


def _fingerprint(found: Finding) -> str:
    """Equal for the same finding in another version of the file, where only lines have moved."""
    origin = found.origin
    parts = (found.code, origin.kind, origin.namespace, origin.name, origin.rule, found.text)
    return sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
