"""The policies of a cluster, or of one endpoint, as one value; its order never matters."""

from __future__ import annotations

from bisect import bisect_left, insort_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

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
from meshbridge.policy.model import Anything, Direction, Document, Layer, NetworkRule, Notice, Origin, Refusal
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
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class _Index:
    """The policies of a set by whom they may concern."""

    network: Anchored[NetworkRule]
    authorization: Anchored[AuthorizationPolicy]
    peer_authentication: Anchored[PeerAuthentication]
    request_authentication: Anchored[RequestAuthentication]
    refusals: Anchored[Refusal]

    def replaced(self, removed: PolicySet, added: PolicySet) -> _Index:
        return _Index(
            self.network.replaced(removed.network, added.network),
            self.authorization.replaced(removed.authorization, added.authorization),
            self.peer_authentication.replaced(removed.peer_authentication, added.peer_authentication),
            self.request_authentication.replaced(removed.request_authentication, added.request_authentication),
            self.refusals.replaced(removed.refusals, added.refusals),
        )


def _rule_order(rule: NetworkRule) -> tuple[Origin, Direction, str]:
    return (rule.origin, rule.direction, repr(rule.ports))


def _policy_order(policy: AuthorizationPolicy | PeerAuthentication | RequestAuthentication) -> Origin:
    return policy.origin


def _ordered(policies: Iterable[_Policy]) -> tuple[_Policy, ...]:
    return tuple(sorted(policies, key=_policy_order))


def _exchanged(
    items: tuple[_Item, ...], removed: Iterable[_Item], added: Iterable[_Item], order: Callable[[_Item], Any]
) -> tuple[_Item, ...]:
    """``items`` in their order, without ``removed``, which are among them, and with ``added``."""
    found = list(items)
    for item in removed:
        del found[found.index(item, bisect_left(found, order(item), key=order))]
    for item in added:
        insort_right(found, item, key=order)
    return tuple(found)


