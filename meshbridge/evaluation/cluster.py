"""A cluster as its manifests say it is, and who the two ends of a flow are in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.clients import Registry
from meshbridge.bypass.inventory import workloads_of
from meshbridge.bypass.state import INTERFACE, CaptureState, Truth, capture_of
from meshbridge.evaluation.question import LabelledPod, Question, QuestionError, address_of
from meshbridge.identity.model import Entity, IpAddress, IpFamily, ProxyClass, Workload
from meshbridge.policy.capture import AppProtocol, Capture
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Document, Judge
from meshbridge.policy.parse import parse
from meshbridge.policy.parse.cluster import API_SERVER, EndpointSlice, Namespace, Node, Service
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.protocols import declared_protocols

JUDGES: Final = frozenset(Judge)
DATAPLANE_MODE: Final = "istio.io/dataplane-mode"
_ENDED: Final = frozenset({"Succeeded", "Failed"})
_EXAMPLES: Final = (IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1"))


@dataclass(frozen=True, slots=True)
class Party:
    """One end of a flow: a pod, a node, a Service's address, or whoever has ``entities``.

    ``address`` is None where nobody said it. A pod on its node's network is that node.
    """

    name: str
    address: IpAddress | None = None
    workload: Workload | None = None
    node: str = ""
    entities: frozenset[Entity] = frozenset()
    services: tuple[Service, ...] = ()

    @property
    def endpoint(self) -> Workload | None:
        """The pod, if the kernel can tell its packets from its node's."""
        return self.workload if self.workload is not None and not self.workload.host_network else None


