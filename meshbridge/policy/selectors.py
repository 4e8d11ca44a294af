"""Whom a rule picks: label selectors of both dialects, entities and CIDRs, as values over ``Peer``.

A selector of Kubernetes and one of Cilium become the same thing, a conjunction of requirements; what differs is where
the label is looked up (``LabelSource``). "Pods only" is a requirement as well: the namespace must exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from meshbridge.identity.model import Entity, IpNetwork, Peer

NAMESPACE_NAME_LABEL = "kubernetes.io/metadata.name"
"""On every namespace, whether or not anybody wrote it there."""


class LabelSource(StrEnum):
    """Where a requirement looks its key up."""

    POD = "pod"
    NAMESPACE = "namespace"
    NAMESPACE_LABEL = "namespace-label"
    SERVICE_ACCOUNT = "service-account"
    CLUSTER = "cluster"
    RESERVED = "reserved"
    NODE = "node"
    ABSENT = "absent"
    """A key no identity carries (Cilium filters such labels out): it never exists."""


class Operator(StrEnum):
    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True, order=True)
class Requirement:
    """One condition on one label. ``NotIn`` also holds where the key is absent."""

    source: LabelSource
    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, peer: Peer) -> bool:
        return self.accepts(label_of(peer, self.source, self.key))

    def accepts(self, value: str | None) -> bool:
        """Whether it holds where its key has this value; None: where there is no such key."""
        match self.operator:
            case Operator.IN:
                return value is not None and value in self.values
            case Operator.NOT_IN:
                return value is None or value not in self.values
            case Operator.EXISTS:
                return value is not None
            case Operator.DOES_NOT_EXIST:
                return value is None


@dataclass(frozen=True, slots=True)
class Selector:
    """A conjunction of requirements; none at all picks everything, nodes and the world included."""

    requirements: tuple[Requirement, ...] = ()

    @classmethod
    def of(cls, requirements: Iterable[Requirement]) -> Selector:
        """Equal for equal sets of requirements, in whatever order they were written."""
        return cls(tuple(sorted(set(requirements))))

    def matches(self, peer: Peer) -> bool:
        return all(requirement.matches(peer) for requirement in self.requirements)

    @property
    def namespaces(self) -> tuple[str, ...] | None:
        """The only namespaces it can pick from; None when it names none."""
        for requirement in self.requirements:
            if requirement.source is LabelSource.NAMESPACE and requirement.operator is Operator.IN:
                return requirement.values
        return None

    def contradiction(self) -> str:
        """Why it can pick nobody, as a sentence; empty when it can pick somebody."""
        by_label: dict[tuple[LabelSource, str], list[Requirement]] = {}
        for requirement in self.requirements:
            by_label.setdefault((requirement.source, requirement.key), []).append(requirement)
        for (_, key), requirements in by_label.items():
            operators = {requirement.operator for requirement in requirements}
            wanted = [set(r.values) for r in requirements if r.operator is Operator.IN]
            unwanted = {value for r in requirements if r.operator is Operator.NOT_IN for value in r.values}
            must_exist = bool(wanted) or Operator.EXISTS in operators
            if must_exist and Operator.DOES_NOT_EXIST in operators:
                return f"label {key!r} is required to exist and not to exist"
            if wanted and not set.intersection(*wanted) - unwanted:
                return f"no value of label {key!r} satisfies all requirements on it"
        return ""


EVERYBODY: Final = Selector()
"""Picks every peer."""


@dataclass(frozen=True, slots=True)
class EntityPeers:
    """Peers that are any of these reserved entities."""

    entities: frozenset[Entity]

    def matches(self, peer: Peer) -> bool:
        return not self.entities.isdisjoint(peer.entities)


@dataclass(frozen=True, slots=True)
class ClusterPeers:
    """Cilium's entity ``cluster``: every pod of the cluster, its nodes and what runs on them, not the world.

    An empty name is ``cluster-mesh``: the pods of any cluster.
    """

    cluster: str

    def matches(self, peer: Peer) -> bool:
        if peer.is_pod:
            return self.cluster in ("", peer.cluster)
        return not CLUSTER_ENTITIES.isdisjoint(peer.entities)


NODE_ENTITIES = frozenset({Entity.HOST, Entity.REMOTE_NODE})
CLUSTER_ENTITIES = frozenset(
    {
        Entity.HOST,
        Entity.REMOTE_NODE,
        Entity.INIT,
        Entity.INGRESS,
        Entity.HEALTH,
        Entity.UNMANAGED,
        Entity.KUBE_APISERVER,
    }
)


@dataclass(frozen=True, slots=True)
class CidrPeers:
    """Addresses inside ``cidr`` and in none of ``excepts``.

    ``pods`` and ``nodes`` say whether their addresses count: in a NetworkPolicy they do, in a CiliumNetworkPolicy a
    CIDR means the world only.
    """

    cidr: IpNetwork
    excepts: tuple[IpNetwork, ...] = ()
    pods: bool = True
    nodes: bool = True

    @property
    def in_cluster(self) -> bool:
        """Whether everybody with an address inside is meant, whatever holds it."""
        return self.pods and self.nodes

    def counts(self, peer: Peer) -> bool:
        """Whether it is somebody whose address is looked at."""
        if self.in_cluster or Entity.WORLD in peer.entities:
            return True
        return (self.pods and peer.is_pod) or (self.nodes and is_node(peer))

    def matches(self, peer: Peer) -> bool:
        if not self.counts(peer):
            return False
        return self.cidr in peer.networks and not any(network in peer.networks for network in self.excepts)


@dataclass(frozen=True, slots=True)
class CidrGroupReference:
    """The CiliumCIDRGroup of a name, or, without one, those whose labels satisfy ``requirements``; less ``excepts``."""

    name: str
    requirements: tuple[Requirement, ...] = ()
    excepts: tuple[IpNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class ServiceReference:
    """The pods of a Service: of a name, or, without one, of those with labels; an empty namespace is any."""

    namespace: str
    name: str
    requirements: tuple[Requirement, ...] = ()


Reference = CidrGroupReference | ServiceReference
"""Whoever other objects say that it is, see ``policy.references``."""

PeerSelector = Selector | EntityPeers | ClusterPeers | CidrPeers


def label_of(peer: Peer, source: LabelSource, key: str) -> str | None:
    """The value of a label of ``peer``, None when it has no such label."""
    match source:
        case LabelSource.POD:
            return peer.labels.get(key) if peer.is_pod else None
        case LabelSource.NAMESPACE:
            return peer.namespace
        case LabelSource.NAMESPACE_LABEL:
            if key == NAMESPACE_NAME_LABEL:
                return peer.namespace
            return peer.namespace_labels.get(key) if peer.is_pod else None
        case LabelSource.SERVICE_ACCOUNT:
            return peer.service_account if peer.is_pod else None
        case LabelSource.CLUSTER:
            return peer.cluster if peer.is_pod else None
        case LabelSource.RESERVED:
            return "" if key in peer.entities else None
        case LabelSource.NODE:
            if not is_node(peer):
                return None
            return peer.labels.get(key) if key else ""
        case LabelSource.ABSENT:
            return None


def is_node(peer: Peer) -> bool:
    """Whether it is an address of a node, whose labels are the node's."""
    return not NODE_ENTITIES.isdisjoint(peer.entities)


