"""From the model to what agents and authz servers are sent; ``xds.messages`` reads it back to an equal value.

Messages are serialised deterministically, so that equal values have equal bytes and thus equal versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from google.protobuf.message import Message

from meshbridge.identity.model import ContainerPort, IpAddress, Peer, Workload
from meshbridge.kube.problems import Problem
from meshbridge.policy.mesh import MeshSettings
from meshbridge.policy.model import Document
from meshbridge.policy.parse.cluster import Service
from meshbridge.policy.parse.ports import PROTOCOLS
from meshbridge.protos import agent_pb2
from meshbridge.xds.exclusions import ports_messages
from meshbridge.xds.snapshot import Resource


def resource(message: Message) -> Resource:
    """The message as it is sent."""
    return Resource.of(bytes(message.SerializeToString(deterministic=True)))


def endpoint_message(
    workload: Workload, extra_addresses: Iterable[IpAddress] = (), *, fault: str = ""
) -> agent_pb2.Endpoint:
    """A pod of the client's node; ``extra_addresses`` are sources it may use besides its own.

    With a ``fault`` the node lets nothing in or out of it, for that reason.
    """
    message = agent_pb2.Endpoint(
        namespace=workload.namespace,
        name=workload.name,
        uid=workload.uid,
        node=workload.node,
        addresses=[address.packed for address in workload.addresses],
        labels=workload.labels,
        namespace_labels=workload.namespace_labels,
        annotations=workload.annotations,
        service_account=workload.service_account,
        ports=_ports(workload.ports),
        probe_ports=[str(port) for port in workload.probe_ports],
        proxy=workload.proxy.value,
        host_network=workload.host_network,
        phase=workload.phase,
        extra_addresses=[address.packed for address in extra_addresses],
        init_containers=workload.init_containers,
        fault=fault,
    )
    if workload.init_args is not None:
        init = agent_pb2.InitContainer(args=workload.init_args, env=workload.init_env)
        message.istio_init.CopyFrom(init)
    proxy = workload.proxy_container
    if proxy is not None:
        message.istio_proxy.CopyFrom(
            agent_pb2.ProxyContainer(kind=proxy.kind, env=proxy.env, uid=proxy.uid, gid=proxy.gid, native=proxy.native)
        )
    return message


def address_message(
    address: IpAddress, peer: Peer, *, name: str = "", uid: str = "", node: str = ""
) -> agent_pb2.Address:
    """Who holds ``address``; the CIDRs that contain it are for the reader to find."""
    return agent_pb2.Address(
        address=address.packed,
        namespace=peer.namespace or "",
        name=name,
        labels=peer.labels,
        namespace_labels=peer.namespace_labels,
        service_account=peer.service_account,
        cluster=peer.cluster,
        trust_domain=peer.trust_domain,
        proxy=peer.proxy.value,
        entities=sorted(entity.value for entity in peer.entities),
        node=node,
        uid=uid,
        ports=_ports(sorted(peer.ports, key=lambda port: (port.name, port.port, port.protocol))),
        excluded=ports_messages(peer.excluded),
    )


def service_message(service: Service, pods: Iterable[Workload], listed: Iterable[IpAddress] = ()) -> agent_pb2.Service:
    """A Service with those of ``pods``, all of its own, that answer behind each port, and what its slices list."""
    backends = sorted(pods, key=lambda pod: pod.key)
    message = agent_pb2.Service(namespace=service.namespace, name=service.name)
    message.addresses.extend(address.packed for address in dict.fromkeys(service.addresses))
    message.outside_addresses.extend(address.packed for address in dict.fromkeys(service.outside_addresses))
    for port in service.ports:
        if port.protocol not in PROTOCOLS:
            continue  # nobody translates it either
        by_target: dict[int, list[bytes]] = {}
        for pod in backends:
            target = port.target_at(pod.ports)
            if target is not None:
                by_target.setdefault(target, []).extend(address.packed for address in pod.addresses)
        if isinstance(port.target, int):
            for address in listed:
                by_target.setdefault(port.target, []).append(address.packed)
        found = [agent_pb2.ServiceBackends(port=target, addresses=by_target[target]) for target in sorted(by_target)]
        message.ports.append(agent_pb2.ServicePort(protocol=port.protocol, port=port.port, backends=found))
    return message


def policy_message(document: Document) -> agent_pb2.Policy:
    """The object as written, without what is written beside it: a status that changes changes nothing for a node."""
    data = {name: value for name, value in document.data.items() if name != "status"}
    metadata = data.get("metadata")
    if isinstance(metadata, Mapping):
        beside = ("managedFields", "resourceVersion")
        data["metadata"] = {name: value for name, value in metadata.items() if name not in beside}
    return agent_pb2.Policy(
        api_version=document.api_version,
        kind=document.kind,
        namespace=document.namespace,
        name=document.name,
        uid=document.uid,
        json=json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"),
        file=document.source.file,
        lines=document.source.lines,
        fault=document.fault,
    )


def mesh_message(mesh: MeshSettings, *, all_policies: bool = False) -> agent_pb2.Mesh:
    """``all_policies``: the node is sent every policy of the mesh, whomever it selects."""
    providers = mesh.providers
    kinds = dict(providers) if providers is not None else {}
    return agent_pb2.Mesh(
        all_mesh_policies=all_policies,
        root_namespace=mesh.root_namespace,
        trust_domain=mesh.trust_domain,
        trust_domain_aliases=mesh.trust_domain_aliases,
        cluster=mesh.cluster,
        providers=agent_pb2.ExtensionProviders(kinds=kinds) if providers is not None else None,
        registry_only=mesh.registry_only,
        own_sidecars=mesh.own_sidecars,
    )


def problem_message(problem: Problem) -> agent_pb2.Problem:
    return agent_pb2.Problem(text=problem.text, file=problem.file, line=problem.line, reason=problem.reason.value)


def problem_name(problem: Problem) -> str:
    """The same for the same sentence, so that a problem that stays is sent once."""
    return hashlib.blake2b(problem.text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _ports(ports: Iterable[ContainerPort]) -> list[agent_pb2.ContainerPort]:
    return [agent_pb2.ContainerPort(name=port.name, port=port.port, protocol=port.protocol) for port in ports]
