"""From what the rules do with a flow, and what the mesh would have guarded, to its class and its route."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from meshbridge.bypass.redirect_config import RedirectConfig
from meshbridge.bypass.rules import Hook, RuleSet
from meshbridge.bypass.sets import ADDRESSES, LOOPBACK, OWNERS, TCP, Box, IntSet, NameSet, coalesced
from meshbridge.bypass.state import LOOPBACK_INTERFACE, Route, RouteKind, Span
from meshbridge.bypass.walk import Outcome, Region, regions
from meshbridge.identity.model import IpFamily
from meshbridge.policy.capture import HBONE_PORT, ISTIO_PORTS, PortClass
from meshbridge.policy.model import Direction

_INBOUND_PORT, _OUTBOUND_PORT, _DNS_PORT = 15006, 15001, 15053
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
        return replace(everything, input=outside, destination=ADDRESSES[family] - LOOPBACK[family])
    return everything


_ISTIO_PORTS = IntSet.of(*ISTIO_PORTS)
_TUNNEL = IntSet.of(HBONE_PORT)


def classified_spans(
    rule_sets: Iterable[RuleSet],
    family: IpFamily,
    config: RedirectConfig,
    absent: Route,
    intended: tuple[Span, ...] = (),
) -> list[Span]:
    found: list[Span] = []
    rule_sets = tuple(rule_sets)
    for direction, hook in ((Direction.INGRESS, Hook.PREROUTING), (Direction.EGRESS, Hook.OUTPUT)):
        explained = [span for span in intended if span.direction is direction and span.family is family]
        spans: list[Span] = []
        for region in regions(rule_sets, hook, universe(direction, family)):
            for span in _classified(region, direction, family, config, absent):
                spans += _explained(span, explained) if explained else [span]
        found += coalesced_spans(spans)
    return found


def coalesced_spans(spans: Iterable[Span]) -> list[Span]:
    """The same flows in fewer spans."""
    groups: dict[tuple[PortClass, Route, int], list[Span]] = {}
    for span in spans:
        groups.setdefault((span.port_class, span.route, span.listener), []).append(span)
    return [replace(group[0], box=box) for group in groups.values() for box in coalesced(span.box for span in group)]


def _classified(
    region: Region, direction: Direction, family: IpFamily, config: RedirectConfig, absent: Route
) -> list[Span]:
    """Cut a region by what the baseline says of its flows, and name its route."""
    spans = []
    for box, baseline, route in baseline_parts(region.box, direction, family, config):
        port_class, why, listener = _class_of(region, baseline, route, direction, config, absent)
        spans.append(Span(direction, family, box, port_class, why, listener))
    return spans


def baseline_parts(
    box: Box, direction: Direction, family: IpFamily, config: RedirectConfig
) -> list[tuple[Box, PortClass, RouteKind]]:
    """What the mesh would guard if the pod had no exclusions."""
    parts = [(replace(box, protocol=box.protocol - TCP), PortClass.UNGUARDED, RouteKind.NOT_TCP)]
    tcp = replace(box, protocol=box.protocol & TCP)
    if direction is Direction.INGRESS:
        parts += [
            (replace(tcp, port=tcp.port & _TUNNEL), PortClass.TUNNEL, RouteKind.TUNNEL),
            (replace(tcp, port=tcp.port & _ISTIO_PORTS), PortClass.UNGUARDED, RouteKind.ISTIO_PORT),
            (replace(tcp, port=tcp.port - _TUNNEL - _ISTIO_PORTS), PortClass.CAPTURED, RouteKind.REDIRECTED),
        ]
    else:
        lo, loopback = NameSet.of(LOOPBACK_INTERFACE), LOOPBACK[family]
        uids, gids = _numbers(config.uids), _numbers(config.gids)
        away = replace(tcp, output=tcp.output - lo)
        sent = replace(away, destination=away.destination - loopback)
        others = replace(sent, uid=sent.uid - uids)
        parts += [
            (replace(tcp, output=tcp.output & lo), PortClass.UNGUARDED, RouteKind.LOOPBACK),
            (replace(away, destination=away.destination & loopback), PortClass.UNGUARDED, RouteKind.LOOPBACK),
            (replace(sent, uid=sent.uid & uids), PortClass.UNGUARDED, RouteKind.PROXY_OWNER),
            (replace(others, gid=others.gid & gids), PortClass.UNGUARDED, RouteKind.PROXY_OWNER),
            (replace(others, gid=others.gid - gids), PortClass.CAPTURED, RouteKind.REDIRECTED),
        ]
    return [part for part in parts if part[0]]


def _numbers(texts: Iterable[str]) -> IntSet:
    return IntSet.of(*(int(text) for text in texts if text.isascii() and text.isdigit())) & OWNERS


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
        box = span.box & other.box
        if box is None:
            continue
        same = span.port_class is other.port_class and span.listener == other.listener
        plain = span.route.kind in (RouteKind.OTHER_RULE, RouteKind.RULES_MISSING)
        pieces.append(replace(span, box=box, route=other.route if same and plain else span.route))
    return pieces
