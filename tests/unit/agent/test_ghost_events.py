"""Ghost bypasses as they come and go: events, the endpoint's condition, counts."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address

from meshbridge.agent.ghosts import Ghosts
from meshbridge.bypass.ghosts import GhostBypass
from meshbridge.bypass.sets import IntSet
from meshbridge.bypass.state import Route, RouteKind
from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.observe.flow import Flow
from meshbridge.observe.messages import decode_flow, encode_flow
from meshbridge.observe.monitor import monitor_lines
from meshbridge.observe.printers import Table, compact_line, json_line
from meshbridge.policy.model import Direction
from meshbridge.protos import observer_pb2 as pb

API = Workload("shop", "api", "u", "n", (ip_address("10.0.0.1"),), proxy=ProxyClass.SIDECAR, phase="Running")
ROUTE = Route(RouteKind.OTHER_RULE, "-A PREROUTING -p tcp --dport 9000 -j RETURN")
ON_9000 = GhostBypass(Direction.INGRESS, IpFamily.IPV4, IntSet.of(9000), ROUTE)
ON_53 = GhostBypass(Direction.EGRESS, IpFamily.IPV6, IntSet.of(53), ROUTE)


def names(events: list[Flow]) -> list[tuple[str, str]]:
    return [(f.agent.name, dict(f.agent.details)["ports"]) for f in events if f.agent is not None]


def test_each_is_told_once_when_it_comes_and_once_when_it_goes() -> None:
    ghosts = Ghosts("n")
    assert names(ghosts.update({"u": (API, (ON_9000,))}, 1)) == [("ghost-bypass-found", "9000")]
    assert ghosts.update({"u": (replace(API, labels={"a": "b"}), (ON_9000,))}, 2) == []
    assert names(ghosts.update({"u": (API, (ON_9000, ON_53))}, 3)) == [("ghost-bypass-found", "53")]
    assert [ghosts.pods(direction) for direction in Direction] == [1, 1]
    assert sorted(names(ghosts.update({}, 4))) == [("ghost-bypass-gone", "53"), ("ghost-bypass-gone", "9000")]
    assert ([ghosts.pods(direction) for direction in Direction], ghosts.found) == ([0, 0], 2)


def test_the_condition_says_what_and_since_when_and_goes_with_the_last() -> None:
    ghosts = Ghosts("n")
    assert ghosts.condition("u") is None
    ghosts.update({"u": (API, (ON_9000,))}, 1)
    ghosts.update({"u": (API, (ON_9000, ON_53))}, 2)
    condition = ghosts.condition("u")
    assert condition is not None
    assert (condition.type, condition.status, condition.reason, condition.since_unix_ns) == (
        "Captured", False, "GhostBypass", 1,
    )  # fmt: skip
    assert condition.message == f"{ON_9000}; {ON_53}"
    ghosts.update({}, 3)
    assert ghosts.condition("u") is None


def test_a_pod_whose_init_containers_run_is_no_ghost_yet() -> None:
    ghosts = Ghosts("n")
    assert ghosts.update({"u": (replace(API, phase="Pending"), (ON_9000,))}, 1) == []
    assert names(ghosts.update({"u": (API, (ON_9000,))}, 2)) == [("ghost-bypass-found", "9000")]


def test_the_event_survives_the_socket_and_is_shown_in_every_form() -> None:
    (event,) = Ghosts("n").update({"u": (API, (ON_9000,))}, 1_700_000_000_000_000_000)
    assert decode_flow(pb.Flow.FromString(encode_flow(event))) == event
    (line,) = monitor_lines(event, verbose=True)
    assert line.startswith(
        ">> ghost-bypass-found: pod shop/api: direction ingress, family ipv4, ports 9000, route a rule"
    )
    assert "ghost-bypass-found pod shop/api: direction ingress" in compact_line(event)
    assert "shop/api" in Table().lines([event])[1]
    record = json.loads(json_line(event))["agent_event"]
    assert (record["type"], record["pod_name"], record["ports"]) == ("ghost-bypass-found", "api", "9000")
