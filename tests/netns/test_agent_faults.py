"""Pods that cannot be enforced as they are: closed on a real node, and it is said why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import NodeHarness, running_node

pytestmark = pytest.mark.root

FAULT = "a.yaml:3: Pod shop/api, spec: unreadable"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeHarness]:
    with running_node(tmp_path) as harness:
        yield harness


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "found by its route"])
def test_a_pod_with_a_fault_is_closed_and_named(node: NodeHarness, announced: bool) -> None:
    web, api = node.add_pod("shop", "web"), node.add_pod("shop", "api", announce=announced)
    node.listen(api, 80)
    if not announced:
        assert node.reaches(web.netns, api.ipv4, 80) is False, "web's own interface waits for policy"
    node.faults[api.key] = FAULT
    node.sync()
    for address in (api.ipv4, api.ipv6):
        assert not node.reaches(web.netns, address, 80)
    (state,) = (state for state in node.client.endpoints() if state.pod == "api")
    assert (state.state, state.interface) == ("not-ready", api.interface)
    assert any(FAULT in problem for problem in node.client.status().problems)
    del node.faults[api.key]
    node.sync()
    for address in (api.ipv4, api.ipv6):
        assert node.reaches(web.netns, address, 80, timeout_s=5), "neighbours are asked again each second"
    node.faults[api.key] = FAULT
    node.sync()
    assert not node.reaches(web.netns, api.ipv4, 80)
