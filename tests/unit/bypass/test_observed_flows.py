"""Connections that were seen tell who uses what: read from lines of text, and counted for the way they were dialled."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_bypass_report import NAMESPACES, STRICT, pod

from meshbridge.bypass import observed
from meshbridge.bypass.halfreport import HalfBypass, Source
from meshbridge.bypass.inventory import inventory
from meshbridge.bypass.observed import MAX_LINE_BYTES, ObservedError, ObservedFlow, latest, parse_observed
from meshbridge.bypass.report import report
from meshbridge.cli.bypass import command
from meshbridge.kube.manifests import read_objects
from meshbridge.observe.flow import AgentEvent, Flow, FlowKind, FlowPeer, FlowVerdict
from meshbridge.observe.printers import json_line
from meshbridge.policy.model import Direction

SYN, SYN_ACK = 0x02, 0x12
TIME_NS = 1_795_521_791_000_000_000
SENT = Flow(
    TIME_NS, "n", FlowKind.VERDICT, FlowVerdict.ALLOWED, Direction.EGRESS, protocol=6, tcp_flags=SYN, reply=False,
    source=FlowPeer(ip_address("10.0.1.1"), 40000, namespace="monitoring", pod="all"), uid=1000,
    destination=FlowPeer(ip_address("10.0.0.1"), 9000, namespace="finance", pod="api"),
)  # fmt: skip
SEEN = ObservedFlow(TIME_NS, "monitoring/all", "finance/api", ip_address("10.0.0.1"), 9000, 1000)


def lines(*flows: Flow) -> list[bytes]:
    return [json_line(flow).encode() + b"\n" for flow in flows]


def test_what_observe_prints_is_read_as_it_was() -> None:
    assert parse_observed(lines(SENT)) == (SEEN,)
    arrived = replace(SENT, direction=Direction.INGRESS, uid=None)
    assert parse_observed(lines(arrived)) == (replace(SEEN, uid=None),)
    to_service = replace(SENT, destination=FlowPeer(ip_address("10.96.0.1"), 80))
    assert parse_observed(lines(to_service)) == (replace(SEEN, server="", address=ip_address("10.96.0.1"), port=80),)


NOT_COUNTED = {
    "an answer": replace(SENT, tcp_flags=SYN_ACK),
    "a later packet": replace(SENT, tcp_flags=0x10),
    "a reply": replace(SENT, reply=True),
    "UDP": replace(SENT, protocol=17),
    "a client that is no pod": replace(SENT, source=FlowPeer(ip_address("192.0.2.1"), 1)),
    "events that were lost": Flow(1, "n", FlowKind.LOST, FlowVerdict.DROPPED, lost=3),
    "an event of the agent's own": Flow(1, "n", FlowKind.AGENT, FlowVerdict.NONE, agent=AgentEvent("x")),
}


@pytest.mark.parametrize("flow", NOT_COUNTED.values(), ids=NOT_COUNTED.keys())
def test_no_connection_is(flow: Flow) -> None:
    assert parse_observed(lines(flow)) == ()


def test_of_the_same_connection_the_last_counts() -> None:
    later = replace(SENT, time_ns=TIME_NS + 5_000_000_000)
    (found,) = parse_observed(lines(SENT, later, SENT))
    assert found.time_ns == later.time_ns


RECORD = json.loads(json_line(SENT))
FLOW = RECORD["flow"]


def changed(**parts: object) -> bytes:
    return json.dumps({**RECORD, "flow": {**FLOW, **parts}}).encode()


MALFORMED = {
    "no JSON": b"Nov 24 07:55:59.321: a -> b\n",
    "no object": b"[1]",
    "a number": b"1",
    "no flow": b"{}",
    "another's flow": b'{"flow": {"source": 7}}',
    "a port that is none": changed(l4={"TCP": {"destination_port": 70000, "flags": {"SYN": True}}}),
    "a port that is text": changed(l4={"TCP": {"destination_port": "80", "flags": {"SYN": True}}}),
    "a port that is true": changed(l4={"TCP": {"destination_port": True, "flags": {"SYN": True}}}),
    "an address that is none": changed(IP={"destination": "10.0.0.0.1"}),
    "a time that is none": changed(time="yesterday"),
    "a name without end": changed(source={"namespace": "a" * 300, "pod_name": "b"}),
    "a name that is none": changed(source={"namespace": ["a"], "pod_name": "b"}),
    "nested without end": b"[" * 50_000,
    "a line without end": b" " * (MAX_LINE_BYTES + 1),
    "no UTF-8": b'{"flow": "\xff"}',
}


@pytest.mark.parametrize("line", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_observe_does_not_print_is_an_error_that_names_the_line(line: bytes) -> None:
    with pytest.raises(ObservedError, match="line 2"):
        parse_observed([*lines(SENT), line])


def test_lines_and_what_is_kept_of_them_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = parse_observed(lines(*(replace(SENT, uid=uid) for uid in range(1, 9))))
    assert len(latest(parsed, 8)) == 8
    with pytest.raises(ObservedError, match="more than 7 different connections"):
        latest(parsed, 7)
    monkeypatch.setattr(observed, "MAX_LINES", 4)
    with pytest.raises(ObservedError, match="more than 4 lines"):
        parse_observed(lines(*[SENT] * 5))


SERVER = pod("finance/api", "10.0.0.1")
EVERYTHING = pod("monitoring/all", "10.0.1.1", '{traffic.sidecar.istio.io/includeOutboundIPRanges: ""}', ports="1")
WEB = pod("monitoring/all", "10.0.1.1", ports="1")
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: api, namespace: finance}
spec: {selector: {app: api}, clusterIP: 10.96.0.1, ports: [{port: 80, targetPort: 9000}]}
---
"""


