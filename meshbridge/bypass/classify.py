"""From what the rules do with a flow, and what the mesh would have guarded, to its class and its route."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from meshbridge.bypass.redirect_config import RedirectConfig
from meshbridge.bypass.rules import Hook, RuleSet
from meshbridge.bypass.sets import ADDRESSES, LOOPBACK, OWNERS, PORTS, PROTOCOLS, TCP, Box, IntSet, NameSet, coalesced
from meshbridge.bypass.state import LOOPBACK_INTERFACE, Route, RouteKind, Span
from meshbridge.bypass.walk import Outcome, Region, regions
from meshbridge.identity.model import IpFamily
from meshbridge.policy.capture import HBONE_PORT, ISTIO_PORTS, PortClass
from meshbridge.policy.model import Direction

_INBOUND_PORT, _OUTBOUND_PORT, _DNS_PORT = 15006, 15001, 15053
_LONGEST_OWNER: Final = 10
_ZTUNNELS: Final = ("Envoy's", "ztunnel's")
AMBIENT_PROBES: Final = {
    IpFamily.IPV4: IntSet.of(0xA9FE077F),  # 169.254.7.127
    IpFamily.IPV6: IntSet.of(0xFD16_9254_7127_1337_FFFF_FFFF_FFFF_FFFF),
}
_ROUTE_OF_FIELD: Final = {
    "exclude_inbound_ports": RouteKind.EXCLUDE_INBOUND_PORTS,
    "include_inbound_ports": RouteKind.INCLUDE_INBOUND_PORTS,
    "exclude_outbound_ports": RouteKind.EXCLUDE_OUTBOUND_PORTS,
    "include_outbound_ports": RouteKind.INCLUDE_OUTBOUND_PORTS,
    "exclude_outbound_ranges": RouteKind.EXCLUDE_OUTBOUND_RANGES,
    "include_outbound_ranges": RouteKind.INCLUDE_OUTBOUND_RANGES,
    "exclude_interfaces": RouteKind.EXCLUDE_INTERFACES,
    "reroute_interfaces": RouteKind.REROUTE_INTERFACES,
    "proxy_uid": RouteKind.PROXY_OWNER,
    "proxy_gid": RouteKind.PROXY_OWNER,
    "owner_groups_include": RouteKind.OWNER_GROUPS,
    "owner_groups_exclude": RouteKind.OWNER_GROUPS,
    "loopback": RouteKind.LOOPBACK,
    "tunnel_port": RouteKind.TUNNEL,
}


def universe(direction: Direction, family: IpFamily) -> Box:
    """First packets that arrive from outside, respectively that any process of the pod sends."""
    everything = Box.everything(family)
    outside = NameSet(frozenset({LOOPBACK_INTERFACE}), inverted=True)
    if direction is Direction.INGRESS:
        return everything._replace(input=outside, destination=ADDRESSES[family] - LOOPBACK[family])
    return everything


_ISTIO_PORTS = IntSet.of(*ISTIO_PORTS)
_TUNNEL = IntSet.of(HBONE_PORT)


def classified_spans(
    rule_sets: Iterable[RuleSet],
    family: IpFamily,
    config: RedirectConfig,
    absent: Route,
    intended: tuple[Span, ...] = (),
    *,
    ambient: bool = False,
) -> list[Span]:
    found: list[Span] = []
    rule_sets = tuple(rule_sets)
    for direction, hook in ((Direction.INGRESS, Hook.PREROUTING), (Direction.EGRESS, Hook.OUTPUT)):
        explained = [span for span in intended if span.direction is direction and span.family is family]
        guarded = ambient_guards(direction, family) if ambient else guards(direction, family, config)
        spans: list[Span] = []
        for region in _merged(regions(rule_sets, hook, universe(direction, family))):
            for guard, baseline, kind in guarded:
                box = region.box.both(guard)
                if box is not None:
                    port_class, route, listener = _class_of(region, baseline, kind, direction, config, absent)
                    if ambient:
                        route = replace(route, detail=route.detail.replace(*_ZTUNNELS))
                    span = Span(direction, family, box, port_class, route, listener)
                    spans += _explained(span, explained) if explained else [span]
        found += coalesced_spans(spans)
    return found


def _merged(found: Iterable[Region]) -> list[Region]:
    """The same regions in fewer pieces."""
    groups: dict[tuple[Outcome, int, int, str], list[Region]] = {}
    for region in found:
        groups.setdefault((region.outcome, region.port, id(region.rule), region.why), []).append(region)
    return [replace(group[0], box=box) for group in groups.values() for box in coalesced(r.box for r in group)]


def coalesced_spans(spans: Iterable[Span]) -> list[Span]:
    """The same flows in fewer spans."""
    groups: dict[tuple[PortClass, Route, int], list[Span]] = {}
    for span in spans:
        groups.setdefault((span.port_class, span.route, span.listener), []).append(span)
    return [replace(group[0], box=box) for group in groups.values() for box in coalesced(span.box for span in group)]


def guards(direction: Direction, family: IpFamily, config: RedirectConfig) -> list[tuple[Box, PortClass, RouteKind]]:
    """What the mesh would guard if the pod had no exclusions: disjoint boxes that cover the universe."""
    every = universe(direction, family)
    tcp = every._replace(protocol=TCP)
    found = [(every._replace(protocol=PROTOCOLS - TCP), PortClass.UNGUARDED, RouteKind.NOT_TCP)]
    if direction is Direction.INGRESS:
        return [
            *found,
            (tcp._replace(port=_TUNNEL), PortClass.TUNNEL, RouteKind.TUNNEL),
            (tcp._replace(port=_ISTIO_PORTS), PortClass.UNGUARDED, RouteKind.ISTIO_PORT),
            (tcp._replace(port=PORTS - _TUNNEL - _ISTIO_PORTS), PortClass.CAPTURED, RouteKind.REDIRECTED),
        ]
    lo, uids, gids = NameSet.of(LOOPBACK_INTERFACE), _numbers(config.uids), _numbers(config.gids)
    away = tcp._replace(output=~lo)
    sent = away._replace(destination=ADDRESSES[family] - LOOPBACK[family])
    others = sent._replace(uid=OWNERS - uids)
    found += [
        (tcp._replace(output=lo), PortClass.UNGUARDED, RouteKind.LOOPBACK),
        (away._replace(destination=LOOPBACK[family]), PortClass.UNGUARDED, RouteKind.LOOPBACK),
        (sent._replace(uid=uids), PortClass.UNGUARDED, RouteKind.PROXY_OWNER),
        (others._replace(gid=gids), PortClass.UNGUARDED, RouteKind.PROXY_OWNER),
        (others._replace(gid=OWNERS - gids), PortClass.CAPTURED, RouteKind.REDIRECTED),
    ]
    return [part for part in found if not part[0].empty]


def ambient_guards(direction: Direction, family: IpFamily) -> list[tuple[Box, PortClass, RouteKind]]:
    """The same in ambient mode: ztunnel is let go by a mark, not by its user, and Istio's ports are the pod's own.

    The kubelet's probes, which the node gives an address of their own, are no traffic of the mesh.
    """
    every = universe(direction, family)
    tcp, probes = every._replace(protocol=TCP), AMBIENT_PROBES[family]
    found = [(every._replace(protocol=PROTOCOLS - TCP), PortClass.UNGUARDED, RouteKind.NOT_TCP)]
    if direction is Direction.INGRESS:
        others = tcp._replace(source=every.source - probes)
        return [
            *found,
            (tcp._replace(source=probes, port=PORTS - _TUNNEL), PortClass.UNGUARDED, RouteKind.AMBIENT),
            (tcp._replace(port=_TUNNEL), PortClass.TUNNEL, RouteKind.TUNNEL),
            (others._replace(port=PORTS - _TUNNEL), PortClass.CAPTURED, RouteKind.REDIRECTED),
        ]
    lo = NameSet.of(LOOPBACK_INTERFACE)
    away = tcp._replace(output=~lo)
    sent = ADDRESSES[family] - LOOPBACK[family]
    return [
        *found,
        (tcp._replace(output=lo), PortClass.UNGUARDED, RouteKind.LOOPBACK),
        (away._replace(destination=LOOPBACK[family]), PortClass.UNGUARDED, RouteKind.LOOPBACK),
        (away._replace(destination=probes), PortClass.UNGUARDED, RouteKind.AMBIENT),
        (away._replace(destination=sent - probes), PortClass.CAPTURED, RouteKind.REDIRECTED),
    ]


def _numbers(texts: Iterable[str]) -> IntSet:
    return IntSet.of(*owner_numbers(texts)) & OWNERS


def owner_numbers(texts: Iterable[str]) -> Iterator[int]:
    """Users and groups that are written as numbers."""
    return (int(text) for text in texts if text.isascii() and text.isdigit() and len(text) <= _LONGEST_OWNER)


def _class_of(
    region: Region, baseline: PortClass, kind: RouteKind, direction: Direction, config: RedirectConfig, absent: Route
) -> tuple[PortClass, Route, int]:
    rule = region.rule
    origin = _ROUTE_OF_FIELD.get(rule.origin) if rule else None
    detail = (config.source(rule.origin) or rule.text) if rule and rule.origin else rule.text if rule else ""
    if region.outcome is Outcome.REDIRECTED and (name := _listener(region.port, direction, config)):
        # what is not TCP is DNS on its way to the agent: seen by it, judged by nobody
        captured = baseline if kind in (RouteKind.NOT_TCP, RouteKind.TUNNEL) else PortClass.CAPTURED
        return captured, Route(RouteKind.REDIRECTED, f"to {name}"), region.port
    if baseline is not PortClass.CAPTURED:
        return baseline, Route(kind, detail if region.outcome is not Outcome.PASSED else ""), 0
    if region.outcome is Outcome.UNKNOWN:
        return PortClass.EXCLUDED, Route(RouteKind.NOT_UNDERSTOOD, f"{region.why}{f': {detail}' if detail else ''}"), 0
    if region.outcome is Outcome.REDIRECTED:
        return PortClass.EXCLUDED, Route(RouteKind.OTHER_PORT, f"port {region.port}: {detail}"), region.port
    if region.outcome in (Outcome.DIVERTED, Outcome.DROPPED):
        return PortClass.EXCLUDED, Route(RouteKind.OTHER_RULE, f"{region.outcome.value}: {detail or region.why}"), 0
    if rule is not None:
        return PortClass.EXCLUDED, Route(origin or RouteKind.OTHER_RULE, detail), 0
    return PortClass.EXCLUDED, _fallen_through(direction, config, absent), 0


def _listener(port: int, direction: Direction, config: RedirectConfig) -> str:
    """The name of Envoy's (or the agent's) listener on a port; empty when it is none of them."""
    if direction is Direction.INGRESS and str(port) in (str(_INBOUND_PORT), config.inbound_port):
        return f"Envoy's inbound listener, port {port}"
    if str(port) in (str(_OUTBOUND_PORT), config.proxy_port):
        return f"Envoy's outbound listener, port {port}"
    if direction is Direction.EGRESS and str(port) in (str(_INBOUND_PORT), config.inbound_port):
        return f"Envoy's inbound listener, port {port}"
    return f"the agent's DNS proxy, port {port}" if direction is Direction.EGRESS and port == _DNS_PORT else ""


def _fallen_through(direction: Direction, config: RedirectConfig, absent: Route) -> Route:
    """No rule mentions the flow: an include list leaves it out, or there are no rules."""
    if absent.detail:
        return absent
    name = "include_inbound_ports" if direction is Direction.INGRESS else "include_outbound_ranges"
    return Route(_ROUTE_OF_FIELD[name], config.source(name) or f"{name} was not given")


def _explained(span: Span, intended: Iterable[Span]) -> list[Span]:
    """Split a seen span by what was intended: where both agree, the intention explains it better than the rule does."""
    pieces = []
    for other in intended:
        box = span.box.both(other.box)
        if box is None:
            continue
        same = span.port_class is other.port_class and span.listener == other.listener
        plain = span.route.kind in (RouteKind.OTHER_RULE, RouteKind.RULES_MISSING)
        pieces.append(replace(span, box=box, route=other.route if same and plain else span.route))
    return pieces
