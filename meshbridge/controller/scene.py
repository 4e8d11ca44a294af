"""The cluster as a report on bypasses sees it: of pods that no report can tell apart, two stand for all.

So what is computed, and what is written, depends on how many kinds of pods there are, and not on how many pods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Final

from meshbridge.bypass.bypasspolicy import BypassPolicies, BypassPolicy
from meshbridge.bypass.capture import bypasses_sidecar, capture_state
from meshbridge.bypass.clients import Registry
from meshbridge.bypass.encryption import NodeEncryption
from meshbridge.bypass.inventory import Inventory
from meshbridge.identity.model import IpFamily, Workload
from meshbridge.identity.networks import NetworkIndex
from meshbridge.policy.mesh import MeshSettings
from meshbridge.policy.model import Document
from meshbridge.policy.parse import Parsed
from meshbridge.policy.parse.cluster import Service
from meshbridge.policy.policyset import PolicySet

_STANDING: Final = 2
"""Two, since pods of one kind are also each other's peers."""
_ANNOTATIONS: Final = ("istio.io", "meshbridge.io", "prometheus.io")
"""Only these groups' annotations say anything about bypasses."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Pods that no report tells apart; ``standing`` are those in the inventory.

    ``name`` is that of who made them, or of the first one where nobody did.
    """

    key: tuple[Any, ...]
    name: str
    pods: tuple[Workload, ...]
    bypasses: bool

    @property
    def standing(self) -> tuple[Workload, ...]:
        return self.pods[:_STANDING]

    @property
    def first(self) -> Workload:
        return self.pods[0]


class Scene:
    """Kinds of pods, and an inventory of those that stand for them."""

    def __init__(
        self,
        pods: Iterable[Workload],
        parsed: Sequence[Parsed],
        services: Sequence[Service],
        policies: Iterable[BypassPolicy],
        mesh: MeshSettings,
        now: datetime,
        maker_of: Callable[[Workload], str],
        encryption: NodeEncryption | None = None,
    ) -> None:
        """
        Args:
            maker_of: who made a pod, which outlives it, as ``namespace/name``; empty where nobody did.
        """
        self._pods, self._parsed, self._services = tuple(pods), tuple(parsed), tuple(services)
        self._mesh, self._maker_of, self._encryption = mesh, maker_of, encryption
        self._bypass_policies = BypassPolicies(tuple(sorted(policies, key=lambda policy: policy.origin)), now)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """In an order that does not depend on the pods'."""
        networks = NetworkIndex(self._policies.referenced_networks())
        found: dict[tuple[Any, ...], list[Workload]] = {}
        for pod in sorted(self._pods, key=lambda pod: pod.key):
            within = frozenset().union(*map(networks.containing, pod.addresses))
            key = (self._maker_of(pod), within, self._is_encrypted(pod), *_told_apart(pod))
            found.setdefault(key, []).append(pod)
        return tuple(
            Kind(key, key[0] or alike[0].key, tuple(alike), bypasses_sidecar(alike[0])) for key, alike in found.items()
        )

    def _is_encrypted(self, pod: Workload) -> bool:
        return self._encryption is not None and self._encryption.covers(pod.node, map(IpFamily.of, pod.addresses))

    def is_like(self, other: Scene) -> bool:
        """Whether the same holds of every kind of pods in both, however many pods there are."""
        mine, theirs = ((*s._parsed, *s._services, *s._bypass_policies.policies) for s in (self, other))
        return (
            len(mine) == len(theirs)
            and all(one is another for one, another in zip(mine, theirs, strict=True))
            and (self._mesh, self._encryption) == (other._mesh, other._encryption)
            and self._bypass_policies.next_change == other._bypass_policies.next_change
            and {kind.key: kind.name for kind in self.kinds} == {kind.key: kind.name for kind in other.kinds}
        )

    @cached_property
    def inventory(self) -> Inventory:
        pods = tuple(pod for kind in self.kinds for pod in kind.standing)
        known = [found for item in self._parsed for found in item.registry]
        policies = self._policies
        return Inventory(
            tuple(sorted(pods, key=lambda pod: pod.key)),
            self._services,
            policies,
            {pod.key: capture_state(pod) for pod in pods},
            bypass_policies=self._bypass_policies,
            registry=Registry(known, self._services, self._mesh, policies.peer_authentication),
            registry_only=self._mesh.registry_only,
            encryption=self._encryption,
        )

    @cached_property
    def _policies(self) -> PolicySet:
        return PolicySet.of_parsed(self._parsed, self._mesh)


def maker_of(pod: Workload, document: Document | None) -> str:
    """``namespace/name`` of whoever made the pod, which outlives it; empty where nobody did."""
    metadata = document.data.get("metadata") if document is not None else None
    owners = metadata.get("ownerReferences") if isinstance(metadata, Mapping) else None
    for owner in owners if isinstance(owners, list) else ():
        if isinstance(owner, Mapping) and owner.get("controller") is True and isinstance(owner.get("name"), str):
            generated = f"-{pod.labels.get('pod-template-hash', '')}"
            name = owner["name"].removesuffix(generated) if owner.get("kind") == "ReplicaSet" else owner["name"]
            return f"{pod.namespace}/{name}"
    return ""


def _told_apart(pod: Workload) -> tuple[Any, ...]:
    said = {name: text for name, text in pod.annotations.items() if any(group in name for group in _ANNOTATIONS)}
    return (
        pod.namespace, _items(pod.labels), _items(pod.namespace_labels), _items(said), pod.service_account, pod.ports,
        pod.probe_ports, pod.host_network, pod.proxy, pod.init_args, _items(pod.init_env), pod.proxy_container,
        pod.init_containers, frozenset(map(IpFamily.of, pod.addresses)),
    )  # fmt: skip


def _items(mapping: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(mapping.items())
