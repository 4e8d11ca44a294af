"""From what the controller sends to the model: agents and authz servers read the same messages in the same way."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from sys import intern
from typing import Any, Final

from meshbridge.errors import MeshBridgeError
from meshbridge.identity.model import (
    ContainerPort,
    Entity,
    IpAddress,
    IpFamily,
    Peer,
    ProxyClass,
    ProxyContainer,
    TcpPorts,
    Workload,
)
from meshbridge.policy.mesh import MeshSettings, ProviderKind
from meshbridge.policy.model import Document, Source
from meshbridge.policy.parse.ports import LAST_PORT, PROTOCOLS
from meshbridge.protos import agent_pb2

MAX_RANGES: Final = 256
_NONE: Final[frozenset[Any]] = frozenset()
"""An empty set is 216 bytes, and most of a peer's are empty: an agent keeps thousands of peers."""


class MessageError(MeshBridgeError):
    """A message means something this version does not know; a revision with one cannot be used."""


@dataclass(frozen=True, slots=True)
class AddressHolder:
    """Who holds an address. ``name`` and ``uid`` are the pod's, "" for anything else."""

    address: IpAddress
    peer: Peer
    name: str = ""
    uid: str = ""
    node: str = ""


def workload_of(message: agent_pb2.Endpoint) -> Workload:
    """The pod of an Endpoint.

    Raises:
        MessageError: an address of a wrong length, an unknown proxy class, a probe port that is none.
    """
    where = f"Endpoint {message.namespace}/{message.name}"
    init = message.istio_init if message.HasField("istio_init") else None
    return Workload(
        namespace=message.namespace,
        name=message.name,
        uid=message.uid,
        node=message.node,
        addresses=tuple(address_of(packed, where) for packed in message.addresses),
        labels=dict(message.labels),
        namespace_labels=dict(message.namespace_labels),
        annotations=dict(message.annotations),
        service_account=message.service_account,
        ports=_ports(message.ports),
        probe_ports=tuple(_probe_port(port, where) for port in message.probe_ports),
        host_network=message.host_network,
        proxy=_proxy_class(message.proxy, where),
        init_args=tuple(init.args) if init is not None else None,
        phase=message.phase,
        init_env=dict(init.env) if init is not None else {},
        proxy_container=_proxy_container(message.istio_proxy) if message.HasField("istio_proxy") else None,
        init_containers=tuple(message.init_containers),
    )


def document_of(message: agent_pb2.Policy) -> Document:
    """The policy object of a Policy, unparsed.

    Raises:
        MessageError: its JSON is none, or is not an object.
    """
    where = f"Policy {message.kind} {message.namespace}/{message.name}"
    try:
        data = json.loads(message.json)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"its JSON cannot be read: {error}", where=where) from error
    if not isinstance(data, dict):
        raise MessageError(f"its JSON is a {type(data).__name__}, not an object", where=where)
    return Document(
        kind=intern(message.kind),
        api_version=intern(message.api_version),
        namespace=intern(message.namespace),
        name=message.name,
        data=data,
        source=Source(message.file, dict(message.lines)),
        uid=message.uid,
        fault=message.fault,
    )


def holder_of(message: agent_pb2.Address) -> AddressHolder:
    """Who holds the address of an Address; its ``networks`` are for the reader to fill in.

    Raises:
        MessageError: an address of a wrong length, an unknown proxy class or reserved name.
    """
    where = f"Address of {message.namespace}/{message.name}" if message.namespace else "Address"
    address = address_of(message.address, where)
    return AddressHolder(address, _peer_of(message, address), message.name, message.uid, message.node)


class HolderReader:
    """Reads many Addresses: the same as ``holder_of``, with one Peer object for all holders that are told alike."""

    def __init__(self) -> None:
        self._peers: dict[bytes, Peer] = {}
        self._bare = agent_pb2.Address()

    def read(self, message: agent_pb2.Address) -> AddressHolder:
        """Who holds the address of ``message``.

        Raises:
            MessageError: as of ``holder_of``.
        """
        address = address_of(message.address, f"Address of {message.namespace}/{message.name}")
        self._bare.CopyFrom(message)
        for of_one_holder in ("address", "name", "uid", "node"):
            self._bare.ClearField(of_one_holder)
        told = self._bare.SerializeToString(deterministic=True)
        peer = self._peers.get(told)
        if peer is None:
            peer = self._peers[told] = _peer_of(message, address)
        return AddressHolder(address, peer, message.name, message.uid, message.node)


