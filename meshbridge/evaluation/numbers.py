"""Identity numbers for the parties of flows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from meshbridge.evaluation.cluster import Cluster, Party
from meshbridge.identity.model import Entity, IpFamily, IpNetwork, Peer, Workload
from meshbridge.identity.networks import NetworkIndex
from meshbridge.identity.numbering import FIRST_LOCAL, RESERVED, class_of


class Numbers:
    """Identity numbers for all who take part, given as they turn up."""

    def __init__(self, cluster: Cluster, networks: Iterable[IpNetwork]) -> None:
        self.peers: dict[int, Peer] = dict(RESERVED)
        self._numbers = {class_of(peer): number for number, peer in RESERVED.items()}
        self._index = NetworkIndex(networks)
        self._cluster = cluster
        self._labels = cluster.policies.referenced_labels()
        self._port_names = cluster.policies.referenced_port_names()
        self._mesh = cluster.policies.mesh
        self._known: dict[tuple[object, ...], int] = {}
        self._kept: list[Workload] = []

    def of(self, party: Party, seen_from: str, family: IpFamily) -> int:
        """The number of a party in the eyes of the node ``seen_from``."""
        own_node = bool(party.node) and party.node == seen_from
        key = (id(party.workload) if party.workload else party.entities, party.address, own_node, family, party.name
               if party.services else "")  # fmt: skip
        number = self._known.get(key)
        if number is None:
            if party.workload is not None:
                self._kept.append(party.workload)  # so that its id stays its own
            number = self._known[key] = self._number(self._peer(party, own_node, family))
        return number

    def _peer(self, party: Party, own_node: bool, family: IpFamily) -> Peer:
        address, workload = party.address, party.endpoint
        networks = self._index.containing(address) if address is not None else frozenset[IpNetwork]()
        if workload is not None:
            peer = workload.peer(networks, self._mesh.cluster)
            return replace(
                peer,
                labels=self._labels.trim(peer.labels),
                namespace_labels=self._labels.trim_namespace(peer.namespace_labels),
                trust_domain=self._mesh.trust_domain,
                ports=frozenset(port for port in workload.ports if port.name in self._port_names),
            )
        entities, labels = party.entities, dict[str, str]()
        if party.workload is not None or Entity.REMOTE_NODE in entities:
            entities = frozenset({Entity.HOST if own_node else Entity.REMOTE_NODE})
            labels = self._labels.trim_node(self._cluster.node_labels(party.node))
        elif address is None and entities & {Entity.WORLD}:
            of_family = Entity.WORLD_IPV4 if family is IpFamily.IPV4 else Entity.WORLD_IPV6
            entities |= {of_family}
            networks = frozenset(n for n in self._index.networks if n.prefixlen == 0 and IpFamily.of(n) is family)
        if address in self._cluster.api_servers:
            entities |= {Entity.KUBE_APISERVER}
        service = ", ".join(f"{s.namespace}/{s.name}" for s in party.services)
        return Peer(labels=labels, entities=entities, networks=networks, service=service)

    def _number(self, peer: Peer) -> int:
        key = class_of(peer)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = FIRST_LOCAL + len(self.peers)
            self.peers[number] = peer
        return number
