"""Which identities and ports a rule covers, in the form the kernel probes, and what two rules both cover."""

from __future__ import annotations

from bisect import bisect_left
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


class Cut:
    """What one rule covers, to be cut with what many others do: a cut costs no more than the other and the outcome."""

    def __init__(self, covered: Coverage) -> None:
        self._parts = [(numbers, frozenset(numbers), _SpotIndex(spots)) for numbers, spots in covered]

    def both(self, other: Coverage) -> Coverage:
        """What both cover."""
        found: Coverage = []
        for numbers, members, index in self._parts:
            for others, spots in other:
                if ANYONE in members:
                    shared = others
                else:
                    shared = numbers if others == [ANYONE] else [number for number in others if number in members]
                if shared and (common := index.both(spots)):
                    found.append((shared, common))
        return found


class _SpotIndex:
    """Spots in the order of their ports. Two spots are nested or apart."""

    def __init__(self, spots: Iterable[Spot]) -> None:
        self._spots = sorted(set(spots))
        self._known = frozenset(self._spots)

    def both(self, spots: Iterable[Spot]) -> list[Spot]:
        """The narrower of each pair of nested spots."""
        if EVERY_PORT in self._known:
            return list(spots)
        found: list[Spot] = []
        for spot in spots:
            protocol, port, prefix = spot
            if spot == EVERY_PORT:
                return self._spots
            if any((protocol, masked(port, length), length) in self._known for length in range(prefix + 1)):
                found.append(spot)
                continue
            first = bisect_left(self._spots, (protocol, port, prefix))
            last = bisect_left(self._spots, (protocol, port | (0xFFFF >> prefix), PREFIX_ANY))
            found += [inside for inside in self._spots[first:last] if inside[2] > prefix]
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
