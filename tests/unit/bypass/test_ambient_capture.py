"""The capture state of a pod in ambient mode, as it differs from one with a sidecar."""

from __future__ import annotations

import json
from ipaddress import ip_address
from typing import Any

import pytest

from meshbridge.bypass import annotations as a
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.nft import parse_nft_json
from meshbridge.bypass.rules import MarkMatch, SeenRules
from meshbridge.bypass.state import CaptureState, Span, Truth
from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.policy.capture import PortClass
from meshbridge.policy.model import Direction

V4 = IpFamily.IPV4
PROBES, CLIENT, OWN = "169.254.7.127", "10.0.0.9", "10.0.0.1"
CAPTURED, EXCLUDED, UNGUARDED, TUNNEL = (
    PortClass.CAPTURED, PortClass.EXCLUDED, PortClass.UNGUARDED, PortClass.TUNNEL,
)  # fmt: skip


def pod(**annotations: str) -> Workload:
    return Workload("shop", "web", "u", "n", (ip_address(OWN),), annotations=annotations, proxy=ProxyClass.AMBIENT)


def intended(annotations: dict[str, str] | None = None) -> CaptureState:
    return capture_state(pod(**(annotations or {})))


def span_of(
    state: CaptureState, direction: Direction, port: int, *, peer: str = CLIENT, interface: str = "eth0", uid: int = 0
) -> Span:
    inbound = direction is Direction.INGRESS
    (found,) = [
        span
        for span in state.of(direction, V4, intended=state.truth is not Truth.RULES)
        if 6 in span.box.protocol
        and port in span.box.port
        and interface in (span.box.input if inbound else span.box.output)
        and int(ip_address(peer)) in (span.box.source if inbound else span.box.destination)
        and (inbound or uid in span.box.uid)
    ]
    return found


def test_istios_ports_are_the_pods_own_and_the_tunnel_is_no_port_of_it() -> None:
    state = intended()
    assert [span_of(state, Direction.INGRESS, port).port_class for port in (80, 15020, 15021, 15090, 15008)] == [
        CAPTURED, CAPTURED, CAPTURED, CAPTURED, TUNNEL,
    ]  # fmt: skip


def test_nobody_is_let_go_by_user_or_group() -> None:
    assert {span_of(intended(), Direction.EGRESS, 80, uid=uid).port_class for uid in (0, 1337)} == {CAPTURED}


@pytest.mark.parametrize("annotations", [{}, {a.AMBIENT_BYPASS_INBOUND: "true"}], ids=["captured", "bypassed"])
def test_the_kubelets_probes_are_no_traffic_of_the_mesh(annotations: dict[str, str]) -> None:
    for direction in Direction:
        assert span_of(intended(annotations), direction, 80, peer=PROBES).port_class is UNGUARDED


@pytest.mark.parametrize(
    ("value", "bypasses"),
    [("true", True), ("True", True), ("1", True), ("t", True), ("yes", False), ("on", False), ("false", False)],
)
def test_inbound_capture_is_switched_off_by_what_go_takes_for_true(value: str, bypasses: bool) -> None:
    span = span_of(intended({a.AMBIENT_BYPASS_INBOUND: value}), Direction.INGRESS, 80)
    assert span.port_class is (EXCLUDED if bypasses else CAPTURED)
    assert not bypasses or span.route.detail == f'annotation {a.AMBIENT_BYPASS_INBOUND}: "{value}"'


def test_rerouted_interfaces_stay_captured_without_inbound_capture() -> None:
    state = intended({a.AMBIENT_BYPASS_INBOUND: "true", a.REROUTE_INTERFACES: "net1, net2"})
    found = [span_of(state, Direction.INGRESS, 80, interface=name).port_class for name in ("net1", "net2", "eth0")]
    assert found == [CAPTURED, CAPTURED, EXCLUDED]


MARK = {"&": [{"meta": {"key": "mark"}}, 4095]}


def match(left: Any, right: Any, operator: str = "==") -> dict[str, Any]:
    return {"match": {"op": operator, "left": left, "right": right}}


def ruleset(*rules: list[dict[str, Any]]) -> str:
    chain = {"family": "inet", "table": "istio-ambient-nat", "name": "prerouting", "type": "nat"}
    items: list[dict[str, Any]] = [{"chain": {**chain, "hook": "prerouting", "prio": -100, "policy": "accept"}}]
    items += [
        {"rule": {"family": "inet", "table": "istio-ambient-nat", "chain": "prerouting", "expr": rule}}
        for rule in rules
    ]
    return json.dumps({"nftables": items})


DPORT = match({"payload": {"protocol": "tcp", "field": "dport"}}, 15008, "!=")
TO_ZTUNNEL = {"redirect": {"port": 15006}}


def test_native_nftables_compares_marks_under_a_mask() -> None:
    rules = parse_nft_json(ruleset([DPORT, match(MARK, 1337, "!="), TO_ZTUNNEL]), V4)
    (rule,) = rules.chains["inet/istio-ambient-nat/prerouting"]
    assert (rule.mark, rule.unknown) == (MarkMatch(1337, 4095, negated=True), ())
    state = capture_state(pod(), seen=SeenRules((rules,)))
    assert (span_of(state, Direction.INGRESS, 80).port_class, span_of(state, Direction.INGRESS, 80).listener) == (
        CAPTURED, 15006,
    )  # fmt: skip
    assert "ztunnel's inbound listener" in span_of(state, Direction.INGRESS, 80).route.detail


NOT_UNDERSTOOD = {
    "a mask over an address": match({"&": [{"payload": {"protocol": "ip", "field": "saddr"}}, 255]}, 1),
    "a mask that is no number": match({"&": [{"meta": {"key": "mark"}}, "x"]}, 1337, "!="),
    "a mask over nothing": match({"&": []}, 1337),
    "a mark in a set": match(MARK, {"set": [1, 2]}),
}


@pytest.mark.parametrize("condition", NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD.keys())
def test_what_is_not_understood_of_a_mask_counts_as_not_captured(condition: dict[str, Any]) -> None:
    rules = parse_nft_json(ruleset([DPORT, condition, TO_ZTUNNEL]), V4)
    assert rules.chains["inet/istio-ambient-nat/prerouting"][0].unknown
    assert span_of(capture_state(pod(), seen=SeenRules((rules,))), Direction.INGRESS, 80).port_class is EXCLUDED
