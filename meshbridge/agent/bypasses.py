"""What bypasses the sidecars of this node's pods, by the rules the agent saw and the policies it holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meshbridge.agent.redirects import Seen
from meshbridge.bypass.bypasspolicy import BypassPolicies
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.inventory import Inventory
from meshbridge.bypass.owners import NO_IMPOSTORS, with_impostors
from meshbridge.bypass.record import report_record
from meshbridge.bypass.report import report
from meshbridge.identity.model import Peer, Workload
from meshbridge.policy.policyset import PolicySet


def bypasses_json(
    workloads: Iterable[Workload],
    policies: PolicySet,
    bypass_policies: BypassPolicies,
    seen: Seen,
    others: Mapping[str, Peer],
    audited: Sequence[Mapping[str, Any]] = (),
    proofs: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """The report on these pods.

    Args:
        seen: What was seen in the pods' namespaces.
        others: Pods of other nodes by name, as sources.
        audited: What audits alone let through, as of ``AuditCounts.records``.
        proofs: What came of the proofs that policies ask for, as of ``Proofs.records``.
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
    )
    return json.dumps({**report_record(report(inventory)), "audited": audited, "proofs": proofs}).encode()
