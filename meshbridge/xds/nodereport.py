"""What a node reports of its own pods, as a message and back; whoever reads it trusts nothing of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from meshbridge.protos import reports_pb2 as pb
from meshbridge.xds.exclusions import MAX_PODS, MAX_UID_LENGTH, Exclusions, exclusion_groups, exclusions_of
from meshbridge.xds.messages import MessageError

MAX_CONDITIONS: Final = 8
MAX_POLICIES: Final = 4_096
MAX_WORD: Final = 128
MAX_MESSAGE: Final = 1_024

ENFORCED: Final = "Enforced"
"""The pod's interfaces are hooked and hold its policies. Told while it does not hold."""
CAPTURED: Final = "Captured"
"""All that the pod's specification gives to Envoy reaches it. Told while it does not hold: a ghost bypass."""
PROVED: Final = "Proved"
"""Probes have shown that the compensation lets in and keeps out whom it should. Told where a policy asks for it."""


class ConditionStatus(StrEnum):
    """As Kubernetes spells it."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


_STATUSES: Final = {
    ConditionStatus.TRUE: pb.PodCondition.TRUE,
    ConditionStatus.FALSE: pb.PodCondition.FALSE,
    ConditionStatus.UNKNOWN: pb.PodCondition.UNKNOWN,
}


@dataclass(frozen=True, slots=True)
class PodCondition:
    """Something a node says of one of its pods; ``reason`` is one word, ``message`` a sentence for a person."""

    type: str
    status: ConditionStatus
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """All that a node says of its own pods, by their UIDs.

    ``programmed`` are the BypassPolicies in force there, by UID, in the generation that is.
    """

    exclusions: Exclusions = field(default_factory=dict, hash=False)
    programmed: Mapping[str, int] = field(default_factory=dict, hash=False)
    conditions: Mapping[str, tuple[PodCondition, ...]] = field(default_factory=dict, hash=False)


NO_REPORT: Final = NodeReport()


def report_message(report: NodeReport) -> pb.NodeReport:
    """The whole report. What is beyond its limits is left out, or cut where it is a text for a person."""
    programmed = sorted(report.programmed.items())[:MAX_POLICIES]
    pods = sorted(report.conditions.items())[:MAX_PODS]
    return pb.NodeReport(
        groups=exclusion_groups(report.exclusions),
        programmed=[
            pb.ProgrammedPolicy(uid=uid, generation=generation)
            for uid, generation in programmed
            if 0 < len(uid) <= MAX_UID_LENGTH
        ],
        pods=[
            pb.PodReport(uid=uid, conditions=_messages(conditions))
            for uid, conditions in pods
            if conditions and 0 < len(uid) <= MAX_UID_LENGTH
        ],
    )


def report_of(message: pb.NodeReport, where: str) -> NodeReport:
    """What a report says.

    Raises:
        MessageError: too much of anything, a pod or policy told of twice, ports that are none, unsorted or overlapping.
    """
    exclusions = exclusions_of(message.groups, where)
    if len(message.programmed) > MAX_POLICIES or len(message.pods) > MAX_PODS:
        raise MessageError(f"more than {MAX_POLICIES} policies or {MAX_PODS} pods", where=where)
    programmed: dict[str, int] = {}
    for policy in message.programmed:
        _check_uid(policy.uid, programmed, where)
        programmed[policy.uid] = policy.generation
    conditions: dict[str, tuple[PodCondition, ...]] = {}
    for pod in message.pods:
        _check_uid(pod.uid, conditions, where)
        conditions[pod.uid] = _conditions(pod.conditions, f"{where}, pod {pod.uid}")
    return NodeReport(exclusions, programmed, conditions)


def _check_uid(uid: str, known: Mapping[str, object], where: str) -> None:
    if uid in known or not 0 < len(uid) <= MAX_UID_LENGTH:
        raise MessageError(f"the UID {uid[:80]!r} is empty, too long, or there twice", where=where)


def _messages(conditions: Iterable[PodCondition]) -> list[pb.PodCondition]:
    return [
        pb.PodCondition(
            type=condition.type,
            status=_STATUSES[condition.status],
            reason=condition.reason,
            message=condition.message[:MAX_MESSAGE],
        )
        for condition in list(conditions)[:MAX_CONDITIONS]
    ]


def _conditions(messages: Iterable[pb.PodCondition], where: str) -> tuple[PodCondition, ...]:
    found: dict[str, PodCondition] = {}
    for message in messages:
        words = (message.type, message.reason)
        if not all(word.isascii() and word.isalnum() and len(word) <= MAX_WORD for word in words):
            raise MessageError(f"a condition {message.type[:80]!r} for {message.reason[:80]!r}", where=where)
        if message.status not in _STATUSES.values() or len(message.message) > MAX_MESSAGE:
            raise MessageError(f"condition {message.type}: a status that is none, or an endless text", where=where)
        if message.type in found or len(found) == MAX_CONDITIONS:
            raise MessageError(f"condition {message.type} is there twice, or one too many", where=where)
        status = next(status for status, number in _STATUSES.items() if number == message.status)
        found[message.type] = PodCondition(message.type, status, message.reason, message.message)
    return tuple(found.values())
