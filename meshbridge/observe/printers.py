"""Flows as lines: Hubble's compact form, a table, JSON. Functions of their arguments; whoever calls them prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from enum import StrEnum
from typing import Any

from meshbridge.observe.flow import Flow, FlowKind, FlowPeer, FlowVerdict
from meshbridge.observe.names import (
    agent_event_text,
    arrow,
    flow_summary,
    flow_type,
    flow_verdict,
    icmp_name,
    peer_name,
    peer_with_identity,
    peer_with_port,
    sides,
    tcp_flag_names,
)
from meshbridge.observe.reasons import drop_reason
from meshbridge.observe.text import printable
from meshbridge.policy.model import Direction, Origin

HEADER = ("TIMESTAMP", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY")
_GAP = "   "
# Hubble's codes for what an event is (pkg/monitor/api: drop 1, trace 4, policy verdict 5).
_EVENT_TYPES = {FlowKind.DROP: 1, FlowKind.TRACE: 4, FlowKind.VERDICT: 5}
_HUBBLE_VERDICTS = {FlowVerdict.ALLOWED: "FORWARDED", FlowVerdict.DENIED: "DROPPED"}

Paint = Callable[[str, str], str]
"""Colours a piece of text by the verdict it belongs to; plain output passes ``plain``."""


class Format(StrEnum):
    COMPACT = "compact"
    TABLE = "table"
    JSON = "json"


def plain(text: str, _verdict: str) -> str:
    return text


def timestamp(time_ns: int, zone: tzinfo | None = None) -> str:
    """``Nov 23 23:45:29.123`` in ``zone``, the local one when None."""
    moment = datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).astimezone(zone)
    return f"{moment:%b} {moment.day:>2} {moment:%H:%M:%S}.{time_ns // 1_000_000 % 1000:03}"


def compact_line(flow: Flow, *, zone: tzinfo | None = None, with_node: bool = False, paint: Paint = plain) -> str:
    """Hubble's compact line."""
    head = timestamp(flow.time_ns, zone) + (f" [{printable(flow.node)}]" if with_node else "")
    if flow.kind is FlowKind.LOST:
        return f"{head}: {_lost_text(flow)}"
    if flow.kind is FlowKind.AGENT:
        return f"{head}: {_agent_name(flow)} {agent_event_text(flow)}"
    left, right = sides(flow)
    verdict = flow_verdict(flow)
    return (
        f"{head}: {peer_with_identity(flow, left)} {arrow(flow)} {peer_with_identity(flow, right)} "
        f"{flow_type(flow)} {paint(verdict, verdict)} ({flow_summary(flow)})"
    )


@dataclass(slots=True)
class Table:
    """Rows under Hubble's table header; columns grow with what they have seen, so a stream stays readable."""

    zone: tzinfo | None = None
    paint: Paint = plain
    _widths: list[int] = field(default_factory=lambda: [len(title) for title in HEADER])
    _headed: bool = False

    def lines(self, flows: Iterable[Flow]) -> list[str]:
        """The lines for ``flows``, the header first if this table has not shown it."""
        rows = [self._cells(flow) for flow in flows]
        if rows and not self._headed:
            rows.insert(0, HEADER)
            self._headed = True
        for row in rows:
            self._widths = [max(width, len(cell)) for width, cell in zip(self._widths, row, strict=True)]
        return [self._line(row) for row in rows]

    def _cells(self, flow: Flow) -> tuple[str, ...]:
        when = timestamp(flow.time_ns, self.zone)
        if flow.kind is FlowKind.LOST:
            return (when, "", "", "EVENTS LOST", "", _lost_text(flow))
        if flow.kind is FlowKind.AGENT:
            return (when, "", peer_name(flow.destination), _agent_name(flow), "", agent_event_text(flow))
        left, right = sides(flow)
        return (when, peer_with_port(flow, left), peer_with_port(flow, right), flow_type(flow), flow_verdict(flow),
                flow_summary(flow))  # fmt: skip

    def _line(self, row: tuple[str, ...]) -> str:
        cells = [cell.ljust(width) for cell, width in zip(row, self._widths, strict=True)]
        verdict = row[4]
        cells[4] = self.paint(cells[4], verdict)
        return _GAP.join(cells).rstrip()