class Cluster:
    """Everything that documents say, by the names and addresses questions use."""

    def __init__(self, documents: Iterable[Document], mesh: MeshSettings = DEFAULT_MESH) -> None:
        parsed = [parse(document) for document in documents]
        objects = [found for item in parsed for found in item.objects]
        self.policies = PolicySet.of_parsed(parsed, mesh)
        self.services = tuple(found for found in objects if isinstance(found, Service))
        self.registry = Registry(
            (found for item in parsed for found in item.registry),
            self.services,
            mesh,
            self.policies.peer_authentication,
        )
        self._slices = tuple(found for found in objects if isinstance(found, EndpointSlice))
        self.api_servers = frozenset(a for part in self._slices if part.of(*API_SERVER) for a in part.addresses)
        self._namespaces = {found.name: found for found in objects if isinstance(found, Namespace)}
        self._nodes = {found.name: found for found in objects if isinstance(found, Node)}
        self._workloads = {workload.key: workload for workload in workloads_of(parsed)}
        self._templates = {
            found.key: replace(found, namespace_labels=self._labels_of(found.namespace))
            for found in objects
            if isinstance(found, Workload) and found.key not in self._workloads
        }
        self._injected: dict[str, Workload] = {}
        self._predicted: dict[tuple[object, ...], bool] = {}
        self._given: dict[tuple[int, ProxyClass], Workload] = {}
        self._labelled: dict[LabelledPod, Workload] = {}
        self._captures: dict[tuple[int, str], tuple[Workload, Capture]] = {}
        self._states: dict[int, tuple[Workload, CaptureState]] = {}

    def _labels_of(self, namespace: str) -> Mapping[str, str]:
        found = self._namespaces.get(namespace)
        return found.labels if found else {}

    @cached_property
    def workloads(self) -> tuple[Workload, ...]:
        """Every pod, and what makes pods, as it will run; by name."""
        return tuple(found for key in self._workloads if (found := self._pod(key)) is not None)

    @cached_property
    def _pods_at(self) -> dict[IpAddress, Workload]:
        return {
            address: workload
            for workload in self._workloads.values()
            if workload.phase not in _ENDED and not workload.host_network
            for address in workload.addresses
        }

    @cached_property
    def _nodes_at(self) -> dict[IpAddress, Node]:
        return {address: node for node in self._nodes.values() for address in node.addresses}

    @cached_property
    def _services_at(self) -> dict[IpAddress, list[Service]]:
        found: dict[IpAddress, list[Service]] = {}
        for service in self.services:
            for address in dict.fromkeys((*service.addresses, *service.outside_addresses)):
                found.setdefault(address, []).append(service)
        return found

    def node_labels(self, name: str) -> Mapping[str, str]:
        """The labels of a node; none where it is not among the documents."""
        node = self._nodes.get(name)
        return node.labels if node is not None else {}

    def source(self, question: Question) -> Party:
        """Who sends.

        Raises:
            QuestionError: there is no such pod, node or entity.
        """
        return self._party(question.source, question.source_ip, "src")

    def destination(self, question: Question) -> Party:
        """Who is sent to, with the proxy that the question gives it.

        Raises:
            QuestionError: there is no such pod, node or entity.
        """
        if isinstance(question.destination, LabelledPod):
            pod = self._by_labels(question.destination)
            party = Party(f"a pod of {pod.namespace}", question.destination_ip, pod, pod.node)
        else:
            party = self._party(question.destination, question.destination_ip, "dst")
        if question.proxy is None or party.workload is None:
            return party
        return replace(party, workload=self._with_proxy(party.workload, question.proxy))

    def _party(self, text: str, address: IpAddress | None, where: str) -> Party:
        given = address_of(text)
        if given is not None:
            return self._at(given)
        kind, _, name = text.partition(":")
        if kind == "entity":
            return Party(text, address, entities=_entities(name, where))
        namespace, slash, name = text.partition("/")
        if namespace == "node" and slash:
            node = self._nodes.get(name)
            held = address or next(iter(node.addresses if node is not None else ()), None)
            return Party(text, held, node=name, entities=frozenset({Entity.REMOTE_NODE}))
        workload = self._pod(text)
        if workload is None:
            fix = 'write "ns/pod" of a Pod or of what makes pods, an address, "node/NAME" or "entity:world"'
            if alike := sorted(key for key in self._workloads if slash and key.startswith(text))[:3]:
                fix = f"there is {', '.join(alike)}"
            raise QuestionError(f"no pod {text[:120]!r} is known", where=where, fix=fix)
        return Party(text, address or next(iter(workload.addresses), None), workload, workload.node)

    def _at(self, address: IpAddress) -> Party:
        services = self._services_at.get(address)
        if services:
            return Party(str(address), address, services=tuple(services), entities=_world(address))
        pod = self._pods_at.get(address)
        if pod is not None:
            return Party(pod.key, address, self._pod(pod.key), pod.node)
        node = self._nodes_at.get(address)
        if node is not None:
            return Party(f"node/{node.name}", address, node=node.name, entities=frozenset({Entity.REMOTE_NODE}))
        entry = self.registry.entry_at(address)
        name = f"{address} (WorkloadEntry {entry.namespace}/{entry.name})" if entry is not None else str(address)
        return Party(name, address, entities=_world(address))

    def _pod(self, key: str) -> Workload | None:
        found = self._injected.get(key)
        if found is None:
            written = self._workloads.get(key) or self._templates.get(key)
            if written is None:
                return None
            found = self._injected[key] = self._as_it_will_run(written)
        return found

    def _as_it_will_run(self, workload: Workload) -> Workload:
        """The pod, or a template of pods; with a sidecar where the injector will give it one, else maybe in ambient."""
        if workload.proxy is not ProxyClass.NONE or workload.host_network:
            return workload
        asked = _injection_key(workload)
        predicted = self._predicted.get(asked)
        if predicted is None:
            predicted = self._predicted[asked] = self.capture_state(workload).truth is Truth.PREDICTED
        if predicted:
            return replace(workload, proxy=ProxyClass.SIDECAR)
        mode = workload.labels.get(DATAPLANE_MODE, workload.namespace_labels.get(DATAPLANE_MODE))
        return replace(workload, proxy=ProxyClass.AMBIENT) if mode == "ambient" else workload

    def _with_proxy(self, workload: Workload, proxy: ProxyClass) -> Workload:
        found = self._given.get((id(workload), proxy))
        if found is None:
            found = self._given[id(workload), proxy] = _with_proxy(workload, proxy)
        return found

    def _by_labels(self, asked: LabelledPod) -> Workload:
        """The pod of the files with exactly these labels, else one that nobody wrote down: with a sidecar."""
        found = self._labelled.get(asked)
        if found is None:
            labels = dict(asked.labels)
            alike = [w for w in self._workloads.values() if w.namespace == asked.namespace and w.labels == labels]
            if alike:
                found = self._pod(alike[0].key)
            if found is None:
                found = Workload(
                    asked.namespace, "", "", "", (), labels, self._labels_of(asked.namespace),
                    proxy=ProxyClass.SIDECAR,
                )  # fmt: skip
            self._labelled[asked] = found
        return found

    def backends(self, service: Service) -> list[Workload]:
        """The pods behind a Service."""
        found = (self._pod(w.key) for w in self._workloads.values() if service.selects(w) and w.phase not in _ENDED)
        return [workload for workload in found if workload is not None]

    def listed(self, service: Service, family: IpFamily) -> list[Party]:
        """Who answers behind a Service without a selector, as its EndpointSlices list them."""
        if service.selector is not None:
            return []
        parts = (part for part in self._slices if part.of(service.namespace, service.name))
        found = dict.fromkeys(address for part in parts for address in part.addresses)
        return [self._at(a) for a in found if IpFamily.of(a) is family and a not in self._services_at]

    def capture(self, workload: Workload, interface: str = INTERFACE) -> Capture:
        """How the pod's TCP on one of its interfaces will reach its Envoy once its redirect rules are seen."""
        if workload.proxy is ProxyClass.NONE:
            return Capture.none()
        key = (id(workload), interface)
        known = self._captures.get(key)
        if known is None:
            state = self.capture_state(workload)
            capture = capture_of(state, judges=JUDGES, interface=interface, intended=True)
            known = self._captures[key] = (workload, capture)
        return known[1]

    def capture_state(self, workload: Workload) -> CaptureState:
        """Which of the pod's flows its Envoy sees, and why it does not see others."""
        known = self._states.get(id(workload))
        if known is None:
            shown = workload if workload.addresses else replace(workload, addresses=_EXAMPLES[:1])
            state = capture_state(shown, mesh=MeshDefaults(interception_mode=self.policies.mesh.interception))
            known = self._states[id(workload)] = (workload, state)
        return known[1]

    def protocols(self, workload: Workload) -> dict[int, AppProtocol]:
        """What Envoy takes the pod's ports for, where a Service says it, or a Gateway or Sidecar in its place."""
        if workload.proxy is ProxyClass.GATEWAY:
            return self.registry.served_by(workload)
        scope = self.registry.scope_of(workload)
        if scope is not None and scope.ingress is not None:
            return dict(scope.ingress)
        return dict(declared_protocols(workload, self.services)[0])


