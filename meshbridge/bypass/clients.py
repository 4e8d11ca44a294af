"""What a sidecar knows of a destination, and what it sends there.

Spec: ISTIO.md §b, the 2×2 table; istio, pilot/pkg/model/push_context.go, destinationRule and
BestEffortInferServiceMTLSMode; sidecar.go; pilot/pkg/networking/core/listener.go, headless Services.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TypeVar

from meshbridge.bypass.halves import AUTOMATIC, ClientTls, Sending
from meshbridge.identity.model import IpAddress, Peer, Workload
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import MeshSettings, MtlsMode, PeerAuthentication, effective_mtls
from meshbridge.policy.parse.cluster import Service
from meshbridge.policy.protocols import declared_protocol
from meshbridge.policy.registry import (
    CLUSTER_DOMAIN,
    DestinationRule,
    Gateway,
    RegistryObject,
    ServiceEntry,
    SidecarScope,
    TlsMode,
    WorkloadEntry,
    matches_host_name,
)

_Registered = TypeVar("_Registered", bound=RegistryObject)


class Registry:
    """Istio's registry, as the documents say it is; their order never matters.

    Sidecars that MeshBridge configures (``own_sidecars``) have none: they send mutual TLS to every address of a pod
    with a sidecar, and whatever these objects say does not reach them (docs/adr/0033).
    """

    def __init__(
        self,
        objects: Iterable[RegistryObject],
        services: Iterable[Service],
        mesh: MeshSettings,
        peer_authentication: Iterable[PeerAuthentication] = (),
    ) -> None:
        self.mesh = mesh
        self._objects = sorted(objects, key=lambda found: found.origin)
        self._services: dict[str, list[Service]] = {}
        for service in services:
            self._services.setdefault(service.namespace, []).append(service)
        self._entries = {entry.address: entry for entry in self._of(WorkloadEntry) if entry.address is not None}
        self._modes = tuple(policy for policy in peer_authentication if policy.selector is None)

    @cached_property
    def tells_clients_apart(self) -> bool:
        """Whether some object selects clients by their labels; else those of a namespace send the same."""
        return any(isinstance(found, DestinationRule | SidecarScope) and found.selector for found in self._objects)

    def selecting(self, pod: Workload) -> list[Service]:
        """The Services in front of a pod."""
        return [service for service in self._services.get(pod.namespace, ()) if service.selects(pod)]

    def to_service(self, client: Workload, service: Service, port: int) -> Sending:
        """What ``client``'s Envoy sends to a port of a Service."""
        if self.mesh.own_sidecars:
            return AUTOMATIC
        scope = self.scope_of(client)
        host = _host(service)
        if scope is not None and not _knows(scope, client.namespace, service.namespace, host, port):
            return self._unknown(scope)
        rule = self._rule(client, service.namespace, host)
        tls = rule.tls_at(port) if rule is not None else None
        if rule is None or tls is None:
            return Sending(self._automatic(service))
        return Sending(_SENDS.get(tls), rule.origin)

    def to_pod(self, client: Workload, pod: Workload, address: IpAddress | None, port: int) -> Sending:
        """What it sends to a pod's own address: through a headless Service that has it there, else past them all.

        A port that a headless Service declares HTTP is told by the request's host, and an address is no host of it.
        """
        if self.mesh.own_sidecars:
            return AUTOMATIC
        scope = self.scope_of(client)
        for service, served in self.leading_to(pod, port):
            known = scope is None or _knows(scope, client.namespace, service.namespace, _host(service), served)
            if service.headless and served == port and known and not _is_http(service, served):
                return self.to_service(client, service, served)
        return self.to_address(client, address, port)

    def to_address(self, client: Workload, address: IpAddress | None, port: int) -> Sending:
        """What it sends to an address that is no Service's."""
        if self.mesh.own_sidecars:
            return AUTOMATIC
        scope = self.scope_of(client)
        for entry in self._of(ServiceEntry):
            own = "*" in entry.export_to or not entry.export_to
            if not own and client.namespace not in {entry.namespace if n == "." else n for n in entry.export_to}:
                continue
            if scope is not None and not any(
                _knows(scope, client.namespace, entry.namespace, host, port) for host in entry.hosts
            ):
                continue
            if any(number == port for number, _ in entry.ports) and _is_at(entry, address):
                return Sending(ClientTls.DISABLE, entry.origin)
        return self._unknown(scope)

    def rule_for(self, client: Workload, service: Service) -> DestinationRule | None:
        """The DestinationRule that is in force for a client of a Service."""
        return self._rule(client, service.namespace, _host(service))

    def scope_of(self, client: Workload) -> SidecarScope | None:
        """The Sidecar of a workload: by labels in its namespace, its namespace's, the mesh's."""
        own = [scope for scope in self._of(SidecarScope) if scope.namespace == client.namespace]
        of_mesh = [s for s in self._of(SidecarScope) if s.namespace == self.mesh.root_namespace and not s.selector]
        by_labels = [scope for scope in own if scope.selector and scope.selects(client.labels)]
        return next(iter([*by_labels, *(scope for scope in own if not scope.selector), *of_mesh]), None)

    def hides(self, client: Workload, service: Service, port: int) -> SidecarScope | None:
        """The Sidecar by which a client's Envoy does not know a Service's port; None: it does."""
        scope = self.scope_of(client)
        known = scope is None or _knows(scope, client.namespace, service.namespace, _host(service), port)
        return None if known else scope

    def entry_at(self, address: IpAddress) -> WorkloadEntry | None:
        """The workload outside of the cluster that has an address."""
        return self._entries.get(address)

    def leading_to(self, pod: Workload, port: int) -> list[tuple[Service, int]]:
        """The Services that lead to a TCP port of a pod, each with its own port."""
        return [
            (service, served.port)
            for service in self.selecting(pod)
            for served in service.ports
            if served.protocol == "TCP" and served.target_at(pod.ports) == port
        ]

    def served_by(self, gateway: Workload) -> dict[int, AppProtocol]:
        """What a gateway's own ports speak, by the Gateways that pick it; their ports are those of its Service."""
        found: dict[int, AppProtocol] = {}
        behind = self.selecting(gateway)
        for number, protocol in (s for each in self._of(Gateway) if each.selects(gateway.labels) for s in each.servers):
            served = (port for service in behind for port in service.ports if port.port == number)
            targets = [target for port in served if (target := port.target_at(gateway.ports)) is not None]
            found |= dict.fromkeys(targets or [number], protocol)
        return found

    def _unknown(self, scope: SidecarScope | None) -> Sending:
        said = scope is not None and scope.registry_only is not None
        blocked = scope.registry_only if scope is not None and said else self.mesh.registry_only
        origin = scope.origin if scope is not None else None
        return Sending(ClientTls.DISABLE, origin, unknown=True, blocked=bool(blocked))

    def _automatic(self, service: Service) -> ClientTls:
        """A headless Service's cluster has no endpoints to tell apart: its namespace's mode and labels decide."""
        if not self.mesh.auto_mtls:
            return ClientTls.DISABLE
        if not service.headless:
            return ClientTls.AUTO
        mode = effective_mtls(self._modes, Peer(namespace=service.namespace), self.mesh).mode
        return ClientTls.DISABLE if mode is MtlsMode.DISABLE else ClientTls.LABEL

    def _rule(self, client: Workload, namespace: str, host: str) -> DestinationRule | None:
        """The client's own namespace first, then what the Service's and the root namespace export to it."""
        rules = self._of(DestinationRule)
        root = self.mesh.root_namespace
        own = [r for r in rules if r.namespace == client.namespace]
        exported = [r for r in rules if r.exported_to(client.namespace)]
        groups = (
            own if client.namespace != root else [r for r in own if r.export_to == (".",)],
            [r for r in exported if r.namespace == namespace],
            [r for r in exported if r.namespace == root],
        )
        for group in groups:
            found = _most_specific(group, host, client)
            if found is not None:
                return found
        return None

    def _of(self, kind: type[_Registered]) -> Sequence[_Registered]:
        return [found for found in self._objects if isinstance(found, kind)]


