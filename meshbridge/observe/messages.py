"""Flow ⇄ observer.proto. The agent keeps flows in this form, so that a record is encoded once however many read it."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from meshbridge.identity.model import IpAddress
from meshbridge.observe.flow import (
    PROTOCOL_NUMBERS,
    AgentEvent,
    Flow,
    FlowKind,
    FlowPeer,
    FlowVerdict,
    LostBy,
    MatchType,
)
from meshbridge.observe.reasons import drop_reason
from meshbridge.policy.model import Direction, Layer, Origin
from meshbridge.protos import observer_pb2 as pb

HISTORY_KEY = "meshbridge-history"
"""Initial metadata of GetFlows: how many of the records that follow are of the past."""

NO_UID = 0xFFFFFFFF
_REPLY = {False: 0, True: 1, None: 2}
_LAYERS = {"network": Layer.NETWORK, "mesh": Layer.MESH}
_KINDS = {kind.value: kind for kind in FlowKind}
_VERDICTS = {verdict.value: verdict for verdict in FlowVerdict}
_LOST_BY = {lost_by.value: lost_by for lost_by in LostBy}
_MATCHES = {match.text: match for match in MatchType}


def encode_flow(flow: Flow) -> bytes:
    """The record as the Observer service sends it."""
    message = pb.Flow(
        time_unix_ns=flow.time_ns,
        node=flow.node,
        endpoint_id=flow.endpoint_id,
        direction=flow.direction.name.lower(),
        type=flow.kind.value,
        verdict=flow.verdict.value,
        reason=flow.reason,
        reason_name=drop_reason(flow.reason).name if flow.reason else "",
        source_address=flow.source.address.packed if flow.source.address else b"",
        destination_address=flow.destination.address.packed if flow.destination.address else b"",
        source_port=flow.source.port,
        destination_port=flow.destination.port,
        protocol=flow.protocol_name,
        tcp_flags=flow.tcp_flags,
        icmp_type=flow.icmp_type,
        icmp_code=flow.icmp_code,
        source=_peer_message(flow.source),
        destination=_peer_message(flow.destination),
        layer="" if flow.layer is None else flow.layer.name.lower(),
        network_verdict=flow.network_verdict,
        mesh_verdict=flow.mesh_verdict,
        network_rules=rule_messages(flow.network_rules),
        mesh_rules=rule_messages(flow.mesh_rules),
        match_type=flow.match_type.text,
        is_reply=_REPLY[flow.reply],
        packet_bytes=flow.packet_bytes,
        uid=NO_UID if flow.uid is None else flow.uid,
        cgroup_id=flow.cgroup_id,
        lost=flow.lost,
        lost_by="" if flow.lost_by is None else flow.lost_by.value,
        rejudged=flow.rejudged,
        audit=flow.audit,
        ifindex=flow.ifindex,
        ethertype=flow.ethertype,
    )
    if flow.agent is not None:
        details = [pb.Detail(key=key, value=value) for key, value in flow.agent.details]
        message.agent.CopyFrom(pb.AgentEvent(name=flow.agent.name, details=details))
    return message.SerializeToString()


def decode_flow(message: pb.Flow) -> Flow:
    """The record a message stands for; values of a newer agent that this version has no name for become the nearest
    known ("trace", "FORWARDED"), so that one strange record never ends a stream."""
    return Flow(
        time_ns=message.time_unix_ns,
        node=message.node,
        kind=_KINDS.get(message.type, FlowKind.TRACE),
        verdict=_VERDICTS.get(message.verdict, FlowVerdict.FORWARDED),
        direction=Direction.EGRESS if message.direction == "egress" else Direction.INGRESS,
        endpoint_id=message.endpoint_id,
        ifindex=message.ifindex,
        reason=message.reason,
        source=_peer(message.source, message.source_address, message.source_port),
        destination=_peer(message.destination, message.destination_address, message.destination_port),
        protocol=_protocol(message.protocol),
        tcp_flags=message.tcp_flags,
        icmp_type=message.icmp_type,
        icmp_code=message.icmp_code,
        ethertype=message.ethertype,
        layer=_LAYERS.get(message.layer),
        network_verdict=message.network_verdict,
        mesh_verdict=message.mesh_verdict,
        network_rules=rule_origins(message.network_rules),
        mesh_rules=rule_origins(message.mesh_rules),
        match_type=_MATCHES.get(message.match_type, MatchType.NONE),
        reply={0: False, 1: True}.get(message.is_reply),
        packet_bytes=message.packet_bytes,
        uid=None if message.uid == NO_UID else message.uid,
        cgroup_id=message.cgroup_id,
        lost=message.lost,
        lost_by=_LOST_BY.get(message.lost_by),
        rejudged=message.rejudged,
        audit=message.audit,
        agent=_agent_event(message.agent) if message.HasField("agent") else None,
    )


def rule_messages(origins: Iterable[Origin]) -> list[pb.Rule]:
    return [
        pb.Rule(
            kind=origin.kind,
            namespace=origin.namespace,
            name=origin.name,
            rule=origin.rule,
            file=origin.file,
            line=origin.line,
            tier=origin.tier,
        )
        for origin in origins
    ]


def rule_origins(messages: Iterable[pb.Rule]) -> tuple[Origin, ...]:
    return tuple(Origin(m.kind, m.namespace, m.name, m.rule, m.file, m.line, m.tier) for m in messages)


def address_of(packed: bytes) -> IpAddress | None:
    """The address in 4 or 16 bytes; None for any other length."""
    if len(packed) == 4:
        return IPv4Address(packed)
    return IPv6Address(packed) if len(packed) == 16 else None


def _peer_message(peer: FlowPeer) -> pb.Peer:
    return pb.Peer(
        namespace=peer.namespace,
        pod=peer.pod,
        identity=peer.identity,
        entities=peer.entities,
        labels=peer.labels,
    )


def _peer(message: pb.Peer, packed: bytes, port: int) -> FlowPeer:
    return FlowPeer(
        address=address_of(packed),
        port=port,
        identity=message.identity,
        namespace=message.namespace,
        pod=message.pod,
        entities=tuple(message.entities),
        labels=tuple(message.labels),
    )


def _agent_event(message: pb.AgentEvent) -> AgentEvent:
    return AgentEvent(message.name, tuple((detail.key, detail.value) for detail in message.details))


def _protocol(name: str) -> int:
    if name in PROTOCOL_NUMBERS:
        return PROTOCOL_NUMBERS[name]
    return int(name) if name.isdecimal() and len(name) <= 3 else 0
