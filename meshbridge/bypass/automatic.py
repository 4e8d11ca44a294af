"""``meshbridge.io/bypass: auto``: the ports a pod may exclude because nothing is lost by it that nobody accepted.

All ports are tried together, else each on its own and then all that pass together: the analysis that reports bypasses
decides, asked of the pod as it would be. What it cannot prove stays with Envoy, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from meshbridge.bypass.annotations import (
    EXCLUDE_INBOUND_PORTS,
    EXCLUDE_OUTBOUND_PORTS,
    INCLUDE_INBOUND_PORTS,
)
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.halfreport import half_bypasses
from meshbridge.bypass.halves import Delivered
from meshbridge.bypass.inventory import Inventory
from meshbridge.bypass.report import rows_of
from meshbridge.bypass.sets import IntSet
from meshbridge.identity.model import ProxyClass, Workload
from meshbridge.policy.capture import ISTIO_PORTS, PortClass
from meshbridge.policy.model import Direction

ANNOTATION: Final = "meshbridge.io/bypass"
AUTO: Final = "auto"
MAX_PORTS: Final = 64
_NAMES: Final[Mapping[Direction, str]] = {
    Direction.INGRESS: EXCLUDE_INBOUND_PORTS,
    Direction.EGRESS: EXCLUDE_OUTBOUND_PORTS,
}


@dataclass(frozen=True, slots=True)
class Refused:
    """A port that stays with Envoy."""

    direction: Direction
    port: int
    why: str


@dataclass(frozen=True, slots=True)
class Automatic:
    """The annotations a pod gets; empty: none, and ``refused`` says why."""

    annotations: tuple[tuple[str, str], ...] = ()
    refused: tuple[Refused, ...] = ()


def is_automatic(workload: Workload) -> bool:
    return workload.annotations.get(ANNOTATION) == AUTO


def automatic_exclusions(workload: Workload, inventory: Inventory) -> Automatic:
    """What ``auto`` comes to for a pod that the injector is about to see.

    Candidates are the ports it declares, and outbound those that BypassPolicies name. What the user excluded by
    annotation stays, and is not judged here.
    """
    if workload.proxy is not ProxyClass.SIDECAR:
        return Automatic(refused=(Refused(Direction.INGRESS, 0, "it gets no sidecar, so there is nothing to bypass"),))
    wanted = {direction: _candidates(workload, inventory, direction) for direction in Direction}
    if not any(wanted.values()) or not _objection(workload, inventory, wanted):
        return Automatic(_annotations(workload, wanted))
    granted: dict[Direction, list[int]] = {direction: [] for direction in Direction}
    refused: list[Refused] = []
    for direction, candidates in wanted.items():
        for port in candidates:
            why = _objection(workload, inventory, {direction: [port]})
            if why:
                refused.append(Refused(direction, port, why))
            else:
                granted[direction].append(port)
    if any(granted.values()) and (why := _objection(workload, inventory, granted)):
        refused += [Refused(direction, port, why) for direction, ports in granted.items() for port in ports]
        return Automatic(refused=tuple(refused))
    return Automatic(_annotations(workload, granted), tuple(refused))


def _annotations(workload: Workload, ports: Mapping[Direction, list[int]]) -> tuple[tuple[str, str], ...]:
    return tuple((_NAMES[d], _listed(workload, d, numbers)) for d, numbers in ports.items() if numbers)


def with_automatic(inventory: Inventory) -> Inventory:
    """The inventory as it will be once every annotated template was given its exclusions; what runs stays as it is."""
    for workload in inventory.workloads:
        if is_automatic(workload) and not workload.addresses:
            found = automatic_exclusions(workload, inventory)
            inventory = _as_if(workload, inventory, dict(found.annotations))
    return inventory


def _candidates(workload: Workload, inventory: Inventory, direction: Direction) -> list[int]:
    if direction is Direction.INGRESS:
        ports: Iterable[int] = inventory.declared_ports(workload)
    else:
        named = IntSet()
        for policy in inventory.bypass_policies.selecting(workload.peer()):
            for route in policy.routes:
                if route.direction is Direction.EGRESS and len(route.ports) <= MAX_PORTS:
                    named |= route.ports
        ports = [port for first, last in named for port in range(first, last + 1)]
    return [port for port in ports if port not in ISTIO_PORTS][:MAX_PORTS]


def _objection(workload: Workload, inventory: Inventory, ports: Mapping[Direction, list[int]]) -> str:
    """Why these ports may not be excluded; empty when nothing stands against it."""
    if ports.get(Direction.INGRESS) and workload.annotations.get(INCLUDE_INBOUND_PORTS, "*") != "*":
        return f"its {INCLUDE_INBOUND_PORTS} makes exclusions have no effect"
    asked = {
        _NAMES[direction]: _listed(workload, direction, numbers) for direction, numbers in ports.items() if numbers
    }
    then = _as_if(workload, inventory, asked)
    (changed,) = [other for other in then.workloads if other.key == workload.key]
    if not then.states[workload.key].starts:
        return "the pod would never start"
    alone = replace(then, workloads=(changed,))  # who else there is changes what a bypass weakens, not what it loses
    for row in rows_of(changed, alone):
        concerned = [port for port in ports.get(row.direction, ()) if port in row.ports]
        if row.port_class is not PortClass.EXCLUDED or not concerned or row.ruling is None:
            continue
        if not row.ruling.allowed:
            return "no BypassPolicy allows this route"
        if row.ruling.unaccepted:
            kinds = ", ".join(dict.fromkeys(guarantee.kind.value for guarantee in row.ruling.unaccepted))
            return f"it would lose {kinds}, which nobody accepted"
    for half in half_bypasses(then, possible=True, of=workload.key):
        if half.delivery.half and half.delivery.outcome is Delivered.BROKEN:
            inbound = half.server == workload.key and half.port in ports.get(Direction.INGRESS, ())
            if inbound or (workload.key in half.clients and ports.get(Direction.EGRESS)):
                return f"{half.server}:{half.port} would break for {', '.join(half.clients)}: {half.delivery.why}"
    return ""


def _as_if(workload: Workload, inventory: Inventory, annotations: Mapping[str, str]) -> Inventory:
    changed = replace(workload, annotations={**workload.annotations, **annotations})
    # as the injector sees it: without the sidecar it is about to give
    written = replace(changed, proxy=ProxyClass.NONE, namespace_labels={"istio-injection": "enabled"})
    state = capture_state(written, mesh=inventory.defaults)
    return replace(
        inventory,
        workloads=tuple(changed if other.key == workload.key else other for other in inventory.workloads),
        states={**inventory.states, workload.key: state},
    )


def _listed(workload: Workload, direction: Direction, ports: Iterable[int]) -> str:
    written = [text.strip() for text in workload.annotations.get(_NAMES[direction], "").split(",") if text.strip()]
    return ",".join(dict.fromkeys([*written, *map(str, sorted(ports))]))
