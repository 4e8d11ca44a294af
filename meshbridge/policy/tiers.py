"""The order in which network rules decide: the Admin tier, NetworkPolicies and Cilium's kinds, the Baseline tier.

Spec: CILIUM.md §c, "Order".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meshbridge.policy.model import REFUSED, NetworkRule, Origin, Tier, Verdict


@dataclass(frozen=True, slots=True)
class Tiers:
    """The rules of one endpoint and direction, as far as they can decide anything.

    ``admin`` is in order and ends with a rule that decides. ``normal`` are the rules of NetworkPolicies and of Cilium's
    kinds, in any order; ``isolating`` those that turn on the default deny. Without any, ``baseline`` decides what is
    still open, in order; with one it is empty, but for its denials where only refused objects isolate.
    """

    admin: tuple[NetworkRule, ...]
    normal: tuple[NetworkRule, ...]
    baseline: tuple[NetworkRule, ...]
    isolating: tuple[Origin, ...]

    @classmethod
    def of(cls, rules: Iterable[NetworkRule]) -> Tiers:
        by_tier: dict[Tier, list[NetworkRule]] = {tier: [] for tier in Tier}
        isolating: set[Origin] = set()
        for rule in rules:
            by_tier[rule.tier].append(rule)
            if rule.default_deny:
                isolating.add(rule.origin)
        admin = sorted(by_tier[Tier.ADMIN], key=_place)
        while admin and admin[-1].passes:
            admin.pop()
        baseline = sorted(by_tier[Tier.BASELINE], key=_place)
        if isolating:
            # A refused object isolates in place of what it says; what Baseline denies the own node stays denied.
            by_refusal = all(origin.rule == REFUSED for origin in isolating)
            baseline = [rule for rule in baseline if by_refusal and rule.verdict is Verdict.DENY and not rule.passes]
        return cls(tuple(admin), tuple(by_tier[Tier.NORMAL]), tuple(baseline), tuple(sorted(isolating)))

    @property
    def rules(self) -> tuple[NetworkRule, ...]:
        return self.admin + self.normal + self.baseline


def deciding(covering: Iterable[NetworkRule], *, isolated: bool) -> tuple[NetworkRule, ...]:
    """Of the rules that cover a flow, those whose verdict it gets; of none, what holds where nothing is said.

    Args:
        isolated: some rule isolates the endpoint, whether or not it covers the flow.
    """
    tiers = Tiers.of(covering)
    if tiers.admin and not tiers.admin[0].passes:
        return tiers.admin[:1]
    if tiers.normal:
        denying = tuple(rule for rule in tiers.normal if rule.verdict is Verdict.DENY)
        return denying or tiers.normal
    return () if isolated else tiers.baseline[:1]


def _place(rule: NetworkRule) -> tuple[int, str, str, int]:
    """Where a rule stands in its tier. The owners leave the order of equal priorities open; here it is by name."""
    return (rule.priority, rule.origin.name, rule.origin.kind, rule.order)
