"""Which bypasses are audited: their compensation is counted instead of enforced, because a BypassPolicy says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from meshbridge.bypass.bypasspolicy import BypassPolicies, BypassPolicy, Mode
from meshbridge.bypass.sets import IntSet
from meshbridge.bypass.state import CaptureState, Span
from meshbridge.identity.model import Peer
from meshbridge.policy.capture import PortClass


def with_audits(state: CaptureState, peer: Peer, policies: BypassPolicies) -> CaptureState:
    """The same flows, with ``Span.audit`` on bypasses that policies allow, and none of those enforces.

    Only a route that a pod can ask for is audited: rules that are missing, foreign or not seen yet never are.
    """
    selecting = policies.selecting(peer)
    if not any(policy.mode_at(policies.now) is Mode.AUDIT for policy in selecting):
        return state
    of_pod = BypassPolicies(selecting, policies.now)
    return replace(state, spans=tuple(part for span in state.spans for part in _parts(span, peer, of_pod)))


def _parts(span: Span, peer: Peer, policies: BypassPolicies) -> Iterator[Span]:
    if span.port_class is not PortClass.EXCLUDED:
        yield span
        return
    audited, enforced = IntSet(), IntSet()
    for ports in told_apart(span.box.port, policies.policies):
        ruling = policies.ruling(peer, span, ports, ())
        if ruling.mode is Mode.AUDIT:
            audited |= ports
        else:
            enforced |= ports
    for ports, audit in ((audited, True), (enforced, False)):
        if ports:
            yield replace(span, box=span.box._replace(port=ports), audit=audit)


def told_apart(ports: IntSet, policies: tuple[BypassPolicy, ...]) -> list[IntSet]:
    """The ports, cut wherever some route begins or ends."""
    parts = [ports]
    for cut in {route.ports for policy in policies for route in policy.routes}:
        parts = [piece for part in parts for piece in (part & cut, part - cut) if piece]
    return parts
