"""Our answers for many flows of one random cluster, by way of what the kernel is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from oracle import EGRESS, Flow, Holder

from meshbridge.identity.model import ContainerPort, Entity, IpAddress, IpFamily, Peer, Workload
from meshbridge.identity.numbering import number_peers
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import Lookup
from meshbridge.policy.model import Direction, Document
from meshbridge.policy.policyset import PolicySet


def documents_of(objects: Iterable[dict[str, Any]]) -> list[Document]:
    return [
        Document(o["kind"], o["apiVersion"], o["metadata"].get("namespace", ""), o["metadata"]["name"], o)
        for o in objects
    ]


def compiled_answers(objects: Sequence[dict[str, Any]], ends: Iterable[Holder], flows: Iterable[Flow]) -> list[bool]:
    """Whether each flow passes at its endpoint, which is a pod of ``ends``, compiled and looked up."""
    policies = PolicySet.of(documents_of(objects))
    assert not policies.refusals, policies.refusals
    names = policies.referenced_port_names()
    holders: dict[IpAddress, Peer] = {end.address: _peer(end, names) for end in ends}
    numbering = number_peers(holders, policies.referenced_networks())
    compiler = Compiler(numbering.identities)
    lookups: dict[tuple[IpAddress, str], Lookup] = {}
    found = []
    for flow in flows:
        lookup = lookups.get((flow.endpoint.address, flow.direction))
        if lookup is None:
            policy = compiler.endpoint(_workload(flow.endpoint), policies, Capture.none())
            direction = Direction.EGRESS if flow.direction == EGRESS else Direction.INGRESS
            lookup = Lookup.of(policy.map(direction, IpFamily.of(flow.endpoint.address)))
            lookups[flow.endpoint.address, flow.direction] = lookup
        identity = numbering.addresses[flow.peer.address].identity
        found.append(lookup.decide(identity, flow.protocol, flow.port, localhost=flow.localhost).passes)
    return found


def _workload(holder: Holder) -> Workload:
    return Workload(
        holder.namespace, str(holder.address), str(holder.address), "one", (holder.address,), holder.labels,
        holder.namespace_labels, service_account=holder.service_account,
        ports=tuple(ContainerPort(*port) for port in holder.ports),
    )  # fmt: skip


def _peer(holder: Holder, names: frozenset[str]) -> Peer:
    if not holder.is_pod:
        return Peer(labels=holder.labels, entities=frozenset(Entity(entity) for entity in holder.entities))
    pod = _workload(holder)
    return replace(pod.peer(), ports=frozenset(port for port in pod.ports if port.name in names))