def _injection_key(workload: Workload) -> tuple[object, ...]:
    """What injection depends on; a Deployment's pods are equal in it."""
    meant = (item for several in (workload.labels, workload.annotations) for item in several.items())
    return (workload.namespace, workload.init_args, tuple(sorted(item for item in meant if "istio.io/" in item[0])))


def _with_proxy(workload: Workload, proxy: ProxyClass) -> Workload:
    if workload.proxy is proxy:
        return workload
    if proxy is ProxyClass.SIDECAR:
        return replace(workload, proxy=proxy)
    return replace(workload, proxy=proxy, init_args=None, proxy_container=None, init_containers=())


def _entities(name: str, where: str) -> frozenset[Entity]:
    try:
        entity = Entity(name)
    except ValueError:
        known = ", ".join(Entity)
        raise QuestionError(f"no entity {name[:80]!r}", where=where, fix=f"use one of: {known}") from None
    return frozenset({entity, Entity.WORLD} if entity in (Entity.WORLD_IPV4, Entity.WORLD_IPV6) else {entity})


def _world(address: IpAddress) -> frozenset[Entity]:
    family = Entity.WORLD_IPV4 if IpFamily.of(address) is IpFamily.IPV4 else Entity.WORLD_IPV6
    return frozenset({Entity.WORLD, family})
