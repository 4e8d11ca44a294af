"""``meshbridge evaluate`` against a real Envoy that holds the same policies, lowered by our own xDS code."""

from __future__ import annotations

import pytest
from envoy_proxy import Chains, echo, envoy_proxy
from envoy_report import Policies, compare, evaluated
from envoy_world import HTTP_PORTS, TCP_PORTS, MeshOptions, Point, Server, World

from meshbridge.evaluation.cluster import Cluster
from meshbridge.policy.lowering import guard_of
from meshbridge.policy.mesh import MtlsMode
from meshbridge.xds.filters import http_manager, jwt_authn
from meshbridge.xds.rbac import http_rbac, tcp_rbac

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

POINTS_PER_PORT = 8
MESHES = {
    "Istio's defaults": MeshOptions(),
    "a trust domain with an alias, merged slashes": MeshOptions("prod.example", ("old.example",), "MERGE_SLASHES"),
    "decoded slashes": MeshOptions(paths="DECODE_AND_MERGE_SLASHES"),
    "two aliases, paths as they come": MeshOptions("prod.example", ("cluster.local", "old.example"), "NONE"),
}
"""8 points to each of 6 ports of 30 servers make 1,440 for each mesh."""


@pytest.mark.parametrize("options", MESHES.values(), ids=MESHES)
def test_evaluate_agrees_with_an_envoy_that_holds_our_rbac(options: MeshOptions, seed: int) -> None:
    world = World(seed, options)
    cluster = world.cluster()
    assert not cluster.policies.refusals
    points = list(world.points(POINTS_PER_PORT))
    with envoy_proxy(options, world.servers) as proxy:

        def envoy_allows(policies: Policies, point: Point) -> bool:
            port = point.flow["port"]
            proxy.serve({(point.server, port): _chains(world.cluster(policies), point.server, port)})
            return proxy.ask([point])[0]

        ports = [(server, port) for server in world.servers for port in (*HTTP_PORTS, *TCP_PORTS)]
        proxy.serve({(server, port): _chains(cluster, server, port) for server, port in ports})
        compare(world, points, evaluated(cluster, points), proxy.ask(points), envoy_allows)


def _chains(cluster: Cluster, server: Server, port: int) -> Chains:
    """The filters of our own xDS code for a port, mTLS mode included."""
    workload = next(w for w in cluster.workloads if w.key == server.key)
    selected = cluster.policies.selecting(workload)
    guard = guard_of(workload, selected)
    if port in TCP_PORTS:
        filters = [*tcp_rbac(guard.policies, guard.mesh, "conformance"), echo()]
    else:
        rules = tuple(rule for policy in selected.request_authentication for rule in policy.rules)
        judges = [*jwt_authn(rules), *http_rbac(guard.policies, guard.mesh)]
        filters = http_manager(
            judges, peer_verified=False, stat_prefix="conformance", paths=guard.mesh.path_normalization
        )
    mode, _ = guard.mtls.at(port)
    return Chains(
        tls=None if mode is MtlsMode.DISABLE else filters, plaintext=None if mode is MtlsMode.STRICT else filters
    )
