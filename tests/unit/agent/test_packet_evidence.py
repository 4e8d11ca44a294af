"""Which packets give away a bypass: who owns the socket of what should be Envoy's alone."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from meshbridge.agent.evidence import HELD_NS, MAX_HELD, MAX_TOLD, Evidence, Watched
from meshbridge.agent.processes import PodProcesses
from meshbridge.bypass.ghosts import proxy_uids
from meshbridge.identity.model import IpFamily, ProxyClass, ProxyContainer, Workload
from meshbridge.observe.flow import Flow, FlowKind, FlowPeer, FlowVerdict
from meshbridge.policy.capture import Capture, OutboundBypass
from meshbridge.policy.model import Direction

SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10
POD, PEER = FlowPeer(ip_address("10.0.0.1"), 9000), FlowPeer(ip_address("10.0.0.2"), 40000)
ANSWER = Flow(
    7, "n", FlowKind.TRACE, FlowVerdict.FORWARDED, Direction.EGRESS, endpoint_id=5, source=POD, destination=PEER,
    protocol=6, tcp_flags=SYN_ACK, reply=True, uid=1000,
)  # fmt: skip
SENT = replace(
    ANSWER, kind=FlowKind.VERDICT, source=replace(POD, port=50000), destination=replace(PEER, port=8080),
    tcp_flags=SYN, reply=False,
)  # fmt: skip
CAPTURE = replace(Capture.sidecar(), outbound={IpFamily.IPV4: (OutboundBypass(5432, 5432),)})


def told(*flows: Flow) -> list[dict[str, str]]:
    evidence = Evidence("n", {5: Watched("u", "shop", "api", CAPTURE, frozenset({1337}))})
    events = [evidence.of(flow) for flow in flows]
    return [dict(event.agent.details) for event in events if event is not None and event.agent is not None]


SILENT = {
    "Envoy's own answer": replace(ANSWER, uid=1337),
    "an answer whose socket is not seen": replace(ANSWER, uid=None),
    "an answer on a port that nobody guards": replace(ANSWER, source=replace(POD, port=15021)),
    "a later packet": replace(ANSWER, tcp_flags=ACK),
    "what comes in": replace(ANSWER, direction=Direction.INGRESS),
    "another protocol": replace(ANSWER, protocol=17),
    "another endpoint": replace(ANSWER, endpoint_id=6),
    "what Envoy sends": replace(SENT, uid=1337),
    "what may leave past Envoy": replace(SENT, destination=replace(PEER, port=5432)),
    "no IP": replace(SENT, destination=FlowPeer()),
}


@pytest.mark.parametrize("flow", SILENT.values(), ids=SILENT.keys())
def test_nothing_is_given_away_by(flow: Flow) -> None:
    assert told(flow) == []


def test_an_answer_of_the_application_on_a_captured_port_gives_it_away() -> None:
    assert told(ANSWER) == [
        {"direction": "ingress", "family": "ipv4", "ports": "9000", "uid": "1000", "peer": "10.0.0.2"}
    ]


def test_so_does_what_the_application_sends_itself_where_envoy_should() -> None:
    assert told(SENT) == [{"direction": "egress", "family": "ipv4", "ports": "8080", "uid": "1000", "peer": "10.0.0.2"}]


def test_each_port_and_user_is_told_of_once_and_in_bounded_room() -> None:
    assert len(told(ANSWER, replace(ANSWER, time_ns=8), replace(ANSWER, uid=0), SENT)) == 3
    flood = [replace(SENT, uid=2000 + number) for number in range(2 * MAX_TOLD)]
    assert len(told(*flood)) == MAX_TOLD


def test_the_proxy_is_whom_the_pod_says() -> None:
    pod = Workload("shop", "api", "u", "n", (), proxy=ProxyClass.SIDECAR, init_args=("-u", "1500"))
    assert proxy_uids(pod) == {1337, 1500}
    assert proxy_uids(replace(pod, proxy_container=ProxyContainer(uid=0))) == {0, 1337, 1500}


PROXYS = replace(SENT, uid=1337, cgroup_id=40)
LOOKED_AT = 100


def held(
    *flows: Flow, groups: frozenset[int] | None, since_ns: int = LOOKED_AT
) -> tuple[list[dict[str, str]], Evidence]:
    evidence = Evidence("n", {5: Watched("u", "shop", "api", CAPTURE, frozenset({1337}))})
    assert [evidence.of(flow) for flow in flows] == [None] * len(flows)
    looks = {"u": PodProcesses(proxy_cgroups=groups)} if groups is not None else {}
    events = evidence.looked(looks, since_ns)
    return [dict(event.agent.details) for event in events if event.agent is not None], evidence


def test_a_packet_of_the_proxys_user_from_another_container_gives_it_away() -> None:
    (told,), _ = held(PROXYS, PROXYS, replace(PROXYS, cgroup_id=41), groups=frozenset({41}))
    assert told == {
        "direction": "egress", "family": "ipv4", "ports": "8080", "uid": "1337", "peer": "10.0.0.2", "cgroup": "40",
    }  # fmt: skip


def test_the_proxys_own_packets_and_those_of_unknown_groups_give_nothing_away() -> None:
    for flow in (replace(PROXYS, cgroup_id=41), replace(PROXYS, cgroup_id=0), replace(PROXYS, tcp_flags=SYN_ACK)):
        assert held(flow, groups=frozenset({41}))[0] == []


def test_a_packet_waits_for_a_look_that_began_after_it_and_knows_the_proxy() -> None:
    for groups, since_ns in ((frozenset({41}), PROXYS.time_ns), (frozenset[int](), LOOKED_AT), (None, LOOKED_AT)):
        told, evidence = held(PROXYS, groups=groups, since_ns=since_ns)
        assert told == []
        # a proxy that restarted sends before it listens, and then its new group is known
        assert evidence.looked({"u": PodProcesses(proxy_cgroups=frozenset({40}))}, LOOKED_AT + 1) == []
        assert evidence.looked({"u": PodProcesses(proxy_cgroups=frozenset({41}))}, LOOKED_AT + 2) == []


def test_what_waits_is_bounded_in_number_and_time() -> None:
    _, evidence = held(*[PROXYS] * (MAX_HELD + 10), groups=None)
    assert len(evidence._held) == MAX_HELD
    evidence.looked({}, LOOKED_AT + HELD_NS)
    assert evidence._held == []
