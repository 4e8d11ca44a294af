"""What a proof asks, and what its answers prove."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

import pytest

from meshbridge.bypass.bypasspolicy import BypassPolicies
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.proof import (
    MAX_PORTS,
    Answer,
    Demand,
    Outcome,
    Plan,
    Probe,
    Seen,
    Source,
    Status,
    Told,
    chosen_ports,
    demand_of,
    judge,
    only_audited,
    plan_probes,
)
from meshbridge.bypass.sets import IntSet
from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.policy.model import Document
from meshbridge.policy.precedence import DropReason

COMPENSATION, POLICY = int(DropReason.COMPENSATION), int(DropReason.POLICY)
V4, V6 = IpFamily.IPV4, IpFamily.IPV6
NOW = datetime(2026, 11, 1, tzinfo=UTC)


def source(name: str, identity: int) -> Source:
    return Source(name, ip_address(f"10.0.0.{identity % 250}"), identity)


FRIEND, STRANGER, WORLD = source("monitoring/prometheus", 300), source("shop/web", 301), source("world", 9)


def answers(admitted: set[int], network_denied: frozenset[int] = frozenset()) -> Callable[[IpFamily, int, int], Answer]:
    def answer(_family: IpFamily, _port: int, identity: int) -> Answer:
        if identity in network_denied:
            return Answer(POLICY)
        return Answer() if identity in admitted else Answer(COMPENSATION)

    return answer


def planned(sources: list[Source], admitted: set[int], turn: int = 0, **more: Any) -> Plan:
    return plan_probes(Demand({V4: IntSet.of(9090)}), (), {V4: sources}, answers(admitted, **more), turn)


def names(plan: Plan) -> list[tuple[str, int]]:
    return [(probe.source.name, probe.answer.reason) for probe in plan.probes]


def test_a_plan_has_both_kinds_and_those_kept_out_first() -> None:
    plan = planned([FRIEND, STRANGER, WORLD], {FRIEND.identity})
    assert names(plan) == [("shop/web", COMPENSATION), ("world", COMPENSATION), ("monitoring/prometheus", 0)]
    assert plan.lacking == ()


def test_whom_the_compensation_keeps_out_comes_before_whom_a_network_policy_does() -> None:
    others = [source(f"other-{n}", 400 + n) for n in range(3)]
    plan = planned([*others, STRANGER, FRIEND], {FRIEND.identity}, network_denied=frozenset(o.identity for o in others))
    assert names(plan)[0] == ("shop/web", COMPENSATION)


@pytest.mark.parametrize(
    ("admitted", "said"),
    [
        ({FRIEND.identity, STRANGER.identity, WORLD.identity}, "keeps nobody out"),
        (set[int](), "lets nobody in"),
    ],
    ids=["everybody is let in", "nobody is let in"],
)
def test_a_kind_of_source_that_there_is_none_of_is_said(admitted: set[int], said: str) -> None:
    plan = planned([FRIEND, STRANGER, WORLD], admitted)
    assert plan.probes
    (lack,) = plan.lacking
    assert said in lack
    outcome = judge(plan, right(plan), counted(plan), lost=False)
    assert (outcome.status, outcome.reason) == (Status.TRUE, "ProvedInPart")
    assert f"not proved: {lack}" in outcome.message


def test_turns_go_round_all_sources() -> None:
    everybody = [source(f"pod-{n}", 500 + n) for n in range(7)]
    seen = {probe.source.name for turn in range(7) for probe in planned(everybody, set(), turn).probes}
    assert seen == {s.name for s in everybody}


def test_many_ports_have_their_turns_and_declared_ones_are_first() -> None:
    ports = IntSet.of(*range(1, 100, 2))
    assert chosen_ports(ports, [51, 53], 0)[:2] == [51, 53]
    assert len(chosen_ports(ports, [], 0)) == MAX_PORTS
    assert {port for turn in range(50) for port in chosen_ports(ports, [], turn)} == set(range(1, 100, 2))
    assert chosen_ports(IntSet.of((1, 65535)), [8080], 3) == [8080, 1, 65535]


def right(plan: Plan) -> dict[Probe, Seen]:
    """Everything as it should be."""
    found = {}
    for probe in plan.probes:
        told = Told(probe.answer.reason, probe.source.identity, endpoint=4)
        found[probe] = Seen(probe.answer.passes, probe.answer.passes, told, endpoint=4)
    return found


def counted(plan: Plan) -> dict[int, int]:
    reasons = [probe.answer.reason for probe in plan.probes]
    return {reason: reasons.count(reason) for reason in reasons}


PLAN = planned([FRIEND, STRANGER, WORLD], {FRIEND.identity})
KEPT_OUT, _, LET_IN = PLAN.probes


def test_a_proof_needs_every_probe_to_become_what_it_should() -> None:
    outcome = judge(PLAN, right(PLAN), counted(PLAN), lost=False)
    assert (outcome.status, outcome.reason, outcome.refutes) == (Status.TRUE, "Proved", False)
    assert outcome.message == (
        "3 probes became what policy says; let in: monitoring/prometheus; kept out: shop/web, world; on IPv4 TCP 9090"
    )


WRONG: dict[str, tuple[Probe, Callable[[Seen], Seen], str]] = {
    "who is kept out reached the pod": (KEPT_OUT, lambda s: replace(s, arrived=True), "it reached the pod"),
    "who is kept out was let in": (KEPT_OUT, lambda s: replace(s, told=Told(0, 301, endpoint=4)), "let in"),
    "who is kept out was audited": (
        KEPT_OUT, lambda s: replace(s, told=Told(0, 301, audit=True, endpoint=4)), "audited only",
    ),
    "dropped by something else": (
        KEPT_OUT, lambda s: replace(s, told=Told(203, 301, endpoint=4)), "dropped (reason 203)",
    ),
    "taken for somebody else": (
        KEPT_OUT, lambda s: replace(s, told=Told(COMPENSATION, 1, endpoint=4)), "taken for identity 1 in place of 301",
    ),
    "judged as another pod": (
        KEPT_OUT, lambda s: replace(s, told=Told(COMPENSATION, 301, endpoint=5)), "judged as endpoint 5",
    ),
    "never judged": (KEPT_OUT, lambda s: replace(s, told=None), "the datapath never saw it"),
    "who is kept out opened a flow": (KEPT_OUT, lambda s: replace(s, left=True), "it opened a flow"),
    "who is let in was dropped": (
        LET_IN, lambda s: Seen(False, False, Told(COMPENSATION, 300, endpoint=4), endpoint=4), "dropped (COMPENSATION)",
    ),
    "who is let in did not arrive": (LET_IN, lambda s: replace(s, arrived=False), "did not arrive"),
    "who is let in was not judged": (LET_IN, lambda s: replace(s, told=None), "the datapath never saw it"),
    "a flow stays open": (LET_IN, lambda s: replace(s, left=True), "its flow stays open"),
}  # fmt: skip


@pytest.mark.parametrize(("probe", "change", "said"), WRONG.values(), ids=WRONG.keys())
def test_whatever_is_otherwise_refutes_it(probe: Probe, change: Callable[[Seen], Seen], said: str) -> None:
    seen = right(PLAN)
    seen[probe] = change(seen[probe])
    outcome = judge(PLAN, seen, counted(PLAN), lost=False)
    assert (outcome.status, outcome.reason) == (Status.FALSE, "ProbeContradicts")
    assert outcome.refutes is (said != "did not arrive"), "what is lost in the pod's namespace is not the datapath's"
    assert said in outcome.message
    assert str(probe.source.address) in outcome.message


def test_a_counter_that_did_not_grow_refutes_it() -> None:
    outcome = judge(PLAN, right(PLAN), {0: 1, COMPENSATION: 1}, lost=False)
    assert outcome.status is Status.FALSE
    assert "a counter that grew by 1, not 2" in outcome.message


def test_a_missing_event_proves_nothing_where_events_were_lost() -> None:
    seen = right(PLAN)
    seen[LET_IN] = replace(seen[LET_IN], told=None)
    outcome = judge(PLAN, seen, counted(PLAN), lost=True)
    assert (outcome.status, outcome.reason, outcome.refutes) == (Status.UNKNOWN, "EventsLost", False)
    seen[KEPT_OUT] = replace(seen[KEPT_OUT], arrived=True)
    assert judge(PLAN, seen, counted(PLAN), lost=True).status is Status.FALSE, "but what reached the pod did"


POD = Workload(
    "shop", "api", "u", "n", (ip_address("10.0.0.1"),), labels={"app": "api"}, proxy=ProxyClass.SIDECAR,
    annotations={
        "traffic.sidecar.istio.io/excludeInboundPorts": "9090", "traffic.sidecar.istio.io/excludeOutboundPorts": "53",
    },
)  # fmt: skip


def demanded(*specs: dict[str, Any], pod: Workload | None = POD) -> Demand | None:
    documents = [
        Document("BypassPolicy", "meshbridge.io/v1alpha1", "shop", f"p{n}", {"metadata": {}, "spec": spec})
        for n, spec in enumerate(specs)
    ]
    state = None
    if pod is not None:
        state = capture_state(pod)
        state = replace(state, spans=state.intended)
    return demand_of(state, POD.peer(), BypassPolicies.of(documents, NOW))


def test_only_what_a_policy_asks_for_is_proved() -> None:
    assert demanded() is None
    assert demanded({}) is None
    assert demanded({"proof": True, "selector": {"matchLabels": {"app": "other"}}}) is None
    found = demanded({"proof": True})
    assert found is not None
    assert (found.ports[V4], found.audited, found.outbound) == (IntSet.of(9090), {}, True)
    routes = [{"direction": "inbound", "ports": [80]}]
    found = demanded({"proof": True, "routes": routes}, {})
    assert found is not None
    assert V4 not in found.ports, "the one that allows the route does not ask"


def test_a_pod_without_a_bypass_has_nothing_to_prove() -> None:
    assert demanded({"proof": True}, pod=None) == Demand()


def test_an_audit_is_no_enforcement() -> None:
    found = demanded({"proof": True, "mode": "audit"})
    assert found is not None
    outcome = only_audited(found)
    assert isinstance(outcome, Outcome)
    assert (outcome.status, outcome.reason) == (Status.FALSE, "Audited")
    assert not plan_probes(found, (), {V4: [FRIEND]}, answers(set()), 0).probes
    found = demanded({"proof": True, "mode": "audit"}, {"mode": "enforce"})
    assert found is not None
    assert only_audited(found) is None, "the stricter holds"
