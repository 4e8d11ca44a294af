"""What nodes have seen of their own pods reaches the nodes that send past their own Envoys, and nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cluster_views import A, B, World, cnp, document, pod

from meshbridge.bypass.annotations import EXCLUDE_OUTBOUND_PORTS
from meshbridge.identity.model import IpFamily, TcpPorts
from meshbridge.xds.nodereport import NodeReport
from meshbridge.xds.server import Feed

PORTS = (TcpPorts(IpFamily.IPV4, 8080, 8080), TcpPorts(IpFamily.IPV6, 8080, 8080))
SCRAPER = pod("scraper", "10.0.0.1", annotations={EXCLUDE_OUTBOUND_PORTS: "8080"})
API = pod("api", "10.0.0.2", "node-b", app="api")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def excluded(world: World, feed: Feed, ip: str = "10.0.0.2") -> tuple[TcpPorts, ...]:
    return world.address(feed, ip).peer.excluded


def test_a_report_reaches_a_node_that_sends_past_its_envoys(world: World) -> None:
    a, b = world.connect(A), world.connect(B)
    world.put(SCRAPER, API)
    before = world.revision(b)
    world.controller.report("node-b", NodeReport({"uid-api": PORTS}))
    assert excluded(world, a) == PORTS
    assert excluded(world, b) == ()
    assert world.revision(b) == before, "whom it does not concern gets no revision"
    world.controller.report("node-b", NodeReport({"uid-api": PORTS[:1]}))
    assert excluded(world, a) == PORTS[:1]
    world.controller.report("node-b", NodeReport({}))
    assert excluded(world, a) == ()


def test_what_else_a_node_reports_costs_nobody_a_revision(world: World) -> None:
    a = world.connect(A)
    world.put(SCRAPER, API)
    world.controller.report("node-b", NodeReport({"uid-api": PORTS}))
    before = world.revision(a)
    world.woken.clear()
    world.controller.report("node-b", NodeReport({"uid-api": PORTS}, {"policy": 2}))
    assert (world.revision(a), world.woken) == (before, [])
    assert world.controller.node_reports == {"node-b": NodeReport({"uid-api": PORTS}, {"policy": 2})}
    world.controller.report("node-b", NodeReport())
    assert not world.controller.node_reports


def test_a_node_is_told_when_it_begins_to_send_past_its_envoys(world: World) -> None:
    a = world.connect(A)
    world.put(pod("web", "10.0.0.3"), API, cnp("p", "web", {"app": "api"}))
    world.controller.report("node-b", NodeReport({"uid-api": PORTS}))
    assert excluded(world, a) == ()
    world.put(SCRAPER)
    assert excluded(world, a) == PORTS
    world.drop(SCRAPER)
    assert excluded(world, a) == ()


def test_a_node_is_believed_of_its_own_pods_only(world: World) -> None:
    a = world.connect(A)
    world.put(SCRAPER, API)
    world.controller.report("node-c", NodeReport({"uid-api": PORTS}))
    assert excluded(world, a) == ()


def test_a_report_that_came_before_the_pod_counts_with_it_and_goes_with_its_uid(world: World) -> None:
    a = world.connect(A)
    world.controller.report("node-b", NodeReport({"uid-api": PORTS}))
    world.put(SCRAPER, API)
    assert excluded(world, a) == PORTS
    world.put(pod("api", "10.0.0.2", "node-b", app="api", uid="another"))
    assert excluded(world, a) == ()
    world.put(API)
    assert excluded(world, a) == PORTS
    world.drop(API)
    world.put(pod("web", "10.0.0.2", "node-b"))
    assert excluded(world, a) == ()


def test_other_mesh_settings_forget_no_report(world: World) -> None:
    a = world.connect(A)
    world.put(SCRAPER, API)
    world.controller.report("node-b", NodeReport({"uid-api": PORTS}))
    world.put(document("ConfigMap", "istio", "istio-system", data={"mesh": "trustDomain: td"}))
    assert world.address(a, "10.0.0.2").peer.trust_domain == "td"
    assert excluded(world, a) == PORTS
