"""A bypass that nobody asked for, on a real node: told, compensated, and told again when it is gone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import NodeHarness, Pod, inside, run, running_node
from click.testing import CliRunner
from test_agent_capture import ENVOY_PORT, STRICT_AND_A_PATH, eventually, redirect, with_sidecar

from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.redirect_config import restore_text
from meshbridge.cli import cli
from meshbridge.identity.model import IpFamily
from meshbridge.observe.flow import Flow, FlowKind
from meshbridge.protos import observer_pb2 as pb

pytestmark = pytest.mark.root

GHOST_FOUND_S = 10.0
AUDIT_EVERYTHING = """
apiVersion: meshbridge.io/v1alpha1
kind: BypassPolicy
metadata: {name: all, namespace: shop}
spec: {mode: audit}
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeHarness]:
    with running_node(tmp_path, subnet=79) as harness:
        yield harness


def told(node: NodeHarness) -> list[tuple[str, str, str]]:
    """Name, family and ports of each of the agent's own events."""
    found: list[Flow] = [flow for flow in node.flows() if flow.kind is FlowKind.AGENT]
    details = [(flow.agent.name, dict(flow.agent.details)) for flow in found if flow.agent is not None]
    return [(name, detail["family"], detail["ports"]) for name, detail in details]


def conditions(node: NodeHarness, pod: Pod) -> list[pb.Condition]:
    return [c for state in node.client.endpoints() if state.pod == pod.workload.name for c in state.conditions]


def captured(node: NodeHarness) -> tuple[Pod, Pod]:
    api, web = with_sidecar(node, "shop", "api"), with_sidecar(node, "shop", "web")
    redirect(api)
    redirect(web)
    node.listen(api, 9090)
    node.listen(api, ENVOY_PORT, uid=1337)
    node.apply(STRICT_AND_A_PATH)
    node.apply(AUDIT_EVERYTHING)
    node.sync()
    eventually(lambda: node.reaches(web.netns, api.ipv4, 8080, uid=1337))
    return api, web


def test_a_rule_that_takes_a_port_past_envoy_is_told_and_compensated_even_under_audit(node: NodeHarness) -> None:
    api, web = captured(node)
    assert not told(node)
    assert not conditions(node, api)
    before = time.time_ns()
    rule = ["PREROUTING", "-p", "tcp", "--dport", "9090", "-j", "RETURN"]
    run(*inside(api.netns, "iptables-nft", "-t", "nat", "-I", *rule))
    eventually(lambda: bool(told(node)), GHOST_FOUND_S)
    assert told(node) == [("ghost-bypass-found", "ipv4", "9090")]
    (condition,) = conditions(node, api)
    assert (condition.type, condition.status, condition.reason) == ("Captured", False, "GhostBypass")
    assert before < condition.since_unix_ns < time.time_ns()
    assert "inbound IPv4 TCP 9090" in condition.message
    assert not conditions(node, web)
    assert not node.reaches(web.netns, api.ipv4, 9090, uid=1337)
    shown = CliRunner().invoke(cli, ["monitor", "--type", "agent", "--no-follow", "--socket", str(node.socket)])
    assert "ghost-bypass-found: pod shop/api" in shown.output
    listed = CliRunner().invoke(cli, ["endpoint", "list", "-o", "json", "--socket", str(node.socket)])
    (record,) = [r for r in json.loads(listed.output) if r["pod"] == "api"]
    assert record["conditions"][0]["reason"] == "GhostBypass"
    run(*inside(api.netns, "iptables-nft", "-t", "nat", "-D", *rule))
    eventually(lambda: len(told(node)) == 2, GHOST_FOUND_S)
    assert told(node)[1] == ("ghost-bypass-gone", "ipv4", "9090")
    assert not conditions(node, api)


