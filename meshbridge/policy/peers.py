"""Which identities a selector picks, as bit masks, so that a thousand selectors cost set algebra and no loops."""

from __future__ import annotations

from collections.abc import Mapping

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


class PeerIndex:
    """The peers of a node by what selectors ask; bit n of a mask is the n-th smallest identity number."""

    def __init__(self, identities: Mapping[int, Peer]) -> None:
        self.identities = {number: identities[number] for number in sorted(identities)}
        self._numbers = tuple(self.identities)
        self._all = (1 << len(self._numbers)) - 1
        self._labels: dict[tuple[LabelSource, str], dict[str, int]] = {}
        self._networks: dict[IpNetwork, int] = {}
        self._entities: dict[Entity, int] = {}
        self._clusters: dict[str, int] = {}
        self._masks: dict[PeerSelector, int] = {}
        for position, peer in enumerate(self.identities.values()):
            bit = 1 << position
            for network in peer.networks:
                self._networks[network] = self._networks.get(network, 0) | bit
            for entity in peer.entities:
                self._entities[entity] = self._entities.get(entity, 0) | bit
            if peer.is_pod:
                self._clusters[peer.cluster] = self._clusters.get(peer.cluster, 0) | bit

    def matching(self, selector: PeerSelector) -> int:
        """The mask of the identities ``selector`` picks."""
        mask = self._masks.get(selector)
        if mask is None:
            mask = self._masks[selector] = self._compute(selector)
        return mask

    def numbers(self, mask: int) -> list[int]:
        """The identity numbers of a mask, ascending."""
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
        column = self._labels.get((source, key))
        if column is None:
            column = self._labels[source, key] = {}
            for position, peer in enumerate(self.identities.values()):
                value = label_of(peer, source, key)
                if value is not None:
                    column[value] = column.get(value, 0) | 1 << position
        return column
