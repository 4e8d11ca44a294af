"""What an audit would have dropped, counted by pod, port and source."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from meshbridge.agent.audits import MAX_ROWS, AuditCounts
from meshbridge.observe.flow import Flow, FlowKind, FlowPeer, FlowVerdict
from meshbridge.policy.model import Direction, Layer, Origin

WEB = FlowPeer(ip_address("10.0.1.10"), 41112, 4711, "shop", "web")
API = FlowPeer(ip_address("10.0.2.11"), 8080, 4712, "shop", "api")
WORLD = FlowPeer(ip_address("203.0.113.7"), 5000, 9)
RULE = Origin("AuthorizationPolicy", "shop", "api", "spec.rules[0]", "p.yaml", 9)
AUDITED = Flow(
    5, "n", FlowKind.VERDICT, FlowVerdict.AUDIT, reason=229, source=WEB, destination=API, protocol=6,
    layer=Layer.MESH, mesh_rules=(RULE,), audit=True,
)  # fmt: skip


def counted(*flows: Flow) -> list[tuple[str, str, int, str, int]]:
    counts = AuditCounts()
    for flow in flows:
        counts.add(flow)
    return [(r["pod"], r["direction"], r["port"], r["peer"], r["flows"]) for r in counts.records("n")]


def test_each_source_of_a_port_has_a_count_the_largest_first() -> None:
    flows = (replace(AUDITED, source=WORLD), AUDITED, AUDITED)
    assert counted(*flows) == [
        ("shop/api", "ingress", 8080, "shop/web", 2), ("shop/api", "ingress", 8080, "203.0.113.7", 1),
    ]  # fmt: skip


def test_what_a_pod_sends_is_counted_by_destination() -> None:
    sent = replace(AUDITED, direction=Direction.EGRESS)
    assert counted(sent) == [("shop/web", "egress", 8080, "shop/api", 1)]


def test_only_new_connections_that_an_audit_alone_let_through_count() -> None:
    assert counted(replace(AUDITED, audit=False), replace(AUDITED, rejudged=True)) == []


def test_a_record_names_the_rule_and_the_last_time() -> None:
    counts = AuditCounts()
    for time_ns in (7, 9, 8):
        counts.add(replace(AUDITED, time_ns=time_ns))
    (record,) = counts.records("n")
    assert (record["last_unix_ns"], record["node"]) == (9, "n")
    assert [(o["name"], o["line"]) for o in record["origins"]] == [("api", 9)]


def test_a_flood_of_sources_is_counted_in_bounded_room() -> None:
    counts = AuditCounts()
    for number in range(3 * MAX_ROWS):
        address = ip_address(0x0A000000 + number)
        counts.add(replace(AUDITED, source=replace(WORLD, address=address)))
    records = counts.records("n")
    assert len(records) == MAX_ROWS + 1
    assert (records[0]["pod"], records[0]["flows"]) == ("", 2 * MAX_ROWS)
    assert counts.total == 3 * MAX_ROWS