def resolver_of(parsed: Iterable[Parsed]) -> Resolver:
    """What rules refer to, as these objects say it."""
    every = list(parsed)
    settings = next((p.cilium for p in every if p.cilium is not None), DEFAULT_SETTINGS)
    return Resolver.of((found for p in every for found in p.objects), settings)


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
        return cls.of_resolved(every, resolver_of(every), mesh, equal_priorities(every))

    @classmethod
    def of_resolved(
        cls, every: Sequence[Parsed], resolver: Resolver, mesh: MeshSettings, notices: Iterable[Notice]
    ) -> PolicySet:
        """Put together some objects, whose rules refer to those that ``resolver`` knows.

        Args:
            notices: what is to be said besides what each object says by itself.
        """
        rules = (resolver.rule(rule) for p in every for rule in p.network)
        return cls(
            network=tuple(sorted(rules, key=_rule_order)),
            authorization=_ordered(a for p in every for a in p.authorization),
            peer_authentication=_ordered(a for p in every for a in p.peer_authentication),
            request_authentication=_ordered(a for p in every for a in p.request_authentication),
            refusals=tuple(sorted((r for p in every for r in p.refusals), key=str)),
            notices=tuple(sorted((*(n for p in every for n in p.notices), *notices), key=str)),
            mesh=mesh,
            cilium=resolver.settings,
        )

    def replaced(self, removed: PolicySet, added: PolicySet) -> PolicySet:
        """Without the policies of ``removed``, all of which are among these, and with those of ``added``.

        It costs copies of a few tables, and no look at every policy.
        """
        found = PolicySet(
            _exchanged(self.network, removed.network, added.network, _rule_order),
            _exchanged(self.authorization, removed.authorization, added.authorization, _policy_order),
            _exchanged(self.peer_authentication, removed.peer_authentication, added.peer_authentication, _policy_order),
            _exchanged(
                self.request_authentication,
                removed.request_authentication,
                added.request_authentication,
                _policy_order,
            ),
            _exchanged(self.refusals, removed.refusals, added.refusals, str),
            _exchanged(self.notices, removed.notices, added.notices, str),
            self.mesh,
            self.cilium,
        )
        found.__dict__["_index"] = self._index.replaced(removed, added)
        found.__dict__["_networks"] = self._networks - removed._networks + added._networks
        return found

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
            refusals=tuple(
                sorted((refusal for refusal in index.refusals.at(anchors) if self._may_select(refusal, peer)), key=str)
            ),
            mesh=self.mesh,
            cilium=self.cilium,
        )

    def network_rules(self, peer: Peer) -> tuple[NetworkRule, ...]:
        """The rules of the network family in force at the pod ``peer``, in canonical order."""
        selecting = (rule for rule in self._index.network.at(anchors_at(peer)) if rule.subject.matches(peer))
        return enforced(sorted(selecting, key=_rule_order), self.cilium)

    def concerns(self, workload: Workload | Peer) -> bool:
        """Whether any of these policies selects it, or was refused and may select it."""
        if isinstance(workload, Workload) and workload.host_network:
            return False
        peer = workload.peer() if isinstance(workload, Workload) else workload
        index, anchors = self._index, anchors_at(peer)
        of_mesh: list[AuthorizationPolicy | RequestAuthentication] = [
            *index.authorization.at(anchors),
            *index.request_authentication.at(anchors),
        ]
        return (
            any(rule.subject.matches(peer) for rule in index.network.at(anchors))
            or any(selects(policy, peer, self.mesh) for policy in of_mesh)
            or bool(index.peer_authentication.at(anchors))
            or any(self._may_select(refusal, peer) for refusal in index.refusals.at(anchors))
        )

    def anchors(self) -> frozenset[Anchor]:
        """Where everybody stands whom any of these policies may concern."""
        index = self._index
        parts = (index.network, index.authorization, index.peer_authentication, index.request_authentication)
        return frozenset().union(index.refusals.anchors(), *(part.anchors() for part in parts))

    @cached_property
    def _index(self) -> _Index:
        root = self.mesh.root_namespace
        of_mesh = partial(_anchors_of_policy, root)
        return _Index(
            network=Anchored(self.network, _anchors_of_rule),
            authorization=Anchored(self.authorization, of_mesh),
            peer_authentication=Anchored(self.peer_authentication, partial(_anchors_of_mtls, root)),
            request_authentication=Anchored(self.request_authentication, of_mesh),
            refusals=Anchored(self.refusals, partial(_anchors_of_refusal, root)),
        )

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
        return frozenset(self._networks)

    @cached_property
    def _networks(self) -> Counter[IpNetwork]:
        """How often each CIDR is referred to."""
        found: Counter[IpNetwork] = Counter()
        for selector in self._peer_selectors():
            if isinstance(selector, CidrPeers):
                found.update((selector.cidr, *selector.excepts))
        for policy in self.authorization:
            for rule in policy.rules:
                for condition in rule.all_conditions:
                    if condition.attribute in (Attribute.IP_BLOCKS, Attribute.REMOTE_IP_BLOCKS):
                        found.update(network_of(value) for value in (*condition.values, *condition.not_values))
        return found

    def referenced_port_names(self) -> frozenset[str]:
        """The container port names egress rules use; ``Peer.ports`` has to hold the ports of these names."""
        return frozenset(
            port.name
            for rule in self.network
            if rule.direction is Direction.EGRESS and not isinstance(rule.ports, Anything)
            for port in rule.ports
            if port.name
        )


def _reach(root: str, namespace: str) -> tuple[str, ...] | None:
    """In which namespaces a policy of the mesh acts that stands in this one; None: in all."""
    return None if namespace == root else (namespace,)


def _anchors_of_rule(rule: NetworkRule) -> list[Anchor]:
    return anchors_of(rule.subject, None)


def _anchors_of_policy(root: str, policy: AuthorizationPolicy | RequestAuthentication) -> list[Anchor]:
    return anchors_of(policy.selector, _reach(root, policy.namespace))


def _anchors_of_mtls(root: str, policy: PeerAuthentication) -> list[Anchor]:
    """What they select is for ``effective_mtls`` to say, port by port."""
    return anchors_of(EVERYBODY, _reach(root, policy.namespace))


def _anchors_of_refusal(root: str, refusal: Refusal) -> list[Anchor]:
    reach = _reach(root, refusal.document.namespace) if refusal.layer is Layer.MESH else None
    return [anchor for selector in refusal.selectors for anchor in anchors_of(selector, reach)]
