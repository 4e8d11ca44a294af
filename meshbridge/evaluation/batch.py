"""Many questions as JSON lines in, the same lines with answers out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from meshbridge.errors import MeshBridgeError
from meshbridge.evaluation.cluster import Cluster
from meshbridge.evaluation.evaluator import Answer, Evaluator, Prepared
from meshbridge.evaluation.question import QuestionError, parse_question
from meshbridge.evaluation.reasons import Reason
from meshbridge.policy.model import Origin

MAX_LINE_BYTES: Final = 1 << 20
TOGETHER: Final = 100_000
"""Questions that share one set of numbers; more are answered in turns, so that memory has a bound."""


_NO_RULE: Final = Origin("", "", "")


@dataclass(frozen=True, slots=True)
class Line:
    """The record of one line; ``answered`` is false when it holds an error in place of an answer."""

    record: dict[str, Any]
    answered: bool = True


@dataclass(frozen=True, slots=True)
class _Asked:
    record: dict[str, Any]
    prepared: Prepared | None = None


def answer_lines(cluster: Cluster, lines: Iterable[bytes]) -> Iterator[Line]:
    """One record for each line that is not blank, in order: what was asked, and the answer or why there is none."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    while some := list(islice(numbered, TOGETHER)):
        evaluator = Evaluator(cluster)
        asked = [_ask(evaluator, number, line) for number, line in some]
        for each in asked:
            if each.prepared is None:
                yield Line(each.record, answered=False)
            else:
                yield Line({**each.record, **answer_record(evaluator.answer(each.prepared))})


def answer_record(answer: Answer) -> dict[str, Any]:
    """The answer's fields as they are printed."""
    return {
        "network": answer.network.name,
        "mesh": answer.mesh.name,
        "path": {"egress": answer.egress, "ingress": answer.ingress},
        "delivery": answer.delivery.value if answer.delivery is not None else None,
        "kernel": "PASS" if answer.passes_kernel else "DROP",
        "verdict": answer.verdict.name,
        "reasons": [_reason_record(reason) for reason in answer.reasons],
    }


def _reason_record(reason: Reason) -> dict[str, Any]:
    return {**origin_record(reason.origin or _NO_RULE), "text": reason.text}


def origin_record(origin: Origin) -> dict[str, Any]:
    """A rule, by its object, and where it was written."""
    return {
        "policy": origin.policy,
        "kind": origin.kind,
        "rule": origin.rule,
        "file": origin.file,
        "line": origin.line,
    }


def _ask(evaluator: Evaluator, number: int, line: bytes) -> _Asked:
    record: dict[str, Any] = {}
    try:
        data = _json(line)
        if isinstance(data, dict):
            record = data
        return _Asked(record, evaluator.prepare(parse_question(data)))
    except MeshBridgeError as error:
        return _Asked({**record, "error": {"line": number, "text": str(error)}})


def _json(line: bytes) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise QuestionError(f"longer than {MAX_LINE_BYTES} bytes", fix="ask about one flow per line")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QuestionError(f"no JSON: {error}", fix="write one JSON object per line") from None
