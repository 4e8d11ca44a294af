"""Where selectors and peers meet: an index by namespace and pod label, so that a search costs what can match.

Whoever a selector picks stands at one of the selector's anchors. The reverse does not hold: what is found at a peer's
anchors has still to be matched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from meshbridge.identity.model import Peer
from meshbridge.policy.selectors import LabelSource, Operator, Selector

Anchor = tuple[str | None, tuple[str, str] | None]
"""A namespace, None for any, and one pod label, None for any."""

_Item = TypeVar("_Item")


def anchors_of(selector: Selector, namespaces: Iterable[str] | None) -> list[Anchor]:
    """Where to look for those whom ``selector`` picks, in the given namespaces; None: in those it names itself."""
    if namespaces is None:
        namespaces = selector.namespaces
    labels: Iterable[tuple[str, str] | None] = (None,)
    for requirement in selector.requirements:
        if requirement.source is LabelSource.POD and requirement.operator is Operator.IN:
            labels = [(requirement.key, value) for value in requirement.values]
            break
    return [(namespace, label) for namespace in (namespaces if namespaces is not None else (None,)) for label in labels]


def anchors_at(peer: Peer) -> list[Anchor]:
    """Every anchor at which ``peer`` stands."""
    if not peer.is_pod:
        return [(None, None)]
    labels: tuple[tuple[str, str] | None, ...] = (None, *peer.labels.items())
    return [(namespace, label) for namespace in (None, peer.namespace) for label in labels]


class Anchored(Generic[_Item]):
    """Items to be found by where they are anchored. It never changes: ``replaced`` makes another one."""

    __slots__ = ("_anchors", "_at", "_next")

    def __init__(self, items: Iterable[_Item], anchors: Callable[[_Item], Iterable[Anchor]]) -> None:
        self._anchors = anchors
        self._at: dict[Anchor, list[tuple[int, _Item]]] = {}
        self._next = 0
        for self._next, item in enumerate(items, 1):
            for anchor in anchors(item):
                self._at.setdefault(anchor, []).append((self._next, item))

    def replaced(self, removed: Iterable[_Item], added: Iterable[_Item]) -> Anchored[_Item]:
        """Without ``removed``, which are among the items, and with ``added`` after them; costs a copy of one table."""
        found = Anchored[_Item]((), self._anchors)
        found._at, found._next = dict(self._at), self._next
        for item in removed:
            for anchor in self._anchors(item):
                left = found._at.pop(anchor)
                place = next(place for place, (_, held) in enumerate(left) if held == item)
                if len(left) > 1:
                    found._at[anchor] = left[:place] + left[place + 1 :]
        for found._next, item in enumerate(added, self._next + 1):
            for anchor in self._anchors(item):
                found._at[anchor] = [*found._at.get(anchor, ()), (found._next, item)]
        return found

    def at(self, anchors: Iterable[Anchor]) -> list[_Item]:
        """Those anchored at any of ``anchors``, each once, in the order in which they came."""
        if not self._at:
            return []
        found = dict(numbered for anchor in anchors for numbered in self._at.get(anchor, ()))
        return [found[number] for number in sorted(found)]

    def anchors(self) -> frozenset[Anchor]:
        """Every anchor of any item."""
        return frozenset(self._at)
