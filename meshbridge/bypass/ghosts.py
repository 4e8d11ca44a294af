"""Ghost bypasses: flows that the specification gives to Envoy, and the rules seen in the pod do not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.classify import owner_numbers
from meshbridge.bypass.expected import expected_redirection
from meshbridge.bypass.owners import Impostors
from meshbridge.bypass.sets import IntSet, NameSet, union
from meshbridge.bypass.state import LOOPBACK_INTERFACE, CaptureState, Route, Span, Truth
from meshbridge.identity.model import IpFamily, Workload
from meshbridge.policy.capture import PortClass
from meshbridge.policy.model import Direction

PROXY_UID: Final = 1337
"""Istio's, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class GhostBypass:
    """TCP ports that bypass Envoy by a route that nobody asked for."""

    direction: Direction
    family: IpFamily
    ports: IntSet
    route: Route

    def __str__(self) -> str:
        family = "IPv4" if self.family is IpFamily.IPV4 else "IPv6"
        way = "inbound" if self.direction is Direction.INGRESS else "outbound"
        return f"{way} {family} TCP {self.ports} bypasses Envoy, and nobody asked for it: {self.route}"


def ghost_bypasses(state: CaptureState) -> tuple[GhostBypass, ...]:
    """Those of a pod whose rules were seen; one whose rules were not is closed, and nothing is known of it."""
    if state.truth is not Truth.RULES:
        return ()
    found: list[GhostBypass] = []
    for family in IpFamily:
        for direction in Direction:
            wanted = [s for s in state.of(direction, family, intended=True) if s.port_class is PortClass.CAPTURED]
            seen = [s for s in state.of(direction, family) if s.port_class is PortClass.EXCLUDED]
            for route in dict.fromkeys(span.route for span in seen):
                if ports := _common(wanted, (span for span in seen if span.route == route)):
                    found.append(GhostBypass(direction, family, ports, route))
    return tuple(sorted(found, key=lambda ghost: (ghost.direction, ghost.family, ghost.ports.spans)))


def impostor_bypasses(state: CaptureState, workload: Workload, impostors: Impostors) -> tuple[GhostBypass, ...]:
    """What these processes of a pod send past Envoy: the TCP ports on which it gets everybody else's packets."""
    families = sorted({IpFamily.of(address) for address in workload.addresses})
    captured = {
        family: union(
            span.box.port
            for span in state.of(Direction.EGRESS, family)
            if span.port_class is PortClass.CAPTURED and span.box.output - NameSet.of(LOOPBACK_INTERFACE)
        )
        for family in families
    }
    return tuple(
        GhostBypass(Direction.EGRESS, family, captured[family], route)
        for route in impostors.routes()
        for family in families
        if captured[family]
    )


def proxy_uids(workload: Workload) -> frozenset[int]:
    """As which users the pod's own proxy may run; any process may as well."""
    config = expected_redirection(workload, MeshDefaults()).config
    texts = config.uids if config is not None else []
    found = {*owner_numbers(texts), PROXY_UID}
    container = workload.proxy_container
    return frozenset(found if container is None or container.uid is None else found | {container.uid})


def _common(wanted: Iterable[Span], seen: Iterable[Span]) -> IntSet:
    held = list(wanted)
    boxes = (one.box.both(other.box) for other in seen for one in held)
    return union(box.port for box in boxes if box is not None)
