"""Who is who: workloads, the addresses they hold, and the classes of peers that policies can tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network

DEFAULT_CLUSTER = "default"
DEFAULT_TRUST_DOMAIN = "cluster.local"


class IpFamily(IntEnum):
    """Numbers as in bpf/abi.h, ``enum ip_family``."""

    IPV4 = 0
    IPV6 = 1

    @classmethod
    def of(cls, address: IpAddress | IpNetwork) -> IpFamily:
        return cls.IPV4 if address.version == 4 else cls.IPV6


class Entity(StrEnum):
    """What a peer is when it is not a pod; Cilium's reserved identities. A peer may be several at once."""

    HOST = "host"
    REMOTE_NODE = "remote-node"
    WORLD = "world"
    WORLD_IPV4 = "world-ipv4"
    WORLD_IPV6 = "world-ipv6"
    UNMANAGED = "unmanaged"
    HEALTH = "health"
    INIT = "init"
    KUBE_APISERVER = "kube-apiserver"
    INGRESS = "ingress"


class ProxyClass(StrEnum):
    """Which principal a workload can have at all (DESIGN: principals)."""

    NONE = "none"
    SIDECAR = "sidecar"
    AMBIENT = "ambient"
    PROXYLESS = "proxyless"
    GATEWAY = "gateway"
    WAYPOINT = "waypoint"


@dataclass(frozen=True, slots=True)
class ContainerPort:
    """A port a container declares; ``name`` may be empty."""

    name: str
    port: int
    protocol: str = "TCP"


@dataclass(frozen=True, slots=True, order=True)
class TcpPorts:
    """TCP ports ``first``..``last``, both included, in one address family."""

    family: IpFamily
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Peer:
    """Everything policies can ask of the other side of a flow; two addresses with equal Peers share an identity.

    A pod has a namespace and no entities; a node, the world or an unknown address has entities and no namespace.
    ``labels`` are the pod's own, or the node's: which of the two a selector means it says itself.
    ``networks`` holds those CIDRs written in any policy that contain the address, so that an ipBlock is a set lookup.
    ``ports`` holds those container ports whose name an egress policy uses (``PolicySet.referenced_port_names``).
    ``service`` (namespace/name) makes a Service's address a class of its own, see ``policy.frontends``.
    ``excluded``, sorted, holds the ports on which a pod's Envoy is passed by, as its own node has seen.
    ``registered``: the mesh's registry knows the address as some Service's, where a node has to know that.
    """

    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    namespace_labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    service_account: str = ""
    cluster: str = DEFAULT_CLUSTER
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    proxy: ProxyClass = ProxyClass.NONE
    entities: frozenset[Entity] = frozenset()
    networks: frozenset[IpNetwork] = frozenset()
    masqueraded: bool = False
    ports: frozenset[ContainerPort] = frozenset()
    service: str = ""
    excluded: tuple[TcpPorts, ...] = ()
    registered: bool = False

    @property
    def is_pod(self) -> bool:
        return self.namespace is not None


@dataclass(frozen=True, slots=True)
class ProxyContainer:
    """The istio-proxy container of a pod, as far as redirection depends on it.

    ``kind`` is the proxy type (``sidecar``, ``router``; empty when its arguments do not say), ``native`` whether it is
    an init container that stays. ``uid`` and ``gid`` are those of its securityContext, None when unset.
    """

    kind: str = ""
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    uid: int | None = None
    gid: int | None = None
    native: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """A pod as the API server has it: what policies select and what addresses it holds.

    ``annotations`` and ``init_args`` (arguments of the istio-init container, None when there is none) are what the
    capture state is computed from; so are ``init_env`` (environment of istio-init), ``proxy_container`` and
    ``init_containers`` (names of all init containers, in order; ``istio-validation`` among them tells the CNI form).
    ``phase`` Succeeded and Failed mean that its addresses are no longer its own.
    """

    namespace: str
    name: str
    uid: str
    node: str
    addresses: tuple[IpAddress, ...]
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    namespace_labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    service_account: str = "default"
    ports: tuple[ContainerPort, ...] = ()
    probe_ports: tuple[int | str, ...] = ()
    host_network: bool = False
    proxy: ProxyClass = ProxyClass.NONE
    init_args: tuple[str, ...] | None = None
    phase: str = "Running"
    init_env: Mapping[str, str] = field(default_factory=dict, hash=False)
    proxy_container: ProxyContainer | None = None
    init_containers: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """``namespace/name``, as people write it."""
        return f"{self.namespace}/{self.name}"

    @property
    def spiffe_id(self) -> str:
        return f"spiffe://{DEFAULT_TRUST_DOMAIN}/ns/{self.namespace}/sa/{self.service_account}"

    def peer(self, networks: frozenset[IpNetwork] = frozenset(), cluster: str = DEFAULT_CLUSTER) -> Peer:
        """The pod as policies see it. A host-network pod has no identity of its own: its addresses are its node's."""
        return Peer(
            namespace=self.namespace,
            labels=self.labels,
            namespace_labels=self.namespace_labels,
            service_account=self.service_account,
            cluster=cluster,
            proxy=self.proxy,
            networks=networks,
        )
