"""What a person reads: every bypassed port of every pod, what it loses and what stands in, and what will break.

One row is one pod, direction, route and set of ports with the same guarantees. Ports that somebody names (containers,
probes, Services, rules) get rows of their own; the rest of a wide exclusion is one row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshbridge.bypass.bypasspolicy import Ruling
from meshbridge.bypass.compensation import Compensation, excluded_outcome, inbound_compensation
from meshbridge.bypass.findings import Finding, FindingCode
from meshbridge.bypass.guarantees import Fate, Guarantee, inbound_guarantees, outbound_guarantees
from meshbridge.bypass.halfreport import MAX_SINGLE_PORTS, HalfBypass, half_bypasses, ports_of_rules
from meshbridge.bypass.inventory import Inventory, target_port
from meshbridge.bypass.isolation import Isolation, isolations
from meshbridge.bypass.sets import ADDRESSES, LOOPBACK, IntSet, networks
from meshbridge.bypass.state import Route, RouteKind, Span
from meshbridge.identity.model import IpFamily, Peer, ProxyClass, Workload
from meshbridge.policy.baseline import Guard
from meshbridge.policy.capture import PortClass
from meshbridge.policy.lowering import guard_of, guard_of_peer
from meshbridge.policy.model import Direction, Verdict
from meshbridge.policy.policyset import PolicySet

MAX_RANGES = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One pod, direction, class and route, and the ports that share their fate.

    ``ruling``: what BypassPolicies make of it; None where no mesh policy would guard the ports anyway.
    """

    pod: str
    direction: Direction
    families: tuple[IpFamily, ...]
    ports: IntSet
    port_class: PortClass
    route: Route
    destinations: tuple[str, ...] = ()
    guarantees: tuple[Guarantee, ...] = ()
    compensation: Compensation | None = None
    ruling: Ruling | None = None

    def with_fate(self, fate: Fate) -> tuple[Guarantee, ...]:
        return tuple(guarantee for guarantee in self.guarantees if guarantee.fate is fate)


@dataclass(frozen=True, slots=True)
class Report:
    """All of it, in an order that does not depend on the order of the objects."""

    rows: tuple[Row, ...] = ()
    findings: tuple[tuple[str, Finding], ...] = ()
    halves: tuple[HalfBypass, ...] = ()
    isolations: tuple[Isolation, ...] = ()
    not_starting: tuple[str, ...] = ()

    def of(self, pod: str) -> Report:
        """What concerns one pod."""
        return Report(
            tuple(row for row in self.rows if row.pod == pod),
            tuple((name, finding) for name, finding in self.findings if name == pod),
            tuple(half for half in self.halves if half.server == pod or pod in half.clients),
            tuple(isolation for isolation in self.isolations if isolation.pod == pod),
            tuple(name for name in self.not_starting if name == pod),
        )


def report(inventory: Inventory) -> Report:
    """Everything worth knowing about the bypasses of a cluster."""
    rows = [row for workload in inventory.workloads for row in rows_of(workload, inventory)]
    states = inventory.states
    return Report(
        tuple(rows),
        tuple(
            (w.key, finding)
            for w in inventory.workloads
            for finding in states[w.key].findings
            if not (inventory.predicted and finding.code is FindingCode.RULES_NOT_SEEN)
        ),
        tuple(half_bypasses(inventory)),
        isolations(inventory),
        tuple(w.key for w in inventory.workloads if not states[w.key].starts),
    )


def rows_of(workload: Workload, inventory: Inventory) -> list[Row]:
    """The rows of one pod."""
    state = inventory.states[workload.key]
    families = {IpFamily.of(address) for address in workload.addresses} or {IpFamily.IPV4}
    selected = inventory.policies.selecting(workload)
    guard = guard_of(workload, selected)
    named = IntSet.of(*inventory.declared_ports(workload), *ports_of_rules(guard))
    merged: dict[Row, set[IpFamily]] = {}
    for family in families:
        for span in state.of(Direction.INGRESS, family, intended=inventory.predicted):
            if 6 in span.box.protocol and span.port_class is not PortClass.CAPTURED:
                for ports in _cut(span.box.port, named):
                    row = _inbound_row(workload, span, ports, guard, selected, inventory)
                    merged.setdefault(row, set()).add(family)
        for span in state.outbound_bypasses(family, intended=inventory.predicted):
            row = _outbound_row(workload, span, inventory)
            merged.setdefault(row, set()).add(family)
    return sorted((replace(row, families=tuple(sorted(held))) for row, held in merged.items()), key=_order)


def _order(row: Row) -> tuple[str, int, str, tuple[tuple[int, int], ...], str]:
    return (row.pod, row.direction, row.port_class.value, row.ports.spans, str(row.route))


def _cut(ports: IntSet, named: IntSet) -> list[IntSet]:
    """Single ports where somebody names them or there are few, and what is left as one set."""
    singles = ports if len(ports) <= MAX_SINGLE_PORTS else ports & named
    rest = ports - singles
    found = [IntSet.of(port) for first, last in singles for port in range(first, last + 1)]
    return [*found, rest] if rest else found


