"""The printed forms are other people's formats: every line here is compared letter by letter."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address

import pytest

from meshbridge.observe.flow import Flow, FlowKind, FlowPeer, FlowVerdict, LostBy, MatchType
from meshbridge.observe.messages import decode_flow, encode_flow
from meshbridge.observe.monitor import monitor_lines
from meshbridge.observe.printers import Table, compact_line, json_line
from meshbridge.policy.model import Direction, Layer, Origin
from meshbridge.protos import observer_pb2 as pb

TIME_NS = int(datetime(2026, 11, 23, 23, 45, 29, tzinfo=UTC).timestamp()) * 10**9 + 123_456_789
WEB = FlowPeer(ip_address("10.0.1.10"), 41112, 4711, "shop", "web", (), ("k8s:app=web",))
API = FlowPeer(ip_address("10.0.2.11"), 80, 4712, "shop", "api", (), ("k8s:app=api",))
HOST = FlowPeer(ip_address("10.0.2.1"), 5000, 1, entities=("host",))
WORLD6 = FlowPeer(ip_address("2001:db8::9"), 443, 2, entities=("world",))
ISOLATING = Origin("CiliumNetworkPolicy", "shop", "api-ingress", "spec.ingress[0]", "policies.yaml", 14)
MESH = Origin("AuthorizationPolicy", "shop", "api-posts", "spec.rules[0]", "mesh.yaml", 9)

DROP = Flow(
    TIME_NS, "node-b", FlowKind.DROP, FlowVerdict.DROPPED, Direction.INGRESS, endpoint_id=512, ifindex=12, reason=133,
    source=WEB, destination=API, protocol=6, tcp_flags=0x02, layer=Layer.NETWORK, network_verdict="deny",
    network_rules=(ISOLATING,), packet_bytes=74,
)  # fmt: skip
ALLOWED = replace(
    DROP, kind=FlowKind.VERDICT, verdict=FlowVerdict.ALLOWED, reason=0, layer=None, network_verdict="allow",
    mesh_verdict="needs-l7", mesh_rules=(MESH,), match_type=MatchType.L3_L4, reply=False,
)  # fmt: skip
DENIED = replace(DROP, kind=FlowKind.VERDICT, verdict=FlowVerdict.DENIED)
REPLY = replace(
    DROP, kind=FlowKind.TRACE, verdict=FlowVerdict.FORWARDED, reason=0, layer=None, source=API, destination=WEB,
    tcp_flags=0x12, reply=True, network_rules=(),
)  # fmt: skip
LOST = Flow(TIME_NS, "node-b", FlowKind.LOST, FlowVerdict.DROPPED, lost=17, lost_by=LostBy.KERNEL)

LINES = {
    "default-deny drop": (
        DROP,
        "Nov 23 23:45:29.123: shop/web:41112 (ID:4711) <> shop/api:80 (ID:4712) Policy denied DROPPED (TCP Flags: SYN)",
    ),
    "verdict on a new flow": (
        ALLOWED,
        "Nov 23 23:45:29.123: shop/web:41112 (ID:4711) -> shop/api:80 (ID:4712) "
        "policy-verdict:L3-L4 INGRESS ALLOWED (TCP Flags: SYN)",
    ),
    "verdict that denies": (
        DENIED,
        "Nov 23 23:45:29.123: shop/web:41112 (ID:4711) <> shop/api:80 (ID:4712) "
        "policy-verdict:none INGRESS DENIED (TCP Flags: SYN)",
    ),
    "verdict in audit mode": (
        replace(ALLOWED, verdict=FlowVerdict.AUDIT, match_type=MatchType.NONE, reply=None),
        "Nov 23 23:45:29.123: shop/web:41112 (ID:4711) <> shop/api:80 (ID:4712) "
        "policy-verdict:none INGRESS AUDITED (TCP Flags: SYN)",
    ),
    "reply has its ends swapped back": (
        REPLY,
        "Nov 23 23:45:29.123: shop/web:41112 (ID:4711) <- shop/api:80 (ID:4712) "
        "to-endpoint FORWARDED (TCP Flags: SYN, ACK)",
    ),
    "reserved identities print by name": (
        replace(ALLOWED, source=HOST, match_type=MatchType.L3_ONLY),
        "Nov 23 23:45:29.123: 10.0.2.1:5000 (host) -> shop/api:80 (ID:4712) "
        "policy-verdict:L3-Only INGRESS ALLOWED (TCP Flags: SYN)",
    ),
    "ipv6 address with port in brackets": (
        replace(ALLOWED, source=API, destination=WORLD6, protocol=17, direction=Direction.EGRESS),
        "Nov 23 23:45:29.123: shop/api:80 (ID:4712) -> [2001:db8::9]:443 (world) "
        "policy-verdict:L3-L4 EGRESS ALLOWED (UDP)",
    ),
    "icmp has no ports": (
        replace(DROP, protocol=1, icmp_type=8, source=replace(WEB, port=0), destination=replace(API, port=0)),
        "Nov 23 23:45:29.123: shop/web (ID:4711) <> shop/api (ID:4712) Policy denied DROPPED (ICMPv4 EchoRequest)",
    ),
    "a frame that is not IP": (
        replace(DROP, reason=182, source=FlowPeer(), destination=FlowPeer(), protocol=0, ethertype=0x8100),
        "Nov 23 23:45:29.123: unknown (ID:0) <> unknown (ID:0) "
        "VLAN traffic disallowed by VLAN filter DROPPED (ethertype 0x8100)",
    ),
    "lost events are told": (LOST, "Nov 23 23:45:29.123: EVENTS LOST: KERNEL_EVENTS 17"),
    "a reason of a newer kernel side": (
        replace(DROP, reason=251),
        "Nov 23 23:45:29.123: shop/web:41112 (ID:4711) <> shop/api:80 (ID:4712) Reason 251 DROPPED (TCP Flags: SYN)",
    ),
    "a day of one digit is padded with a space": (
        replace(LOST, time_ns=int(datetime(2026, 3, 5, 1, 2, 3, tzinfo=UTC).timestamp()) * 10**9),
        "Mar  5 01:02:03.000: EVENTS LOST: KERNEL_EVENTS 17",
    ),
}


@pytest.mark.parametrize(("flow", "line"), LINES.values(), ids=LINES.keys())
def test_compact_line_is_hubbles(flow: Flow, line: str) -> None:
    assert compact_line(flow, zone=UTC) == line


def test_compact_line_names_the_node_when_asked() -> None:
    assert compact_line(DROP, zone=UTC, with_node=True).startswith("Nov 23 23:45:29.123 [node-b]: shop/web:41112 ")


def test_table_has_hubbles_columns_and_says_dropped_and_why() -> None:
    assert Table(zone=UTC).lines([DROP, replace(ALLOWED, source=HOST)]) == [
        "TIMESTAMP             SOURCE           DESTINATION   TYPE                           VERDICT   SUMMARY",
        "Nov 23 23:45:29.123   shop/web:41112   shop/api:80   Policy denied                  DROPPED   TCP Flags: SYN",
        "Nov 23 23:45:29.123   10.0.2.1:5000    shop/api:80   policy-verdict:L3-L4 INGRESS   ALLOWED   TCP Flags: SYN",
    ]


def test_table_of_a_stream_shows_its_header_once() -> None:
    table = Table(zone=UTC)
    assert len(table.lines([DROP])) == 2
    assert len(table.lines([DROP])) == 1
    assert table.lines([]) == []


MONITOR_LINES = {
    "drop at ingress": (
        DROP,
        "identity 4711->4712: 10.0.1.10:41112 -> 10.0.2.11:80 tcp SYN",
        "xx drop (Policy denied) flow 0x",
    ),
    "drop to the node": (
        replace(DROP, destination=HOST, direction=Direction.EGRESS),
        "to endpoint 0, ifindex 12, file from_pod.c, , identity 4711->host: 10.0.1.10:41112 -> 10.0.2.1:5000 tcp SYN",
        "xx drop (Policy denied) flow 0x",
    ),
    "verdict": (
        DENIED,
        "local EP ID 512, remote ID 4711, proto 6, ingress, action deny, auth: disabled, match none, "
        "10.0.1.10:41112 -> 10.0.2.11:80 tcp SYN",
        "Policy verdict log: flow 0x",
    ),
    "icmp": (
        replace(DROP, protocol=1, icmp_type=8),
        ": 10.0.1.10 -> 10.0.2.11 icmp EchoRequest",
        "xx drop (Policy denied) flow 0x",
    ),
}


@pytest.mark.parametrize(("flow", "end", "start"), MONITOR_LINES.values(), ids=MONITOR_LINES.keys())
def test_monitor_line_is_ciliums(flow: Flow, end: str, start: str) -> None:
    (line,) = monitor_lines(flow)
    assert line.startswith(start)
    assert line.endswith(end)


def test_monitor_line_has_the_double_comma_before_the_identity() -> None:
    assert ", ifindex 12, file to_pod.c, , identity 4711->4712: " in monitor_lines(DROP)[0]


def test_both_directions_of_a_flow_carry_the_same_flow_number() -> None:
    number = monitor_lines(DROP)[0].split("flow ")[1].split()[0]
    assert f"flow {number}," in monitor_lines(REPLY)[0]


def test_verbose_default_deny_names_the_policies_that_isolated_the_endpoint() -> None:
    assert monitor_lines(DROP, verbose=True)[1:] == [
        "    reason: POLICY_DENIED: policies isolate the pod in this direction and none of their rules allows "
        "this peer and port",
        "    isolated by: CiliumNetworkPolicy shop/api-ingress spec.ingress[0] (policies.yaml:14)",
        "    fix: allow the peer and port in one of the policies named here, or in a new one",
    ]


def test_verbose_verdict_names_the_rule_of_each_layer() -> None:
    assert monitor_lines(ALLOWED, verbose=True)[1:] == [
        "    network allow: CiliumNetworkPolicy shop/api-ingress spec.ingress[0] (policies.yaml:14)",
        "    mesh needs-l7: AuthorizationPolicy shop/api-posts spec.rules[0] (mesh.yaml:9)",
    ]


def test_verbose_mesh_deny_names_only_the_layer_that_decided() -> None:
    flow = replace(DROP, reason=221, layer=Layer.MESH, mesh_verdict="deny", mesh_rules=(MESH,), network_verdict="allow")
    lines = monitor_lines(flow, verbose=True)
    assert "    mesh deny: AuthorizationPolicy shop/api-posts spec.rules[0] (mesh.yaml:9)" in lines
    assert not any("api-ingress" in line for line in lines)


def test_json_is_one_object_a_line_with_hubbles_keys() -> None:
    record = json.loads(json_line(DROP))
    assert record["time"] == "2026-11-23T23:45:29.123456789Z"
    assert record["node_name"] == "node-b"
    flow = record["flow"]
    assert flow["verdict"] == "DROPPED"
    assert (flow["drop_reason"], flow["drop_reason_desc"]) == (133, "POLICY_DENIED")
    assert flow["IP"] == {"source": "10.0.1.10", "destination": "10.0.2.11", "ipVersion": "IPv4"}
    assert flow["l4"] == {"TCP": {"source_port": 41112, "destination_port": 80, "flags": {"SYN": True}}}
    assert flow["source"] == {"identity": 4711, "namespace": "shop", "labels": ["k8s:app=web"], "pod_name": "web"}
    assert flow["traffic_direction"] == "INGRESS"
    assert flow["ingress_denied_by"] == [
        {"kind": "CiliumNetworkPolicy", "namespace": "shop", "name": "api-ingress", "rule": "spec.ingress[0]",
         "file": "policies.yaml", "line": 14, "tier": ""}
    ]  # fmt: skip
    assert "\n" not in json_line(DROP)


def test_json_keys_do_not_depend_on_the_kind_of_flow() -> None:
    keys = [list(json.loads(json_line(flow))["flow"]["meshbridge"]) for flow in (DROP, ALLOWED, REPLY)]
    assert keys[0] == keys[1] == keys[2]


def test_json_verdict_of_a_policy_verdict_is_hubbles() -> None:
    assert json.loads(json_line(DENIED))["flow"]["verdict"] == "DROPPED"
    assert json.loads(json_line(ALLOWED))["flow"]["verdict"] == "FORWARDED"


HOSTILE = "a\x1b[2J\nNov 23: shop/x\u202e\x9b"


def test_control_characters_of_names_never_reach_the_terminal() -> None:
    peer = replace(WEB, pod=HOSTILE)
    rule = replace_origin(ISOLATING, HOSTILE)
    flow = replace(DROP, source=peer, node=HOSTILE, network_rules=(rule,))
    printed = [
        compact_line(flow, with_node=True),
        json_line(flow),
        *monitor_lines(flow, verbose=True),
        *Table().lines([flow]),
    ]
    for line in printed:
        assert line.isprintable(), line


def replace_origin(origin: Origin, name: str) -> Origin:
    return replace(origin, name=name)


TIERED = replace(ISOLATING, kind="ClusterNetworkPolicy", namespace="", tier="Admin")
FLOWS = [
    DROP, ALLOWED, DENIED, REPLY, LOST, replace(DROP, uid=0), replace(DROP, protocol=89),
    replace(DROP, network_rules=(TIERED,)),
]  # fmt: skip


@pytest.mark.parametrize("flow", FLOWS)
def test_a_flow_survives_the_socket(flow: Flow) -> None:
    assert decode_flow(pb.Flow.FromString(encode_flow(flow))) == flow


def test_a_record_of_a_newer_agent_is_shown_not_refused() -> None:
    message = pb.Flow(
        type="weird", verdict="ODD", layer="x", match_type="y", protocol="QUIC?", is_reply=9, lost_by="me"
    )
    flow = decode_flow(message)
    assert (flow.kind, flow.verdict, flow.reply, flow.protocol) == (FlowKind.TRACE, FlowVerdict.FORWARDED, None, 0)
    assert compact_line(flow, zone=UTC)
