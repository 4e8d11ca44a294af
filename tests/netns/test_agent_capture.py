"""The agent on a real node with real redirect rules: captured once they are seen, compensated when they are gone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_harness import NodeHarness, Pod, inside, run, running_node

from meshbridge import abi
from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.redirect_config import restore_text
from meshbridge.identity.model import ContainerPort, IpFamily, ProxyClass
from meshbridge.observe.flow import FlowKind
from meshbridge.policy.model import Direction

pytestmark = pytest.mark.root

STRICT_AND_A_PATH = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: api, namespace: shop}
spec:
  selector: {matchLabels: {app: api}}
  action: ALLOW
  rules:
  - to: [{operation: {ports: ["8080"], paths: ["/metrics"]}}]
  - from: [{source: {namespaces: [monitoring]}}]
    to: [{operation: {ports: ["9090"]}}]
"""
ENVOY_PORT = 15006


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeHarness]:
    with running_node(tmp_path) as harness:
        yield harness


def with_sidecar(node: NodeHarness, namespace: str, name: str, **annotations: str) -> Pod:
    """A pod after injection; ``annotations`` by their short names."""
    given = {a.TRAFFIC + key: value for key, value in annotations.items()}
    pod = node.add_pod(namespace, name)
    workload = replace(
        pod.workload, annotations=given, proxy=ProxyClass.SIDECAR, init_env={"ISTIO_DUAL_STACK": "true"},
        init_args=a.render_init_args(given, MeshDefaults()),
        ports=(ContainerPort("http", 8080), ContainerPort("metrics", 9090)),
    )  # fmt: skip
    changed = node.pods[pod.key] = replace(pod, workload=workload)
    return changed


def redirect(pod: Pod) -> None:
    """What istio-init does."""
    config, _ = parse_init_args(pod.workload.init_args or (), pod.workload.init_env)
    for family, tool in ((IpFamily.IPV4, "iptables-nft-restore"), (IpFamily.IPV6, "ip6tables-nft-restore")):
        text = restore_text(config, family)
        run(*inside(pod.netns, "sh", "-c", f"{tool} --noflush <<'END'\n{text}\nEND\n"))


def eventually(holds: Callable[[], bool], within_s: float = 6.0) -> float:
    """How long it took until something held."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < within_s
        time.sleep(0.05)
    return time.monotonic() - started


def bypasses(node: NodeHarness) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.client.bypasses())
    return found


def excluded(node: NodeHarness, pod: Pod) -> list[list[int]]:
    rows = [row for row in bypasses(node)["bypasses"] if row["pod"] == pod.key and row["class"] == "excluded"]
    return [span for row in rows if row["direction"] == "ingress" for span in row["ports"]]


def test_what_needs_envoy_passes_only_while_redirect_rules_are_there(node: NodeHarness) -> None:
    api, web = with_sidecar(node, "shop", "api"), with_sidecar(node, "shop", "web")
    node.listen(api, 8080)
    node.listen(api, ENVOY_PORT)
    node.apply(STRICT_AND_A_PATH)
    node.sync()
    for address in (api.ipv4, api.ipv6):
        assert not node.reaches(web.netns, address, 8080)
    assert any(flow.kind is FlowKind.DROP and flow.reason == abi.DropReason.DROP_COMPENSATION for flow in node.flows())
    redirect(api)
    eventually(lambda: node.reaches(web.netns, api.ipv4, 8080) and node.reaches(web.netns, api.ipv6, 8080))
    assert not excluded(node, api)
    run(*inside(api.netns, "nft", "flush", "ruleset"))
    assert eventually(lambda: not node.reaches(web.netns, api.ipv4, 8080)) < 5
    assert "rules-missing" in {finding["code"] for finding in bypasses(node)["findings"]}
    assert any("should be redirected to Envoy" in problem for problem in node.client.status().problems)


def test_an_excluded_port_is_open_to_whom_the_mesh_would_have_let_in(node: NodeHarness) -> None:
    api = with_sidecar(node, "shop", "api", excludeInboundPorts="9090")
    scraper, web = with_sidecar(node, "monitoring", "prometheus"), with_sidecar(node, "shop", "web")
    plain = node.add_pod("monitoring", "plain")
    redirect(api)
    for port in (8080, 9090, ENVOY_PORT):
        node.listen(api, port)
    node.apply(STRICT_AND_A_PATH)
    node.sync()
    eventually(lambda: excluded(node, api) == [[9090, 9090]])
    for address in (api.ipv4, api.ipv6):
        assert node.reaches(scraper.netns, address, 9090)
        assert not node.reaches(web.netns, address, 9090)
        assert not node.reaches(plain.netns, address, 9090)
        assert node.reaches(web.netns, address, 8080)


def test_an_agent_that_takes_over_cuts_nothing_that_is_captured(node: NodeHarness) -> None:
    api, web = with_sidecar(node, "shop", "api"), with_sidecar(node, "shop", "web")
    redirect(api)
    node.listen(api, ENVOY_PORT)
    node.apply(STRICT_AND_A_PATH)
    node.sync()
    eventually(lambda: node.reaches(web.netns, api.ipv4, 8080))
    stream = node.stream(web.netns, api.ipv4, 8080)
    node.kill_agent()
    time.sleep(0.2)
    node.start_agent()
    node.wait(lambda status: status.revision_programmed >= node.controller.revision, "revision")
    time.sleep(0.5)
    result = stream.finish()
    assert result["bad"] == 0
    assert result["retransmits"] == 0, result


CLOSED = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec: {selector: {matchLabels: {app: api}}, action: DENY, rules: [{to: [{operation: {ports: ["8080"]}}]}]}
"""


def test_what_a_destination_certainly_refuses_is_dropped_where_it_is_sent_past_envoy(node: NodeHarness) -> None:
    api = with_sidecar(node, "shop", "api")
    scraper = with_sidecar(node, "monitoring", "scraper", excludeOutboundPorts="8080,9090")
    plain = node.add_pod("monitoring", "plain")
    redirect(api)
    redirect(scraper)
    node.listen(api, ENVOY_PORT)
    node.apply(CLOSED)
    node.all_mesh_policies = True
    node.sync()
    eventually(lambda: not excluded(node, api) and node.reaches(scraper.netns, api.ipv4, 9090))
    for client, direction in ((scraper, Direction.EGRESS), (plain, Direction.INGRESS)):
        for address in (api.ipv4, api.ipv6):
            assert not node.reaches(client.netns, address, 8080)
        time.sleep(0.2)
        dropped = [
            flow
            for flow in node.flows()
            if flow.kind is FlowKind.DROP and str(flow.source.address) in (client.ipv4, client.ipv6)
        ]
        assert {flow.direction for flow in dropped} == {direction}
        assert {origin.name for flow in dropped for origin in flow.mesh_rules} == {"closed"}
