"""The parts of Istio's networking kinds that decide what a sidecar knows, what it sends, and who is a gateway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from meshbridge.identity.model import IpAddress, IpNetwork
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.model import Origin

CLUSTER_DOMAIN = "svc.cluster.local"


class TlsMode(StrEnum):
    """What a client's Envoy sends to a port, ``ClientTLSSettings.mode``."""

    DISABLE = "DISABLE"
    SIMPLE = "SIMPLE"
    MUTUAL = "MUTUAL"
    ISTIO_MUTUAL = "ISTIO_MUTUAL"


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """Something outside of the cluster that sidecars know.

    ``addresses`` empty: on its TCP ports any address is it. ``ports`` are numbers and what is spoken there.
    """

    namespace: str
    name: str
    hosts: tuple[str, ...]
    addresses: tuple[IpNetwork, ...]
    ports: tuple[tuple[int, AppProtocol], ...]
    export_to: tuple[str, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class WorkloadEntry:
    """A workload that is no pod. To policies of the network it is the world's, whatever certificate it has."""

    namespace: str
    name: str
    address: IpAddress | None
    origin: Origin


@dataclass(frozen=True, slots=True)
class DestinationRule:
    """How clients in ``namespace``, or those it is exported to, speak to ``host``.

    ``tls`` None: nothing is said, so mutual TLS is automatic. A port in ``port_tls`` does not inherit ``tls``.
    """

    namespace: str
    name: str
    host: str
    tls: TlsMode | None
    port_tls: Mapping[int, TlsMode | None] = field(hash=False)
    export_to: tuple[str, ...]
    selector: Mapping[str, str] = field(hash=False)
    origin: Origin

    @property
    def fqdn(self) -> str:
        """A host without dots is a Service of the rule's own namespace."""
        return self.host if "." in self.host or self.host == "*" else f"{self.host}.{self.namespace}.{CLUSTER_DOMAIN}"

    def tls_at(self, port: int) -> TlsMode | None:
        return self.port_tls.get(port, self.tls)

    def exported_to(self, namespace: str) -> bool:
        exported = {self.namespace if name == "." else name for name in self.export_to}
        return not exported or not exported.isdisjoint({"*", namespace})


@dataclass(frozen=True, slots=True)
class EgressListener:
    """``hosts`` are namespace and name, as written; ``port`` 0 is any."""

    port: int
    hosts: tuple[tuple[str, str], ...]

    def knows(self, own: str, namespace: str, host: str, port: int) -> bool:
        """Whether clients in ``own`` see a host of ``namespace``."""
        return self.port in (0, port) and any(
            where in ("*", namespace) or (where == "." and namespace == own)
            for where, name in self.hosts
            if where != "~" and matches_host_name(name, host)
        )


@dataclass(frozen=True, slots=True)
class SidecarScope:
    """What the sidecars of some workloads know. ``egress`` None: everything; ``registry_only`` None: as the mesh.

    ``ingress`` are the workload's ports that it redefines, and what is spoken there; None: as Services say.
    """

    namespace: str
    name: str
    selector: Mapping[str, str] = field(hash=False)
    egress: tuple[EgressListener, ...] | None
    registry_only: bool | None
    ingress: tuple[tuple[int, AppProtocol], ...] | None
    origin: Origin

    def selects(self, labels: Mapping[str, str]) -> bool:
        return all(labels.get(key) == value for key, value in self.selector.items())


@dataclass(frozen=True, slots=True)
class Gateway:
    """Servers that the selected pods run on behalf of others; their ports, and what is spoken there."""

    namespace: str
    name: str
    selector: Mapping[str, str] = field(hash=False)
    servers: tuple[tuple[int, AppProtocol], ...]
    origin: Origin

    def selects(self, labels: Mapping[str, str]) -> bool:
        """An empty selector picks nobody: the servers would be everybody's."""
        return bool(self.selector) and all(labels.get(key) == value for key, value in self.selector.items())


RegistryObject = ServiceEntry | WorkloadEntry | DestinationRule | SidecarScope | Gateway


def matches_host_name(pattern: str, host: str) -> bool:
    """A host name, ``*`` for all of them, or ``*.rest`` for those that end so."""
    return pattern == "*" or pattern == host or (pattern.startswith("*.") and host.endswith(pattern[1:]))
