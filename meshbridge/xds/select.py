"""From the cluster's objects to what one sidecar has to know: modes, tokens, protocols, and who takes mTLS."""

from __future__ import annotations

from collections.abc import Iterable

from meshbridge.identity.model import ProxyClass, Workload
from meshbridge.policy.mesh import Action, MtlsMode, effective_mtls
from meshbridge.policy.model import Direction, Layer
from meshbridge.policy.parse.cluster import Service, ServicePort
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.protocols import declared_protocols
from meshbridge.xds.sidecar import MtlsDestination, Sidecar


def build_sidecar(
    workload: Workload,
    policies: PolicySet,
    services: Iterable[Service],
    destinations: tuple[MtlsDestination, ...],
) -> Sidecar:
    """Everything the sidecar of ``workload`` has to know.

    Args:
        policies: of the whole cluster; those that select the workload are picked here.
        destinations: from ``mtls_destinations``; the same for every sidecar of the mesh.
    """
    peer = workload.peer()
    selecting = policies.selecting(peer)
    protocols, server_first = declared_protocols(workload, services)
    return Sidecar(
        workload=workload,
        trust_domains=(policies.mesh.trust_domain, *policies.mesh.trust_domain_aliases),
        mtls=effective_mtls(policies.peer_authentication, peer, policies.mesh),
        protocols=protocols,
        server_first_ports=server_first,
        jwt_rules=tuple(rule for policy in selecting.request_authentication for rule in policy.rules),
        path_normalization=policies.mesh.path_normalization,
        destinations=destinations,
        restricted=_restricted(selecting),
    )


def mtls_destinations(
    workloads: Iterable[Workload], services: Iterable[Service], policies: PolicySet
) -> tuple[MtlsDestination, ...]:
    """Whom clients speak mTLS to: pods with a sidecar, and Services whose every endpoint is one.

    Ports that a pod excludes from its sidecar are not looked at: like Istio's clients ours go on with mTLS there, and
    the application gets a TLS hello (ISTIO.md §b); what the exclusion costs is reported elsewhere.
    """
    pods = [w for w in workloads if w.addresses and not w.host_network and w.phase not in ("Succeeded", "Failed")]
    taking = {pod.uid: _destination(pod, policies) for pod in pods if pod.proxy is ProxyClass.SIDECAR}
    found = [destination for destinations in taking.values() for destination in destinations]
    for service in services:
        endpoints = [pod for pod in pods if service.selects(pod)]
        ports = frozenset(
            port.port
            for port in service.ports
            if endpoints and all(_takes_mtls(pod, port, taking.get(pod.uid, ())) for pod in endpoints)
        )
        if ports:
            found += [MtlsDestination(address, mtls=False, except_ports=ports) for address in service.addresses]
    return tuple(sorted(set(found), key=lambda entry: (entry.address.version, entry.address)))


def _destination(pod: Workload, policies: PolicySet) -> tuple[MtlsDestination, ...]:
    modes = effective_mtls(policies.peer_authentication, pod.peer(), policies.mesh)
    terminates = modes.mode is not MtlsMode.DISABLE
    other = frozenset(port for port, (mode, _) in modes.ports.items() if (mode is not MtlsMode.DISABLE) != terminates)
    return tuple(MtlsDestination(address, mtls=terminates, except_ports=other) for address in pod.addresses)


def _takes_mtls(pod: Workload, port: ServicePort, destinations: tuple[MtlsDestination, ...]) -> bool:
    target = port.target_at(pod.ports)
    return target is not None and any(destination.accepts_mtls(target) for destination in destinations)


def _restricted(policies: PolicySet) -> bool:
    enforced = any(p.action in (Action.ALLOW, Action.DENY) and not p.dry_run for p in policies.authorization)
    refused = any(refusal.layer is Layer.MESH for refusal in policies.refusals)
    l7_rules = any(rule.http and rule.direction is Direction.INGRESS for rule in policies.network)
    return enforced or refused or l7_rules
