"""The agent on a real node: pods in network namespaces, TCP judged by the bytes that come back."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import GATEWAY4, MESHBRIDGE, NodeHarness, inside, run, running_node

from meshbridge.observe.flow import Flow, FlowKind
from meshbridge.observe.monitor import monitor_lines

pytestmark = pytest.mark.root

ALLOW_WEB = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: web}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}]}]
"""
ALLOW_OTHER = ALLOW_WEB.replace("app: web", "app: other")
NOT_UNDERSTOOD = ALLOW_WEB.replace("fromEndpoints", "fromNowhere")


both_ways = pytest.mark.parametrize("node", ["tcx", "clsact"], indirect=True)
"""Where the way programs are attached can make a difference; the rest runs with TCX."""


@pytest.fixture
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[NodeHarness]:
    with running_node(tmp_path, attach=getattr(request, "param", "tcx")) as harness:
        yield harness


def drops(node: NodeHarness, source: str) -> list[Flow]:
    time.sleep(0.1)
    return [flow for flow in node.flows() if flow.kind is FlowKind.DROP and str(flow.source.address) == source]


@both_ways
def test_policy_decides_who_gets_through_and_says_why(node: NodeHarness) -> None:
    api = node.add_pod("shop", "api")
    web = node.add_pod("shop", "web")
    other = node.add_pod("shop", "other")
    node.listen(api, 80)
    node.listen(api, 81)
    node.apply(ALLOW_WEB)
    node.sync()
    for address in (api.ipv4, api.ipv6):
        assert node.reaches(web.netns, address, 80)
        assert not node.reaches(web.netns, address, 81)
        assert not node.reaches(other.netns, address, 80)
    flow = drops(node, other.ipv4)[0]
    assert (flow.reason, flow.source.pod, flow.destination.pod) == (133, "other", "api")
    lines = monitor_lines(flow, verbose=True)
    assert lines[0].startswith("xx drop (Policy denied) flow 0x")
    assert any("isolated by: CiliumNetworkPolicy shop/api" in line and "policies.yaml:" in line for line in lines)


@both_ways
def test_nothing_passes_before_the_policy_is_known(node: NodeHarness) -> None:
    api = node.add_pod("shop", "api")
    node.listen(api, 80)
    assert not node.reaches(node.netns, api.ipv4, 80, timeout_s=0.3)
    web = node.add_pod("shop", "web")
    assert not node.reaches(web.netns, api.ipv4, 80, timeout_s=0.3)
    node.sync()
    assert node.reaches(web.netns, api.ipv4, 80, timeout_s=3), (
        "neighbours that did not answer are asked again each second"
    )
    assert node.announce(web, wait_ready=True).ready


def test_a_policy_change_cuts_an_open_connection_and_its_return_heals(node: NodeHarness) -> None:
    api, web = node.add_pod("shop", "api"), node.add_pod("shop", "web")
    node.listen(api, 80)
    node.apply(ALLOW_WEB)
    node.sync()
    stream = node.stream(web.netns, api.ipv4, 80)
    time.sleep(0.2)
    node.apply(ALLOW_OTHER)
    node.sync()
    assert not node.reaches(web.netns, api.ipv4, 80)
    time.sleep(0.3)
    assert any(flow.rejudged for flow in drops(node, web.ipv4))
    node.apply(ALLOW_WEB)
    node.sync()
    time.sleep(1.5)  # TCP tries again
    result = stream.finish()
    assert result["bad"] == 0
    assert result["worst"] > 0.25


@both_ways
def test_killed_under_traffic_it_loses_nothing_and_lets_nothing_through(node: NodeHarness) -> None:
    api, web, other = (node.add_pod("shop", name) for name in ("api", "web", "other"))
    node.listen(api, 80)
    node.apply(ALLOW_WEB)
    node.sync()
    before = {state.pod: state.id for state in node.client.endpoints()}
    stream = node.stream(web.netns, api.ipv4, 80)
    for number in (signal.SIGKILL, signal.SIGTERM):
        node.kill_agent(number)
        assert not node.reaches(other.netns, api.ipv4, 80, timeout_s=0.3)
        assert node.reaches(web.netns, api.ipv4, 80)
        node.start_agent()
        assert not node.reaches(other.netns, api.ipv4, 80, timeout_s=0.3)
        node.wait(lambda status: status.revision_programmed >= node.controller.revision, "revision")
        assert not node.reaches(other.netns, api.ipv4, 80, timeout_s=0.3)
    result = stream.finish()
    assert result["bad"] == 0
    assert result["retransmits"] == 0, result
    assert result["sent"] > 200
    assert {state.pod: state.id for state in node.client.endpoints()} == before


