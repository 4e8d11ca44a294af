"""Services with the pods behind them, as resources: what a node has to know to judge a Service's address."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from meshbridge.controller.messages import resource, service_message
from meshbridge.identity.model import IpAddress, Workload
from meshbridge.kube.manifests import Key
from meshbridge.policy.parse.cluster import EndpointSlice, Service
from meshbridge.xds.tables import Resource, Table

_Pair = tuple[str, str]


@dataclass(slots=True)
class ServiceBook:
    """The Services of a cluster, kept up with single changes of them and of pods.

    A pod counts as a backend from its first address to its end, ready or not: readiness changes faster than it travels,
    and a frontend passes only where every backend would.

    Behind a Service without a selector are the addresses that its EndpointSlices list, at the ports it names by number.

    Cost: a pod that comes, goes or changes is looked at by the Services of its namespace; those that select it are made
    anew together, with one pass over the namespace's pods.
    """

    headless: bool = False
    """Whether Services without addresses are told of as well, for those behind them."""
    resources: Table = field(default_factory=Table)
    """By ``namespace/name``; the same mapping until something changes."""
    _by_namespace: dict[str, dict[str, Service]] = field(default_factory=dict)
    _slices: dict[Key, EndpointSlice] = field(default_factory=dict)
    _stale: dict[str, set[str]] = field(default_factory=dict)

    def put(self, key: Key, service: Service | None) -> None:
        """This is the Service now, or, with None, there is none."""
        _, _, namespace, name = key
        services = self._by_namespace.setdefault(namespace, {})
        if service is None:
            services.pop(name, None)
        else:
            services[name] = service
        self._stale.setdefault(namespace, set()).add(name)

    def put_slice(self, key: Key, part: EndpointSlice | None) -> EndpointSlice | None:
        """This is the slice now, or, with None, there is none; returns what it was."""
        before = self._slices.pop(key, None)
        if part is not None and part.service:
            self._slices[key] = part
        for each in (before, part):
            if each is not None and each.service:
                self._stale.setdefault(each.namespace, set()).add(each.service)
        return before

    def is_behind(self, namespace: str, name: str, address: IpAddress) -> bool:
        """Whether a slice of the Service lists ``address``."""
        return any(address in part.addresses for part in self._parts(namespace, name))

    def _parts(self, namespace: str, name: str) -> list[EndpointSlice]:
        return [part for part in self._slices.values() if part.of(namespace, name)]

    def _listed(self, service: Service) -> list[IpAddress]:
        if service.selector is not None:
            return []
        listed = {address for part in self._parts(service.namespace, service.name) for address in part.addresses}
        return sorted(listed, key=lambda address: (address.version, int(address)))

    def pod_changed(self, old: Workload | None, new: Workload | None) -> None:
        """A pod came, went or is another now."""
        pods = [pod for pod in (old, new) if pod is not None]
        for namespace in {pod.namespace for pod in pods}:
            for name, service in self._by_namespace.get(namespace, {}).items():
                if any(service.selects(pod) for pod in pods):
                    self._stale.setdefault(namespace, set()).add(name)

    def refresh(self, pods_in: Callable[[str], Iterable[Workload]]) -> None:
        """Bring ``resources`` up to date; ``pods_in`` are the pods of a namespace that hold addresses."""
        if not self._stale:
            return
        stale, self._stale = self._stale, {}
        updated: dict[str, Resource | None] = {}
        for namespace, names in stale.items():
            services = self._by_namespace.get(namespace, {})
            known = {name: services[name] for name in names if name in services}
            for name in names - known.keys():
                updated[f"{namespace}/{name}"] = None
            for name, pods in _selected(known, pods_in(namespace)).items():
                service = known[name]
                if service.addresses or service.outside_addresses or (self.headless and service.selector):
                    message = service_message(service, pods, self._listed(service))
                    updated[f"{namespace}/{name}"] = resource(message)
                else:
                    updated[f"{namespace}/{name}"] = None
        if any(self.resources.get(name) != resource for name, resource in updated.items()):
            self.resources = self.resources.changed(updated)


def _selected(services: dict[str, Service], pods: Iterable[Workload]) -> dict[str, list[Workload]]:
    """The pods of each Service, found by one label of its selector."""
    by_pair: dict[_Pair, list[str]] = {}
    for name, service in services.items():
        if service.selector:
            by_pair.setdefault(min(service.selector.items()), []).append(name)
    found: dict[str, list[Workload]] = {name: [] for name in services}
    if by_pair:
        for pod in pods:
            for pair in pod.labels.items():
                for name in by_pair.get(pair, ()):
                    if services[name].selects(pod):
                        found[name].append(pod)
    return found
