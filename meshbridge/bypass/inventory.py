"""The cluster as a report sees it: workloads with their capture states, Services, policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property

from meshbridge.bypass.annotations import TRAFFIC, MeshDefaults
from meshbridge.bypass.bypasspolicy import NO_BYPASS_POLICIES, BypassPolicies
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.clients import Registry
from meshbridge.bypass.encryption import NodeEncryption, node_encryption
from meshbridge.bypass.observed import ObservedFlow
from meshbridge.bypass.rules import SeenRules
from meshbridge.bypass.state import CaptureState, Truth
from meshbridge.identity.model import Entity, IpAddress, IpFamily, IpNetwork, Peer, ProxyClass, Workload
from meshbridge.identity.networks import NetworkIndex
from meshbridge.policy.mesh import MeshSettings
from meshbridge.policy.model import Document
from meshbridge.policy.parse import Parsed, parse
from meshbridge.policy.parse.cluster import Namespace, Service
from meshbridge.policy.policyset import PolicySet

WORLD = "world"
OTHER_NODE = "another node"


@dataclass(frozen=True)
class Inventory:
    """``predicted`` says that the capture states are those of the specification, not of rules seen.

    ``others`` are further sources by name: pods of which only labels are known. ``defaults`` None: not known.
    ``registry`` None: nobody knows what clients' Envoys know, as on a node; then every destination is a Service's to
    them, without a DestinationRule. ``registry_only`` is the mesh's outboundTrafficPolicy, None: not known.
    ``observed`` are connections that were seen, which tell who uses what. ``encryption`` is what is said to encrypt
    between nodes.
    """

    workloads: tuple[Workload, ...]
    services: tuple[Service, ...]
    policies: PolicySet
    states: Mapping[str, CaptureState] = field(hash=False)
    predicted: bool = True
    others: Mapping[str, Peer] = field(default_factory=dict, hash=False)
    bypass_policies: BypassPolicies = NO_BYPASS_POLICIES
    defaults: MeshDefaults | None = None
    registry: Registry | None = field(default=None, hash=False)
    registry_only: bool | None = None
    observed: tuple[ObservedFlow, ...] = ()
    encryption: NodeEncryption | None = None

    @property
    def said_encryption(self) -> str:
        """What is said to encrypt between nodes, as a sentence; "" where nothing is."""
        return str(self.encryption) if self.encryption is not None else ""

    def encrypts(self, workload: Workload) -> bool:
        """Whether all that the pod exchanges with other nodes is said to be encrypted between them."""
        families = map(IpFamily.of, workload.addresses)
        return self.encryption is not None and self.encryption.covers(workload.node, families)

    def peer(self, workload: Workload) -> Peer:
        """The workload as policies see it, with the CIDRs that contain its addresses."""
        return workload.peer(networks=self._networks(workload.addresses))

    def sources(self) -> dict[str, Peer]:
        """Every source that policies can tell apart, by name: the workloads, another node, the world."""
        found = dict(self.others)
        found |= {workload.key: self.peer(workload) for workload in self.workloads if not workload.host_network}
        found[OTHER_NODE] = Peer(entities=frozenset({Entity.REMOTE_NODE}))
        found[WORLD] = Peer(entities=frozenset({Entity.WORLD, Entity.WORLD_IPV4, Entity.WORLD_IPV6}))
        return found

    def selected_by(self, service: Service) -> list[Workload]:
        """The workloads a Service sends to."""
        if not service.selector:
            return []
        wanted = service.selector.items()
        return [w for w in self.workloads if w.namespace == service.namespace and wanted <= w.labels.items()]

    def frontends(self, workload: Workload, port: int) -> list[tuple[Service, int]]:
        """The Services and their ports through which a workload's TCP port is reached."""
        found = []
        for service in self._services_of(workload):
            found += [
                (service, entry.port)
                for entry in service.ports
                if entry.protocol == "TCP" and target_port(workload, entry.target) == port
            ]
        return found

    def declared_ports(self, workload: Workload) -> list[int]:
        """The TCP ports somebody declares: containers, probes, Services."""
        found = {port.port for port in workload.ports if port.protocol == "TCP"}
        found |= {number for probe in workload.probe_ports if (number := target_port(workload, probe)) is not None}
        for service in self._services_of(workload):
            targets = (target_port(workload, p.target) for p in service.ports if p.protocol == "TCP")
            found |= {target for target in targets if target is not None}
        return sorted(found)

    def _services_of(self, workload: Workload) -> Iterable[Service]:
        return (service for service in self._services.get(workload.namespace, ()) if service.selects(workload))

    @cached_property
    def _services(self) -> Mapping[str, list[Service]]:
        found: dict[str, list[Service]] = {}
        for service in self.services:
            found.setdefault(service.namespace, []).append(service)
        return found

    def _networks(self, addresses: Iterable[IpAddress]) -> frozenset[IpNetwork]:
        return frozenset().union(*map(self._network_index.containing, addresses))

    @cached_property
    def _network_index(self) -> NetworkIndex:
        return NetworkIndex(self.policies.referenced_networks())


