"""An agent of another ABI takes a node over: until its own maps are filled, what was enforced goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import NodeHarness, running_node

from meshbridge import abi

pytestmark = pytest.mark.root

ALLOW = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}, ingress: [{from: [{podSelector: {matchLabels: {app: %s}}}]}]}
"""
MAPS, OLD_MAPS = f"maps-v{abi.ABI_VERSION}", f"maps-v{abi.ABI_VERSION - 1}"


@pytest.fixture(params=["auto", "clsact"])
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[NodeHarness]:
    with running_node(tmp_path, attach=request.param) as harness:
        yield harness


def test_programs_of_another_abi_stay_in_force_until_the_new_maps_are_filled(node: NodeHarness) -> None:
    api, web, other = (node.add_pod("shop", name) for name in ("api", "web", "other"))
    node.listen(api, 80)
    node.apply(ALLOW % "web")
    node.sync()
    node.controller.go_away()
    node.kill_agent()
    pins = node.pin_root / node.name
    (pins / MAPS).rename(pins / OLD_MAPS)
    node.start_agent()
    assert node.reaches(web.netns, api.ipv4, 80), "without a controller what is there stays"
    assert not node.reaches(other.netns, api.ipv4, 80)
    going = node.stream(web.netns, api.ipv4, 80)
    node.controller.serve()
    node.sync()
    found = going.finish()
    assert found["bad"] == 0, found
    assert not (pins / OLD_MAPS).exists()
    assert node.reaches(web.netns, api.ipv4, 80)
    node.apply(ALLOW % "other")
    node.sync()
    assert node.reaches(other.netns, api.ipv4, 80)
    assert not node.reaches(web.netns, api.ipv4, 80)
