"""Which identities and ports a rule covers, in the form the kernel probes, and what two rules both cover."""

from __future__ import annotations

from collections.abc import Iterable

from meshbridge.identity.model import ContainerPort, Entity
from meshbridge.policy.model import Anything, Direction, NetworkRule, PortMatch, Verdict
from meshbridge.policy.parse.ports import PROTOCOLS
from meshbridge.policy.peers import PeerIndex
from meshbridge.policy.ports import PREFIX_ANY, PREFIX_PORT, masked, range_prefixes
from meshbridge.policy.precedence import ANYONE
from meshbridge.policy.selectors import EntityPeers, Selector

Spot = tuple[int, int, int]
"""protocol, port, prefix, as in a PolicyKey."""

Coverage = list[tuple[list[int], list[Spot]]]
"""Identity numbers, each with every one of the spots beside it; ``[ANYONE]`` is whoever it is."""

EVERY_PORT: Spot = (0, 0, PREFIX_ANY)

UNKNOWN_LABELS = EntityPeers(frozenset({Entity.UNMANAGED}))


def coverage(rule: NetworkRule, index: PeerIndex, ports: tuple[ContainerPort, ...], direction: Direction) -> Coverage:
    """What ``rule`` covers at an endpoint with these container ports."""
    if isinstance(rule.peers, Anything):
        numbers, everybody = [ANYONE], True
    else:
        mask = 0
        for selector in rule.peers:
            mask |= index.matching(selector)
        if denies_by_labels(rule):
            mask |= index.matching(UNKNOWN_LABELS)
        numbers, everybody = index.numbers(mask), False
    if not numbers:
        return []
    if isinstance(rule.ports, Anything):
        return [(numbers, [EVERY_PORT])]
    numbered = [match for match in rule.ports if not match.name]
    names = [match for match in rule.ports if match.name]
    found = [(numbers, _numbered_spots(numbered))] if numbered else []
    if names and direction is Direction.INGRESS:
        found.append((numbers, _named_spots(names, ports)))
    elif names:
        for number, peer in index.identities.items() if everybody else ((n, index.identities[n]) for n in numbers):
            if spots := _named_spots(names, peer.ports):
                found.append(([number], spots))
    return found


def both(one: Coverage, other: Coverage) -> Coverage:
    """What both cover."""
    found: Coverage = []
    for numbers, spots in one:
        for others, other_spots in other:
            shared = _common(numbers, others)
            if shared and (common := [s for a in spots for b in other_spots if (s := _narrower(a, b)) is not None]):
                found.append((shared, common))
    return found


def denies_by_labels(rule: NetworkRule) -> bool:
    """Whether a rule denies peers by what their labels are, or hands them to policies that may.

    Whoever's labels nobody knows may be one of them. So an address that two pods claim, or a pod that cannot be read,
    gets past no deny.
    """
    return (
        (rule.verdict is Verdict.DENY or rule.passes)
        and not isinstance(rule.peers, Anything)
        and any(isinstance(selector, Selector) for selector in rule.peers)
    )


def _common(one: list[int], other: list[int]) -> list[int]:
    if one == [ANYONE]:
        return other
    return one if other == [ANYONE] else sorted(set(one).intersection(other))


def _narrower(one: Spot, other: Spot) -> Spot | None:
    """Of two spots, which are nested or apart, the one inside."""
    wide, narrow = sorted((one, other), key=lambda spot: (spot[2] != PREFIX_ANY, spot[2]))
    if wide[2] == PREFIX_ANY:
        return narrow
    inside = wide[0] == narrow[0] and masked(narrow[1], wide[2]) == wide[1]
    return narrow if inside else None


def _numbered_spots(matches: Iterable[PortMatch]) -> list[Spot]:
    return [
        (match.protocol, port, prefix) for match in matches for port, prefix in range_prefixes(match.first, match.last)
    ]


def _named_spots(names: Iterable[PortMatch], ports: Iterable[ContainerPort]) -> list[Spot]:
    """A name stands for the container ports of that name and protocol; without any it matches nothing."""
    return [
        (name.protocol, port.port, PREFIX_PORT)
        for name in names
        for port in ports
        if port.name == name.name and PROTOCOLS.get(port.protocol) == name.protocol
    ]
