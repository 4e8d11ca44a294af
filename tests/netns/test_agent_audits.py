"""``mode: audit`` on a real node: what enforcement would drop passes and is counted by source."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from agent_harness import NodeHarness, Pod, running_node
from click.testing import CliRunner
from test_agent_capture import ENVOY_PORT, STRICT_AND_A_PATH, bypasses, eventually, excluded, redirect, with_sidecar

from meshbridge.bypass.bypasspolicy import LOSSES
from meshbridge.cli.bypass import command
from meshbridge.observe.flow import FlowVerdict
from meshbridge.policy.precedence import DropReason

pytestmark = pytest.mark.root

POLICY = """
apiVersion: meshbridge.io/v1alpha1
kind: BypassPolicy
metadata: {{name: api, namespace: shop}}
spec: {spec}
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeHarness]:
    with running_node(tmp_path, subnet=78) as harness:
        yield harness


@pytest.fixture
def pods(node: NodeHarness) -> tuple[Pod, Pod]:
    """A server that excludes 9090, where nothing but monitoring is let in, and a client that is not."""
    api, web = with_sidecar(node, "shop", "api", excludeInboundPorts="9090"), with_sidecar(node, "shop", "web")
    redirect(api)
    node.listen(api, 9090)
    node.listen(api, ENVOY_PORT)
    node.apply(STRICT_AND_A_PATH)
    return api, web


def put(node: NodeHarness, spec: str) -> None:
    node.apply(POLICY.format(spec=spec))
    node.sync()


def test_an_audit_lets_pass_and_counts_and_enforcement_drops(node: NodeHarness, pods: tuple[Pod, Pod]) -> None:
    api, web = pods
    put(node, "{mode: audit}")
    eventually(lambda: excluded(node, api) == [[9090, 9090]])
    for address in (api.ipv4, api.ipv6):
        assert node.reaches(web.netns, address, 9090)
    told = [flow for flow in node.flows() if flow.verdict is FlowVerdict.AUDIT]
    assert [(f.source.pod, f.destination.pod, f.destination.port, f.reason) for f in told] == [
        ("web", "api", 9090, DropReason.COMPENSATION)
    ] * 2
    assert {rule.name for flow in told for rule in flow.rules} == {"api"}
    (row,) = bypasses(node)["audited"]
    assert (row["pod"], row["port"], row["peer"], row["flows"]) == ("shop/api", 9090, "shop/web", 2)
    shown = CliRunner().invoke(command, ["audit", "--socket", str(node.socket)])
    assert "shop/web" in shown.output
    listed = CliRunner().invoke(command, ["list", "--socket", str(node.socket)])
    assert "audit only: kernel" in listed.output
    put(node, "{mode: enforce}")
    for address in (api.ipv4, api.ipv6):
        assert not node.reaches(web.netns, address, 9090)


def test_an_audit_that_ends_is_enforced_although_nothing_else_happens(node: NodeHarness, pods: tuple[Pod, Pod]) -> None:
    api, web = pods
    end = (datetime.now(UTC) + timedelta(seconds=6)).isoformat()
    every = ", ".join(sorted(set(LOSSES.values())))
    put(node, f"{{mode: audit, accept: [{every}], reason: r, until: '{end}'}}")
    eventually(lambda: node.reaches(web.netns, api.ipv4, 9090))
    eventually(lambda: not node.reaches(web.netns, api.ipv4, 9090), within_s=12)
    assert datetime.now(UTC) >= datetime.fromisoformat(end)


def test_an_audit_is_never_proved(node: NodeHarness, pods: tuple[Pod, Pod]) -> None:
    put(node, "{mode: audit, proof: true, selector: {matchLabels: {app: api}}}")
    eventually(lambda: excluded(node, pods[0]) == [[9090, 9090]])
    (condition,) = [c for state in node.client.endpoints() if state.pod == "api" for c in state.conditions]
    assert (condition.type, condition.status, condition.reason) == ("Enforced", False, "Audited")
    assert "IPv4 TCP 9090, IPv6 TCP 9090" in condition.message


def test_a_refused_policy_is_told_with_file_and_line_and_opens_nothing(
    node: NodeHarness, pods: tuple[Pod, Pod]
) -> None:
    api, web = pods
    put(node, "{mode: audit, routes: no}")
    eventually(lambda: excluded(node, api) == [[9090, 9090]])
    assert not node.reaches(web.netns, api.ipv4, 9090)
    assert any(
        problem.startswith("policies.yaml:6: BypassPolicy shop/api") for problem in node.client.status().problems
    )
