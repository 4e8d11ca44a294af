"""``meshbridge evaluate`` against a real Envoy that judges as a real istiod tells it to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from api_server import ADMIN, missing, path_of, running_api_server, wait_for
from envoy_proxy import envoy_proxy
from envoy_report import compare, evaluated
from envoy_world import HTTP_PORTS, TCP_PORTS, MeshOptions, World
from istiod_server import chains_of, custom_resource_definitions, inbound_listener, istiod

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

POINTS_PER_PORT = 8


def test_evaluate_agrees_with_an_envoy_that_holds_istiods_rbac(
    seed: int, third_party: Callable[[str], Path], tmp_path: Path
) -> None:
    """The API server holds Istio's own definitions, so no policy is in it that Istio would not take."""
    istio = third_party("istio")
    if reason := missing():
        pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)
    world = World(seed, MeshOptions("prod.example", ("old.example",), "MERGE_SLASHES"), ipv6=False, misguided=True)
    points = list(world.points(POINTS_PER_PORT))
    ports = [(server, port) for server in world.servers for port in (*HTTP_PORTS, *TCP_PORTS)]
    with running_api_server(tmp_path, {}) as api:
        api.create(*custom_resource_definitions(istio / "share"))
        api.create(*world.objects)
        wait_for(
            lambda: all(api.call("GET", f"{path_of(each)}")[0] == 200 for each in world.policies), "kinds are served"
        )
        api.create(*world.policies)
        with istiod(istio / "bin/pilot-discovery", api.kubeconfig(ADMIN), tmp_path) as channel:
            inbound = {server: inbound_listener(channel, world, server) for server in world.servers}
    with envoy_proxy(world.options, world.servers) as proxy:
        proxy.serve({(server, port): chains_of(inbound[server], port) for server, port in ports})
        compare(world, points, evaluated(world.cluster(), points), proxy.ask(points))
