"""The readiness gate of pods that wait for the proof of what stands in for Envoy on their bypassed ports.

A pod has the gate by its own specification, or by the webhook. What the gate says is changed by proofs alone: an agent
that is away, or events that were lost, neither make a pod ready nor take it out of its Services.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final

from meshbridge.bypass.bypasspolicy import BypassPolicy
from meshbridge.bypass.proof import GATE
from meshbridge.controller.picture import Picture
from meshbridge.controller.policystatus import MANAGER
from meshbridge.controller.writer import Outbox
from meshbridge.identity.model import Workload
from meshbridge.kube.api import Api, Resource
from meshbridge.policy.model import Document
from meshbridge.xds.nodereport import NO_REPORT, PROVED, ConditionStatus, PodCondition

PODS: Final = Resource("", "v1", "pods", "Pod", True)
NOT_ASKED: Final = PodCondition(
    GATE, ConditionStatus.TRUE, "NoProofAsked", "no BypassPolicy with proof: true selects the pod"
)
NOT_PROVED: Final = PodCondition(GATE, ConditionStatus.FALSE, "NotProved", "no node has proved it yet")


class PodGates:
    """Writes the condition of a gate when it says something else than the pod does.

    Cost: a look at every pod's gates, and one write for each that changes.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._written: dict[str, tuple[str, PodCondition]] = {}
        """The version we wrote to, and what it says since: until the follower has seen that."""

    def write(self, picture: Picture, out: Outbox, now: datetime) -> None:
        """Every pod that has the gate says what its node has proved."""
        asking = [policy for policy in picture.policies if policy.proof or policy.refusal is not None]
        written: dict[str, tuple[str, PodCondition]] = {}
        for pod in picture.enforced:
            documents = picture.documents.get(("", "Pod", pod.namespace, pod.name), ())
            if not documents or not pod.uid or not _has_gate(documents[0]):
                continue
            version = str(_mapping(documents[0].data, "metadata").get("resourceVersion", ""))
            known = self._written.get(pod.uid)
            observed = known[1] if known is not None and known[0] == version else _observed(documents[0])
            wanted = gate_condition(pod, asking, picture.reports.get(pod.node, NO_REPORT).conditions, observed)
            if wanted == observed:
                if known is not None and known[0] == version:
                    written[pod.uid] = known
                continue
            same = observed is not None and observed.status is wanted.status
            since = _since(documents[0]) if same else ""
            body = _body(pod, wanted, since or now.strftime("%Y-%m-%dT%H:%M:%SZ"))
            act = partial(self._api.apply, PODS, body, status=True, force=True, manager=MANAGER)
            if out.write("patch pods/status", act, f"Pod {pod.key}") is not None:
                written[pod.uid] = (version, wanted)
        self._written = written


def gate_condition(
    pod: Workload,
    asking: Iterable[BypassPolicy],
    told: Mapping[str, tuple[PodCondition, ...]],
    observed: PodCondition | None,
) -> PodCondition:
    """What the gate of a pod is to say.

    Args:
        asking: policies that ask for a proof, and those that were refused, which may.
        told: what the pod's node says of its pods.
        observed: what it says already; None: nothing.
    """
    if not any(policy.subject.matches(pod.peer()) for policy in asking):
        return NOT_ASKED
    proof = next((condition for condition in told.get(pod.uid, ()) if condition.type == PROVED), None)
    if proof is None or proof.status is ConditionStatus.UNKNOWN:
        return observed if observed is not None and observed != NOT_ASKED else NOT_PROVED
    return PodCondition(GATE, proof.status, proof.reason, proof.message)


def _has_gate(document: Document) -> bool:
    gates = _mapping(document.data, "spec").get("readinessGates")
    return isinstance(gates, list) and any(isinstance(g, Mapping) and g.get("conditionType") == GATE for g in gates)


def _record(document: Document) -> Mapping[str, Any]:
    """What the pod's status says of the gate; empty where it says nothing."""
    conditions = _mapping(document.data, "status").get("conditions")
    listed = conditions if isinstance(conditions, list) else ()
    return next((c for c in listed if isinstance(c, Mapping) and c.get("type") == GATE), {})


def _observed(document: Document) -> PodCondition | None:
    record = _record(document)
    if record.get("status") not in frozenset(ConditionStatus):
        return None
    status = ConditionStatus(record["status"])
    return PodCondition(GATE, status, str(record.get("reason", "")), str(record.get("message", "")))


def _since(document: Document) -> str:
    return str(_record(document).get("lastTransitionTime") or "")


def _body(pod: Workload, condition: PodCondition, since: str) -> dict[str, Any]:
    """With the UID: another pod of its name is told nothing of this one."""
    record = {
        "type": GATE,
        "status": condition.status.value,
        "reason": condition.reason,
        "message": condition.message,
        "lastTransitionTime": since,
    }
    metadata = {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid}
    return {"kind": "Pod", "metadata": metadata, "status": {"conditions": [record]}}


def _mapping(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = given.get(name)
    return found if isinstance(found, Mapping) else {}
