"""What the readiness gate ``meshbridge.io/compensated`` says: nothing but proofs opens or closes it."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from meshbridge.bypass.bypasspolicy import BypassPolicy, parse_bypass_policy
from meshbridge.bypass.proof import GATE
from meshbridge.controller.podgates import NOT_ASKED, NOT_PROVED, gate_condition
from meshbridge.identity.model import Workload
from meshbridge.policy.model import Document
from meshbridge.xds.nodereport import ConditionStatus, PodCondition

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
POD = Workload("shop", "api", "u", "n", (ip_address("10.0.0.1"),), labels={"app": "api"})


def policy(**spec: Any) -> BypassPolicy:
    return parse_bypass_policy(Document("BypassPolicy", "meshbridge.io/v1alpha1", "shop", "p", {"spec": spec}))


def proved(status: ConditionStatus, reason: str = "Why") -> dict[str, tuple[PodCondition, ...]]:
    other = PodCondition("Captured", FALSE, "GhostBypass")
    return {"u": (other, PodCondition("Proved", status, reason, "text"))}


OPEN, CLOSED = PodCondition(GATE, TRUE, "Proved", "text"), PodCondition(GATE, FALSE, "ProbeContradicts", "text")
NONE: dict[str, tuple[PodCondition, ...]] = {}
CASES: dict[str, tuple[BypassPolicy, dict[str, tuple[PodCondition, ...]], PodCondition | None, PodCondition]] = {
    "nobody said anything": (policy(proof=True), NONE, None, NOT_PROVED),
    "proved": (policy(proof=True), proved(TRUE, "Proved"), NOT_PROVED, OPEN),
    "refuted": (policy(proof=True), proved(FALSE, "ProbeContradicts"), OPEN, CLOSED),
    "not known yet": (policy(proof=True), proved(UNKNOWN), None, NOT_PROVED),
    "not known any more": (policy(proof=True), proved(UNKNOWN), OPEN, OPEN),
    "refuted, then not known": (policy(proof=True), proved(UNKNOWN), CLOSED, CLOSED),
    "the agent is away": (policy(proof=True), NONE, OPEN, OPEN),
    "of another pod": (policy(proof=True), {"v": proved(TRUE)["u"]}, None, NOT_PROVED),
    "nobody asks": (policy(), NONE, NOT_PROVED, NOT_ASKED),
    "asked of another pod": (policy(proof=True, selector={"matchLabels": {"app": "x"}}), NONE, None, NOT_ASKED),
    "asked again": (policy(proof=True), NONE, NOT_ASKED, NOT_PROVED),
    "a policy that is not understood may ask": (policy(proof="yes"), NONE, None, NOT_PROVED),
}


@pytest.mark.parametrize(("asked", "told", "observed", "expected"), CASES.values(), ids=CASES.keys())
def test_only_proofs_open_and_close_it(
    asked: BypassPolicy,
    told: dict[str, tuple[PodCondition, ...]],
    observed: PodCondition | None,
    expected: PodCondition,
) -> None:
    asking = [asked] if asked.proof or asked.refusal is not None else []
    assert gate_condition(POD, asking, told, observed) == expected
