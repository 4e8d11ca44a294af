"""Which bypasses are audited, and that an audit opens nothing but what the compensation closed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import pytest
from compensation_cases import ADDRESSES, CLIENTS, PORTS, SERVER, WORLDS, World
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.audit import with_audits
from meshbridge.bypass.bypasspolicy import BypassPolicies
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.iptables import parse_iptables_save
from meshbridge.bypass.redirect_config import restore_text
from meshbridge.bypass.rules import SeenRules
from meshbridge.bypass.state import capture_of
from meshbridge.identity.model import IpFamily, ProxyClass, TcpPorts, Workload
from meshbridge.policy.capture import Capture, OutboundBypass, PortClass
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.model import Direction, Document, Judge, Verdict
from meshbridge.policy.precedence import DropReason

NOW = datetime(2026, 11, 24, tzinfo=UTC)
V4 = IpFamily.IPV4
IN, OUT = {"excludeInboundPorts": "8080,9090"}, {"excludeOutboundPorts": "8080,9090"}


def policy(name: str = "p", **spec: Any) -> Document:
    version = "meshbridge.io/v1alpha1"
    data = {"apiVersion": version, "kind": "BypassPolicy", "metadata": {"name": name}, "spec": spec}
    return Document("BypassPolicy", version, "shop", name, data)


def workload(annotations: dict[str, str]) -> Workload:
    given_ = {a.TRAFFIC + key: value for key, value in annotations.items()}
    return Workload(
        "shop", "api", "u", "n", (ip_address("10.0.0.1"),), {"app": "api"}, annotations=given_,
        proxy=ProxyClass.SIDECAR, init_args=a.render_init_args(given_, MeshDefaults()),
    )  # fmt: skip


def rules_of(pod: Workload) -> SeenRules:
    config, _ = parse_init_args(pod.init_args or (), pod.init_env)
    return SeenRules((parse_iptables_save(restore_text(config, V4), V4),))


def audited(pod: Workload, seen: SeenRules | None, policies: list[Document], now: datetime = NOW) -> tuple[str, str]:
    """The audited ports, inbound and outbound."""
    state = with_audits(capture_state(pod, seen=seen), pod.peer(), BypassPolicies.of(policies, now))
    capture = capture_of(state, judges=frozenset(Judge))
    inbound = [f"{p.first}-{p.last}" for p in capture.audited if p.family is V4]
    outbound = [f"{b.first}-{b.last}" for b in capture.outbound.get(V4, ()) if b.audit]
    return " ".join(inbound), " ".join(outbound)


AUDIT: dict[str, Any] = {"mode": "audit"}
ON_8080 = {"routes": [{"direction": "inbound", "ports": [8080]}]}
ACCEPTING = {"accept": ["l7"], "reason": "r", "until": (NOW + timedelta(hours=1)).isoformat()}
CASES: dict[str, tuple[dict[str, str], list[Document], tuple[str, str]]] = {
    "nothing without a policy": (IN, [], ("", "")),
    "nothing where policies enforce": (IN, [policy()], ("", "")),
    "every inbound exclusion": (IN, [policy(**AUDIT)], ("8080-8080 9090-9090", "")),
    "every outbound exclusion": (OUT, [policy(**AUDIT)], ("", "8080-8080 9090-9090")),
    "the ports of the route only": (IN, [policy(**AUDIT, **ON_8080)], ("8080-8080", "")),
    "no route of another kind": (
        IN, [policy(**AUDIT, routes=[{"direction": "inbound", "kinds": ["interceptionModeNone"]}])], ("", ""),
    ),
    "not what another policy enforces": (IN, [policy(**AUDIT), policy("q", **ON_8080)], ("9090-9090", "")),
    "nothing while a policy is refused": (IN, [policy(**AUDIT), policy("q", mode="off")], ("", "")),
    "nothing of other pods": (IN, [policy(**AUDIT, selector={"matchLabels": {"app": "db"}})], ("", "")),
    "no route to more than is named": (
        OUT, [policy(**AUDIT, routes=[{"direction": "outbound", "destinations": ["10.0.0.0/8"]}])], ("", ""),
    ),
    "what is accepted for a while": (IN, [policy(**AUDIT, **ACCEPTING)], ("8080-8080 9090-9090", "")),
}  # fmt: skip


@pytest.mark.parametrize(("annotations", "policies", "expected"), CASES.values(), ids=CASES.keys())
def test_an_audit_covers(annotations: dict[str, str], policies: list[Document], expected: tuple[str, str]) -> None:
    pod = workload(annotations)
    assert audited(pod, rules_of(pod), policies) == expected


def test_an_audit_ends_with_what_its_policy_accepts() -> None:
    pod, policies = workload(IN), [policy(**AUDIT, **ACCEPTING)]
    later = NOW + timedelta(hours=1)
    assert BypassPolicies.of(policies, NOW).next_change == later
    assert audited(pod, rules_of(pod), policies, later) == ("", "")
    assert BypassPolicies.of(policies, later).next_change is None


def test_what_nobody_asked_for_is_never_audited() -> None:
    """Rules that are missing, foreign, or not seen yet are no route that a policy can allow."""
    pod, plain = workload(IN), workload({})
    assert audited(plain, SeenRules(), [policy(**AUDIT)]) == ("", "")
    assert audited(plain, rules_of(pod), [policy(**AUDIT)]) == ("", "")
    assert audited(plain, None, [policy(**AUDIT)]) == ("", "")
    assert audited(pod, None, [policy(**AUDIT)]) == ("8080-8080 9090-9090", ""), "but what was asked for, at once"


@settings(max_examples=60, deadline=None)
@given(WORLDS, st.sets(st.sampled_from(PORTS)))
def test_an_audit_lets_pass_and_tells_what_the_compensation_drops_and_nothing_else(world: World, on: set[int]) -> None:
    numbering = world.numbering()
    auditing = replace(world.capture, audited=tuple(TcpPorts(V4, port, port) for port in sorted(on)))
    compiler = Compiler(numbering.identities)
    enforced, audit = (
        compiler.endpoint(SERVER, world.policies, capture).map(Direction.INGRESS, V4)
        for capture in (world.capture, auditing)
    )
    for port in (*PORTS, 7000):
        for address in ADDRESSES:
            number = numbering.addresses[ip_address(address)].identity
            before, after = evaluate(enforced, number, 6, port), evaluate(audit, number, 6, port)
            if before.passes or port not in on or world.classes.get(port) is not PortClass.EXCLUDED:
                assert (after.verdict, after.deny_reason, after.audited) == (before.verdict, before.deny_reason, None)
                assert after.deciding.origins == before.deciding.origins
            else:
                assert after.passes
                assert after.audited is not None
                assert after.audited.deny_reason == DropReason.COMPENSATION
                assert after.audited.origins == before.deciding.origins


ONE, BOTH = (
    (OutboundBypass(8080, 9090, audit=True),),
    (OutboundBypass(8080, 9090, audit=True), OutboundBypass(9090, 9090)),
)


@settings(max_examples=40, deadline=None)
@given(WORLDS)
def test_at_the_source_too_and_what_one_bypass_enforces_no_other_audits(world: World) -> None:
    numbering = world.numbering()
    number = numbering.addresses[SERVER.addresses[0]].identity
    compiler = Compiler(numbering.identities, {number: world.capture.inbound})
    plain, audit, both = (
        compiler.endpoint(CLIENTS[0], world.policies, Capture(outbound={V4: bypasses})).map(Direction.EGRESS, V4)
        for bypasses in ((OutboundBypass(8080, 9090),), ONE, BOTH)
    )
    for port in PORTS:
        enforced = evaluate(plain, number, 6, port)
        assert evaluate(audit, number, 6, port).passes
        assert (evaluate(audit, number, 6, port).audited is None) == enforced.passes
        expected = enforced.verdict if port == 9090 else Verdict.ALLOW
        assert evaluate(both, number, 6, port).verdict is expected
