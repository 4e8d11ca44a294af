"""What bypasses the sidecars of this node's pods, by the rules the agent saw and the policies it holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meshbridge.agent.redirects import Seen
from meshbridge.bypass.bypasspolicy import BypassPolicies
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.encryption import NodeEncryption
from meshbridge.bypass.inventory import Inventory
from meshbridge.bypass.observed import ObservedFlow, latest
from meshbridge.bypass.owners import NO_IMPOSTORS, with_impostors
from meshbridge.bypass.record import report_record
from meshbridge.bypass.report import report
from meshbridge.identity.model import Peer, Workload
from meshbridge.observe.messages import decode_flow
from meshbridge.policy.policyset import PolicySet
from meshbridge.protos import observer_pb2 as pb

_TCP, _SYN, _ACK = 6, 0x02, 0x10


def bypasses_json(
    workloads: Iterable[Workload],
    policies: PolicySet,
    bypass_policies: BypassPolicies,
    seen: Seen,
    others: Mapping[str, Peer],
    audited: Sequence[Mapping[str, Any]] = (),
    proofs: Sequence[Mapping[str, Any]] = (),
    observed: Sequence[bytes] = (),
    encryption: NodeEncryption | None = None,
) -> bytes:
    """The report on these pods.

    Args:
        seen: What was seen in the pods' namespaces.
        others: Pods of other nodes by name, as sources.
        audited: What audits alone let through, as of ``AuditCounts.records``.
        observed: Records of the ring, among them the connections that were seen.
        proofs: What came of the proofs that policies ask for, as of ``Proofs.records``.
        encryption: What this node's links say of encryption between nodes.
    """
    pods = tuple(sorted(workloads, key=lambda workload: workload.key))
    states = {
        pod.key: with_impostors(
            capture_state(pod, seen=seen.rules.get(pod.uid)),
            seen.processes[pod.uid].impostors if pod.uid in seen.processes else NO_IMPOSTORS,
        )
        for pod in pods
    }
    inventory = Inventory(
        pods,
        (),
        policies,
        states,
        predicted=False,
        others=others,
        bypass_policies=bypass_policies,
        registry_only=policies.mesh.registry_only,
        observed=latest(flow for record in observed if (flow := _connection(record)) is not None),
        encryption=encryption,
    )
    return json.dumps({**report_record(report(inventory)), "audited": audited, "proofs": proofs}).encode()


def _connection(record: bytes) -> ObservedFlow | None:
    """The TCP connection that a pod opened with a packet of the ring."""
    flow = decode_flow(pb.Flow.FromString(record))
    source, destination = flow.source, flow.destination
    opens = flow.protocol == _TCP and flow.tcp_flags & _SYN and not flow.tcp_flags & _ACK and flow.reply is not True
    if not opens or not source.pod or destination.address is None:
        return None
    client = f"{source.namespace}/{source.pod}"
    server = f"{destination.namespace}/{destination.pod}" if destination.pod else ""
    return ObservedFlow(flow.time_ns, client, server, destination.address, destination.port, flow.uid)
