"""The cluster at one moment, as another thread than the one that keeps it may look at it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Final

from meshbridge.bypass.bypasspolicy import BypassPolicy
from meshbridge.bypass.encryption import node_encryption
from meshbridge.controller.cluster import TERMINAL_PHASES
from meshbridge.controller.scene import Scene, maker_of
from meshbridge.identity.model import Peer, Workload
from meshbridge.kube.manifests import Key
from meshbridge.kube.problems import Problem
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Document
from meshbridge.policy.parse import Parsed
from meshbridge.policy.parse.cluster import Service
from meshbridge.xds.nodereport import NodeReport

_NO_TIME: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Picture:
    """``problems`` are those of single objects; ``reports`` what nodes say of their own pods, by node.

    ``parsed`` are the objects that policies and the registry consist of.
    """

    documents: Mapping[Key, tuple[Document, ...]]
    problems: Mapping[Key, tuple[Problem, ...]]
    policies: tuple[BypassPolicy, ...]
    workloads: tuple[Workload, ...]
    reports: Mapping[str, NodeReport]
    parsed: tuple[Parsed, ...] = ()
    services: tuple[Service, ...] = ()
    mesh: MeshSettings = DEFAULT_MESH
    now: datetime = _NO_TIME

    @cached_property
    def scene(self) -> Scene:
        """The same as a report on bypasses sees it."""
        return self.scene_of(self.parsed)

    def scene_of(self, parsed: Sequence[Parsed]) -> Scene:
        """The same with other objects of policies and the registry."""
        encryption = node_encryption(document for held in self.documents.values() for document in held)
        return Scene(
            self.enforced, parsed, self.services, self.policies, self.mesh, self.now, self._maker_of, encryption
        )

    def _maker_of(self, pod: Workload) -> str:
        return maker_of(pod, next(iter(self.documents.get(("", "Pod", pod.namespace, pod.name), ())), None))

    def selected(self, policy: BypassPolicy) -> list[Workload]:
        """The pods a BypassPolicy selects on whose interfaces a node enforces."""
        return [pod for peer, pods in self._alike if policy.subject.matches(peer) for pod in pods]

    @cached_property
    def enforced(self) -> tuple[Workload, ...]:
        """The pods with interfaces of their own that carry their addresses, on some node."""
        return tuple(
            pod
            for pod in self.workloads
            if pod.node and pod.addresses and not pod.host_network and pod.phase not in TERMINAL_PHASES
        )

    @cached_property
    def bypassing(self) -> frozenset[str]:
        """Those among them whose specifications let something pass by their sidecars, by UID."""
        return frozenset(pod.uid for kind in self.scene.kinds if kind.bypasses for pod in kind.pods)

    @cached_property
    def _alike(self) -> Iterable[tuple[Peer, list[Workload]]]:
        """Pods that a selector cannot tell apart, together: there are few kinds of pods and many of each."""
        found: dict[tuple[object, ...], list[Workload]] = {}
        for pod in self.enforced:
            labels = (frozenset(pod.labels.items()), frozenset(pod.namespace_labels.items()))
            found.setdefault((pod.namespace, *labels, pod.service_account, pod.proxy), []).append(pod)
        return [(pods[0].peer(), pods) for pods in found.values()]
