"""What an agent itself saw of connections tells who uses what: a half bypass that nothing else points at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_harness import NodeHarness, running_node
from test_agent_capture import ENVOY_PORT, eventually, redirect, with_sidecar

pytestmark = pytest.mark.root

STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeHarness]:
    with running_node(tmp_path, subnet=85) as harness:
        yield harness


def halves(node: NodeHarness) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(node.client.bypasses())["half_bypasses"]
    return found


def test_a_connection_that_the_agent_saw_is_a_source_of_half_bypasses(node: NodeHarness) -> None:
    api = with_sidecar(node, "shop", "api")
    everything = with_sidecar(node, "monitoring", "all", includeOutboundIPRanges="")
    for pod in (api, everything):
        redirect(pod)
    node.listen(api, ENVOY_PORT, uid=1337)
    node.apply(STRICT)
    node.sync()
    eventually(lambda: len([s for s in node.client.endpoints() if s.state == "ready" and not s.message]) == 2)
    assert halves(node) == []
    node.reaches(everything.netns, api.ipv4, 7000, uid=1000)
    eventually(lambda: bool(halves(node)))
    (half,) = halves(node)
    assert (half["server"], half["port"], half["clients"]) == ("shop/api", 7000, ["monitoring/all"])
    assert (half["known_from"], half["delivery"]) == (["observed"], "broken")
    assert half["observed_unix_ns"] in {flow.time_ns for flow in node.flows()}
