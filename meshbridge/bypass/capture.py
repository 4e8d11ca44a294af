"""Whether Envoy sees a flow: the capture state of one pod, for every port, range, interface and owner at once.

Truth, in this order: the rules seen in the pod's network namespace; istio-init's arguments and environment; the
annotations of the running pod (CNI form). Until rules are seen nothing counts as captured. Where two of them differ,
that is a finding, and the earlier one is followed.

Spec: ISTIO.md §c; DESIGN §2, the table of classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from meshbridge.bypass import annotations as asked
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.classify import ambient_guards, classified_spans, universe
from meshbridge.bypass.expected import expected_redirection, families_with_rules, family_findings
from meshbridge.bypass.findings import Finding, FindingCode, Severity
from meshbridge.bypass.redirect_config import RedirectConfig, istio_rules
from meshbridge.bypass.rules import Hook, SeenRules
from meshbridge.bypass.sets import IntSet, NameSet, union
from meshbridge.bypass.state import CaptureState, Route, RouteKind, Span, Truth
from meshbridge.bypass.walk import Outcome, regions
from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.policy.capture import ISTIO_PORTS, PortClass
from meshbridge.policy.model import Direction

_KEPT: Final = 128
_ISTIO_PORTS: Final = IntSet.of(*ISTIO_PORTS)


def capture_state(
    workload: Workload, *, mesh: MeshDefaults | None = None, seen: SeenRules | None = None
) -> CaptureState:
    """Compute the capture state of a pod from its final specification and, where read, the rules in its namespace.

    Args:
        mesh: The mesh-wide values; None: not known, Istio's own are taken for what is only predicted.
        seen: The rules of its network namespace; None: not read yet, so nothing counts as captured.
    """
    known = mesh or MeshDefaults()
    if workload.proxy is ProxyClass.AMBIENT:
        return _ambient(workload, seen)
    expected = expected_redirection(workload, known)
    findings = list(expected.findings)
    if expected.config is None and expected.truth is Truth.NO_PROXY:
        spans = unguarded(expected.reason)
        if seen is None:
            return CaptureState(workload.key, Truth.NO_PROXY, spans, spans, tuple(findings))
        # rules without a proxy in the specification: what is redirected goes to nobody we know
        return CaptureState(workload.key, Truth.NO_PROXY, spans, spans, (*findings, *_stray_rules(seen)))
    config = expected.config or RedirectConfig()
    families = families_with_rules(workload, config)
    settings = _Settings(
        config, tuple(sorted(config.sources.items())), families, None if expected.config else expected.reason
    )
    intended = _intended(settings)
    findings += family_findings(workload, config, families)
    if seen is None:
        findings.append(
            Finding(
                FindingCode.RULES_NOT_SEEN, Severity.INFO, f"pod {workload.key}",
                "its redirect rules have not been seen yet, so every port counts as excluded",
            )
        )  # fmt: skip
        return CaptureState(
            workload.key, expected.truth, _not_seen(intended), intended, tuple(findings), expected.starts
        )
    spans = _followed(settings, seen)
    findings += compare(workload.key, intended, spans, seen)
    return CaptureState(workload.key, Truth.RULES, spans, intended, tuple(findings), expected.starts)


def bypasses_outbound(workload: Workload) -> bool:
    """Whether the pod's specification lets its application send past its own sidecar."""
    if workload.proxy is not ProxyClass.SIDECAR:
        return False
    state = capture_state(workload)
    families = {IpFamily.of(address) for address in workload.addresses}
    return any(state.outbound_bypasses(family, intended=True) for family in families)


