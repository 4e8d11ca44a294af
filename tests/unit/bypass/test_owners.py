"""Who of a pod's processes is its proxy, and who only runs as its user."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.ghosts import impostor_bypasses
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.owners import (
    MAX_IMPOSTORS,
    Impostor,
    Impostors,
    Process,
    ProxyOwner,
    borrowed,
    named,
    proxy_owner,
    proxy_processes,
    with_impostors,
)
from meshbridge.bypass.redirect_config import istio_rules
from meshbridge.bypass.rules import SeenRules
from meshbridge.bypass.state import RouteKind, Truth, capture_of
from meshbridge.identity.model import IpFamily, ProxyClass, ProxyContainer, Workload
from meshbridge.policy.capture import OutboundBypass, PortClass
from meshbridge.policy.model import Direction

ISTIO = frozenset({1337})
OWNER = ProxyOwner(ISTIO, ISTIO, frozenset({15001, 15006}))


def process(pid: int, parent: int = 1, started: int = 0, container: str = "") -> Process:
    return Process(pid, parent, started or pid, "x", ISTIO, ISTIO, container)


def proxies(*processes: Process, holders: tuple[int, ...], last: str = "") -> tuple[set[int], str]:
    found, container = proxy_processes({each.pid: each for each in processes}, holders, last)
    return set(found), container


def test_without_containers_it_is_who_listens_with_parents_and_children() -> None:
    agent, envoy, worker, other = process(10), process(11, 10), process(12, 11), process(20)
    assert proxies(agent, envoy, worker, other, holders=(11,)) == ({10, 11, 12}, "")


def test_a_circle_of_parents_ends() -> None:
    assert proxies(process(10, 11), process(11, 10), holders=(11,)) == ({10, 11}, "")


def test_with_containers_it_is_all_of_that_of_who_listens() -> None:
    agent, envoy = process(10, container="proxy"), process(11, 10, container="proxy")
    child_elsewhere, other = process(12, 11, container="app"), process(20, container="app")
    assert proxies(agent, envoy, child_elsewhere, other, holders=(11,)) == ({10, 11}, "proxy")


def test_who_listens_as_well_later_does_not_become_the_proxy() -> None:
    envoy, hostile = process(30, started=5, container="proxy"), process(20, started=9, container="app")
    assert proxies(envoy, hostile, holders=(30, 20)) == ({30}, "proxy")
    assert proxies(envoy, replace(hostile, started=1), holders=(30, 20), last="proxy") == ({30}, "proxy")


def test_a_container_that_was_replaced_is_followed() -> None:
    envoy = process(40, container="proxy-2")
    assert proxies(envoy, holders=(40,), last="proxy-1") == ({40}, "proxy-2")


def test_while_nobody_listens_nobody_is_known() -> None:
    assert proxies(process(10), holders=(), last="proxy") == (set(), "proxy")


@pytest.mark.parametrize(
    ("uids", "gids", "found"),
    [
        ((0, 1337), (0,), ("uid", 1337)),
        ((0,), (1337,), ("gid", 1337)),
        ((0,), (0,), None),
    ],
    ids=["by its user", "by its group", "by neither"],
)
def test_ids_are_borrowed(uids: tuple[int, ...], gids: tuple[int, ...], found: tuple[str, int] | None) -> None:
    assert borrowed(OWNER, uids, gids) == found


def pod(**annotations: str) -> Workload:
    given = {a.TRAFFIC + key: value for key, value in annotations.items()}
    return Workload(
        "shop", "web", "u", "n", (ip_address("10.0.0.1"), ip_address("fd00::1")), annotations=given,
        proxy=ProxyClass.SIDECAR, init_args=a.render_init_args(given, MeshDefaults()),
        init_env={"ISTIO_DUAL_STACK": "true"},
    )  # fmt: skip


def rules(workload: Workload) -> SeenRules:
    config, _ = parse_init_args(workload.init_args or (), workload.init_env)
    return SeenRules(tuple(istio_rules(config, family) for family in IpFamily))


def test_whose_packets_pass_is_what_the_rules_say() -> None:
    assert proxy_owner(pod()) == OWNER
    own = replace(pod(), init_args=("-p", "15201", "-z", "15206", "-u", "2000", "-g", "3000", "-i", "*", "-b", "*"))
    assert proxy_owner(own) == ProxyOwner(frozenset({2000}), frozenset({3000}), frozenset({15001, 15006, 15201, 15206}))
    # in TPROXY it runs as root, and what root sends is captured all the same
    root = replace(pod(interceptionMode="TPROXY"), proxy_container=ProxyContainer(uid=0, gid=1337))
    assert proxy_owner(root) == OWNER
    assert proxy_owner(replace(pod(), proxy=ProxyClass.NONE)) is None


ONE = Impostors((Impostor(7, 1, "curl", "uid", 1337),))


def test_what_it_sends_past_envoy_is_what_envoy_gets_of_everybody_else() -> None:
    web = pod(excludeOutboundPorts="5432")
    state = capture_state(web, seen=rules(web))
    assert state.truth is Truth.RULES
    found = impostor_bypasses(state, web, ONE)
    assert [(ghost.direction, ghost.family) for ghost in found] == [(Direction.EGRESS, f) for f in IpFamily]
    assert all(80 in ghost.ports and 5432 not in ghost.ports for ghost in found)
    assert str(found[0].route) == "proxy uid or gid (process 7 (curl) runs as uid 1337)"
    nothing = pod(includeOutboundIPRanges="")
    assert impostor_bypasses(capture_state(nothing, seen=rules(nothing)), nothing, ONE) == ()


def test_the_pod_then_counts_as_bypassing_outbound_and_the_registry_is_not_asked() -> None:
    web = pod(excludeOutboundPorts="5432")
    state = with_impostors(capture_state(web, seen=rules(web)), ONE)
    spans = [span for span in state.outbound_bypasses(IpFamily.IPV4) if span.route.kind is RouteKind.PROXY_OWNER]
    assert spans
    assert all(span.port_class is PortClass.EXCLUDED for span in spans)
    outbound = capture_of(state, judges=frozenset()).outbound[IpFamily.IPV4]
    assert OutboundBypass(5432, 5432) in outbound
    assert {bypass.registered for bypass in outbound if bypass.last - bypass.first > 1000} == {False}
    assert with_impostors(state, Impostors()) is state


def test_many_are_counted_and_the_oldest_are_named() -> None:
    many = [Impostor(pid, 1000 - pid, "x", "uid", 1337) for pid in range(1, 31)]
    found = named([*many, *many])
    assert len(found.named) == MAX_IMPOSTORS
    assert found.named[0].pid == 30
    assert found.more == 30 - MAX_IMPOSTORS
    assert str(found.routes()[-1]).endswith("22 more are not named)")
