"""What the status of a BypassPolicy says, from what nodes report, and when it is written again."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import pytest

from meshbridge.bypass.bypasspolicy import BypassPolicy, parse_bypass_policy
from meshbridge.controller.conditions import (
    MAX_MESSAGE,
    Condition,
    Selected,
    condition_records,
    policy_conditions,
)
from meshbridge.identity.model import Workload
from meshbridge.policy.model import Document
from meshbridge.xds.nodereport import ConditionStatus, NodeReport, PodCondition

NOW = datetime(2026, 11, 24, 7, 0, tzinfo=UTC)
UID = "policy-uid"
TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN


def policy(generation: int = 2, **spec: Any) -> BypassPolicy:
    data = {"metadata": {"name": "p", "generation": generation}, "spec": spec}
    return parse_bypass_policy(Document("BypassPolicy", "meshbridge.io/v1alpha1", "shop", "p", data, uid=UID))


def pod(name: str, node: str) -> Workload:
    return Workload("shop", name, f"uid-{name}", node, (ip_address("10.0.0.1"),))


PODS = (pod("a", "n1"), pod("b", "n2"))
BOTH = Selected(PODS, frozenset({"uid-a"}))


def reports(generation: int = 2, **conditions: PodCondition) -> dict[str, NodeReport]:
    """Both nodes hold the policy; ``a`` and ``b`` are their pods."""
    of = {name: {f"uid-{name}": (condition,)} for name, condition in conditions.items()}
    return {
        "n1": NodeReport(programmed={UID: generation}, conditions=of.get("a", {})),
        "n2": NodeReport(programmed={UID: generation}, conditions=of.get("b", {})),
    }


def said(kind: str, status: ConditionStatus, reason: str = "Because", message: str = "why") -> PodCondition:
    return PodCondition(kind, status, reason, message)


PROVED = said("Proved", TRUE)
NOT_HOOKED = said("Enforced", FALSE, "NotHooked", "no interface")
GHOST = said("Captured", FALSE, "GhostBypass", "8080 bypasses Envoy")

CASES: dict[str, tuple[BypassPolicy, Selected, Mapping[str, NodeReport], dict[str, tuple[ConditionStatus, str]]]] = {
    "in force": (
        policy(), BOTH, reports(),
        {"Accepted": (TRUE, "Understood"), "Programmed": (TRUE, "Programmed"), "Enforced": (TRUE, "Programmed"),
         "Degraded": (FALSE, "AsExpected")},
    ),
    "nobody is selected": (policy(), Selected((), frozenset()), {}, {"Programmed": (TRUE, "NoPods")}),
    "a node has not said anything": (
        policy(), BOTH, {"n1": reports()["n1"]}, {"Programmed": (FALSE, "Pending"), "Enforced": (FALSE, "Pending")},
    ),
    "nodes hold what was written before": (policy(), BOTH, reports(1), {"Programmed": (FALSE, "Pending")}),
    "another policy of the name was held": (
        policy(), BOTH, {node: NodeReport(programmed={"old": 2}) for node in ("n1", "n2")},
        {"Programmed": (FALSE, "Pending")},
    ),
    "refused": (
        policy(mode="never"), BOTH, reports(),
        {"Accepted": (FALSE, "Refused"), "Programmed": (TRUE, "Programmed"), "Enforced": (TRUE, "Programmed"),
         "Degraded": (TRUE, "Refused")},
    ),
    "what it accepted is over": (
        policy(accept=["telemetry"], reason="r", until="2026-01-01T00:00:00Z"), BOTH, reports(),
        {"Accepted": (TRUE, "Expired"), "Enforced": (TRUE, "Programmed")},
    ),
    "audited": (
        policy(mode="audit"), BOTH, reports(), {"Enforced": (FALSE, "Audit"), "Degraded": (FALSE, "AsExpected")},
    ),
    "an audit that is over": (
        policy(mode="audit", accept=["telemetry"], reason="r", until="2026-01-01T00:00:00Z"), BOTH, reports(),
        {"Enforced": (TRUE, "Programmed")},
    ),
    "a pod without hooks": (
        policy(), BOTH, reports(b=NOT_HOOKED),
        {"Programmed": (TRUE, "Programmed"), "Enforced": (FALSE, "PodsNotEnforced"),
         "Degraded": (TRUE, "PodsNotEnforced")},
    ),
    "a pod that is just starting": (
        policy(), BOTH, reports(b=said("Enforced", UNKNOWN)),
        {"Enforced": (UNKNOWN, "PodsWaiting"), "Degraded": (FALSE, "AsExpected")},
    ),
    "a ghost bypass, which is compensated": (
        policy(), BOTH, reports(a=GHOST), {"Enforced": (TRUE, "Programmed"), "Degraded": (TRUE, "GhostBypass")},
    ),
    "proof is asked for and not given": (policy(proof=True), BOTH, reports(), {"Enforced": (UNKNOWN, "ProofPending")}),
    "proof is asked for and given where something bypasses": (
        policy(proof=True), BOTH, reports(a=PROVED), {"Enforced": (TRUE, "Proved")},
    ),
    "proof of a pod of which nobody asked it proves nothing": (
        policy(proof=True), BOTH, reports(b=PROVED), {"Enforced": (UNKNOWN, "ProofPending")},
    ),
    "probes showed the contrary": (
        policy(proof=True), BOTH, reports(a=said("Proved", FALSE)),
        {"Enforced": (FALSE, "ProofFailed"), "Degraded": (TRUE, "ProofFailed")},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "selected", "told", "expected"), CASES.values(), ids=CASES.keys())
def test_conditions(
    given: BypassPolicy,
    selected: Selected,
    told: Mapping[str, NodeReport],
    expected: dict[str, tuple[ConditionStatus, str]],
) -> None:
    found = {c.type: c for c in policy_conditions(given, selected, told, NOW)}
    assert list(found) == ["Accepted", "Programmed", "Enforced", "Degraded"]
    assert {kind: (found[kind].status, found[kind].reason) for kind in expected} == expected
    assert {c.generation for c in found.values()} == {2}


def test_a_node_is_believed_of_its_own_pods_only() -> None:
    foreign = {**reports(), "n2": NodeReport(programmed={UID: 2}, conditions={"uid-a": (NOT_HOOKED,)})}
    assert policy_conditions(policy(), BOTH, foreign, NOW) == policy_conditions(policy(), BOTH, reports(), NOW)


def test_a_message_names_some_pods_and_is_bounded() -> None:
    pods = tuple(pod(f"p{n:03}", "n1") for n in range(500))
    told = {p.uid: (said("Enforced", FALSE, "NotHooked", "x" * 1024),) for p in pods}
    node = {"n1": NodeReport(programmed={UID: 2}, conditions=told)}
    degraded = policy_conditions(policy(), Selected(pods, frozenset()), node, NOW)[3]
    assert degraded.message.startswith("pods shop/p000, shop/p001, shop/p002 and 497 more: xx")
    assert len(degraded.message) == MAX_MESSAGE


def test_the_time_of_a_transition_changes_with_the_status_alone() -> None:
    first = condition_records([Condition("Enforced", FALSE, "Pending", "1 of 2", 1)], None, NOW)
    assert first is not None
    assert first[0]["lastTransitionTime"] == "2026-11-24T07:00:00Z"
    later = NOW + timedelta(minutes=5)
    assert condition_records([Condition("Enforced", FALSE, "Pending", "1 of 2", 1)], list(first), later) is None
    other = condition_records([Condition("Enforced", FALSE, "Audit", "", 2)], list(first), later)
    assert other is not None
    assert (other[0]["lastTransitionTime"], other[0]["observedGeneration"]) == ("2026-11-24T07:00:00Z", 2)
    turned = condition_records([Condition("Enforced", TRUE, "Programmed", "", 2)], list(other), later)
    assert turned is not None
    assert turned[0]["lastTransitionTime"] == "2026-11-24T07:05:00Z"


@pytest.mark.parametrize("observed", [None, {}, [], [None], [{"type": 3}], "x"], ids=repr)
def test_a_status_that_is_none_is_written_anew(observed: object) -> None:
    assert condition_records([Condition("Accepted", TRUE, "Understood")], observed, NOW) is not None


def test_conditions_of_others_beside_ours_cost_no_write() -> None:
    ours = condition_records([Condition("Accepted", TRUE, "Understood")], None, NOW)
    assert ours is not None
    theirs = {"type": "Reviewed", "status": "True"}
    assert condition_records([Condition("Accepted", TRUE, "Understood")], [theirs, *ours], NOW) is None