@both_ways
def test_pods_that_were_there_before_are_found_by_their_routes(node: NodeHarness) -> None:
    api = node.add_pod("shop", "api", announce=False)
    web = node.add_pod("shop", "web", announce=False)
    node.listen(api, 80)
    assert node.reaches(web.netns, api.ipv4, 80), "not hooked yet"
    node.apply(ALLOW_OTHER)
    node.sync()
    assert {state.pod: state.state for state in node.client.endpoints()} == {"api": "ready", "web": "ready"}
    assert not node.reaches(web.netns, api.ipv4, 80)


@both_ways
def test_a_pod_that_takes_over_an_address_inherits_nothing(node: NodeHarness) -> None:
    api, web = node.add_pod("shop", "api"), node.add_pod("shop", "web")
    node.listen(api, 80)
    node.apply(ALLOW_WEB)
    node.sync()
    assert node.reaches(web.netns, api.ipv4, 80)
    node.remove_pod(web)
    node._count -= 1  # the next pod gets its address and its interface's name
    other = node.add_pod("shop", "other")
    assert (other.ipv4, other.interface) == (web.ipv4, web.interface)
    assert not node.reaches(other.netns, api.ipv4, 80, timeout_s=0.3), "before the controller knows"
    node.sync()
    assert not node.reaches(other.netns, api.ipv4, 80)
    assert node.reaches(other.netns, api.ipv4, 80) is False
    assert {state.pod for state in node.client.endpoints()} == {"api", "other"}


def test_the_nodes_own_processes_reach_a_pod_and_a_masqueraded_pod_does_not(node: NodeHarness) -> None:
    api, other = node.add_pod("shop", "api"), node.add_pod("shop", "other")
    node.listen(api, 80)
    node.apply(ALLOW_WEB)
    node.sync()
    assert node.reaches(node.netns, api.ipv4, 80)
    run(*inside(node.netns, "iptables", "-t", "nat", "-A", "POSTROUTING", "-s", other.ipv4, "-j", "SNAT", "--to-source",
                GATEWAY4))  # fmt: skip
    assert not node.reaches(other.netns, api.ipv4, 80)
    flow = drops(node, GATEWAY4)[0]
    assert flow.destination.pod == "api"


def test_an_address_the_node_gets_later_is_the_nodes(node: NodeHarness) -> None:
    api = node.add_pod("shop", "api")
    node.listen(api, 80)
    node.apply(ALLOW_WEB)
    node.sync()
    run("ip", "-n", node.netns, "addr", "add", "192.0.2.77/32", "dev", "lo")
    deadline = time.monotonic() + 3
    while not node.reaches(node.netns, api.ipv4, 80, bind="192.0.2.77", timeout_s=0.3):
        assert time.monotonic() < deadline


def test_while_the_controller_is_away_enforcement_stays_and_status_says_so(node: NodeHarness) -> None:
    api, web, other = (node.add_pod("shop", name) for name in ("api", "web", "other"))
    node.listen(api, 80)
    node.apply(ALLOW_WEB)
    node.sync()
    node.controller.go_away()
    node.wait(lambda status: not status.controller_connected, "disconnection")
    assert node.reaches(web.netns, api.ipv4, 80)
    assert not node.reaches(other.netns, api.ipv4, 80)
    node.kill_agent()
    node.start_agent()
    assert node.reaches(web.netns, api.ipv4, 80), "a new agent without a controller leaves what is there"
    assert not node.reaches(other.netns, api.ipv4, 80)
    node.controller.serve()
    node.wait(lambda status: status.revision_programmed == node.controller.revision, "revision")
    node.apply(ALLOW_OTHER)
    node.sync()
    assert node.reaches(other.netns, api.ipv4, 80)


def test_a_refused_policy_isolates_and_is_named(node: NodeHarness) -> None:
    api, web = node.add_pod("shop", "api"), node.add_pod("shop", "web")
    node.listen(api, 80)
    node.sync()
    assert node.reaches(web.netns, api.ipv4, 80)
    node.apply(NOT_UNDERSTOOD)
    node.sync()
    assert not node.reaches(web.netns, api.ipv4, 80)
    problems = list(node.client.status().problems)
    assert any("CiliumNetworkPolicy shop/api" in problem and "fromNowhere" in problem for problem in problems), problems


@both_ways
def test_cleanup_leaves_nothing(node: NodeHarness) -> None:
    api, web = node.add_pod("shop", "api"), node.add_pod("shop", "web")
    node.listen(api, 80)
    node.apply(ALLOW_OTHER)
    node.sync()
    assert not node.reaches(web.netns, api.ipv4, 80)
    node.kill_agent(signal.SIGTERM)
    assert not node.reaches(web.netns, api.ipv4, 80)
    options = ["agent", "--node", node.name, "--bpffs", str(node.pin_root), "--attach", node.attach, "--cleanup"]
    out = run(*inside(node.netns, MESHBRIDGE, *options))
    assert "2 interfaces released" in out
    assert node.reaches(web.netns, api.ipv4, 80)
    assert not (node.pin_root / node.name).exists()