def target_port(workload: Workload, target: int | str) -> int | None:
    """A port number, or the container port of that name."""
    if isinstance(target, int):
        return target
    return next((port.port for port in workload.ports if port.name == target), None)


def inventory(
    documents: Iterable[Document],
    *,
    mesh: MeshSettings | None = None,
    defaults: MeshDefaults | None = None,
    seen: Mapping[str, SeenRules] | None = None,
    now: datetime | None = None,
) -> Inventory:
    """Read a cluster from its objects.

    Args:
        seen: The rules read in the namespaces of pods, by ``namespace/name``.
        now: When it is, for what BypassPolicies accept until some time; without it they are not read.
    """
    parsed = [parse(document) for document in documents]
    return inventory_of(parsed, mesh=mesh, defaults=defaults, seen=seen, now=now)


def inventory_of(
    parsed: Sequence[Parsed],
    *,
    mesh: MeshSettings | None = None,
    defaults: MeshDefaults | None = None,
    seen: Mapping[str, SeenRules] | None = None,
    now: datetime | None = None,
    encryption: NodeEncryption | None = None,
) -> Inventory:
    """The same of objects that were parsed before; what encrypts between nodes is looked for among them, too."""
    rules = seen or {}
    workloads = workloads_of(parsed)
    named = {o.name for item in parsed for o in item.objects if isinstance(o, Namespace)}
    policies = PolicySet.of_parsed(parsed, mesh or MeshSettings())
    services = tuple(o for item in parsed for o in item.objects if isinstance(o, Service))
    known = (o for item in parsed for o in item.registry)
    states = {
        w.key: capture_state(w if w.namespace in named else _expecting(w), mesh=defaults, seen=rules.get(w.key))
        for w in workloads
    }
    return Inventory(
        tuple(_injected(workload, states[workload.key]) for workload in workloads),
        services,
        policies,
        states,
        predicted=seen is None,
        bypass_policies=NO_BYPASS_POLICIES if now is None else BypassPolicies.of((p.document for p in parsed), now),
        defaults=defaults,
        registry=Registry(known, services, policies.mesh, policies.peer_authentication),
        registry_only=mesh.registry_only if mesh is not None else None,
        encryption=encryption or node_encryption(p.document for p in parsed),
    )


def _expecting(workload: Workload) -> Workload:
    """Nothing is said of its namespace: whoever writes annotations for a sidecar expects one."""
    if workload.addresses or not any(name.startswith(TRAFFIC) for name in workload.annotations):
        return workload
    return replace(workload, namespace_labels={"istio-injection": "enabled"})


def _injected(workload: Workload, state: CaptureState) -> Workload:
    """A pod as a person wrote it, with the sidecar that the injector will give it; what runs stays what it is."""
    predicted = state.truth is Truth.PREDICTED and not workload.addresses
    return replace(workload, proxy=ProxyClass.SIDECAR) if predicted else workload


def workloads_of(parsed: Iterable[Parsed]) -> tuple[Workload, ...]:
    """Pods and the templates of pods, with the labels of their namespaces, by name.

    A template is left out where pods that carry its labels are given: those are what became of it.
    """
    every = list(parsed)
    namespaces = {o.name: o for item in every for o in item.objects if isinstance(o, Namespace)}
    pods: dict[str, Workload] = {}
    templates: dict[str, Workload] = {}
    for item in every:
        for read in item.objects:
            if isinstance(read, Workload):
                namespace = namespaces.get(read.namespace)
                written = replace(read, namespace_labels=namespace.labels) if namespace else read
                (pods if item.document.kind == "Pod" else templates)[read.key] = written
    found = dict(pods)
    labelled = {(pod.namespace, label) for pod in pods.values() for label in pod.labels.items()}
    for template in templates.values():
        candidates = all((template.namespace, label) in labelled for label in template.labels.items())
        if not (template.labels and candidates and any(_became(template, pod) for pod in pods.values())):
            found.setdefault(template.key, template)
    return tuple(found[key] for key in sorted(found))


def _became(template: Workload, pod: Workload) -> bool:
    return pod.namespace == template.namespace and template.labels.items() <= pod.labels.items()
