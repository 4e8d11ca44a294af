"""Objects of which only their owner could say which comes first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from meshbridge.policy.model import Direction, Notice, Tier
from meshbridge.policy.parse import Parsed


def equal_priorities(parsed: Iterable[Parsed]) -> list[Notice]:
    """A notice for every object that shares tier, priority and direction with another one.

    The API leaves open which of the two decides on a flow that both match; ``policy.tiers`` goes by name.
    """
    ranked: dict[tuple[Tier, int, Direction], dict[str, Parsed]] = defaultdict(dict)
    for each in parsed:
        for rule in () if each.refusals else each.network:
            if rule.tier is not Tier.NORMAL:
                ranked[rule.tier, rule.priority, rule.direction][f"{each.document.kind} {each.document.name}"] = each
    others: dict[str, set[str]] = defaultdict(set)
    documents = {}
    for holders in ranked.values():
        for name, each in holders.items() if len(holders) > 1 else ():
            others[name] |= holders.keys() - {name}
            documents[name] = each.document
    return [
        Notice(
            documents[name],
            f"has the tier and priority of {', '.join(sorted(names))}: where both match, the first by name decides "
            "here, and any elsewhere; give each its own",
            "spec.priority",
            code="MB0508",
        )
        for name, names in others.items()
    ]
