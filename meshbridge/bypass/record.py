"""A report as plain data for JSON. Keys and enumerated values are stable; new keys may be added."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshbridge.bypass.automatic import Automatic
from meshbridge.bypass.bypasspolicy import Ruling
from meshbridge.bypass.compensation import Compensation
from meshbridge.bypass.guarantees import Guarantee
from meshbridge.bypass.halfreport import HalfBypass
from meshbridge.bypass.report import Report, Row
from meshbridge.bypass.sets import IntSet
from meshbridge.identity.model import IpFamily

MAX_NAMES = 200
_FAMILIES = {IpFamily.IPV4: "ipv4", IpFamily.IPV6: "ipv6"}


def report_record(report: Report) -> dict[str, Any]:
    """The whole report."""
    return {
        "bypasses": [_row(row) for row in report.rows],
        "findings": [
            {
                "pod": pod,
                "code": finding.code.value,
                "severity": finding.severity.value,
                "subject": finding.subject,
                "what": finding.what,
                "fix": finding.fix,
            }
            for pod, finding in report.findings
        ],
        "half_bypasses": [_half(half) for half in report.halves],
        "isolations": [
            {
                "policy": isolation.policy,
                "origin": isolation.origin.record(),
                "pod": isolation.pod,
                "ports": [
                    {
                        "port": port.port,
                        "protocol": port.protocol,
                        "name": port.name,
                        "closed": port.closed,
                        "probed": port.probed,
                        "sources_kept": list(port.kept[:MAX_NAMES]),
                        "sources_kept_count": len(port.kept),
                        "sources_lost": list(port.lost[:MAX_NAMES]),
                        "sources_lost_count": len(port.lost),
                    }
                    for port in isolation.ports
                ],
            }
            for isolation in report.isolations
        ],
        "not_starting": list(report.not_starting),
    }


def merged_records(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The reports of several nodes as one; each pod is in one of them."""
    merged: dict[str, Any] = {}
    for record in records:
        for key, items in record.items():
            held = merged.setdefault(key, [])
            held += [item for item in items if item not in held]
    return merged or report_record(Report())


def automatic_record(pod: str, found: Automatic) -> dict[str, Any]:
    """What the annotation ``meshbridge.io/bypass: auto`` of a pod comes to."""
    refused = [{"direction": item.direction.name.lower(), "port": item.port, "why": item.why} for item in found.refused]
    return {"pod": pod, "annotations": dict(found.annotations), "refused": refused}


def _row(row: Row) -> dict[str, Any]:
    return {
        "pod": row.pod,
        "direction": row.direction.name.lower(),
        "families": [_FAMILIES[family] for family in row.families],
        "protocol": "TCP",
        "ports": _ports(row.ports),
        "destinations": list(row.destinations),
        "class": row.port_class.value,
        "route": {"kind": row.route.kind.value, "detail": row.route.detail},
        "guarantees": [_guarantee(guarantee) for guarantee in row.guarantees],
        "compensation": _compensation(row.compensation),
        "ruling": _ruling(row.ruling),
    }


def _ruling(ruling: Ruling | None) -> dict[str, Any] | None:
    if ruling is None:
        return None
    return {
        "mode": ruling.mode.name.lower(),
        "allowed": ruling.allowed,
        "unaccepted": [_guarantee(guarantee) for guarantee in ruling.unaccepted],
        "otherwise": ruling.otherwise.name.lower() if ruling.otherwise is not None else None,
        "policies": [origin.record() for origin in ruling.policies],
        "notes": list(ruling.notes),
        "proof": ruling.proof,
        "fix": ruling.fix,
    }


def _ports(ports: IntSet) -> list[list[int]]:
    """Ranges, both ends included."""
    return [[first, last] for first, last in ports]


def _guarantee(guarantee: Guarantee) -> dict[str, Any]:
    return {
        "kind": guarantee.kind.value,
        "what": guarantee.what,
        "fate": guarantee.fate.value,
        "stands_in": guarantee.stands_in,
        "origin": guarantee.origin.record() if guarantee.origin else None,
    }


def _compensation(compensation: Compensation | None) -> dict[str, Any] | None:
    if compensation is None:
        return None
    return {
        "enforced": compensation.enforced,
        "why": compensation.why,
        "allowed": list(compensation.allowed[:MAX_NAMES]),
        "allowed_count": len(compensation.allowed),
        "refused": list(compensation.refused[:MAX_NAMES]),
        "refused_count": len(compensation.refused),
        "weakened": list(compensation.weakened),
        "origins": [origin.record() for origin in compensation.origins],
        "summary": compensation.summary,
    }


def _half(half: HalfBypass) -> dict[str, Any]:
    return {
        "server": half.server,
        "port": half.port,
        "via": half.via,
        "clients": list(half.clients),
        "half": half.delivery.half,
        "delivery": half.delivery.outcome.value,
        "why": half.delivery.why,
        "fix": half.delivery.fix,
        "origin": half.delivery.origin.record() if half.delivery.origin else None,
        "known_from": [source.value for source in half.known_from],
        "observed_unix_ns": half.observed_ns or None,
    }
