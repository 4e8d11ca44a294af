"""Peers that other objects say: CIDR groups and Services, put into the rules once all objects are there.

Spec: ``cidrGroupRef``, ``cidrGroupSelector`` and ``toServices`` as Cilium 1.20 resolves them
(pkg/policy/types/selector.go, pkg/policy/k8s/service.go).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final

from meshbridge.identity.model import DEFAULT_CLUSTER, IpNetwork
from meshbridge.policy.cilium import CiliumSettings
from meshbridge.policy.model import ANY, Anything, NetworkRule, Verdict
from meshbridge.policy.parse.cluster import CidrGroup, EndpointSlice, Service
from meshbridge.policy.selectors import (
    CidrGroupReference,
    CidrPeers,
    LabelSource,
    Operator,
    PeerSelector,
    Requirement,
    Selector,
    ServiceReference,
    in_namespace,
    is_identity_label,
)

_EVERYTHING: Final[tuple[IpNetwork, ...]] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
_NEGATIVE: Final = (Operator.NOT_IN, Operator.DOES_NOT_EXIST)


@dataclass(frozen=True, slots=True)
class Resolver:
    """Objects that rules refer to, and the settings that decide what Cilium's selectors mean."""

    settings: CiliumSettings
    groups: tuple[CidrGroup, ...] = ()
    services: tuple[Service, ...] = ()
    slices: tuple[EndpointSlice, ...] = ()

    @classmethod
    def of(cls, objects: Iterable[object], settings: CiliumSettings) -> Resolver:
        """With those of ``objects`` that rules may refer to."""
        every = list(objects)
        return cls(
            settings,
            tuple(found for found in every if isinstance(found, CidrGroup)),
            tuple(found for found in every if isinstance(found, Service)),
            tuple(found for found in every if isinstance(found, EndpointSlice)),
        )

    def rule(self, rule: NetworkRule) -> NetworkRule:
        """The rule with nothing left open: no references, and whom a CIDR and a cluster's name mean is decided.

        What refers to an object that was refused allows nobody, and denies everybody.
        """
        peers = rule.peers
        if not isinstance(peers, Anything):
            found = [self._meant(selector) for selector in peers]
            for reference in rule.references:
                resolved = self._peers(reference)
                if resolved is not None:
                    found += resolved
                elif rule.verdict is Verdict.DENY:
                    return replace(rule, peers=ANY, references=())
            peers = tuple(dict.fromkeys(found)) if rule.references else tuple(found)
        subject = self._meant_selector(rule.subject)
        if peers == rule.peers and subject == rule.subject and not rule.references:
            return rule
        return replace(rule, subject=subject, peers=peers, references=())

    def _meant(self, selector: PeerSelector) -> PeerSelector:
        match selector:
            case CidrPeers() if not selector.in_cluster:
                # Every address is "the world" to Cilium, which no node is part of; only its mode for pods undoes that.
                nodes = self.settings.nodes and (selector.cidr.prefixlen > 0 or self.settings.pods)
                return replace(selector, pods=self.settings.pods, nodes=nodes)
            case Selector():
                return self._meant_selector(selector)
            case _:
                return selector

    def _meant_selector(self, selector: Selector) -> Selector:
        """With the cluster's own name replaced by the one that peers carry."""
        own = self.settings.cluster
        if own == DEFAULT_CLUSTER or all(r.source is not LabelSource.CLUSTER for r in selector.requirements):
            return selector
        renamed = {own: DEFAULT_CLUSTER, DEFAULT_CLUSTER: own}
        return Selector.of(
            replace(r, values=tuple(sorted(renamed.get(value, value) for value in r.values)))
            if r.source is LabelSource.CLUSTER and r.operator in (Operator.IN, Operator.NOT_IN)
            else r
            for r in selector.requirements
        )

    def _peers(self, reference: CidrGroupReference | ServiceReference) -> list[PeerSelector] | None:
        """None: an object it refers to was refused."""
        if isinstance(reference, ServiceReference):
            return [peers for service in self.services_of(reference) for peers in self._backends(service)]
        cut: list[IpNetwork] = []
        if reference.name:
            networks = _union(group for group in self.groups if group.name == reference.name)
        else:
            networks, cut = self._selected(reference.requirements)
        if networks is None:
            return None
        return [self._at(network, (*reference.excepts, *cut)) for network in networks]

    def _selected(self, requirements: Iterable[Requirement]) -> tuple[list[IpNetwork] | None, list[IpNetwork]]:
        """The CIDRs in which an address has all labels that are asked for, and those it must not be in.

        As in Cilium, an address has the labels of every group that it is in, and one in no group has none: a selector
        that only says what must not be there selects all of the world outside of those groups.
        """
        networks: list[IpNetwork] = list(_EVERYTHING)
        cut: list[IpNetwork] = []
        for requirement in requirements:
            wanted = _opposite(requirement) if requirement.operator in _NEGATIVE else requirement
            held = _union(group for group in self.groups if _has(group, wanted))
            if held is None:
                return None, []
            if requirement.operator in _NEGATIVE:
                cut += held
            else:
                networks = _common(networks, held)
        return networks, cut

    def services_of(self, reference: ServiceReference) -> list[Service]:
        """The Services a rule means."""
        return [
            service
            for service in self.services
            if reference.namespace in ("", service.namespace)
            and reference.name in ("", service.name)
            and all(r.accepts(service.labels.get(r.key)) for r in reference.requirements)
        ]

    def _at(self, network: IpNetwork, excepts: Iterable[IpNetwork]) -> CidrPeers:
        cut = tuple(sorted(set(excepts), key=str))
        return CidrPeers(network, cut, pods=self.settings.pods, nodes=self.settings.nodes)

    def _backends(self, service: Service) -> list[PeerSelector]:
        if service.selector:
            return [Selector.of(requirements_of(service))]
        return [
            self._at(ip_network(address), ())
            for part in self.slices
            if (part.namespace, part.service) == (service.namespace, service.name)
            for address in part.addresses
        ]


