"""Sets of ports, addresses, owners and interface names, and boxes of packets made of them.

A rule matches a box: one set per property of a packet. What a rule leaves over is a few boxes again, so a whole rule
list is decided for all packets at once instead of one look-up per port.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, summarize_address_range
from typing import Any, Final, NamedTuple

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


class Box(NamedTuple):
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
        return _EVERYTHING[family]

    @property
    def empty(self) -> bool:
        return not all(self)

    def both(self, other: Box) -> Box | None:
        """The packets in both; None when there are none."""
        changed = False
        axes: list[Any] = []
        ours: tuple[Any, ...] = self
        for mine, theirs in zip(ours, other, strict=True):
            kept = mine if mine is theirs else mine & theirs
            if not kept:
                return None
            if kept is not mine and kept != mine:
                changed = True
            axes.append(kept)
        return Box(*axes) if changed else self

    def without(self, other: Box) -> tuple[Box, ...]:
        """The packets of this box that are not in the other, as disjoint boxes."""
        common = self.both(other)
        if common is None:
            return (self,)
        if common is self:
            return ()
        rest: list[Box] = []
        remaining = self
        ours: tuple[Any, ...] = self
        theirs: tuple[Any, ...] = common
        for name, mine, shared in zip(AXES, ours, theirs, strict=True):
            left = mine - shared if mine is not shared else None
            if left:
                rest.append(remaining._replace(**{name: left}))
                remaining = remaining._replace(**{name: shared})
        return tuple(rest)


AXES: Final = Box._fields
_EVERYTHING: Final = {family: Box(every, every) for family, every in ADDRESSES.items()}


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
    position = AXES.index(axis)
    alike: dict[tuple[Axis, ...], Box] = {}
    for box in boxes:
        key = (*box[:position], *box[position + 1 :])
        held = alike.get(key)
        if held is not None:
            joined: Any = getattr(held, axis) | getattr(box, axis)
            box = box._replace(**{axis: joined})
        alike[key] = box
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
