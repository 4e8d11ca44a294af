"""Which identities a selector picks, as bit masks, so that a thousand selectors cost set algebra and no loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import compress
from typing import Any, Final, TypeVar

from meshbridge.identity.model import Entity, IpNetwork, Peer
from meshbridge.policy.selectors import (
    CLUSTER_ENTITIES,
    NODE_ENTITIES,
    CidrPeers,
    ClusterPeers,
    EntityPeers,
    LabelSource,
    Operator,
    PeerSelector,
    Requirement,
    Selector,
    label_of,
)

_Said = TypeVar("_Said")

_MAX_SELECTORS: Final = 4096
"""Whose masks are remembered: policies come and go while identities stay."""
_ONE_BY_ONE: Final = 64
_BITS: Final = bytes.maketrans(b"01", b"\0\1")


class PeerIndex:
    """The peers of a node by what selectors ask; bit n of a mask is the n-th smallest identity number."""

    def __init__(self, identities: Mapping[int, Peer]) -> None:
        self.identities: dict[int, Peer] = {}
        self._numbers: list[int] = []
        self._all = 0
        self._columns: dict[tuple[LabelSource, str], dict[str, int]] = {}
        self._groups: dict[Callable[[Peer], Any], dict[Any, int]] = {}
        self._networks: dict[IpNetwork, int] = {}
        self._entities: dict[Entity, int] = {}
        self._clusters: dict[str, int] = {}
        self._masks: dict[PeerSelector, int] = {}
        self.extend(identities)

    def extend(self, added: Mapping[int, Peer]) -> bool:
        """``added`` are among the peers as well; False, and nothing has changed: a number is not above all others."""
        if not added:
            return True
        if self._numbers and min(added) <= self._numbers[-1]:
            return False
        first = len(self._numbers)
        ordered = {number: added[number] for number in sorted(added)}
        self.identities |= ordered
        self._numbers += ordered
        self._all = (1 << len(self._numbers)) - 1
        self._masks.clear()
        for position, peer in enumerate(ordered.values(), first):
            bit = 1 << position
            for network in peer.networks:
                self._networks[network] = self._networks.get(network, 0) | bit
            for entity in peer.entities:
                self._entities[entity] = self._entities.get(entity, 0) | bit
            if peer.is_pod:
                self._clusters[peer.cluster] = self._clusters.get(peer.cluster, 0) | bit
            for (source, key), column in self._columns.items():
                _enter(column, label_of(peer, source, key), bit)
            for group, groups in self._groups.items():
                groups[group(peer)] = groups.get(group(peer), 0) | bit
        return True

    def grouped(self, group: Callable[[Peer], _Said]) -> Mapping[_Said, int]:
        """The masks of the peers that are alike in what ``group``, a function that stays, says of them."""
        found = self._groups.get(group)
        if found is None:
            found = self._groups[group] = {}
            for position, peer in enumerate(self.identities.values()):
                said = group(peer)
                found[said] = found.get(said, 0) | 1 << position
        return found

    def inside(self, network: IpNetwork) -> int:
        """The mask of the peers whose addresses are inside of a CIDR that policies name."""
        return self._networks.get(network, 0)

    def matching(self, selector: PeerSelector) -> int:
        """The mask of the identities ``selector`` picks."""
        mask = self._masks.get(selector)
        if mask is None:
            if len(self._masks) >= _MAX_SELECTORS:
                self._masks.clear()
            mask = self._masks[selector] = self._compute(selector)
        return mask

    def numbers(self, mask: int) -> list[int]:
        """The identity numbers of a mask, ascending."""
        if mask.bit_count() > _ONE_BY_ONE:
            return list(compress(self._numbers, f"{mask:b}"[::-1].encode().translate(_BITS)))
        found = []
        while mask:
            lowest = mask & -mask
            found.append(self._numbers[lowest.bit_length() - 1])
            mask ^= lowest
        return found

    def _compute(self, selector: PeerSelector) -> int:
        match selector:
            case Selector():
                mask = self._all
                for requirement in selector.requirements:
                    mask &= self._requirement(requirement)
                return mask
            case EntityPeers():
                return self._any_entity(selector.entities)
            case ClusterPeers():
                pods = self._clusters.get(selector.cluster, 0) if selector.cluster else self._any_pod()
                return pods | self._any_entity(CLUSTER_ENTITIES)
            case CidrPeers():
                mask = self._networks.get(selector.cidr, 0)
                for network in selector.excepts:
                    mask &= ~self._networks.get(network, 0)
                if selector.in_cluster:
                    return mask
                reached = self._entities.get(Entity.WORLD, 0)
                if selector.pods:
                    reached |= self._any_pod()
                if selector.nodes:
                    reached |= self._any_entity(NODE_ENTITIES)
                return mask & reached

    def _any_pod(self) -> int:
        mask = 0
        for of_cluster in self._clusters.values():
            mask |= of_cluster
        return mask

    def _any_entity(self, entities: frozenset[Entity]) -> int:
        mask = 0
        for entity in entities:
            mask |= self._entities.get(entity, 0)
        return mask

    def _requirement(self, requirement: Requirement) -> int:
        column = self._column(requirement.source, requirement.key)
        if requirement.operator in (Operator.EXISTS, Operator.DOES_NOT_EXIST):
            values: tuple[str, ...] = tuple(column)
        else:
            values = requirement.values
        mask = 0
        for value in values:
            mask |= column.get(value, 0)
        if requirement.operator in (Operator.NOT_IN, Operator.DOES_NOT_EXIST):
            return self._all & ~mask
        return mask

    def _column(self, source: LabelSource, key: str) -> dict[str, int]:
        column = self._columns.get((source, key))
        if column is None:
            column = self._columns[source, key] = {}
            for position, peer in enumerate(self.identities.values()):
                _enter(column, label_of(peer, source, key), 1 << position)
        return column


def _enter(column: dict[str, int], value: str | None, bit: int) -> None:
    if value is not None:
        column[value] = column.get(value, 0) | bit