def in_namespace(namespace: str) -> Requirement:
    return Requirement(LabelSource.NAMESPACE, "", Operator.IN, (namespace,))


IS_POD = Requirement(LabelSource.NAMESPACE, "", Operator.EXISTS)
IS_NODE = Requirement(LabelSource.NODE, "", Operator.EXISTS)


@dataclass(frozen=True, slots=True)
class LabelKeys:
    """The label keys that some policy can tell peers apart by; all others may be dropped from a ``Peer``."""

    pod: frozenset[str] = frozenset()
    namespace: frozenset[str] = frozenset()
    node: frozenset[str] = frozenset()

    def __or__(self, other: LabelKeys) -> LabelKeys:
        return LabelKeys(self.pod | other.pod, self.namespace | other.namespace, self.node | other.node)

    def trim(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Only those pod labels that matter."""
        return {key: value for key, value in labels.items() if key in self.pod}

    def trim_node(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Only those node labels that matter."""
        return {key: value for key, value in labels.items() if key in self.node}

    def trim_namespace(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Only those namespace labels that matter."""
        return {key: value for key, value in labels.items() if key in self.namespace}


def label_keys(selectors: Iterable[PeerSelector]) -> LabelKeys:
    """The label keys that ``selectors`` look at."""
    requirements = [r for selector in selectors if isinstance(selector, Selector) for r in selector.requirements]
    return LabelKeys(
        pod=frozenset(r.key for r in requirements if r.source is LabelSource.POD),
        namespace=frozenset(r.key for r in requirements if r.source is LabelSource.NAMESPACE_LABEL),
        node=frozenset(r.key for r in requirements if r.source is LabelSource.NODE and r.key),
    )


_FILTERED = re.compile(
    r"io\.kubernetes|kubernetes\.io|.*beta\.kubernetes\.io|k8s\.io|topology\.kubernetes\.io"
    r"|statefulset\.kubernetes\.io/pod-name|apps\.kubernetes\.io/pod-index"
    r"|batch\.kubernetes\.io/job-completion-index|batch\.kubernetes\.io/controller-uid"
    r"|controller-uid|pod-template-generation|pod-template-hash|controller-revision-hash|annotation|etcd_node"
    r"|io\.cilium\.k8s"
)


def is_identity_label(key: str) -> bool:
    """Whether Cilium keeps a pod label in identities; a CiliumNetworkPolicy never sees the others.

    Spec: CILIUM.md §a, "Identity labels".
    """
    return _FILTERED.match(key) is None
