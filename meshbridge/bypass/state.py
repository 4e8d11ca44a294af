"""The capture state of a pod as values: which flows Envoy sees, and the route of those it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from meshbridge.bypass.findings import Finding
from meshbridge.bypass.sets import ADDRESSES, LOOPBACK, PORTS, Box, IntSet, NameSet, networks
from meshbridge.identity.model import IpAddress, IpFamily, IpNetwork, TcpPorts
from meshbridge.policy.capture import AppProtocol, Capture, OutboundBypass, PortClass, PortClasses, PortRange
from meshbridge.policy.model import ANY, Anything, Direction, Judge

MAX_NETWORKS: Final = 64
LOOPBACK_INTERFACE: Final = "lo"
INTERFACE: Final = "eth0"


class Truth(StrEnum):
    """What the capture state was computed from."""

    RULES = "rules"
    ARGUMENTS = "istio-init arguments"
    ANNOTATIONS = "annotations"
    PREDICTED = "predicted injection"
    NO_PROXY = "no proxy"


class RouteKind(StrEnum):
    """Why a flow does or does not reach Envoy."""

    REDIRECTED = "redirected"
    EXCLUDE_INBOUND_PORTS = "excludeInboundPorts"
    INCLUDE_INBOUND_PORTS = "includeInboundPorts"
    EXCLUDE_OUTBOUND_PORTS = "excludeOutboundPorts"
    INCLUDE_OUTBOUND_PORTS = "includeOutboundPorts"
    EXCLUDE_OUTBOUND_RANGES = "excludeOutboundIPRanges"
    INCLUDE_OUTBOUND_RANGES = "includeOutboundIPRanges"
    EXCLUDE_INTERFACES = "excludeInterfaces"
    REROUTE_INTERFACES = "reroute-virtual-interfaces"
    MODE_NONE = "interceptionMode NONE"
    PROXY_OWNER = "proxy uid or gid"
    OWNER_GROUPS = "owner groups"
    LOOPBACK = "loopback"
    ISTIO_PORT = "Istio's own port"
    TUNNEL = "HBONE tunnel"
    NOT_TCP = "not TCP"
    IPV6 = "IPv6 without rules"
    NO_SIDECAR = "no sidecar"
    AMBIENT = "ambient"
    OTHER_RULE = "a rule in the pod's namespace"
    OTHER_PORT = "redirected to a port that is not Envoy's"
    NOT_UNDERSTOOD = "rules not understood"
    RULES_NOT_SEEN = "redirect rules not seen yet"
    RULES_MISSING = "redirect rules missing"


@dataclass(frozen=True, slots=True)
class Route:
    """Why, and where that is written: an annotation, an argument, a default, or a rule."""

    kind: RouteKind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind.value} ({self.detail})" if self.detail else self.kind.value


@dataclass(frozen=True, slots=True)
class Span:
    """Flows of one class and route; ``listener`` is the local port they are redirected to, 0 when they are not.

    ``audit``: what stands in for Envoy there is counted, not enforced.
    """

    direction: Direction
    family: IpFamily
    box: Box
    port_class: PortClass
    route: Route
    listener: int = 0
    audit: bool = False


@dataclass(frozen=True, slots=True)
class CaptureState:
    """What holds for a pod now (``spans``) and what it will be once its rules are seen (``intended``).

    Spans of one direction and family are disjoint and cover every first packet a pod can receive on its interfaces, or
    send, the loopback included. ``starts`` False: the pod is refused or never starts, so nothing of it is reachable.
    """

    pod: str
    truth: Truth
    spans: tuple[Span, ...]
    intended: tuple[Span, ...]
    findings: tuple[Finding, ...] = ()
    starts: bool = True

    def of(self, direction: Direction, family: IpFamily, *, intended: bool = False) -> tuple[Span, ...]:
        source = self.intended if intended else self.spans
        return tuple(span for span in source if span.direction is direction and span.family is family)

    def inbound(self, interface: str | None = INTERFACE, *, intended: bool = False) -> dict[IpFamily, PortClasses]:
        """The class of every TCP port for what arrives on one interface, by family; None: on any but the loopback.

        A port that only some flows reach through Envoy is excluded as a whole.
        """
        on = ~NameSet.of(LOOPBACK_INTERFACE) if interface is None else NameSet.of(interface)
        return {family: self._classes(family, on, intended) for family in IpFamily}

    def _classes(self, family: IpFamily, on: NameSet, intended: bool) -> PortClasses:
        ports: dict[PortClass, IntSet] = dict.fromkeys(PortClass, IntSet())
        for span in self.of(Direction.INGRESS, family, intended=intended):
            if 6 in span.box.protocol and span.box.input & on and not _only_probes(span):
                ports[span.port_class] |= span.box.port
        taken = IntSet()
        cuts: list[PortRange] = []
        for port_class in (PortClass.TUNNEL, PortClass.EXCLUDED, PortClass.CAPTURED):
            cuts += [PortRange(first, last, port_class) for first, last in ports[port_class] - taken]
            taken |= ports[port_class]
        cuts += [PortRange(first, last, PortClass.UNGUARDED) for first, last in PORTS - taken]
        return PortClasses(tuple(sorted(cuts)))

    def span_at(
        self,
        direction: Direction,
        family: IpFamily,
        port: int,
        *,
        interface: str = INTERFACE,
        uid: int | None = None,
        address: IpAddress | None = None,
        intended: bool = False,
    ) -> Span | None:
        """The TCP flows that one is among; None where the pod has none like it.

        Args:
            uid: of the sender; None: of an application that the rules do not know.
            address: the destination's; None: whichever.
        """
        for span in self.of(direction, family, intended=intended):
            box = span.box
            if (
                6 in box.protocol
                and port in box.port
                and interface in (box.output if direction is Direction.EGRESS else box.input)
                and (uid in box.uid if uid is not None else span.route.kind is not RouteKind.PROXY_OWNER)
                and (address is None or int(address) in box.destination)
            ):
                return span
        return None

    def outbound_bypasses(self, family: IpFamily, *, intended: bool = False) -> tuple[Span, ...]:
        """What the application sends past Envoy although the mesh would have captured it."""
        return tuple(
            span
            for span in self.of(Direction.EGRESS, family, intended=intended)
            if span.port_class is PortClass.EXCLUDED and span.box.output - NameSet.of(LOOPBACK_INTERFACE)
        )


def _only_probes(span: Span) -> bool:
    return span.route.kind is RouteKind.AMBIENT and span.port_class is PortClass.UNGUARDED


def capture_of(
    state: CaptureState,
    *,
    judges: frozenset[Judge],
    protocols: Mapping[int, AppProtocol] | None = None,
    interface: str | None = INTERFACE,
    intended: bool = False,
) -> Capture:
    """What the compiler reads of a capture state, for one interface of the pod, or None: all of them at once.

    Args:
        judges: Who answers a NEEDS_L7 on captured ports.
        protocols: What Envoy takes a port for, where a Service says it.
        intended: As it will be once the redirect rules are seen; for previews, never for the kernel.
    """
    outbound = {family: _bypasses(state.outbound_bypasses(family, intended=intended), family) for family in IpFamily}
    return Capture(
        state.inbound(interface, intended=intended),
        judges,
        dict(protocols or {}),
        {family: bypasses for family, bypasses in outbound.items() if bypasses},
        tuple(ports for family in IpFamily for ports in _audited(state, family, interface)),
    )


def _audited(state: CaptureState, family: IpFamily, interface: str | None) -> list[TcpPorts]:
    """The inbound ports on which everything that bypasses Envoy is audited."""
    on = ~NameSet.of(LOOPBACK_INTERFACE) if interface is None else NameSet.of(interface)
    ports = {True: IntSet(), False: IntSet()}
    for span in state.of(Direction.INGRESS, family):
        if span.port_class is PortClass.EXCLUDED and 6 in span.box.protocol and span.box.input & on:
            ports[span.audit] |= span.box.port
    return [TcpPorts(family, first, last) for first, last in ports[True] - ports[False]]


def _bypasses(spans: tuple[Span, ...], family: IpFamily) -> tuple[OutboundBypass, ...]:
    found: set[OutboundBypass] = set()
    for span in spans:
        where: Anything | tuple[IpNetwork, ...] = ANY
        if ADDRESSES[family] - span.box.destination - LOOPBACK[family]:
            prefixes = networks(span.box.destination, family)
            # too many to compare every destination with; to name more than is bypassed drops nothing that
            # the destination would let in
            where = prefixes if len(prefixes) <= MAX_NETWORKS else ANY
        registered = span.route.kind is not RouteKind.PROXY_OWNER
        found.update(OutboundBypass(first, last, where, span.audit, registered) for first, last in span.box.port)
    return tuple(sorted(found, key=lambda b: (b.first, b.last, repr(b.networks), b.audit, b.registered)))
