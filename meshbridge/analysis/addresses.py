"""CIDRs that do not match whom they look like matching."""

from __future__ import annotations

from collections.abc import Iterator

from meshbridge.analysis.finding import Finding, finding, listed
from meshbridge.analysis.scene import Scene
from meshbridge.identity.model import IpAddress
from meshbridge.policy.model import Anything, NetworkRule, Severity
from meshbridge.policy.selectors import CidrPeers


def _cidrs(scene: Scene) -> Iterator[tuple[NetworkRule, CidrPeers]]:
    for rule in dict.fromkeys(scene.policies.network):
        for selector in () if isinstance(rule.peers, Anything) else rule.peers:
            if isinstance(selector, CidrPeers):
                yield rule, selector


def _covers(selector: CidrPeers, address: IpAddress) -> bool:
    return address in selector.cidr and not any(address in network for network in selector.excepts)


def missing_pods(scene: Scene) -> Iterator[Finding]:
    """CIDRs of Cilium policies that pods' addresses are in; the whole world is only told of."""
    inside: dict[CidrPeers, list[str]] = {}
    for rule, selector in _cidrs(scene):
        if selector not in inside:
            missed = [
                pods.names[0]
                for pods in scene.pods
                if any(_covers(selector, address) for address in pods.pod.addresses)
                and not selector.matches(scene.identities[pods.number])
            ]
            inside[selector] = sorted(missed)
        if covered := inside[selector]:
            text = f"{selector.cidr} covers addresses of {listed(covered)}, and does not match them: they are pods"
            severity = Severity.INFO if selector.cidr.prefixlen == 0 else None
            yield finding("MB0504", rule.origin, text, severity=severity)


def of_services(scene: Scene) -> Iterator[Finding]:
    """CIDRs with addresses of Services in them, and of nobody else that is known."""
    services = {address: service for service in scene.services for address in service.addresses}
    others = [address for workload in scene.workloads for address in workload.addresses]
    for rule, selector in _cidrs(scene):
        covered = {f"{s.namespace}/{s.name}" for address, s in services.items() if _covers(selector, address)}
        if covered and not any(_covers(selector, address) for address in others):
            text = f"{selector.cidr} is the address of Service {listed(sorted(covered))}, which no packet has any more "
            yield finding("MB0505", rule.origin, f"{text}when policies see it")