def _inbound_row(
    workload: Workload, span: Span, ports: IntSet, guard: Guard, selected: PolicySet, inventory: Inventory
) -> Row:
    row = Row(workload.key, Direction.INGRESS, (), ports, span.port_class, span.route)
    if span.port_class is not PortClass.EXCLUDED:
        return row
    port = ports.spans[0][0]
    probed = port in {target_port(workload, probe) for probe in workload.probe_ports}
    sources = {name: peer for name, peer in inventory.sources().items() if name != workload.key}
    return _ruled(
        replace(
            row,
            guarantees=inbound_guarantees(
                guard.past_envoy, selected.request_authentication, port, node_encryption=inventory.said_encryption
            ),
            compensation=inbound_compensation(guard, port, sources, probed=probed),
        ),
        workload,
        span,
        inventory,
    )


def _ruled(row: Row, workload: Workload, span: Span, inventory: Inventory) -> Row:
    ruling = inventory.bypass_policies.ruling(
        workload.peer(), span, row.ports, row.with_fate(Fate.LOST), encrypted=inventory.encrypts(workload)
    )
    return replace(row, ruling=ruling)


def _outbound_row(workload: Workload, span: Span, inventory: Inventory) -> Row:
    refusing = _refusing_destinations(workload, span, inventory)
    known = any(other is not workload for other in inventory.workloads)
    impostor = span.route.kind is RouteKind.PROXY_OWNER
    # REGISTRY_ONLY does not hold where Envoy's own packets look the same
    registry_only = None if impostor else inventory.registry_only
    if impostor and not refusing:
        why = (
            "its packets look like Envoy's, so only that is dropped here which would be dropped where it arrives; "
            "the rest is judged there as what comes past an Envoy; end the process, or run it as another user"
        )
    elif refusing:
        why = "what these destinations refuse this pod is dropped here already, and again where it arrives"
    elif inventory.others:
        why = (
            "no pod whose ports are known refuses it there; others drop what they refuse where it arrives, "
            "what they refuse under any name is dropped here already; identity and encryption are lost"
        )
    elif known:
        why = "no known destination's policy refuses this pod on these ports; identity and encryption are lost"
    else:
        why = "no destination is known"
    row = Row(
        workload.key,
        Direction.EGRESS,
        (),
        span.box.port,
        span.port_class,
        span.route,
        _destinations(span),
        outbound_guarantees(
            destination_drops=bool(refusing),
            registry_only=registry_only,
            node_encryption=inventory.said_encryption,
        ),
        Compensation(
            bool(refusing or registry_only),
            why,
            refused=refusing,
            outbound=True,
            registry_only=bool(registry_only),
        ),
    )
    return _ruled(row, workload, span, inventory)


def _destinations(span: Span) -> tuple[str, ...]:
    """The destinations of a bypass as prefixes; none when it is any."""
    if not ADDRESSES[span.family] - span.box.destination - LOOPBACK[span.family]:
        return ()
    prefixes = [str(network) for network in networks(span.box.destination, span.family)]
    return (*prefixes[:MAX_RANGES], *(["…"] if len(prefixes) > MAX_RANGES else []))


def _refusing_destinations(workload: Workload, span: Span, inventory: Inventory) -> tuple[str, ...]:
    """``pod:port`` of every known destination that drops what this pod sends there past its Envoy."""
    sender = inventory.peer(workload)
    found = []
    for other in inventory.workloads:
        if other.key == workload.key or other.proxy is not ProxyClass.SIDECAR:
            continue
        addresses = [address for address in other.addresses if IpFamily.of(address) is span.family]
        if other.addresses and not any(int(address) in span.box.destination for address in addresses):
            continue
        guard = guard_of(other, inventory.policies.selecting(other))
        classes = inventory.states[other.key].inbound(intended=inventory.predicted)[span.family]
        for port in inventory.declared_ports(other):
            if port not in span.box.port or classes.at(port) is not PortClass.EXCLUDED:
                continue
            if excluded_outcome(guard, port, sender).verdict is Verdict.DENY:
                found.append(f"{other.key}:{port}")
    return (*found, *_refusing_elsewhere(sender, span, inventory))


def _refusing_elsewhere(sender: Peer, span: Span, inventory: Inventory) -> list[str]:
    """The same of pods of other nodes, by the ports that their nodes have seen to be excluded."""
    here = {workload.key for workload in inventory.workloads}
    everywhere = not _destinations(span)
    ranges = frozenset(networks(span.box.destination, span.family))
    found = []
    for name, peer in sorted(inventory.others.items()):
        if name in here or not peer.excluded or not (everywhere or peer.networks & ranges):
            continue
        excluded = IntSet.of(*((p.first, p.last) for p in peer.excluded if p.family is span.family)) & span.box.port
        guard = guard_of_peer(peer, inventory.policies.selecting(peer))
        asked = excluded if len(excluded) <= MAX_SINGLE_PORTS else excluded & IntSet.of(*ports_of_rules(guard))
        found += [
            f"{name}:{port}"
            for first, last in asked
            for port in range(first, last + 1)
            if excluded_outcome(guard, port, sender).verdict is Verdict.DENY
        ]
    return found
