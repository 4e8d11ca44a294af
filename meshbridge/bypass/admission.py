"""What whoever applies a pod is told about its bypasses, and whether BypassPolicies let it in at all."""

from __future__ import annotations

from dataclasses import dataclass

from meshbridge.bypass.bypasspolicy import Otherwise
from meshbridge.bypass.compensated import ports_text
from meshbridge.bypass.guarantees import Fate
from meshbridge.bypass.inventory import Inventory
from meshbridge.bypass.report import Row, rows_of
from meshbridge.identity.model import Workload
from meshbridge.policy.capture import PortClass
from meshbridge.policy.model import Direction


@dataclass(frozen=True, slots=True)
class Admission:
    """``denied`` not empty: the pod is refused, for these reasons. ``warnings`` are one line each."""

    denied: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def review(workload: Workload, inventory: Inventory) -> Admission:
    """The verdict of the BypassPolicies of the inventory on one of its pods, and what its bypasses lose."""
    denied: list[str] = []
    warnings: list[str] = []
    for row in rows_of(workload, inventory):
        ruling = row.ruling
        if row.port_class is not PortClass.EXCLUDED or ruling is None or ruling.otherwise is None:
            continue
        if ruling.otherwise is Otherwise.DENY:
            denied.append(f"{_where(row)}: {_objection(row)}")
        elif ruling.otherwise is Otherwise.WARN:
            warnings.append(f"{_where(row)}: {_objection(row)}")
        warnings += ruling.notes
    if not inventory.states[workload.key].starts:
        warnings.append("Istio refuses this pod, or it never starts: 'meshbridge bypass plan' says why")
    return Admission(tuple(denied), tuple(dict.fromkeys(warnings)))


def _where(row: Row) -> str:
    direction = "inbound" if row.direction is Direction.INGRESS else "outbound"
    return f"{direction} TCP {ports_text(row.ports)} bypasses Envoy by {row.route}"


def _objection(row: Row) -> str:
    ruling = row.ruling
    assert ruling is not None
    by = ", ".join(str(origin) for origin in ruling.policies)
    if not ruling.allowed:
        return f"no route that {by} allows"
    lost = ", ".join(dict.fromkeys(guarantee.kind.value for guarantee in ruling.unaccepted))
    weakened = ", ".join(dict.fromkeys(guarantee.kind.value for guarantee in row.with_fate(Fate.WEAKENED)))
    accepted = f"which {by} does not accept" if by else "which no BypassPolicy accepts"
    return f"loses {lost}, {accepted}{f'; weakened: {weakened}' if weakened else ''}"