def halves(*texts: str, seen: tuple[ObservedFlow, ...] = ()) -> list[HalfBypass]:
    known = inventory(read_objects("".join((NAMESPACES, STRICT, *texts)).encode(), "all.yaml").documents)
    return list(report(replace(known, observed=seen)).halves)


def test_a_client_of_which_nothing_else_tells_is_known_once_it_was_seen() -> None:
    assert halves(SERVER, EVERYTHING) == []
    (half,) = halves(SERVER, EVERYTHING, seen=(SEEN,))
    assert (half.server, half.port, half.via, half.clients) == ("finance/api", 9000, "", ("monitoring/all",))
    assert (half.known_from, half.observed_ns) == ((Source.OBSERVED,), TIME_NS)
    assert half.delivery.outcome.value == "broken"


def test_an_address_without_a_name_is_that_of_the_pod_that_has_it() -> None:
    assert halves(SERVER, EVERYTHING, seen=(replace(SEEN, server=""),))
    for flow in (replace(SEEN, server="", address=ip_address("10.9.9.9")), replace(SEEN, client="monitoring/other")):
        assert halves(SERVER, EVERYTHING, seen=(flow,)) == []


def test_a_services_address_counts_for_the_port_behind_it() -> None:
    dialled = replace(SEEN, server="", address=ip_address("10.96.0.1"), port=80)
    found = {half.via: half for half in halves(SERVER, EVERYTHING, SERVICE, seen=(dialled,))}
    assert set(found) == {"Service finance/api:80"}
    assert found["Service finance/api:80"].known_from == (Source.SERVICE, Source.OBSERVED)
    without = {half.via: half for half in halves(SERVER, EVERYTHING, SERVICE)}
    assert without["Service finance/api:80"].known_from == (Source.SERVICE,)
    assert without["Service finance/api:80"].observed_ns == 0


def test_what_envoy_sends_counts_for_the_service_and_what_an_application_sends_for_the_address() -> None:
    # through both Envoys, to the pod's own address: plaintext, which STRICT resets
    assert halves(SERVER, WEB) == []
    by_envoy = replace(SEEN, uid=1337)
    (half,) = halves(SERVER, WEB, seen=(by_envoy,))
    assert (half.via, half.known_from) == ("", (Source.OBSERVED,))
    # with a Service in front it was most likely that
    assert halves(SERVER, WEB, SERVICE, seen=(by_envoy, replace(SEEN, uid=None))) == []
    (half,) = halves(SERVER, WEB, SERVICE, seen=(SEEN,))
    assert half.via == ""


def test_a_client_that_policies_keep_away_is_none_although_it_was_seen() -> None:
    denied = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: finance}
spec: {action: DENY, rules: [{to: [{operation: {ports: ["9000"]}}]}]}
---
"""
    assert halves(SERVER, EVERYTHING, denied, seen=(SEEN,)) == []


def test_the_command_line_says_from_where_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests, flows = tmp_path / "all.yaml", tmp_path / "flows.jsonl"
    manifests.write_text("".join((NAMESPACES, STRICT, SERVER, EVERYTHING)))
    flows.write_bytes(b"".join(lines(SENT)))
    monkeypatch.setenv("TZ", "UTC")
    for verb, *rest in (("list",), ("show", "finance/api"), ("plan",)):
        result = CliRunner().invoke(command, [verb, *rest, "-f", str(manifests), "--observed", str(flows)])
        assert "(known from: observed Nov 24 " in result.output, result.output
    fixed = CliRunner().invoke(command, ["fix", "-f", str(manifests), "--observed", "-"], input=flows.read_bytes())
    assert "9000" in fixed.output
    assert "No half bypass" in CliRunner().invoke(command, ["fix", "-f", str(manifests)]).output
    record = CliRunner().invoke(command, ["list", "-o", "json", "-f", str(manifests), "--observed", str(flows)]).output
    (half,) = json.loads(record)["half_bypasses"]
    assert (half["known_from"], half["observed_unix_ns"]) == (["observed"], TIME_NS)
    without_files = CliRunner().invoke(command, ["list", "--observed", str(flows)])
    assert (without_files.exit_code, "agents count" in without_files.output) == (2, True)
