"""Bad objects: one file each, the sentence a person reads, and what holds instead. Nothing is ever loosened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshbridge.kube.objects import read_objects
from meshbridge.policy.model import ANY, Direction, NetworkRule, Refusal, Tier, Verdict
from meshbridge.policy.parse import Parsed, parse
from meshbridge.policy.selectors import Selector

GOLDEN = Path(__file__).parents[2] / "golden" / "policy"
CASES = sorted(GOLDEN.glob("*.yaml"))


def requirement_words(selector: Selector) -> str:
    words = [f"{r.source}:{r.key} {r.operator} {','.join(r.values)}".strip() for r in selector.requirements]
    return " and ".join(words) or "everything in reach of its namespace"


def rule_words(rule: NetworkRule) -> str:
    assert rule.ports is ANY
    if rule.verdict is Verdict.DENY:
        assert rule.peers is ANY
        assert rule.default_deny is (rule.tier is Tier.NORMAL)
        return "everybody is denied" + ("" if rule.default_deny else f" before all of {rule.tier.name}")
    assert rule.default_deny
    assert rule.peers == ()
    return "isolated"


def outcome(parsed: Parsed) -> str:
    """What the golden file shows: the sentence, then what holds for whom."""
    lines = [str(refusal) for refusal in parsed.refusals]
    for rule in parsed.network:
        lines.append(f"  {rule.direction.name} {rule_words(rule)}: {requirement_words(rule.subject)}")
    for refusal in parsed.refusals:
        if refusal.layer.name == "MESH":
            lines += [f"  NEEDS_L7: {requirement_words(selector)}" for selector in refusal.selectors]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_a_bad_object_is_refused_with_place_reason_and_fix(path: Path) -> None:
    content = read_objects(path.read_bytes(), path.name)
    (document,) = content.documents
    parsed = parse(document)
    (refusal,) = parsed.refusals
    assert isinstance(refusal, Refusal)
    assert refusal.fix, "it does not say how to mend it"
    assert not parsed.authorization
    assert not parsed.peer_authentication
    assert not parsed.request_authentication
    assert not parsed.objects
    expected = path.with_suffix(".txt")
    if os.environ.get("UPDATE_GOLDEN"):
        expected.write_text(outcome(parsed))
    assert outcome(parsed) == expected.read_text()


def test_there_are_cases_of_every_kind() -> None:
    assert {path.stem.partition("-")[0] for path in CASES} == {"cnp", "ccnp", "np", "anp", "ap", "pa", "ra", "pod"}


def test_no_refused_network_object_leaves_its_pods_open() -> None:
    for path in CASES:
        if path.stem.partition("-")[0] not in ("cnp", "np"):
            continue
        (document,) = read_objects(path.read_bytes(), path.name).documents
        directions = {rule.direction for rule in parse(document).network}
        named = {d for d in Direction if d.name.lower() in path.read_text()}
        assert named <= directions, path.name