def bypasses_sidecar(workload: Workload) -> bool:
    """Whether something reaches the pod's application, or leaves it, past its own sidecar, by its specification.

    Istio's own ports are none: injection itself excludes them in every pod.
    """
    if workload.proxy is not ProxyClass.SIDECAR:
        return False
    state = capture_state(workload)
    families = {IpFamily.of(address) for address in workload.addresses}
    return any(
        span.port_class is PortClass.EXCLUDED and 6 in span.box.protocol and span.box.port - _ISTIO_PORTS
        for family in families
        for span in (
            *state.of(Direction.INGRESS, family, intended=True), *state.outbound_bypasses(family, intended=True),
        )
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Settings:
    """All that spans depend on besides rules that were read; pods of one template share it.

    ``without_rules`` says why nothing redirects at all; None: the settings do.
    """

    config: RedirectConfig
    sources: tuple[tuple[str, str], ...]
    families: frozenset[IpFamily]
    without_rules: str | None


@lru_cache(maxsize=_KEPT)
def _intended(settings: _Settings) -> tuple[Span, ...]:
    """What the specification leads to."""
    spans: list[Span] = []
    for family in IpFamily:
        redirects = settings.without_rules is None and family in settings.families
        rule_sets = (istio_rules(settings.config, family),) if redirects else ()
        spans += classified_spans(rule_sets, family, settings.config, _absent_route(settings, family))
    return tuple(spans)


@lru_cache(maxsize=_KEPT)
def _followed(settings: _Settings, seen: SeenRules) -> tuple[Span, ...]:
    """What the rules in the namespace lead to."""
    absent, intended = Route(RouteKind.RULES_MISSING, "no rule redirects it"), _intended(settings)
    spans: list[Span] = []
    for family in IpFamily:
        spans += classified_spans(seen.of(family), family, settings.config, absent, intended)
    return tuple(spans)


def _not_seen(intended: tuple[Span, ...]) -> tuple[Span, ...]:
    route = Route(RouteKind.RULES_NOT_SEEN)
    return tuple(
        replace(span, port_class=PortClass.EXCLUDED, route=route, listener=0)
        if span.port_class is PortClass.CAPTURED
        else span
        for span in intended
    )


def unguarded(reason: str) -> tuple[Span, ...]:
    route = Route(RouteKind.NO_SIDECAR, reason)
    return tuple(
        Span(direction, family, universe(direction, family), PortClass.UNGUARDED, route)
        for family in IpFamily
        for direction in Direction
    )


def _stray_rules(seen: SeenRules) -> list[Finding]:
    for family in IpFamily:
        for region in regions(seen.of(family), Hook.PREROUTING, universe(Direction.INGRESS, family)):
            if region.outcome is Outcome.REDIRECTED:
                what = f"redirects to port {region.port}, but the pod has no sidecar"
                return [
                    Finding(
                        FindingCode.RULES_CONTRADICT,
                        Severity.WARNING,
                        region.rule.text if region.rule else "a rule",
                        what,
                    )
                ]
    return []


def _ambient(workload: Workload, seen: SeenRules | None) -> CaptureState:
    """Ambient: ztunnel's redirection in the pod; the sidecar's annotations have no effect on it."""
    findings = [
        Finding(
            FindingCode.AMBIENT_IGNORES,
            Severity.WARNING,
            f"annotation {name}",
            "has no effect on a pod in ambient mode",
        )
        for name in workload.annotations
        if name.startswith(asked.TRAFFIC)
    ]
    without_inbound = asked.is_true(workload.annotations.get(asked.AMBIENT_BYPASS_INBOUND, ""))
    rerouted = [name.strip() for name in workload.annotations.get(asked.REROUTE_INTERFACES, "").split(",")]
    kept = NameSet.of(*(name for name in rerouted if name))
    intended = []
    for family in IpFamily:
        for direction in Direction:
            for box, baseline, kind in ambient_guards(direction, family):
                span = Span(direction, family, box, baseline, Route(kind))
                bypasses = direction is Direction.INGRESS and baseline is PortClass.CAPTURED and without_inbound
                intended += _without_inbound(span, workload, kept) if bypasses else [span]
    if seen is None:
        return CaptureState(
            workload.key, Truth.ANNOTATIONS, _not_seen(tuple(intended)), tuple(intended), tuple(findings)
        )
    absent = Route(RouteKind.RULES_MISSING, "no rule redirects it")
    spans = [
        span
        for family in IpFamily
        for span in classified_spans(seen.of(family), family, RedirectConfig(), absent, tuple(intended), ambient=True)
    ]
    return CaptureState(workload.key, Truth.RULES, tuple(spans), tuple(intended), tuple(findings))


def _without_inbound(span: Span, workload: Workload, kept: NameSet) -> list[Span]:
    """What arrives at a pod that asked for no inbound redirection; that on rerouted interfaces counts as sent."""
    value = workload.annotations[asked.AMBIENT_BYPASS_INBOUND]
    route = Route(RouteKind.AMBIENT, f'annotation {asked.AMBIENT_BYPASS_INBOUND}: "{value}"')
    boxes = [span.box._replace(input=span.box.input - kept), span.box._replace(input=span.box.input & kept)]
    parts = [replace(span, box=boxes[0], port_class=PortClass.EXCLUDED, route=route), replace(span, box=boxes[1])]
    return [part for part in parts if not part.box.empty]


def compare(pod: str, intended: Iterable[Span], spans: Iterable[Span], seen: SeenRules) -> list[Finding]:
    """Where the rules seen capture something else than the specification leads to."""
    found = [
        Finding(
            FindingCode.RULE_NOT_UNDERSTOOD,
            Severity.WARNING,
            f"pod {pod}",
            f"{problem}; what it may concern counts as not captured",
        )
        for problem in _unread(spans, seen)
    ]
    planned, real = list(intended), list(spans)
    for direction in Direction:
        for family in IpFamily:
            mine = [span for span in real if span.direction is direction and span.family is family]
            theirs = [span for span in planned if span.direction is direction and span.family is family]
            lost, gained = _differences(theirs, mine), _differences(mine, theirs)
            for ports, code, what in (
                (lost, FindingCode.RULES_MISSING, "should be redirected to Envoy, and the rules in the pod do not"),
                (
                    gained,
                    FindingCode.RULES_CONTRADICT,
                    "should not be redirected to Envoy, and the rules in the pod do",
                ),
            ):
                if ports:
                    version = "IPv4" if family is IpFamily.IPV4 else "IPv6"
                    subject = f"pod {pod}, {direction.name.lower()} {version} TCP ports {ports}"
                    found.append(
                        Finding(code, Severity.ERROR, subject, f"{what}: followed the rules", "restart the pod")
                    )
    return found


def _unread(spans: Iterable[Span], seen: SeenRules) -> list[str]:
    texts = [span.route.detail for span in spans if span.route.kind is RouteKind.NOT_UNDERSTOOD]
    return sorted({*seen.problems, *(text for text in texts if text)})[:16]


def _differences(left: Iterable[Span], right: Iterable[Span]) -> IntSet:
    """TCP ports that are captured on the left and, for some flow, excluded on the right."""
    ports = []
    for one in left:
        if one.port_class is not PortClass.CAPTURED:
            continue
        for other in right:
            if other.port_class is PortClass.EXCLUDED and (box := one.box.both(other.box)) is not None:
                ports.append(box.port)
    return union(ports)


def _absent_route(settings: _Settings, family: IpFamily) -> Route:
    """Why nothing redirects a flow that no rule mentions."""
    if settings.without_rules is not None:
        kind = RouteKind.MODE_NONE if "NONE" in settings.without_rules else RouteKind.RULES_MISSING
        return Route(kind, settings.without_rules)
    if family not in settings.families:
        return Route(RouteKind.IPV6, "the pod's redirect rules are for IPv4 only")
    return Route(RouteKind.RULES_MISSING, "")
