"""What REGISTRY_ONLY lets a sidecar send to besides Services and the pods behind them, as far as addresses can say it.

Spec: istio, MeshConfig.outboundTrafficPolicy; networking.istio.io/v1 ServiceEntry, WorkloadEntry, Sidecar.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network

from meshbridge.identity.model import IpNetwork, Workload
from meshbridge.policy.capture import EgressRegistry
from meshbridge.policy.mesh import MeshSettings
from meshbridge.policy.model import Document
from meshbridge.policy.parse import Parsed
from meshbridge.policy.parse.lenient import child, children, text
from meshbridge.policy.parse.reader import Invalid, Reader
from meshbridge.policy.registry import ServiceEntry, SidecarScope, WorkloadEntry

REGISTRY_ONLY_KINDS = frozenset(("networking.istio.io", kind) for kind in ("ServiceEntry", "WorkloadEntry", "Sidecar"))


@dataclass(frozen=True, slots=True)
class Known:
    """What one object, or all of them, add to the registry.

    ``by_name`` are ports of hosts whose addresses only DNS knows; ``scopes`` may say otherwise of some workloads.
    """

    networks: frozenset[IpNetwork] = frozenset()
    by_name: frozenset[int] = frozenset()
    scopes: tuple[SidecarScope, ...] = ()

    @classmethod
    def all_of(cls, parts: Iterable[Known]) -> Known:
        every = list(parts)
        return cls(
            frozenset().union(*(part.networks for part in every)),
            frozenset().union(*(part.by_name for part in every)),
            tuple(scope for part in every for scope in part.scopes),
        )

    def registry_of(self, workload: Workload, mesh: MeshSettings) -> EgressRegistry | None:
        """What the registry knows for one pod; None where it may send to anybody, or some Sidecar may say so."""
        scopes = (s for s in self.scopes if s.namespace in (workload.namespace, mesh.root_namespace))
        if not mesh.registry_only or any(s.registry_only is False and s.selects(workload.labels) for s in scopes):
            return None
        return EgressRegistry(self.networks, tuple(sorted(self.by_name)))


def known_of(document: Document, parsed: Parsed) -> Known:
    """What one object adds; one that is refused adds nothing, as no API server of Istio's takes it."""
    found = Known()
    for each in parsed.registry:
        match each:
            case WorkloadEntry(address=address) if address is not None:
                found = Known.all_of((found, Known(frozenset({ip_network(address)}))))
            case ServiceEntry():
                found = Known.all_of((found, _of_entry(document, each)))
            case SidecarScope():
                found = Known.all_of((found, Known(scopes=(each,))))
            case _:
                pass
    return found


def _of_entry(document: Document, entry: ServiceEntry) -> Known:
    """Its addresses, and those of its endpoints; where it has others, all of its ports count as by name."""
    networks, named = set(entry.addresses), False
    ports = {port for port, _ in entry.ports}
    try:
        spec = child(Reader(document.data, ""), "spec")
        for port in children(spec, "ports"):
            if (target := child(port, "targetPort")).value is not None:
                ports.add(target.integer(1, 65535))
        endpoints = children(spec, "endpoints")
        for endpoint in endpoints:
            try:
                networks.add(child(endpoint, "address").network(bare_address=True))
            except Invalid:
                named = True
            numbers = child(endpoint, "ports").value
            ports |= {n for n in numbers.values() if isinstance(n, int)} if isinstance(numbers, dict) else set()
        by_dns = not endpoints and (not entry.addresses or "DNS" in text(spec, "resolution"))
        named = named or by_dns or child(spec, "workloadSelector").value is not None
    except Invalid:
        named = True  # what is not understood of it stays open
    return Known(frozenset(networks), frozenset(ports) if named else frozenset())
