"""What a rule list does with every first packet of a flow at once: the packets are split into regions by outcome.

Traversal as the kernel does it: base chains by priority, first terminal rule decides, RETURN goes back to the caller, a
base chain's end is its policy. A nat base chain sees a packet only while no nat rule has decided it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from meshbridge.bypass.rules import Action, Hook, Rule, RuleSet
from meshbridge.bypass.sets import Box

MAX_BOXES: Final = 1024
MAX_STEPS: Final = 50_000  # of comparing a box with a rule or a box: half a second, whatever the rules are
MAX_DEPTH: Final = 16
TOO_MANY: Final = "the rules cut the packets into too many pieces"


class Outcome(StrEnum):
    """What happens to a first packet."""

    PASSED = "passed"  # to where it was addressed
    REDIRECTED = "redirected"  # to ``Region.port`` of the pod itself
    DIVERTED = "diverted"  # to another address
    DROPPED = "dropped"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Region:
    """Packets with one outcome; ``rule`` is the one that decided it, None when no rule did."""

    box: Box
    outcome: Outcome
    port: int = 0
    rule: Rule | None = None
    why: str = ""


class _TooMany(Exception):
    """The rules cut the packets into more pieces than anyone writes by intention."""


@dataclass(frozen=True, slots=True)
class _Flow:
    """Packets on their way: the box as sent, the mark they carry now, and the last rule that let them go."""

    box: Box
    rule: Rule | None = None
    mark: int = 0
    untracked: bool = False


def regions(rule_sets: Iterable[RuleSet], hook: Hook, packets: Box) -> tuple[Region, ...]:
    """Split ``packets``, which carry no mark yet, by what all backends together do with them at a hook.

    The regions are disjoint and cover ``packets``. Where two backends both decide and differ, the outcome is unknown:
    their order is not written anywhere.
    """
    combined: tuple[Region, ...] = (Region(packets, Outcome.PASSED),)
    for rule_set in rule_sets:
        combined = _combine(combined, _one_backend(rule_set, hook, packets))
    return combined


def _combine(left: Sequence[Region], right: Sequence[Region]) -> tuple[Region, ...]:
    merged: list[Region] = []
    if len(left) * len(right) > MAX_STEPS:
        return tuple(Region(region.box, Outcome.UNKNOWN, why=TOO_MANY) for region in left)
    for one in left:
        for other in right:
            box = one.box.both(other.box)
            if box is None:
                continue
            merged.append(_stronger(box, one, other))
            if len(merged) > MAX_BOXES:
                return tuple(Region(region.box, Outcome.UNKNOWN, why=TOO_MANY) for region in left)
    return tuple(merged)


def _stronger(box: Box, one: Region, other: Region) -> Region:
    if one.outcome is Outcome.PASSED or (one.outcome, one.port) == (other.outcome, other.port):
        decisive = other if one.outcome is Outcome.PASSED and (other.rule or not one.rule) else one
        return replace(decisive, box=box)
    if other.outcome is Outcome.PASSED:
        return replace(one, box=box)
    if Outcome.DROPPED in (one.outcome, other.outcome):
        return replace(one if one.outcome is Outcome.DROPPED else other, box=box)
    return Region(box, Outcome.UNKNOWN, rule=other.rule, why="two sets of rules decide differently")


def _one_backend(rule_set: RuleSet, hook: Hook, packets: Box) -> tuple[Region, ...]:
    if rule_set.problems:
        return (Region(packets, Outcome.UNKNOWN, why="; ".join(rule_set.problems)),)
    done: list[Region] = []
    flows = [_Flow(packets)]
    bases = sorted((base for base in rule_set.bases if base.hook is hook), key=lambda base: (base.priority, base.chain))
    try:
        for base in bases:
            walker = _Walker(rule_set, base.kind == "nat")
            entering = [flow for flow in flows if not (flow.untracked and base.kind == "nat")]
            around = [flow for flow in flows if flow.untracked and base.kind == "nat"]
            left = walker.chain(base.chain, entering, 0)
            if base.chain in rule_set.drops:
                done.extend(Region(flow.box, Outcome.DROPPED, rule=flow.rule, why="chain policy") for flow in left)
                left = []
            done.extend(walker.done)
            flows = [*around, *left, *walker.accepted]
            if len(flows) + len(done) > MAX_BOXES:
                raise _TooMany
    except _TooMany:
        return (Region(packets, Outcome.UNKNOWN, why=TOO_MANY),)
    return (*done, *(Region(flow.box, Outcome.PASSED, rule=flow.rule) for flow in flows))


class _Walker:
    """One pass through one base chain."""

    def __init__(self, rule_set: RuleSet, nat: bool) -> None:
        self.rule_set, self.nat = rule_set, nat
        self.done: list[Region] = []
        self.accepted: list[_Flow] = []
        self.pieces = 0
        self.steps = 0

    def chain(self, name: str, flows: list[_Flow], depth: int) -> list[_Flow]:
        """Send flows through a chain; what comes out at its end (or by RETURN) is given back."""
        if depth > MAX_DEPTH:
            raise _TooMany
        returned: list[_Flow] = []
        for rule in self.rule_set.chains.get(name, ()):
            if not flows:
                break
            passed_by: list[_Flow] = []
            self.steps += len(flows)
            if self.steps > MAX_STEPS:
                raise _TooMany
            for flow in flows:
                matched, rest = self._split(flow, rule)
                passed_by.extend(rest)
                if matched is None:
                    continue
                if rule.unknown or rule.action is Action.UNKNOWN:
                    if rule.action is Action.CONTINUE:
                        passed_by.append(matched)
                    else:
                        self._finish(
                            matched,
                            Outcome.UNKNOWN,
                            rule,
                            why=f"not understood: {' '.join(rule.unknown) or rule.target}",
                        )
                elif rule.action is Action.JUMP:
                    passed_by.extend(self.chain(rule.target, [matched], depth + 1))
                elif rule.action is Action.GOTO:
                    returned.extend(self.chain(rule.target, [matched], depth + 1))
                else:
                    self._apply(matched, rule, passed_by, returned)
            flows = passed_by
            self.pieces = max(self.pieces, len(flows) + len(returned) + len(self.done) + len(self.accepted))
            if self.pieces > MAX_BOXES:
                raise _TooMany
        return [*flows, *returned]

    def _split(self, flow: _Flow, rule: Rule) -> tuple[_Flow | None, list[_Flow]]:
        """The part a rule matches, and the rest."""
        if rule.mark is not None and not rule.mark.holds(flow.mark):
            return None, [flow]
        matched = flow.box.both(rule.match)
        if matched is None:
            return None, [flow]
        if matched is flow.box:
            return flow, []
        return replace(flow, box=matched), [replace(flow, box=box) for box in flow.box.without(rule.match)]

    def _apply(self, flow: _Flow, rule: Rule, passed_by: list[_Flow], returned: list[_Flow]) -> None:
        match rule.action:
            case Action.RETURN:
                returned.append(replace(flow, rule=rule))
            case Action.ACCEPT:
                self.accepted.append(replace(flow, rule=rule))
            case Action.DROP:
                self._finish(flow, Outcome.DROPPED, rule)
            case Action.REDIRECT | Action.TPROXY:
                port = rule.port or (flow.box.port.spans[0][0] if len(flow.box.port) == 1 else 0)
                self._finish(flow, Outcome.REDIRECTED, rule, port=port)
            case Action.DIVERT:
                self._finish(flow, Outcome.DIVERTED, rule)
            case Action.UNTRACK:
                passed_by.append(replace(flow, untracked=True, rule=rule))
            case Action.MARK:
                passed_by.append(replace(flow, mark=flow.mark & ~rule.mask ^ rule.port))
            case _:
                passed_by.append(flow)

    def _finish(self, flow: _Flow, outcome: Outcome, rule: Rule, *, port: int = 0, why: str = "") -> None:
        self.done.append(Region(flow.box, outcome, port, rule, why))
