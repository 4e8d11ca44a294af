"""What a fix of a half bypass opens at the server's Envoy, and what keeps it closed: a real istiod and real Envoys."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from api_server import missing
from authz_world import TCP, World, until, world

from meshbridge.bypass.fixes import fixes
from meshbridge.bypass.inventory import inventory
from meshbridge.kube.objects import read_objects

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

STRICT = {
    "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
    "metadata": {"name": "default", "namespace": "finance"}, "spec": {"mtls": {"mode": "STRICT"}},
}  # fmt: skip
CAUSE = f"""
{{apiVersion: v1, kind: Namespace, metadata: {{name: finance}}}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: default, namespace: finance}}
spec: {{mtls: {{mode: STRICT}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: mine, namespace: finance}}
spec: {{host: transactions, trafficPolicy: {{connectionPool: {{tcp: {{maxConnections: 9}}}}}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: transactions, namespace: finance}}
spec: {{clusterIP: 10.96.9.1, selector: {{app: transaction-service}}, ports: [{{name: tcp, port: {TCP}}}]}}
---
apiVersion: v1
kind: Pod
metadata:
  name: server
  namespace: finance
  labels: {{app: transaction-service}}
  annotations: {{traffic.sidecar.istio.io/excludeInboundPorts: "{TCP}"}}
spec: {{containers: [{{name: app, ports: [{{containerPort: {TCP}}}]}}, {{name: istio-proxy}}]}}
status: {{podIP: 10.99.0.1}}
---
apiVersion: v1
kind: Pod
metadata: {{name: client, namespace: finance, labels: {{app: client}}}}
spec: {{containers: [{{name: app}}, {{name: istio-proxy}}]}}
status: {{podIP: 10.99.0.2}}
"""
"""The half bypass that is mended. In the mesh of the test the server's Envoy sees the port: the exclusion has gone, and
what mends it is still there."""


@pytest.fixture(scope="module")
def mesh(third_party: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    istio = third_party("istio")
    if reason := missing():
        pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)
    with world(istio, tmp_path_factory.mktemp) as made:
        yield made


def comes_in(mesh: World) -> bool:
    """Whether a stranger's plaintext gets to the application: from the client's address, past the client's Envoy."""
    with suppress(OSError), mesh.client.connect_as_proxy(str(mesh.server.v4), TCP) as sock:
        sock.settimeout(5)
        sock.sendall(b"hello")
        return sock.recv(5) == b"hello"
    return False


def test_what_a_fix_opens_its_guard_closes(mesh: World) -> None:
    documents = read_objects(CAUSE.encode(), "").documents
    guard, authentication = (fix.apply for fix in fixes(inventory(documents), documents))
    assert guard is not None
    assert authentication is not None
    assert (guard["kind"], authentication["kind"]) == ("AuthorizationPolicy", "PeerAuthentication")
    assert comes_in(mesh)  # PERMISSIVE
    mesh.put(STRICT)
    until(lambda: not comes_in(mesh), "STRICT keeps strangers out", 30)
    mesh.put(authentication)
    until(lambda: comes_in(mesh), "the PeerAuthentication alone lets them in", 30)
    mesh.put(guard)
    until(lambda: not comes_in(mesh), "the guard keeps them out", 30)
    mesh.api.delete(authentication)
    until(lambda: not comes_in(mesh), "STRICT is back", 30)
    mesh.api.delete(guard)
    assert not comes_in(mesh)