def requirements_of(service: Service) -> list[Requirement]:
    """What a pod has to be to stand behind a Service with a selector."""
    selector = service.selector or {}
    wanted = [Requirement(_source(key), key, Operator.IN, (value,)) for key, value in selector.items()]
    return [in_namespace(service.namespace), *wanted]


def _source(key: str) -> LabelSource:
    return LabelSource.POD if is_identity_label(key) else LabelSource.ABSENT


def _union(groups: Iterable[CidrGroup]) -> list[IpNetwork] | None:
    found: list[IpNetwork] = []
    for group in groups:
        if group.networks is None:
            return None
        found += group.networks
    return found


def _has(group: CidrGroup, requirement: Requirement) -> bool:
    return group.networks is None or requirement.accepts(group.labels.get(requirement.key))


def _opposite(requirement: Requirement) -> Requirement:
    operator = Operator.IN if requirement.operator is Operator.NOT_IN else Operator.EXISTS
    return replace(requirement, operator=operator)


def _common(some: Iterable[IpNetwork], others: Iterable[IpNetwork]) -> list[IpNetwork]:
    """Where both are, no longer than both: of two CIDRs, which are nested or apart, the narrower."""
    first, second = dict.fromkeys(some), dict.fromkeys(others)
    narrower = [*_inside(first, second), *_inside(second, first)]
    return list(dict.fromkeys(narrower))


def _inside(some: Iterable[IpNetwork], others: Collection[IpNetwork]) -> list[IpNetwork]:
    """Those that lie in one of ``others``."""
    lengths = sorted({other.prefixlen for other in others})
    return [
        one
        for one in some
        if any(one.supernet(new_prefix=length) in others for length in lengths if length <= one.prefixlen)
    ]
