"""What the status of a BypassPolicy says: whether it is understood, in force, proved, and what is wrong with its pods.

Spec: Kubernetes API conventions, "Typical status properties".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from meshbridge.bypass.bypasspolicy import BypassPolicy, Mode
from meshbridge.identity.model import Workload
from meshbridge.xds.nodereport import CAPTURED, ENFORCED, NO_REPORT, PROVED, ConditionStatus, NodeReport, PodCondition

MAX_MESSAGE: Final = 1_024
_NAMED: Final = 3
_TRUE, _FALSE, _UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of an object, as of its ``generation``."""

    type: str
    status: ConditionStatus
    reason: str
    message: str = ""
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Selected:
    """The pods a policy selects whose traffic somebody enforces, and those among them that bypass their sidecars."""

    pods: Sequence[Workload]
    bypassing: Set[str]
    """By UID."""


def policy_conditions(
    policy: BypassPolicy,
    selected: Selected,
    reports: Mapping[str, NodeReport],
    now: datetime,
    unfixed: Iterable[str] = (),
) -> tuple[Condition, ...]:
    """Accepted, Programmed, Enforced and Degraded, of the generation that ``policy`` is.

    Args:
        reports: what nodes say of their own pods, by node.
        unfixed: why what it asks to be applied is not.
    """
    accepted = _accepted(policy, now)
    programmed = _programmed(policy, selected.pods, reports)
    told = _Told(selected, reports)
    found = (accepted, programmed, _enforced(policy, programmed, told, now), _degraded(policy, told, sorted(unfixed)))
    return tuple(replace(c, message=_cut(c.message), generation=policy.generation) for c in found)


def condition_records(
    conditions: Iterable[Condition], observed: object, now: datetime
) -> tuple[dict[str, Any], ...] | None:
    """The conditions as they are to be written; None where ``observed``, what the object says, is the same already.

    The time of a transition changes with the status alone.
    """
    before = {c.get("type"): c for c in observed if isinstance(c, Mapping)} if isinstance(observed, list) else {}
    found = []
    for condition in conditions:
        known = before.get(condition.type, {})
        since = known.get("lastTransitionTime") if known.get("status") == condition.status.value else None
        found.append(
            {
                "type": condition.type,
                "status": condition.status.value,
                **({"observedGeneration": condition.generation} if condition.generation else {}),
                "lastTransitionTime": since or now.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "reason": condition.reason,
                "message": condition.message,
            }
        )
    return None if all(before.get(record["type"]) == record for record in found) else tuple(found)


def named(names: Iterable[str]) -> str:
    """Some of the names, and how many more there are."""
    found = sorted(names)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


class _Told:
    """What nodes say of the pods that a policy selects."""

    def __init__(self, selected: Selected, reports: Mapping[str, NodeReport]) -> None:
        self._selected, self._reports = selected, reports
        self.unenforced = self._with(ENFORCED, _FALSE)
        self.waiting = self._with(ENFORCED, _UNKNOWN)
        self.ghosts = self._with(CAPTURED, _FALSE)
        self.disproved = self._with(PROVED, _FALSE)

    @property
    def bypassing(self) -> list[Workload]:
        return [pod for pod in self._selected.pods if pod.uid in self._selected.bypassing]

    @property
    def unproved(self) -> list[str]:
        """Those that bypass their sidecars without a proof of what stands in."""
        proved = self._with(PROVED, _TRUE)
        return [pod.key for pod in self.bypassing if pod.key not in proved]

    def _with(self, kind: str, status: ConditionStatus) -> dict[str, PodCondition]:
        """By the pods' names."""
        found = {}
        for pod in self._selected.pods:
            for condition in self._reports.get(pod.node, NO_REPORT).conditions.get(pod.uid, ()):
                if (condition.type, condition.status) == (kind, status):
                    found[pod.key] = condition
        return found


def _accepted(policy: BypassPolicy, now: datetime) -> Condition:
    if policy.refusal is not None:
        text = f"{policy.refusal}; until it is mended it allows nothing, accepts nothing and denies"
        return Condition("Accepted", _FALSE, "Refused", text)
    if policy.is_expired(now) and policy.accept:
        text = f"it accepted {', '.join(sorted(policy.accept))} until {policy.until:%Y-%m-%dT%H:%M:%SZ}, which is over"
        return Condition("Accepted", _TRUE, "Expired", text)
    return Condition("Accepted", _TRUE, "Understood")


def _programmed(policy: BypassPolicy, pods: Sequence[Workload], reports: Mapping[str, NodeReport]) -> Condition:
    nodes = {pod.node for pod in pods}
    if not nodes:
        return Condition("Programmed", _TRUE, "NoPods", "it selects no pod")
    waiting = [node for node in nodes if reports.get(node, NO_REPORT).programmed.get(policy.uid) != policy.generation]
    if waiting:
        text = f"{len(waiting)} of {len(nodes)} nodes do not say that they hold it as it is: {named(waiting)}"
        return Condition("Programmed", _FALSE, "Pending", text)
    return Condition("Programmed", _TRUE, "Programmed", f"{len(nodes)} nodes hold it, for {len(pods)} pods")


def _enforced(policy: BypassPolicy, programmed: Condition, told: _Told, now: datetime) -> Condition:
    if programmed.status is not _TRUE:
        return Condition("Enforced", programmed.status, programmed.reason, programmed.message)
    if told.unenforced:
        return Condition("Enforced", _FALSE, "PodsNotEnforced", _of_pods(told.unenforced))
    if told.waiting:
        return Condition("Enforced", _UNKNOWN, "PodsWaiting", _of_pods(told.waiting))
    if policy.mode_at(now) is Mode.AUDIT and policy.refusal is None:
        text = "mode audit: on the routes it allows, what the compensation would drop passes and is counted"
        return Condition("Enforced", _FALSE, "Audit", text)
    if not policy.proof:
        return Condition("Enforced", _TRUE, "Programmed", "no proof is asked for")
    if told.disproved:
        return Condition("Enforced", _FALSE, "ProofFailed", _of_pods(told.disproved))
    if unproved := told.unproved:
        text = f"{len(unproved)} of {len(told.bypassing)} bypassing pods are not proved yet: {named(unproved)}"
        return Condition("Enforced", _UNKNOWN, "ProofPending", text)
    return Condition("Enforced", _TRUE, "Proved", f"probes proved it for {len(told.bypassing)} bypassing pods")


def _degraded(policy: BypassPolicy, told: _Told, unfixed: Sequence[str]) -> Condition:
    if policy.refusal is not None:
        return Condition("Degraded", _TRUE, "Refused", "see Accepted")
    causes = [
        (reason, _of_pods(pods))
        for reason, pods in (
            ("PodsNotEnforced", told.unenforced), ("ProofFailed", told.disproved), ("GhostBypass", told.ghosts),
        )
        if pods
    ]  # fmt: skip
    causes += [("FixNotApplied", "; ".join(unfixed))] if unfixed else []
    if not causes:
        return Condition("Degraded", _FALSE, "AsExpected")
    return Condition("Degraded", _TRUE, causes[0][0], "; ".join(text for _, text in causes))


def _of_pods(told: Mapping[str, PodCondition]) -> str:
    first = told[min(told)]
    return f"{'pod' if len(told) == 1 else 'pods'} {named(told)}: {first.message or first.reason}"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 1]}…"
