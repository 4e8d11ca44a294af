"""The default-deny preview: what stops working because a network policy isolates the pods it selects.

An allow rule for one port closes every other port of the pods it selects; that is the common way to cut off an
application while opening it for a scraper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from meshbridge.bypass.inventory import Inventory, target_port
from meshbridge.identity.model import Workload
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.model import Direction, EndpointPolicy, NetworkRule, Origin, Verdict
from meshbridge.policy.policyset import PolicySet

_PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
_FIRST_IDENTITY = 256


@dataclass(frozen=True, slots=True)
class IsolatedPort:
    """A declared port and the known sources that reached it without the policy: those it keeps and those it loses.

    ``probed``: the kubelet of the pod's own node goes on reaching it.
    """

    port: int
    protocol: str
    name: str
    kept: tuple[str, ...]
    lost: tuple[str, ...]
    probed: bool = False

    @property
    def closed(self) -> bool:
        """Nobody reaches it any more, but for processes of the pod's own node."""
        return not self.kept


@dataclass(frozen=True, slots=True)
class Isolation:
    """What one policy does to one pod beyond what it allows."""

    policy: str
    origin: Origin
    pod: str
    ports: tuple[IsolatedPort, ...]

    def __str__(self) -> str:
        return f"{self.policy} isolates {self.pod}: {', '.join(map(_sentence, self.ports))}"


def _sentence(port: IsolatedPort) -> str:
    name = f" ({port.name})" if port.name else ""
    effect = "stops working" if port.closed else f"loses {len(port.lost)} of {len(port.lost) + len(port.kept)} sources"
    return f"{port.port}/{port.protocol}{name} {effect}"


def isolations(inventory: Inventory) -> tuple[Isolation, ...]:
    """What every ingress-isolating policy takes from the declared ports of the pods it selects.

    Each policy is judged against all the others: what another policy closes anyway is not laid at its door.
    """
    sources = inventory.sources()
    identities = {_FIRST_IDENTITY + number: peer for number, peer in enumerate(sources.values())}
    names = dict(zip(identities, sources, strict=True))
    compiler = Compiler(identities)
    without: dict[tuple[str, str], PolicySet] = {}
    found = []
    for workload in inventory.workloads:
        if workload.host_network:
            continue
        for origin in _isolating(inventory.policies.network_rules(workload.peer())):
            key = _policy(origin)
            if key not in without:
                others = tuple(rule for rule in inventory.policies.network if _policy(rule.origin) != key)
                without[key] = replace(inventory.policies, network=others)
            before = compiler.endpoint(workload, without[key], Capture.none())
            after = compiler.endpoint(workload, inventory.policies, Capture.none())
            ports = tuple(_isolated_ports(workload, inventory, before, after, names))
            if ports:
                found.append(Isolation(f"{origin.kind} {origin.policy}", origin, workload.key, ports))
    return tuple(found)


def _policy(origin: Origin) -> tuple[str, str]:
    """What a person calls one policy: its kind and name."""
    return (origin.kind, origin.policy)


def _isolating(rules: tuple[NetworkRule, ...]) -> list[Origin]:
    """One origin for each policy that isolates in ingress."""
    policies: dict[tuple[str, str], Origin] = {}
    for rule in rules:
        if rule.direction is Direction.INGRESS and rule.default_deny:
            policies.setdefault(_policy(rule.origin), rule.origin)
    return list(policies.values())


def _isolated_ports(
    workload: Workload, inventory: Inventory, before: EndpointPolicy, after: EndpointPolicy, names: Mapping[int, str]
) -> list[IsolatedPort]:
    probes = {target_port(workload, probe) for probe in workload.probe_ports}
    found = []
    for port, protocol, name in _declared(workload, inventory):
        reached = _reaching(before, port, protocol, names)
        kept = _reaching(after, port, protocol, names)
        lost = tuple(source for source in reached if source not in kept and source != workload.key)
        if lost:
            staying = tuple(source for source in kept if source != workload.key)
            probed = protocol == "TCP" and port in probes
            found.append(IsolatedPort(port, protocol, name, staying, lost, probed))
    return found


def _declared(workload: Workload, inventory: Inventory) -> list[tuple[int, str, str]]:
    named = {(port.port, port.protocol): port.name for port in workload.ports if port.protocol in _PROTOCOLS}
    for port in inventory.declared_ports(workload):
        named.setdefault((port, "TCP"), "")
    return [(port, protocol, name) for (port, protocol), name in sorted(named.items())]


def _reaching(policy: EndpointPolicy, port: int, protocol: str, names: Mapping[int, str]) -> tuple[str, ...]:
    """The sources that the network policies let in, in either family."""
    maps = [policy_map for (direction, _), policy_map in policy.maps.items() if direction is Direction.INGRESS]
    return tuple(
        name
        for number, name in names.items()
        if any(
            evaluate(policy_map, number, _PROTOCOLS[protocol], port).network.verdict is not Verdict.DENY
            for policy_map in maps
        )
    )
