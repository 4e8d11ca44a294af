"""The policies of a cluster, or of one endpoint, as one value; its order never matters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from meshbridge.identity.model import IpNetwork, Peer, Workload
from meshbridge.policy.anchors import Anchor, Anchored, anchors_at, anchors_of
from meshbridge.policy.cilium import DEFAULT_SETTINGS, CiliumSettings, enforced
from meshbridge.policy.mesh import (
    DEFAULT_MESH,
    GATEWAY_LABEL,
    Attribute,
    AuthorizationPolicy,
    MeshSettings,
    PeerAuthentication,
    RequestAuthentication,
    network_of,
    selects,
)
from meshbridge.policy.model import Anything, Direction, Document, Layer, NetworkRule, Notice, Refusal
from meshbridge.policy.parse import Parsed, parse
from meshbridge.policy.priorities import equal_priorities
from meshbridge.policy.references import Resolver
from meshbridge.policy.selectors import (
    EVERYBODY,
    CidrPeers,
    LabelKeys,
    LabelSource,
    Operator,
    PeerSelector,
    Requirement,
    Selector,
    label_keys,
)

_GATEWAYS = Selector.of([Requirement(LabelSource.POD, GATEWAY_LABEL, Operator.EXISTS)])

_Policy = TypeVar("_Policy", AuthorizationPolicy, PeerAuthentication, RequestAuthentication)


@dataclass(frozen=True, slots=True)
class _Index:
    """The policies of a set by whom they may concern."""

    network: Anchored[NetworkRule]
    authorization: Anchored[AuthorizationPolicy]
    peer_authentication: Anchored[PeerAuthentication]
    request_authentication: Anchored[RequestAuthentication]
    refusals: Anchored[Refusal]


def _ordered(policies: Iterable[_Policy]) -> tuple[_Policy, ...]:
    return tuple(sorted(policies, key=lambda policy: policy.origin))


@dataclass(frozen=True)
class PolicySet:
    """Rules of the network family, policies of the mesh, and what was refused, each in a canonical order.

    ``refusals`` of network objects are already in ``network`` as isolating rules; those of mesh objects make what they
    may select NEEDS_L7.
    """

    network: tuple[NetworkRule, ...] = ()
    authorization: tuple[AuthorizationPolicy, ...] = ()
    peer_authentication: tuple[PeerAuthentication, ...] = ()
    request_authentication: tuple[RequestAuthentication, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notices: tuple[Notice, ...] = ()
    mesh: MeshSettings = DEFAULT_MESH
    cilium: CiliumSettings = DEFAULT_SETTINGS

    @classmethod
    def of(cls, documents: Iterable[Document], mesh: MeshSettings = DEFAULT_MESH) -> PolicySet:
        """Parse ``documents`` and put them together; kinds that are no policies are passed over."""
        return cls.of_parsed((parse(document) for document in documents), mesh)

    @classmethod
    def of_parsed(cls, parsed: Iterable[Parsed], mesh: MeshSettings = DEFAULT_MESH) -> PolicySet:
        """Put together what was parsed before, so that a caller may keep what did not change."""
        every = list(parsed)
        settings = next((p.cilium for p in every if p.cilium is not None), DEFAULT_SETTINGS)
        resolver = Resolver.of((found for p in every for found in p.objects), settings)
        rules = (resolver.rule(rule) for p in every for rule in p.network)
        return cls(
            network=tuple(sorted(rules, key=lambda r: (r.origin, r.direction, repr(r.ports)))),
            authorization=_ordered(a for p in every for a in p.authorization),
            peer_authentication=_ordered(a for p in every for a in p.peer_authentication),
            request_authentication=_ordered(a for p in every for a in p.request_authentication),
            refusals=tuple(sorted((r for p in every for r in p.refusals), key=str)),
            notices=tuple(sorted((*(n for p in every for n in p.notices), *equal_priorities(every)), key=str)),
            mesh=mesh,
            cilium=settings,
        )

    def selecting(self, workload: Workload | Peer) -> PolicySet:
        """Those policies that concern one endpoint. Host-network pods are not selectable: none do."""
        if isinstance(workload, Workload) and workload.host_network:
            return PolicySet(mesh=self.mesh)
        peer = workload.peer() if isinstance(workload, Workload) else workload
        index, anchors = self._index, anchors_at(peer)
        return PolicySet(
            network=self.network_rules(peer),
            authorization=_ordered(p for p in index.authorization.at(anchors) if selects(p, peer, self.mesh)),
            peer_authentication=_ordered(index.peer_authentication.at(anchors)),
            request_authentication=_ordered(
                p for p in index.request_authentication.at(anchors) if selects(p, peer, self.mesh)
            ),
            refusals=tuple(refusal for refusal in index.refusals.at(anchors) if self._may_select(refusal, peer)),
            mesh=self.mesh,
            cilium=self.cilium,
        )

    def network_rules(self, peer: Peer) -> tuple[NetworkRule, ...]:
        """The rules of the network family in force at the pod ``peer``, in canonical order."""
        selecting = (rule for rule in self._index.network.at(anchors_at(peer)) if rule.subject.matches(peer))
        return enforced(selecting, self.cilium)

    def anchors(self) -> frozenset[Anchor]:
        """Where everybody stands whom any of these policies may concern."""
        index = self._index
        parts = (index.network, index.authorization, index.peer_authentication, index.request_authentication)
        return frozenset().union(index.refusals.anchors(), *(part.anchors() for part in parts))

    @cached_property
    def _index(self) -> _Index:
        def of_mesh(policy: AuthorizationPolicy | RequestAuthentication) -> list[Anchor]:
            return anchors_of(policy.selector, self._reach(policy.namespace))

        def of_refusal(refusal: Refusal) -> list[Anchor]:
            reach = self._reach(refusal.document.namespace) if refusal.layer is Layer.MESH else None
            return [anchor for selector in refusal.selectors for anchor in anchors_of(selector, reach)]

        return _Index(
            network=Anchored(self.network, lambda rule: anchors_of(rule.subject, None)),
            authorization=Anchored(self.authorization, of_mesh),
            # what they select is for `effective_mtls` to say, port by port
            peer_authentication=Anchored(
                self.peer_authentication, lambda policy: anchors_of(EVERYBODY, self._reach(policy.namespace))
            ),
            request_authentication=Anchored(self.request_authentication, of_mesh),
            refusals=Anchored(self.refusals, of_refusal),
        )

    def _reach(self, namespace: str) -> tuple[str, ...] | None:
        """In which namespaces a policy of the mesh acts that stands in this one; None: in all."""
        return None if namespace == self.mesh.root_namespace else (namespace,)

    def _may_select(self, refusal: Refusal, peer: Peer) -> bool:
        if refusal.layer is Layer.MESH and refusal.document.namespace not in (self.mesh.root_namespace, peer.namespace):
            return False
        return any(selector.matches(peer) for selector in refusal.selectors)

    def _peer_selectors(self) -> list[PeerSelector]:
        found: list[PeerSelector] = []
        for rule in self.network:
            found.append(rule.subject)
            if not isinstance(rule.peers, Anything):
                found += rule.peers
        return found

    def referenced_labels(self) -> LabelKeys:
        """The label keys by which these policies tell peers or subjects apart; a Peer may be trimmed to them."""
        selectors = self._peer_selectors()
        selectors += [policy.selector for policy in self.authorization]
        selectors += [policy.selector for policy in self.request_authentication]
        if any(p.targets for p in self.authorization) or any(p.targets for p in self.request_authentication):
            selectors.append(_GATEWAYS)
        selectors += [p.selector for p in self.peer_authentication if p.selector is not None]
        selectors += [selector for refusal in self.refusals for selector in refusal.selectors]
        return label_keys(selectors)

    def referenced_networks(self) -> frozenset[IpNetwork]:
        """The CIDRs that ``Peer.networks`` has to be computed against."""
        found: set[IpNetwork] = set()
        for selector in self._peer_selectors():
            if isinstance(selector, CidrPeers):
                found.add(selector.cidr)
                found.update(selector.excepts)
        for policy in self.authorization:
            for rule in policy.rules:
                for condition in rule.all_conditions:
                    if condition.attribute in (Attribute.IP_BLOCKS, Attribute.REMOTE_IP_BLOCKS):
                        found.update(network_of(value) for value in (*condition.values, *condition.not_values))
        return frozenset(found)

    def referenced_port_names(self) -> frozenset[str]:
        """The container port names egress rules use; ``Peer.ports`` has to hold the ports of these names."""
        return frozenset(
            port.name
            for rule in self.network
            if rule.direction is Direction.EGRESS and not isinstance(rule.ports, Anything)
            for port in rule.ports
            if port.name
        )