def _peer_of(message: agent_pb2.Address, address: IpAddress) -> Peer:
    try:
        entities = frozenset(Entity(name) for name in message.entities) or _NONE
    except ValueError as error:
        raise MessageError(str(error), where=f"Address {address}", fix="update this node's MeshBridge") from error
    return Peer(
        namespace=intern(message.namespace) or None,
        labels=_labels(message.labels),
        namespace_labels=_labels(message.namespace_labels),
        service_account=intern(message.service_account),
        cluster=intern(message.cluster),
        trust_domain=intern(message.trust_domain),
        proxy=_proxy_class(message.proxy, f"Address {address}"),
        entities=entities,
        ports=frozenset(_ports(message.ports)) or _NONE,
        excluded=excluded_of(message.excluded, f"Address {address}"),
    )


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A port of a Service; ``backends`` are addresses of pods with their own port, none when nobody is known."""

    protocol: int
    port: int
    backends: tuple[tuple[IpAddress, int], ...]


@dataclass(frozen=True, slots=True)
class ServiceFrontends:
    """The addresses of a Service and who answers behind its ports; ``name`` is ``namespace/name``.

    ``addresses`` are ClusterIPs, ``outside_addresses`` those it claims outside of the cluster.
    """

    name: str
    addresses: tuple[IpAddress, ...]
    ports: tuple[ServicePort, ...]
    outside_addresses: tuple[IpAddress, ...] = ()


def service_of(message: agent_pb2.Service) -> ServiceFrontends:
    """The Service of a Service message.

    Raises:
        MessageError: an address of a wrong length, an unknown protocol, a port above 65535.
    """
    name = f"{message.namespace}/{message.name}"
    where = f"Service {name}"
    ports = []
    for port in message.ports:
        protocol = PROTOCOLS.get(port.protocol)
        if protocol is None:
            raise MessageError(f"unknown protocol {port.protocol!r}", where=where, fix="update this node's MeshBridge")
        for number in (port.port, *(backends.port for backends in port.backends)):
            if number > LAST_PORT:
                raise MessageError(f"no port: {number}", where=where)
        backends = tuple(
            (address_of(packed, where), same_port.port) for same_port in port.backends for packed in same_port.addresses
        )
        ports.append(ServicePort(protocol, port.port, backends))
    addresses, outside = (
        tuple(address_of(packed, where) for packed in given) for given in (message.addresses, message.outside_addresses)
    )
    return ServiceFrontends(name, addresses, tuple(ports), outside)


def mesh_of(message: agent_pb2.Mesh) -> MeshSettings:
    """The mesh's settings."""
    return MeshSettings(
        root_namespace=message.root_namespace,
        trust_domain=message.trust_domain,
        trust_domain_aliases=tuple(message.trust_domain_aliases),
        cluster=message.cluster,
        providers=_providers(message.providers) if message.HasField("providers") else None,
        registry_only=message.registry_only,
        own_sidecars=message.own_sidecars,
    )


def _providers(message: agent_pb2.ExtensionProviders) -> tuple[tuple[str, ProviderKind], ...]:
    """A kind that is not known here is one that nobody can be asked by."""
    known = {kind.value: kind for kind in ProviderKind}
    return tuple(sorted((name, known.get(kind, ProviderKind.UNUSABLE)) for name, kind in message.kinds.items()))


def address_of(packed: bytes, where: str) -> IpAddress:
    """The address of 4 or 16 bytes in network order; a v4-mapped one is IPv4.

    Raises:
        MessageError: any other length.
    """
    try:
        address = ipaddress.ip_address(packed)
    except ValueError as error:
        raise MessageError(f"an address of {len(packed)} bytes", where=where) from error
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def excluded_of(messages: Sequence[agent_pb2.TcpPorts], where: str) -> tuple[TcpPorts, ...]:
    """Ports on which an Envoy is passed by.

    Raises:
        MessageError: too many ranges, no ports, or not sorted and disjoint.
    """
    if len(messages) > MAX_RANGES:
        raise MessageError(f"{len(messages)} ranges of ports", where=where)
    found = tuple(TcpPorts(IpFamily.IPV6 if m.ipv6 else IpFamily.IPV4, m.first, m.last) for m in messages)
    ends = (TcpPorts(IpFamily.IPV4, -1, -1), *found)
    for before, ports in pairwise(ends):
        if not ports.first <= ports.last <= LAST_PORT or (ports.family, ports.first) <= (before.family, before.last):
            raise MessageError(f"ports {ports.first}-{ports.last} are none, or not in order", where=where)
    return found


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The same few strings stand in most of them, and are kept once."""
    return {intern(key): intern(value) for key, value in labels.items()}


def _ports(messages: Iterable[agent_pb2.ContainerPort]) -> tuple[ContainerPort, ...]:
    return tuple(ContainerPort(message.name, message.port, message.protocol or "TCP") for message in messages)


def _probe_port(text: str, where: str) -> int | str:
    if not (text.isascii() and text.isdigit()):
        return text
    if len(text) > len(str(LAST_PORT)):
        raise MessageError(f"no port: a number of {len(text)} digits", where=where)
    return int(text)


def _proxy_class(text: str, where: str) -> ProxyClass:
    try:
        return ProxyClass(text or "none")
    except ValueError as error:
        raise MessageError(f"unknown proxy class {text!r}", where=where, fix="update this node's MeshBridge") from error


def _proxy_container(message: agent_pb2.ProxyContainer) -> ProxyContainer:
    return ProxyContainer(
        kind=message.kind,
        env=dict(message.env),
        uid=message.uid if message.HasField("uid") else None,
        gid=message.gid if message.HasField("gid") else None,
        native=message.native,
    )
