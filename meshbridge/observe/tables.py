"""Endpoints and status of agents as people and as programs read them. Functions of the messages; nothing prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from meshbridge.observe.messages import address_of, rule_origins
from meshbridge.observe.names import identity_name
from meshbridge.observe.text import printable
from meshbridge.protos import observer_pb2 as pb

ENDPOINT_HEADER = (
    (
        "ENDPOINT",
        "POLICY (ingress)",
        "POLICY (egress)",
        "IDENTITY",
        "LABELS (source:key[=value])",
        "IPv6",
        "IPv4",
        "STATUS",
    ),
    ("", "ENFORCEMENT", "ENFORCEMENT", "", "", "", "", ""),
)
READY = "ready"
_GAP = "   "


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """``rows`` with columns of equal width, three spaces apart, as Go's tabwriter lays Cilium's tables out."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return [_GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def endpoint_lines(endpoints: Iterable[pb.EndpointState]) -> list[str]:
    """``cilium endpoint list``'s columns, one label a line; then a sentence for what is not as it should be."""
    rows: list[Sequence[str]] = [*ENDPOINT_HEADER]
    notes: list[str] = []
    for endpoint in sorted(endpoints, key=lambda e: e.id):
        labels = [printable(label) for label in sorted(endpoint.labels)] or ["no labels"]
        ipv4, ipv6 = _addresses(endpoint, 4), _addresses(endpoint, 6)
        depth = max(len(labels), len(ipv4), len(ipv6))
        columns = [_padded(column, depth) for column in (labels, ipv6, ipv4)]
        for number, (label, six, four) in enumerate(zip(*columns, strict=True)):
            first = number == 0
            rows.append((
                str(endpoint.id) if first else "",
                _enforcement(endpoint.ingress_enforced) if first else "",
                _enforcement(endpoint.egress_enforced) if first else "",
                identity_name(endpoint.identity) if first else "",
                label, six, four,
                printable(endpoint.state) if first else "",
            ))  # fmt: skip
        name = printable(f"{endpoint.namespace}/{endpoint.pod}")
        if endpoint.state != READY or endpoint.message:
            notes.append(f"endpoint {endpoint.id} ({name}): {printable(endpoint.message or endpoint.state)}")
        for condition in endpoint.conditions:
            words = "is unknown" if condition.unknown else "holds" if condition.status else "does not hold"
            text = f"{condition.type} {words} ({condition.reason}): {condition.message}"
            notes.append(f"endpoint {endpoint.id} ({name}): {printable(text)}")
    return [*aligned(rows), *(["", *notes] if notes else [])]


def endpoint_record(node: str, endpoint: pb.EndpointState) -> dict[str, Any]:
    """One endpoint for ``-o json``; keys are stable."""
    return {
        "id": endpoint.id,
        "node": node,
        "namespace": endpoint.namespace,
        "pod": endpoint.pod,
        "uid": endpoint.uid,
        "identity": endpoint.identity,
        "labels": sorted(endpoint.labels),
        "ipv4": _addresses(endpoint, 4),
        "ipv6": _addresses(endpoint, 6),
        "state": endpoint.state,
        "message": endpoint.message,
        "policy": {
            "ingress": {"enforced": endpoint.ingress_enforced, "policies": _policies(endpoint.ingress_policies)},
            "egress": {"enforced": endpoint.egress_enforced, "policies": _policies(endpoint.egress_policies)},
        },
        "interface": endpoint.interface,
        "attach_mode": endpoint.attach_mode,
        "conditions": [
            {
                "type": condition.type,
                "status": None if condition.unknown else condition.status,
                "reason": condition.reason,
                "message": condition.message,
                "since_unix_ns": condition.since_unix_ns,
            }
            for condition in endpoint.conditions
        ],
    }


def is_degraded(status: pb.Status) -> bool:
    """Whether somebody should look: enforcement may be incomplete, stale, or somebody's object was refused."""
    return bool(
        status.problems
        or not status.controller_connected
        or status.endpoints_ready < status.endpoints_total
        or status.revision_programmed < status.revision_received
    )


def status_lines(status: pb.Status) -> list[str]:
    """One agent's state for a person: the verdict first, what is wrong last."""
    revision = f"{status.revision_programmed}"
    if status.revision_programmed != status.revision_received:
        revision += f" (received {status.revision_received})"
    controller = "connected" if status.controller_connected else "away; what was programmed stays enforced"
    rows = [
        (
            "Node:",
            f"{printable(status.node)} (meshbridge {printable(status.version)}, up {_duration(status.uptime_s)})",
        ),
        ("Status:", "Degraded" if is_degraded(status) else "OK"),
        ("Controller:", controller),
        ("Revision:", revision),
        (
            "Endpoints:",
            f"{status.endpoints_ready}/{status.endpoints_total} ready, attached by {status.attach_mode or '-'}",
        ),
        ("Peers:", f"{status.identities} identities of {status.addresses} addresses"),
        ("Policies:", str(status.policies)),
        ("Events lost:", str(status.events_lost)),
        ("Memory:", f"{status.memory_resident_bytes / 1e6:.1f} MB resident"),
    ]
    return [*aligned(rows), *(f"  ! {printable(problem)}" for problem in status.problems)]


def status_record(status: pb.Status) -> dict[str, Any]:
    """One agent for ``-o json``; keys are stable."""
    return {
        "node": status.node,
        "version": status.version,
        "degraded": is_degraded(status),
        "controller_connected": status.controller_connected,
        "revision_programmed": status.revision_programmed,
        "revision_received": status.revision_received,
        "endpoints_ready": status.endpoints_ready,
        "endpoints_total": status.endpoints_total,
        "identities": status.identities,
        "addresses": status.addresses,
        "policies": status.policies,
        "events_lost": status.events_lost,
        "attach_mode": status.attach_mode,
        "memory_resident_bytes": status.memory_resident_bytes,
        "uptime_s": round(status.uptime_s, 3),
        "problems": list(status.problems),
    }


def _enforcement(enforced: bool) -> str:
    return "Enabled" if enforced else "Disabled"


def _addresses(endpoint: pb.EndpointState, version: int) -> list[str]:
    addresses = (address_of(packed) for packed in endpoint.addresses)
    return [str(address) for address in addresses if address is not None and address.version == version]


def _policies(rules: Iterable[pb.Rule]) -> list[str]:
    return [str(origin) for origin in rule_origins(rules)]


def _padded(column: list[str], depth: int) -> list[str]:
    return column + [""] * (depth - len(column))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m{rest:02}s" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
