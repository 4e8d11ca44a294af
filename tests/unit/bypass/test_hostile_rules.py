"""Rules come from a namespace that its pod controls: nothing in them may raise, hang, or be taken for capture."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.capture import bypasses_outbound, capture_state
from meshbridge.bypass.iptables import parse_iptables_save
from meshbridge.bypass.nft import parse_nft_json
from meshbridge.bypass.rules import Action, Hook, RuleSet
from meshbridge.bypass.sets import Box
from meshbridge.bypass.walk import Outcome, regions
from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.policy.capture import PortClass

V4 = IpFamily.IPV4
_OPTIONS = "-A -j -g -m -p -s -d -i -o ! --dport --dports --uid-owner --ctstate --mark --to-ports --set-xmark --comment"
_VALUES = (
    "PREROUTING OUTPUT REDIRECT RETURN ACCEPT MARK TPROXY CT tcp udp 80 80:90 0x50 090 1337 10.0.0.0/8 ::1/128 lo +"
)
_ODD = "eth+ NEW,ESTABLISHED 0x539/0xfff 99999999999999999999 -1 \" ' \\ x"
WORDS = st.sampled_from(f"{_OPTIONS} {_VALUES} {_ODD}".split())
LINES = st.lists(WORDS, max_size=12).map(" ".join)


def outcomes(rules: RuleSet) -> set[Outcome]:
    return {region.outcome for region in regions((rules,), Hook.PREROUTING, Box.everything(rules.family))}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(LINES, LINES.map(lambda text: f"-A PREROUTING {text}"), st.text(max_size=60)), max_size=8))
def test_no_text_makes_the_parser_raise(lines: list[str]) -> None:
    text = "\n".join(["*nat", ":PREROUTING ACCEPT [0:0]", *lines])
    assert outcomes(parse_iptables_save(text, V4))


_LEAVES = st.none() | st.booleans() | st.integers(-1, 70000) | st.sampled_from(["tcp", "eth0", "10.0.0.1", "new", ""])
_KEYS = st.sampled_from(
    [
        "match",
        "left",
        "right",
        "op",
        "payload",
        "meta",
        "key",
        "set",
        "range",
        "prefix",
        "redirect",
        "jump",
        "target",
        "mangle",
        "ct",
        "xt",
        "type",
        "protocol",
        "field",
    ]
)
JSON = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(JSON, max_size=4))
def test_no_json_makes_the_parser_raise(expressions: list[Any]) -> None:
    chain = {"family": "ip", "table": "t", "name": "c", "type": "nat", "hook": "prerouting", "prio": -100}
    rules = [{"rule": {"family": "ip", "table": "t", "chain": "c", "expr": expressions}}, {"rule": {"family": "ip"}}]
    text = json.dumps({"nftables": [{"chain": chain}, *rules, 7, {}, {"rule": 3}]})
    assert outcomes(parse_nft_json(text, V4))


NOT_JSON = {
    "nothing": "",
    "cut short": '{"nftables": [',
    "another shape": "[1, 2]",
    "nested without end": "[" * 100_000,
    "more than rules have": '{"nftables": []}' + " " * (1 << 20),
}


@pytest.mark.parametrize("text", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_nfts_json_makes_every_outcome_unknown(text: str) -> None:
    assert outcomes(parse_nft_json(text, V4)) == {Outcome.UNKNOWN}


def test_more_rules_than_anybody_writes_make_every_outcome_unknown() -> None:
    lines = ["*nat", ":PREROUTING ACCEPT [0:0]", *["-A PREROUTING -p tcp -j REDIRECT --to-ports 15006"] * 5000]
    assert outcomes(parse_iptables_save("\n".join(lines), V4)) == {Outcome.UNKNOWN}


def test_rules_that_cut_packets_into_too_many_pieces_end_soon_and_make_every_outcome_unknown() -> None:
    lines = ["*nat", ":PREROUTING ACCEPT [0:0]"]
    for number in range(4000):
        where = f"-s 10.{number // 250}.{number % 250}.0/24 -p tcp --dport {number + 1}"
        lines.append(f"-A PREROUTING {where} -j MARK --set-mark {number + 1}")
    lines.append("-A PREROUTING -p tcp -j REDIRECT --to-ports 15006")
    rules = parse_iptables_save("\n".join(lines), V4)
    started = time.process_time()
    assert outcomes(rules) == {Outcome.UNKNOWN}
    assert time.process_time() - started < 5


def test_a_negated_match_with_an_unknown_part_never_narrows() -> None:
    """``! -m x`` must not turn into a match of everything else."""
    text = (
        "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m set ! --match-set x dst -j REDIRECT --to-ports 15006\n"
    )
    (rule,) = parse_iptables_save(text, V4).chains["nat/PREROUTING"]
    assert rule.unknown
    assert rule.action is Action.REDIRECT
    assert outcomes(parse_iptables_save(text, V4)) == {Outcome.UNKNOWN, Outcome.PASSED}


def test_nftables_rules_read_from_json() -> None:
    port = {"payload": {"protocol": "tcp", "field": "dport"}}
    address = {"payload": {"protocol": "ip", "field": "daddr"}}
    expression = [
        {"match": {"op": "==", "left": port, "right": {"set": [80, {"range": [90, 99]}]}}},
        {"match": {"op": "!=", "left": address, "right": {"prefix": {"addr": "10.0.0.0", "len": 8}}}},
        {"counter": {"packets": 0, "bytes": 0}},
        {"redirect": {"port": 15006}},
    ]
    chain = {"family": "inet", "table": "t", "name": "c", "type": "nat", "hook": "prerouting", "prio": -100}
    rule = {"family": "inet", "table": "t", "chain": "c", "expr": expression}
    text = json.dumps({"nftables": [{"chain": chain}, {"rule": rule}]})
    (read,) = parse_nft_json(text, V4).chains["inet/t/c"]
    assert (str(read.match.port), str(read.match.protocol), read.port) == ("80,90-99", "6", 15006)
    assert 0x0A000001 not in read.match.destination
    # for IPv6 the rule, which asks for an IPv4 address, matches nothing
    (other,) = parse_nft_json(text, IpFamily.IPV6).chains["inet/t/c"]
    assert other.match.empty


def test_an_annotation_of_every_port_there_is_ends_soon_and_captures_nothing() -> None:
    every = ",".join(str(port) for port in range(65536))
    annotations = {a.EXCLUDE_INBOUND_PORTS: every, a.EXCLUDE_OUTBOUND_PORTS: "," * 1000 + "0120," * 40000 + "1"}
    arguments = a.render_init_args(annotations, MeshDefaults())
    pod = Workload("shop", "web", "u", "n", (), annotations=annotations, proxy=ProxyClass.SIDECAR, init_args=arguments)
    started = time.process_time()
    state = capture_state(pod)
    assert time.process_time() - started < 5
    assert state.inbound(intended=True)[V4].at(80) is PortClass.EXCLUDED
    assert sum(len(str(finding)) for finding in state.findings) < 100_000


LONG = "9" * 5000
"""Python refuses to read so many digits as a number."""
POD = Workload("shop", "web", "u", "n", (), proxy=ProxyClass.SIDECAR)
UNREADABLE = {
    "excluded ports": replace(POD, annotations={a.EXCLUDE_INBOUND_PORTS: LONG}),
    "a status port": replace(POD, annotations={"status.sidecar.istio.io/port": LONG}),
    "a user": replace(POD, init_args=("-p", "15001", "-u", LONG)),
    "a group": replace(POD, init_args=("-p", "15001", "-g", LONG)),
}


@pytest.mark.parametrize("pod", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_number_of_thousands_of_digits_raises_nowhere(pod: Workload) -> None:
    assert capture_state(pod).inbound()[V4].at(80) is PortClass.EXCLUDED
    bypasses_outbound(pod)
