"""What the controller is told of this node's pods: where they are not as their policies want them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from meshbridge.bypass.bypasspolicy import BypassPolicy
from meshbridge.bypass.proof import AUDITED, CONDITION
from meshbridge.protos import observer_pb2 as pb
from meshbridge.xds.exclusions import Exclusions
from meshbridge.xds.nodereport import ENFORCED, PROVED, ConditionStatus, NodeReport, PodCondition

_UNENFORCED: Final[Mapping[str, tuple[ConditionStatus, str]]] = {
    "waiting-for-policy": (ConditionStatus.UNKNOWN, "WaitingForPolicy"),
    "not-ready": (ConditionStatus.FALSE, "NotCompiled"),
    "not-hooked": (ConditionStatus.FALSE, "NotHooked"),
}
"""What the states of an endpoint mean; any other is enforced, or is no pod of which the controller knows."""


def node_report(
    exclusions: Exclusions, policies: Iterable[BypassPolicy], states: Iterable[pb.EndpointState]
) -> NodeReport:
    """The report of a node that holds ``policies`` as they are written, with its endpoints in ``states``."""
    programmed = {policy.uid: policy.generation for policy in policies if policy.uid}
    return NodeReport(exclusions, programmed, _conditions(states))


def _conditions(states: Iterable[pb.EndpointState]) -> dict[str, tuple[PodCondition, ...]]:
    found: dict[str, dict[str, PodCondition]] = {}
    for state in states:
        of_pod = found.setdefault(state.uid, {})  # a pod may have several interfaces: what any of them lacks, it lacks
        if state.state in _UNENFORCED:
            status, reason = _UNENFORCED[state.state]
            of_pod.setdefault(ENFORCED, PodCondition(ENFORCED, status, reason, state.message))
        for condition in state.conditions:
            if (told := _condition(condition)) is not None:
                of_pod.setdefault(told.type, told)
    return {uid: tuple(of_pod.values()) for uid, of_pod in found.items() if uid and of_pod}


def _condition(condition: pb.Condition) -> PodCondition | None:
    """What an endpoint calls enforced is proved; None: an audit, of which the controller knows by itself."""
    if condition.reason == AUDITED:
        return None
    kind = PROVED if condition.type == CONDITION else condition.type
    status = ConditionStatus.TRUE if condition.status else ConditionStatus.FALSE
    return PodCondition(
        kind, ConditionStatus.UNKNOWN if condition.unknown else status, condition.reason, condition.message
    )
