"""What a cluster holds, as far as an admission asks for it, parsed once and kept by where it matters.

The verdict on a pod's bypasses needs only what can select the pod: the policies and Services of its namespace, the
mesh's root and what is cluster-scoped. ``meshbridge.io/bypass: auto`` asks as well who may call the pod; for that, pods
that no policy and no Service can tell apart are one.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Final

from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.encryption import NodeEncryption, node_encryption
from meshbridge.bypass.inventory import Inventory, inventory_of
from meshbridge.identity.model import IpFamily, IpNetwork, Workload
from meshbridge.identity.networks import NetworkIndex
from meshbridge.policy.cilium import CNI_KINDS
from meshbridge.policy.mesh import DEFAULT_MESH, AuthorizationPolicy, MeshSettings
from meshbridge.policy.model import Document
from meshbridge.policy.parse import CILIUM_CONFIG, Parsed, parse
from meshbridge.policy.providers import Meeting, meetings

Key = tuple[str, str, str, str]

_CLUSTER: Final = ""
_ENDED: Final = ("Succeeded", "Failed")
_OF_NODES: Final = CNI_KINDS | {("", "Node")}
_DOMAINS: Final = ("istio.io", "meshbridge.io")
"""Whose annotations decide what bypasses; others are often those of one pod alone."""


@dataclass(frozen=True)
class _Distinctions:
    """By what any policy, Service or object of Istio's registry can tell two pods apart."""

    labels: frozenset[str]
    networks: frozenset[IpNetwork]

    @cached_property
    def _index(self) -> NetworkIndex:
        return NetworkIndex(self.networks)

    def group(self, pod: Workload) -> Hashable:
        """Equal for pods that are the same to every policy, Service and redirection."""
        networks: frozenset[IpNetwork] = frozenset().union(*map(self._index.containing, pod.addresses))
        families = frozenset(map(IpFamily.of, pod.addresses))
        labels = {name: value for name, value in pod.labels.items() if name in self.labels}
        asked = {name: value for name, value in pod.annotations.items() if name.partition("/")[0].endswith(_DOMAINS)}
        anonymous = replace(pod, name="", uid="", node="", addresses=(), labels=labels, annotations=asked)
        return anonymous, networks, families, frozenset(labels.items())


