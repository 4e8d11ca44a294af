"""An explanation as a program reads it."""

from __future__ import annotations

from typing import Any

from meshbridge.evaluation.batch import origin_record
from meshbridge.evaluation.cluster import Party
from meshbridge.evaluation.explanation import Explanation, Step
from meshbridge.evaluation.explanation_network import Near


def explanation_record(explanation: Explanation) -> dict[str, Any]:
    """All of it; ``near`` lists are nearest first."""
    own = explanation.as_itself
    return {
        "source": _party(explanation.source),
        "destination": {**_party(explanation.destination), "port": explanation.port},
        "steps": [_step(step) for step in explanation.steps],
        "verdict": explanation.verdict.name,
        "decided_by": explanation.decided_by,
        "as_itself": None if own is None else {"peer_principal": own.principal, "verdict": own.verdict.name},
        "frontend": None if explanation.frontend is None else _party(explanation.frontend),
        "backends": explanation.legs,
        "refused": [{**origin_record(refusal.origin), "text": str(refusal)} for refusal in explanation.refusals],
    }


def _party(party: Party) -> dict[str, Any]:
    workload = party.workload
    return {
        "name": party.name,
        "address": None if party.address is None else str(party.address),
        "node": party.node,
        "labels": {} if workload is None else dict(workload.labels),
        "proxy": None if workload is None else workload.proxy,
        "entities": sorted(party.entities),
        "services": [f"{service.namespace}/{service.name}" for service in party.services],
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "stage": step.stage,
        "verdict": None if step.verdict is None else step.verdict.name,
        "outcome": step.outcome,
        "text": step.text,
        "rules": [origin_record(origin) for origin in step.origins],
        "near": [_near(near) for near in step.near or ()],
        "without": None if step.without is None else step.without.name,
        "depends_on": [_near(near) for near in step.open],
    }


def _near(near: Near) -> dict[str, Any]:
    return {
        **origin_record(near.origin),
        "verdict": near.verdict.name,
        "isolates": near.isolates,
        "mismatches": [{"of": miss.of, "wants": miss.wants, "has": miss.has} for miss in near.mismatches],
        "depends": list(near.depends),
    }
