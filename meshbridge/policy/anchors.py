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
    """Items in the order in which they were given, to be found by where they are anchored."""

    __slots__ = ("_at", "_items")

    def __init__(self, items: Iterable[_Item], anchors: Callable[[_Item], Iterable[Anchor]]) -> None:
        self._items = tuple(items)
        self._at: dict[Anchor, list[int]] = {}
        for position, item in enumerate(self._items):
            for anchor in anchors(item):
                self._at.setdefault(anchor, []).append(position)

    def at(self, anchors: Iterable[Anchor]) -> list[_Item]:
        """Those anchored at any of ``anchors``, each once."""
        if not self._at:
            return []
        found = {position for anchor in anchors for position in self._at.get(anchor, ())}
        return [self._items[position] for position in sorted(found)]

    def anchors(self) -> frozenset[Anchor]:
        """Every anchor of any item."""
        return frozenset(self._at)
