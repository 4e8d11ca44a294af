"""Sets of ports, addresses, owners and interface names, and boxes of packets made of them.

A rule matches a box: one set per property of a packet. What a rule leaves over is a few boxes again, so a whole rule
list is decided for all packets at once instead of one look-up per port.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, summarize_address_range
from typing import Final

from meshbridge.identity.model import IpFamily, IpNetwork


@dataclass(frozen=True, slots=True)
class IntSet:
    """A set of whole numbers as sorted, disjoint, not adjoining spans (first, last), both inclusive."""

    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, *members: int | tuple[int, int]) -> IntSet:
        """The set of these numbers and spans, in any order and however they overlap."""
        spans = sorted(member if isinstance(member, tuple) else (member, member) for member in members)
        merged: list[tuple[int, int]] = []
        for first, last in spans:
            if last < first:
                continue
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        return cls(tuple(merged))

    def __bool__(self) -> bool:
        return bool(self.spans)

    def __contains__(self, number: int) -> bool:
        return any(first <= number <= last for first, last in self.spans)

    def __and__(self, other: IntSet) -> IntSet:
        if self.spans == other.spans:
            return self
        common: list[tuple[int, int]] = []
        left, right = 0, 0
        while left < len(self.spans) and right < len(other.spans):
            first = max(self.spans[left][0], other.spans[right][0])
            last = min(self.spans[left][1], other.spans[right][1])
            if first <= last:
                common.append((first, last))
            if self.spans[left][1] < other.spans[right][1]:
                left += 1
            else:
                right += 1
        return IntSet(tuple(common))

    def __or__(self, other: IntSet) -> IntSet:
        return IntSet.of(*self.spans, *other.spans)

    def __sub__(self, other: IntSet) -> IntSet:
        rest: list[tuple[int, int]] = []
        cuts = iter(other.spans)
        cut = next(cuts, None)
        for first, last in self.spans:
            while cut is not None and cut[1] < first:
                cut = next(cuts, None)
            while cut is not None and cut[0] <= last:
                if first < cut[0]:
                    rest.append((first, cut[0] - 1))
                first = cut[1] + 1
                if cut[1] >= last:
                    break
                cut = next(cuts, None)
            if first <= last:
                rest.append((first, last))
        return IntSet(tuple(rest))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.spans)

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self.spans)

    def __str__(self) -> str:
        return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in self.spans)


@dataclass(frozen=True, slots=True)
class NameSet:
    """A set of interface names: those listed, or with ``inverted`` all but those."""

    names: frozenset[str] = frozenset()
    inverted: bool = False

    @classmethod
    def of(cls, *names: str) -> NameSet:
        return cls(frozenset(names))

    def __bool__(self) -> bool:
        return self.inverted or bool(self.names)

    def __contains__(self, name: str) -> bool:
        return (name in self.names) != self.inverted

    def __and__(self, other: NameSet) -> NameSet:
        if self.inverted and other.inverted:
            return NameSet(self.names | other.names, inverted=True)
        if self.inverted:
            return NameSet(other.names - self.names)
        return NameSet(self.names - other.names if other.inverted else self.names & other.names)

    def __or__(self, other: NameSet) -> NameSet:
        return ~(~self & ~other)

    def __sub__(self, other: NameSet) -> NameSet:
        return self & ~other

    def __invert__(self) -> NameSet:
        return NameSet(self.names, not self.inverted)

    def __str__(self) -> str:
        listed = ",".join(sorted(self.names))
        if not self.inverted:
            return listed
        return f"all but {listed}" if listed else "any"


Axis = IntSet | NameSet

PROTOCOLS: Final = IntSet(((0, 255),))
PORTS: Final = IntSet(((0, 65535),))
OWNERS: Final = IntSet(((0, 2**32 - 1),))
INTERFACES: Final = NameSet(inverted=True)
ADDRESSES: Final = {IpFamily.IPV4: IntSet(((0, 2**32 - 1),)), IpFamily.IPV6: IntSet(((0, 2**128 - 1),))}
LOOPBACK: Final = {IpFamily.IPV4: IntSet(((0x7F000000, 0x7FFFFFFF),)), IpFamily.IPV6: IntSet(((1, 1),))}
TCP: Final = IntSet(((6, 6),))
UDP: Final = IntSet(((17, 17),))


@dataclass(frozen=True, slots=True)
class Box:
    """First packets of flows, as one set per property; ``port`` is the destination port, where there is one."""

    source: IntSet
    destination: IntSet
    protocol: IntSet = PROTOCOLS
    port: IntSet = PORTS
    input: NameSet = INTERFACES
    output: NameSet = INTERFACES
    uid: IntSet = OWNERS
    gid: IntSet = OWNERS

    @classmethod
    def everything(cls, family: IpFamily) -> Box:
        return _everything(family)

    def __bool__(self) -> bool:
        return all(getattr(self, axis) for axis in AXES)

    def __and__(self, other: Box) -> Box | None:
        """The packets in both; None when there are none."""
        changed: dict[str, Axis] = {}
        for axis in AXES:
            mine, theirs = getattr(self, axis), getattr(other, axis)
            if mine is theirs:
                continue
            both = mine & theirs
            if not both:
                return None
            if both != mine:
                changed[axis] = both
        return replace(self, **changed) if changed else self  # type: ignore[arg-type]

    def __sub__(self, other: Box) -> tuple[Box, ...]:
        """The packets of this box that are not in the other, as disjoint boxes."""
        common = self & other
        if common is None:
            return (self,)
        rest: list[Box] = []
        remaining = self
        for axis in AXES:
            mine, shared = getattr(remaining, axis), getattr(common, axis)
            left = mine - shared
            if left:
                rest.append(replace(remaining, **{axis: left}))
                remaining = replace(remaining, **{axis: shared})
        return tuple(rest)


AXES: Final = tuple(entry.name for entry in fields(Box))


@lru_cache
def _everything(family: IpFamily) -> Box:
    return Box(ADDRESSES[family], ADDRESSES[family])


def coalesced(boxes: Iterable[Box]) -> tuple[Box, ...]:
    """The same packets in fewer boxes."""
    kept = list(boxes)
    before = len(kept) + 1
    while len(kept) < before:
        before = len(kept)
        for axis in AXES:
            kept = _joined_along(axis, kept)
    return tuple(kept)


def _joined_along(axis: str, boxes: Iterable[Box]) -> list[Box]:
    alike: dict[tuple[Axis, ...], Box] = {}
    for box in boxes:
        key = tuple(getattr(box, other) for other in AXES if other != axis)
        held = alike.get(key)
        alike[key] = box if held is None else replace(box, **{axis: getattr(held, axis) | getattr(box, axis)})
    return list(alike.values())


def addresses(*networks: IpNetwork) -> IntSet:
    """The addresses of these networks (of one family), as numbers."""
    return IntSet.of(*((int(network.network_address), int(network.broadcast_address)) for network in networks))


def networks(members: IntSet, family: IpFamily) -> tuple[IpNetwork, ...]:
    """The fewest prefixes that cover exactly these addresses."""
    kind = IPv4Address if family is IpFamily.IPV4 else IPv6Address
    return tuple(prefix for first, last in members for prefix in summarize_address_range(kind(first), kind(last)))


def union(sets: Iterable[IntSet]) -> IntSet:
    return IntSet.of(*(span for members in sets for span in members))