def json_line(flow: Flow) -> str:
    """One object, keys always in the same order and spelled as in ``hubble observe -o json``; ours under meshbridge."""
    time = _rfc3339(flow.time_ns)
    if flow.kind is FlowKind.LOST:
        lost = {"source": str(flow.lost_by or ""), "num_events_lost": flow.lost}
        return _dump({"lost_events": lost, "node_name": flow.node, "time": time})
    if flow.kind is FlowKind.AGENT:
        noticed = {"type": _agent_name(flow), "namespace": flow.destination.namespace, "pod_name": flow.destination.pod}
        noticed |= dict(flow.agent.details) if flow.agent is not None else {}
        return _dump({"agent_event": noticed, "node_name": flow.node, "time": time})
    return _dump({"flow": _json_flow(flow, time), "node_name": flow.node, "time": time})


def _json_flow(flow: Flow, time: str) -> dict[str, Any]:
    record: dict[str, Any] = {"time": time, "verdict": _HUBBLE_VERDICTS.get(flow.verdict, flow.verdict.value)}
    if flow.reason:
        record |= {"drop_reason": flow.reason, "drop_reason_desc": drop_reason(flow.reason).name}
    if flow.source.address and flow.destination.address:
        record["IP"] = {
            "source": str(flow.source.address),
            "destination": str(flow.destination.address),
            "ipVersion": f"IPv{flow.source.address.version}",
        }
        record["l4"] = _json_l4(flow)
    record |= {
        "source": _json_peer(flow.source),
        "destination": _json_peer(flow.destination),
        "Type": "L3_L4",
        "node_name": flow.node,
        "is_reply": flow.reply,
        "event_type": {"type": _EVENT_TYPES[flow.kind], "sub_type": flow.reason},
        "traffic_direction": flow.direction.name,
        "policy_match_type": int(flow.match_type),
    }
    if flow.rules:
        record[_rules_key(flow)] = [_json_rule(origin) for origin in flow.rules]
    record["Summary"] = flow_summary(flow)
    record["meshbridge"] = {
        "type": flow.kind.value,
        "verdict": flow.verdict.value,
        "reason_text": drop_reason(flow.reason).text,
        "layer": "" if flow.layer is None else flow.layer.name.lower(),
        "network_verdict": flow.network_verdict,
        "mesh_verdict": flow.mesh_verdict,
        "network_rules": [_json_rule(origin) for origin in flow.network_rules],
        "mesh_rules": [_json_rule(origin) for origin in flow.mesh_rules],
        "endpoint_id": flow.endpoint_id,
        "ifindex": flow.ifindex,
        "packet_bytes": flow.packet_bytes,
        "uid": flow.uid,
        "cgroup_id": flow.cgroup_id or None,
        "ethertype": flow.ethertype,
        "rejudged": flow.rejudged,
        "audit": flow.audit,
    }
    return record


def _json_l4(flow: Flow) -> dict[str, Any]:
    ports: dict[str, Any] = {"source_port": flow.source.port, "destination_port": flow.destination.port}
    if flow.protocol == 6:
        return {"TCP": ports | {"flags": dict.fromkeys(tcp_flag_names(flow.tcp_flags), True)}}
    if flow.protocol in (1, 58):
        return {flow.protocol_name: {"type": flow.icmp_type, "code": flow.icmp_code, "name": icmp_name(flow)}}
    return {flow.protocol_name: ports}


def _json_peer(peer: FlowPeer) -> dict[str, Any]:
    return {
        "identity": peer.identity,
        "namespace": peer.namespace,
        "labels": [*(f"reserved:{entity}" for entity in peer.entities), *peer.labels],
        "pod_name": peer.pod,
    }


def _json_rule(origin: Origin) -> dict[str, Any]:
    return {**origin.record(), "tier": origin.tier}


def _rules_key(flow: Flow) -> str:
    side = "ingress" if flow.direction is Direction.INGRESS else "egress"
    return f"{side}_{'denied' if flow.reason else 'allowed'}_by"


def _agent_name(flow: Flow) -> str:
    return printable(flow.agent.name) if flow.agent is not None else FlowKind.AGENT.value


def _lost_text(flow: Flow) -> str:
    return f"EVENTS LOST: {flow.lost_by or 'UNKNOWN'} {flow.lost}"


def _rfc3339(time_ns: int) -> str:
    moment = datetime.fromtimestamp(time_ns // 1_000_000_000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_ns % 1_000_000_000:09}Z"


def _dump(record: dict[str, Any]) -> str:
    # ASCII escapes keep a hostile name from reaching the terminal as control characters.
    return json.dumps(record, separators=(",", ":"), ensure_ascii=True)
