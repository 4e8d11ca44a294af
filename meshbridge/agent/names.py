"""Events of the kernel with names: who the addresses were, which rules decided, when it was."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from meshbridge import abi
from meshbridge.agent.view import Holder
from meshbridge.datapath.policysets import RuleIds
from meshbridge.identity.model import Peer
from meshbridge.observe.flow import Flow, FlowKind, FlowPeer, FlowVerdict, LostBy, MatchType
from meshbridge.policy.model import Direction, Layer

NO_UID: Final = 0xFFFFFFFF
_NOT_IP: Final = 255
_KINDS: Final[Mapping[int, FlowKind]] = {
    abi.EventType.EVENT_DROP: FlowKind.DROP,
    abi.EventType.EVENT_VERDICT: FlowKind.VERDICT,
    abi.EventType.EVENT_TRACE: FlowKind.TRACE,
    abi.EventType.EVENT_LOST: FlowKind.LOST,
}
_VERDICTS: Final = {
    FlowKind.DROP: FlowVerdict.DROPPED,
    FlowKind.VERDICT: FlowVerdict.ALLOWED,
    FlowKind.TRACE: FlowVerdict.FORWARDED,
    FlowKind.LOST: FlowVerdict.DROPPED,
}
_POLICY_VERDICTS: Final[Mapping[int, str]] = {
    abi.PolicyVerdict.POLICY_NONE: "",
    abi.PolicyVerdict.POLICY_ALLOW: "allow",
    abi.PolicyVerdict.POLICY_DENY: "deny",
    abi.PolicyVerdict.POLICY_NEEDS_L7: "needs-l7",
}
_REPLIES: Final = {0: False, 1: True}
_MATCHES: Final = frozenset(MatchType)


@dataclass(slots=True)
class Names:
    """What numbers and addresses mean now; the agent replaces the mappings as it learns."""

    node: str
    rules: RuleIds = field(default_factory=RuleIds)
    holders: Mapping[bytes, Holder] = field(default_factory=dict)
    identities: Mapping[int, Peer] = field(default_factory=dict)

    def flows(self, event: abi.FlowEvent) -> Iterator[Flow]:
        """The records of one event: first what was lost before it, then the event itself."""
        time_ns = event.time_ns + time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if event.lost:
            yield Flow(time_ns, self.node, FlowKind.LOST, FlowVerdict.DROPPED, lost=event.lost, lost_by=LostBy.KERNEL)
        kind = _KINDS.get(event.type)
        if kind is None or kind is FlowKind.LOST:
            return
        audited = bool(event.audit)
        yield Flow(
            time_ns=time_ns,
            node=self.node,
            kind=kind,
            verdict=FlowVerdict.AUDIT if audited else _VERDICTS[kind],
            direction=Direction(event.direction & 1),
            endpoint_id=event.endpoint_id,
            ifindex=event.ifindex,
            reason=event.reason,
            source=self._peer(event.source, event.source_port, event.source_identity, event.family),
            destination=self._peer(event.destination, event.destination_port, event.destination_identity, event.family),
            protocol=event.protocol,
            tcp_flags=event.tcp_flags,
            icmp_type=event.icmp_type,
            icmp_code=event.icmp_code,
            ethertype=event.ethertype,
            layer=_deciding_layer(event),
            network_verdict=_POLICY_VERDICTS.get(event.network_verdict, ""),
            mesh_verdict=_POLICY_VERDICTS.get(event.mesh_verdict, ""),
            network_rules=self.rules.origins(event.network_rule_id),
            mesh_rules=self.rules.origins(event.mesh_rule_id),
            match_type=MatchType(event.match_type) if event.match_type in _MATCHES else MatchType.NONE,
            reply=_REPLIES.get(event.is_reply),
            packet_bytes=event.packet_bytes,
            uid=None if event.uid == NO_UID else event.uid,
            cgroup_id=event.cgroup_id,
            rejudged=bool(event.rejudged),
            audit=audited,
        )

    def _peer(self, raw: object, port: int, identity: int, family: int) -> FlowPeer:
        if family == _NOT_IP:
            return FlowPeer(identity=identity)
        packed = bytes(raw)  # type: ignore[call-overload]  # a ctypes array of bytes
        address = abi.parse_address(packed)
        holder = self.holders.get(packed)
        known = self.identities.get(identity)
        peer = holder.peer if holder else known
        if peer is None:
            return FlowPeer(address, port, identity)
        # What the kernel took it for counts: an address may have changed hands since.
        entities = (known or peer).entities
        return FlowPeer(
            address=address,
            port=port,
            identity=identity,
            namespace=peer.namespace or "",
            pod=holder.name if holder else "",
            entities=tuple(sorted(entity.value for entity in entities)),
            labels=labels_of(known if known and known.service else peer),
        )


def labels_of(peer: Peer) -> tuple[str, ...]:
    """``k8s:key=value`` of a pod, sorted, as Cilium writes them; a Service's address has its name besides."""
    services = [f"service:{name}" for name in peer.service.split(", ") if name]
    if not peer.is_pod:
        return tuple(sorted([*(f"reserved:{entity.value}" for entity in peer.entities), *services]))
    found = [f"k8s:{key}={value}" if value else f"k8s:{key}" for key, value in peer.labels.items()]
    found.append(f"k8s:io.kubernetes.pod.namespace={peer.namespace}")
    if peer.service_account:
        found.append(f"k8s:io.cilium.k8s.policy.serviceaccount={peer.service_account}")
    return tuple(sorted([*found, *services]))


def _deciding_layer(event: abi.FlowEvent) -> Layer | None:
    """The layer whose deny dropped the packet, network first as in the kernel; None when no policy did."""
    if not event.reason:
        return None
    deny = abi.PolicyVerdict.POLICY_DENY
    if event.network_verdict == deny:
        return Layer.NETWORK
    return Layer.MESH if event.mesh_verdict == deny else None
