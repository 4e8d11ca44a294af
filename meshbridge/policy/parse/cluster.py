"""Cluster objects that are no workloads, as far as policies and the controller ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from meshbridge.identity.model import ContainerPort, IpAddress, IpNetwork, Workload


@dataclass(frozen=True, slots=True)
class Namespace:
    name: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    addresses: tuple[IpAddress, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class ServicePort:
    """``target`` is a number or a container port's name; ``app_protocol`` decides whether Envoy speaks HTTP on it."""

    name: str
    port: int
    target: int | str
    protocol: str = "TCP"
    app_protocol: str = ""

    def target_at(self, ports: Iterable[ContainerPort]) -> int | None:
        """The port at a pod with these container ports; None: the pod has none of that name, so it is no backend."""
        if isinstance(self.target, int):
            return self.target
        return next((port.port for port in ports if (port.name, port.protocol) == (self.target, self.protocol)), None)


@dataclass(frozen=True, slots=True)
class Service:
    """``selector`` None: its endpoints are somebody else's business.

    ``addresses`` are its ClusterIPs, ``outside_addresses`` further ones that nodes translate: external IPs and those
    of a load balancer, but where its packets have to pass through the load balancer itself. ``headless``: it never has
    any, and its name stands for its pods' addresses.
    """

    namespace: str
    name: str
    addresses: tuple[IpAddress, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    selector: Mapping[str, str] | None = field(default=None, hash=False)
    outside_addresses: tuple[IpAddress, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    headless: bool = False

    def selects(self, pod: Workload) -> bool:
        """Whether the pod is one of its endpoints, as far as labels say; an empty selector picks nobody."""
        if not self.selector or pod.namespace != self.namespace:
            return False
        return all(pod.labels.get(key) == value for key, value in self.selector.items())


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    namespace: str
    name: str


API_SERVER: Final = ("default", "kubernetes")
"""The Service behind which the API servers are."""


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """A part of the endpoints of the Service ``service``, which is in the same namespace."""

    namespace: str
    service: str
    addresses: tuple[IpAddress, ...] = ()

    def of(self, namespace: str, service: str) -> bool:
        """Whether it is a part of that Service's endpoints."""
        return (self.namespace, self.service) == (namespace, service)


@dataclass(frozen=True, slots=True)
class CidrGroup:
    """A CiliumCIDRGroup; ``networks`` None: it was refused, so which addresses it means is not known."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    networks: tuple[IpNetwork, ...] | None = ()