def test_rules_that_vanish_and_those_of_another_pod_are_ghosts(node: NodeHarness) -> None:
    api, web = captured(node)
    run(*inside(api.netns, "nft", "flush", "ruleset"))
    eventually(lambda: bool(conditions(node, api)), GHOST_FOUND_S)
    assert {family for _, family, _ in told(node)} == {"ipv4", "ipv6"}
    assert not node.reaches(web.netns, api.ipv4, 9090, uid=1337)
    other = with_sidecar(node, "shop", "other", excludeInboundPorts="9090")
    redirect(Pod(other.workload, api.netns, api.interface))
    eventually(lambda: [c.message.count("TCP 9090") for c in conditions(node, api)] == [2], GHOST_FOUND_S)


def legacy_redirect(pod: Pod) -> None:
    """What istio-init does where the node's iptables is the old one."""
    config, _ = parse_init_args(pod.workload.init_args or (), pod.workload.init_env)
    for family, tool in ((IpFamily.IPV4, "iptables-legacy"), (IpFamily.IPV6, "ip6tables-legacy")):
        text = restore_text(config, family)
        run(*inside(pod.netns, "sh", "-c", f"{tool}-restore --noflush <<'END'\n{text}\nEND\n"))


def test_legacy_rules_that_are_flushed_by_hand_are_ghosts_in_each_family(node: NodeHarness) -> None:
    api = with_sidecar(node, "shop", "api")
    legacy_redirect(api)
    node.listen(api, ENVOY_PORT, uid=1337)
    node.apply(STRICT_AND_A_PATH)
    node.sync()
    eventually(lambda: not any("redirect" in s.message for s in node.client.endpoints()))
    assert not told(node)
    for tool, family in (("iptables-legacy", "ipv4"), ("ip6tables-legacy", "ipv6")):
        run(*inside(api.netns, tool, "-t", "nat", "-F"))
        eventually(lambda family=family: family in {f for name, f, _ in told(node)}, GHOST_FOUND_S)  # type: ignore[misc]


def test_rules_that_vanish_while_no_agent_runs_are_ghosts_once_it_is_back(node: NodeHarness) -> None:
    api, web = captured(node)
    node.kill_agent()
    run(*inside(api.netns, "nft", "flush", "ruleset"))
    node.start_agent()
    eventually(lambda: bool(conditions(node, api)), GHOST_FOUND_S)
    assert {family for _, family, _ in told(node)} == {"ipv4", "ipv6"}
    assert not conditions(node, web)
    assert not node.reaches(web.netns, api.ipv4, 9090, uid=1337)


def given_away(node: NodeHarness, pod: Pod) -> list[tuple[str, str, str]]:
    """Direction, port and user of each bypass of a pod that a packet showed."""
    events = [f for f in node.flows() if f.agent is not None and f.agent.name == "ghost-bypass-packet"]
    details = [dict(f.agent.details) for f in events if f.agent and f.destination.pod == pod.workload.name]
    return [(detail["direction"], detail["ports"], detail["uid"]) for detail in details]


def test_packets_give_away_a_bypass_before_the_rules_are_read_again(node: NodeHarness) -> None:
    api, web = captured(node)
    assert not given_away(node, api)
    inbound = ["PREROUTING", "-p", "tcp", "--dport", "9090", "-j", "RETURN"]
    outbound = ["OUTPUT", "-p", "tcp", "-d", api.ipv4, "-j", "ACCEPT"]

    def briefly(pod: Pod, rule: list[str], port: int, uid: int) -> None:
        run(*inside(pod.netns, "iptables-nft", "-t", "nat", "-I", *rule))
        node.reaches(web.netns, api.ipv4, port, uid=uid)
        run(*inside(pod.netns, "iptables-nft", "-t", "nat", "-D", *rule))

    def answered() -> bool:
        briefly(api, inbound, 9090, 1337)
        return given_away(node, api) == [("ingress", "9090", "0")]

    def sent() -> bool:
        briefly(web, outbound, 8080, 1000)
        return given_away(node, web) == [("egress", "8080", "1000")]

    eventually(answered, 15)
    eventually(sent, 15)
    assert given_away(node, api) == [("ingress", "9090", "0")], "Envoy's own answers are none"