class Surroundings:
    """The objects of a cluster; ``apply`` takes changes in, from one thread, and every other may ask.

    Cost: a change of a pod costs its parsing; a review costs what its namespace and the mesh's root hold of policies
    and Services, whatever there is elsewhere; ``auto`` costs one pass over the kinds of pods there are.
    """

    def __init__(self) -> None:
        self.synced = False
        self._lock = threading.Lock()
        self._mesh = DEFAULT_MESH
        self._defaults: MeshDefaults | None = None
        self._scopes: dict[str, dict[Key, Parsed]] = {}
        self._pods: dict[Key, Parsed] = {}
        self._groups: dict[Hashable, dict[Key, Parsed]] = {}
        self._group_of: dict[Key, Hashable] = {}
        self._distinctions: _Distinctions | None = None
        self._everything: Inventory | None = None
        self._of_nodes: dict[Key, Document] = {}
        self._encryption: NodeEncryption | None = None

    def apply(
        self, changed: Mapping[Key, tuple[Document, ...]], mesh: MeshSettings, defaults: MeshDefaults | None
    ) -> None:
        """These objects are so now, or gone. The first time tells everything there is."""
        parsed = {key: parse(documents[0]) if documents else None for key, documents in changed.items()}
        with self._lock:
            if (mesh, defaults) != (self._mesh, self._defaults):
                self._mesh, self._defaults, self._everything = mesh, defaults, None
            self._look_at_nodes(parsed)
            for key, found in parsed.items():
                if key[1] == "Pod":
                    self._put_pod(key, found)
                else:
                    self._put(key, found)
            self.synced = True

    def near(self, reviewed: Document, now: datetime) -> Inventory:
        """One object, with what can select its pods; who else there is is left out."""
        namespace = reviewed.namespace
        with self._lock:
            scopes = dict.fromkeys((namespace, self._mesh.root_namespace, _CLUSTER))
            around = [
                parsed
                for scope in scopes
                for parsed in self._scopes.get(scope, {}).values()
                if not parsed.network and not parsed.registry  # those have no say in what a bypass loses
            ]
            mesh, defaults, encrypting = self._mesh, self._defaults, self._encryption
        given = [*around, parse(reviewed)]
        return inventory_of(given, mesh=mesh, defaults=defaults, now=now, encryption=encrypting)

    def meetings(self, policy: AuthorizationPolicy) -> list[Meeting]:
        """Where a CUSTOM policy meets those of other providers; its older self is not among them."""
        with self._lock:
            mesh = self._mesh
            scopes = list(self._scopes) if policy.namespace == mesh.root_namespace else [policy.namespace]
            others = [
                other
                for scope in dict.fromkeys((*scopes, mesh.root_namespace))
                for parsed in self._scopes.get(scope, {}).values()
                for other in parsed.authorization
                if (other.namespace, other.name) != (policy.namespace, policy.name)
            ]
            pods = [pod.peer() for parsed in self._pods.values() if (pod := _workload(parsed)) and not pod.host_network]
        return list(meetings(policy, others, pods, mesh))

    def with_others(self, workload: Workload, near: Inventory) -> Inventory:
        """``workload`` among one pod of every kind there is, under every policy; its older self is not among them."""
        with self._lock:
            base = self._current()
        others = tuple(other for other in base.workloads if other.key != workload.key)
        states = {**base.states, workload.key: near.states[workload.key]}
        return replace(base, workloads=(*others, workload), states=states, bypass_policies=near.bypass_policies)

    def _look_at_nodes(self, changed: Mapping[Key, Parsed | None]) -> None:
        """What is said to encrypt between nodes is known anew, as it is asked of all their objects at once."""
        telling = {key: found for key, found in changed.items() if key == CILIUM_CONFIG or key[:2] in _OF_NODES}
        for key, found in telling.items():
            if found is None:
                self._of_nodes.pop(key, None)
            else:
                self._of_nodes[key] = found.document
        if telling:
            before, self._encryption = self._encryption, node_encryption(self._of_nodes.values())
            if before != self._encryption:
                self._everything = None

    def _put(self, key: Key, found: Parsed | None) -> None:
        scope = key[3] if key[1] == "Namespace" else key[2]
        if found is None:
            self._scopes.get(scope, {}).pop(key, None)
        else:
            self._scopes.setdefault(scope, {})[key] = found
        self._everything = None

    def _put_pod(self, key: Key, found: Parsed | None) -> None:
        """Of a pod its object is not kept: nobody asks for more than what was read of it."""
        pod = _workload(found)
        if found is None or pod is None or pod.phase in _ENDED:
            self._forget(key)
            return
        if self._distinctions is not None and self._group_of.get(key) == self._distinctions.group(pod):
            return  # nothing that anybody asks for has changed
        self._forget(key)
        self._pods[key] = replace(found, document=replace(found.document, data={}))
        if self._distinctions is not None:
            self._join(key, self._distinctions)

    def _join(self, key: Key, distinctions: _Distinctions) -> None:
        pod = _workload(self._pods[key])
        assert pod is not None
        group = self._group_of[key] = distinctions.group(pod)
        members = self._groups.setdefault(group, {})
        if not members:
            self._everything = None
        members[key] = self._pods[key]

    def _forget(self, key: Key) -> None:
        self._pods.pop(key, None)
        group = self._group_of.pop(key, None)
        if group is None:
            return
        members = self._groups[group]
        if next(iter(members)) == key:
            self._everything = None  # it stood for the others
        del members[key]
        if not members:
            del self._groups[group]

    def _current(self) -> Inventory:
        if self._everything is None:
            every = [parsed for scope in self._scopes.values() for parsed in scope.values()]
            found = self._one_of_each(every)
            if self._tell_apart(_distinctions(every, found)):
                found = self._one_of_each(every)
            self._everything = found
        return self._everything

    def _one_of_each(self, every: Sequence[Parsed]) -> Inventory:
        pods = (next(iter(members.values())) for members in self._groups.values())
        return inventory_of([*every, *pods], mesh=self._mesh, defaults=self._defaults, encryption=self._encryption)

    def _tell_apart(self, distinctions: _Distinctions) -> bool:
        """Have pods grouped by these. True: they were not."""
        if self._distinctions == distinctions:
            return False
        self._distinctions = distinctions
        self._groups, self._group_of = {}, {}
        for key in self._pods:
            self._join(key, distinctions)
        return True


def _distinctions(every: Iterable[Parsed], found: Inventory) -> _Distinctions:
    selecting = [*found.services, *(each for parsed in every for each in parsed.registry)]
    selectors = (getattr(each, "selector", None) or () for each in selecting)
    labels = found.policies.referenced_labels().pod.union(*selectors)
    return _Distinctions(labels, found.policies.referenced_networks())


def _workload(parsed: Parsed | None) -> Workload | None:
    return next((found for found in parsed.objects if isinstance(found, Workload)), None) if parsed else None