_SENDS = {TlsMode.DISABLE: ClientTls.DISABLE, TlsMode.ISTIO_MUTUAL: ClientTls.ISTIO_MUTUAL}


def _host(service: Service) -> str:
    return f"{service.name}.{service.namespace}.{CLUSTER_DOMAIN}"


def _is_http(service: Service, number: int) -> bool:
    return any(
        declared_protocol(port) is AppProtocol.HTTP
        for port in service.ports
        if (port.port, port.protocol) == (number, "TCP")
    )


def _knows(scope: SidecarScope, own: str, namespace: str, host: str, port: int) -> bool:
    return scope.egress is None or any(listener.knows(own, namespace, host, port) for listener in scope.egress)


def _most_specific(rules: Iterable[DestinationRule], host: str, client: Workload) -> DestinationRule | None:
    """The rule of the longest host that matches; of equal ones the first with the client's labels, by name."""
    matching = [rule for rule in rules if matches_host_name(rule.fqdn, host)]
    if not matching:
        return None
    longest = max(len(rule.fqdn) for rule in matching)
    same = [rule for rule in matching if len(rule.fqdn) == longest]
    selecting = [rule for rule in same if rule.selector and rule.selector.items() <= client.labels.items()]
    return next(iter([*selecting, *(rule for rule in same if not rule.selector)]), None)


def _is_at(entry: ServiceEntry, address: IpAddress | None) -> bool:
    if not entry.addresses:
        return True
    return address is not None and any(address in network for network in entry.addresses)
