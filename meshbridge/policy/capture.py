"""How an endpoint's TCP reaches Envoy: the class of every port, and who judges L7 there.

The values live here because the compiler reads them; ``bypass`` computes them from annotations, istio-init's arguments
and the rules seen in the pod's namespace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from meshbridge.identity.model import IpFamily, IpNetwork, TcpPorts
from meshbridge.policy.model import ANY, Anything, Judge, Origin

LAST_PORT: Final = 65535
HBONE_PORT: Final = 15008
ISTIO_PORTS: Final = frozenset({15020, 15021, 15090})
"""Health and metrics of the sidecar itself; no mesh policy ever guards them."""


class PortClass(StrEnum):
    """DESIGN §2: who judges a TCP flow to a port, and so what the kernel may leave open."""

    CAPTURED = "captured"
    EXCLUDED = "excluded"
    UNGUARDED = "unguarded"
    TUNNEL = "tunnel"


class AppProtocol(StrEnum):
    """What Envoy takes a port for: a declared protocol, or sniffed from the first bytes."""

    AUTO = "auto"
    HTTP = "http"
    TCP = "tcp"


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """``first``..``last`` inclusive and their class."""

    first: int
    last: int
    port_class: PortClass


@dataclass(frozen=True, slots=True)
class PortClasses:
    """A class for every port: adjacent ranges of one class are one range, so equal answers are equal values."""

    ranges: tuple[PortRange, ...]

    @classmethod
    def of(cls, default: PortClass, exceptions: Mapping[int, PortClass] | None = None) -> PortClasses:
        """``default`` everywhere but on the ports of ``exceptions``."""
        cuts: list[PortRange] = []
        start = 0
        for port, port_class in sorted((exceptions or {}).items()):
            if start < port:
                cuts.append(PortRange(start, port - 1, default))
            cuts.append(PortRange(port, port, port_class))
            start = port + 1
        if start <= LAST_PORT:
            cuts.append(PortRange(start, LAST_PORT, default))
        return cls(tuple(_joined(cuts)))

    def at(self, port: int) -> PortClass:
        """The class of one port."""
        return next(r.port_class for r in self.ranges if r.first <= port <= r.last)


def _joined(ranges: Iterable[PortRange]) -> Iterator[PortRange]:
    pending: PortRange | None = None
    for current in ranges:
        if pending is not None and pending.port_class is current.port_class:
            pending = PortRange(pending.first, current.last, current.port_class)
            continue
        if pending is not None:
            yield pending
        pending = current
    if pending is not None:
        yield pending


UNGUARDED: Final = PortClasses.of(PortClass.UNGUARDED)
SIDECAR: Final = PortClasses.of(
    PortClass.CAPTURED, {HBONE_PORT: PortClass.TUNNEL, **dict.fromkeys(ISTIO_PORTS, PortClass.UNGUARDED)}
)


def sidecar_excluding(excluded: Iterable[TcpPorts]) -> dict[IpFamily, PortClasses]:
    """The classes of a sidecar that captures everything but these ports, sorted."""
    ranges = {family: list(SIDECAR.ranges) for family in IpFamily}
    for ports in excluded:
        cut: list[PortRange] = []
        for known in ranges[ports.family]:
            if known.last < ports.first or ports.last < known.first:
                cut.append(known)
                continue
            if known.first < ports.first:
                cut.append(PortRange(known.first, ports.first - 1, known.port_class))
            cut.append(PortRange(max(known.first, ports.first), min(known.last, ports.last), PortClass.EXCLUDED))
            if ports.last < known.last:
                cut.append(PortRange(ports.last + 1, known.last, known.port_class))
        ranges[ports.family] = cut
    return {family: PortClasses(tuple(_joined(known))) for family, known in ranges.items()}


@dataclass(frozen=True, slots=True)
class OutboundBypass:
    """TCP destination ports that an endpoint's application reaches past its own Envoy, and where.

    Destinations in ``networks`` are found by ``Peer.networks``, so they have to be among those it is computed against.
    ``audit``: what is dropped there in Envoy's place passes, and is told. ``registered``: REGISTRY_ONLY holds there;
    not where Envoy's own packets look the same, since it may send to others.
    """

    first: int
    last: int
    networks: Anything | tuple[IpNetwork, ...] = ANY
    audit: bool = False
    registered: bool = True


REGISTRY_ONLY: Final = Origin("MeshConfig", "", "outboundTrafficPolicy", "REGISTRY_ONLY")
"""What drops of destinations that the registry does not know are attributed to."""


@dataclass(frozen=True, slots=True)
class EgressRegistry:
    """What the mesh's registry knows besides peers that are ``registered``, and Services' own addresses.

    ``by_name`` are ports of hosts of which only DNS knows the addresses: what is sent there may be to one of them.
    ``networks`` have to be among those that ``Peer.networks`` is computed against.
    """

    networks: frozenset[IpNetwork] = frozenset()
    by_name: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Capture:
    """What of one endpoint's traffic its Envoy sees.

    ``inbound`` holds the class of each TCP port by address family, ``judges`` who answers a NEEDS_L7 on captured ports,
    ``protocols`` what Envoy takes a port for where a Service says it, ``outbound`` what leaves past Envoy, ``audited``
    on which excluded ports what is dropped in Envoy's place passes, and is told. ``registry``: what leaves past Envoy
    may go to nobody else; None: to anybody.
    """

    inbound: Mapping[IpFamily, PortClasses] = field(
        default_factory=lambda: dict.fromkeys(IpFamily, UNGUARDED), hash=False
    )
    judges: frozenset[Judge] = frozenset()
    protocols: Mapping[int, AppProtocol] = field(default_factory=dict, hash=False)
    outbound: Mapping[IpFamily, tuple[OutboundBypass, ...]] = field(default_factory=dict, hash=False)
    audited: tuple[TcpPorts, ...] = ()
    registry: EgressRegistry | None = None

    @property
    def networks(self) -> frozenset[IpNetwork]:
        """The destinations that ``outbound`` names; ``Peer.networks`` has to be computed against them."""
        named = (bypass.networks for bypasses in self.outbound.values() for bypass in bypasses)
        return frozenset(network for where in named if not isinstance(where, Anything) for network in where)

    def anywhere(self) -> Capture:
        """The same, but what ``outbound`` says of some destinations it says of all."""
        outbound = {
            family: tuple(dict.fromkeys(replace(bypass, networks=ANY) for bypass in bypasses))
            for family, bypasses in self.outbound.items()
        }
        return replace(self, outbound=outbound)

    @classmethod
    def none(cls) -> Capture:
        """No sidecar: nobody judges L7, and no mesh policy is guarded."""
        return cls()

    @classmethod
    def sidecar(
        cls,
        judges: frozenset[Judge] = frozenset({Judge.ENVOY}),
        protocols: Mapping[int, AppProtocol] | None = None,
    ) -> Capture:
        """A sidecar that captures everything Istio captures by default, in both families."""
        return cls(dict.fromkeys(IpFamily, SIDECAR), judges, dict(protocols or {}))
