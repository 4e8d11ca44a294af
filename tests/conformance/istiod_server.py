"""A real istiod on a real API server, and what it has a sidecar of a pod do with inbound connections."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import yaml
from api_server import free_port
from envoy.config.core.v3 import base_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from envoy_data_plane.envoy.config.listener.v3 import Filter
from envoy_data_plane.google.protobuf import Any as AnyMessage
from envoy_proxy import Chains, echo
from envoy_world import HTTP_PORTS, ROOT_NAMESPACE, UNDECLARED, Server, World

from meshbridge.xds.names import CLUSTER_INBOUND
from meshbridge.xds.types import LISTENER

INBOUND = "virtualInbound"
STARTED_S = 90
_TYPES = "type.googleapis.com/envoy.extensions.filters"
_NETWORK_RBAC = f"{_TYPES}.network.rbac.v3.RBAC"
_MANAGER = f"{_TYPES}.network.http_connection_manager.v3.HttpConnectionManager"
_HTTP_KEPT = {
    f"{_TYPES}.http.rbac.v3.RBAC",
    f"{_TYPES}.http.jwt_authn.v3.JwtAuthentication",
    f"{_TYPES}.http.router.v3.Router",
}


@contextlib.contextmanager
def istiod(program: Path, kubeconfig: Path, directory: Path) -> Iterator[grpc.Channel]:
    """Run istiod on the cluster of ``kubeconfig`` until it is ready; it is ended afterwards. Yields its ADS."""
    with istiod_at(program, kubeconfig, directory) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


@contextlib.contextmanager
def istiod_at(program: Path, kubeconfig: Path, directory: Path, *options: str, **settings: str) -> Iterator[int]:
    """The same, for who connects to its port; ``settings`` are further ones of its environment."""
    grpc_port, http_port = free_port(), free_port()
    command = [
        str(program), "discovery", f"--kubeconfig={kubeconfig}", f"--grpcAddr=127.0.0.1:{grpc_port}",
        f"--httpAddr=127.0.0.1:{http_port}", "--monitoringAddr=127.0.0.1:0", "--secureGRPCAddr=", "--httpsAddr=",
        "--ctrlz_port=0", "--meshConfig=/nonexistent", "--log_target=stdout", "--shutdownDuration=1s",
        *options,
    ]  # fmt: skip
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(directory), "POD_NAMESPACE": ROOT_NAMESPACE, "POD_NAME": "istiod",
        "ENABLE_CA_SERVER": "false", "PILOT_CERT_PROVIDER": "none", "INJECTION_WEBHOOK_CONFIG_NAME": "",
        "VALIDATION_WEBHOOK_CONFIG_NAME": "", "PILOT_ENABLE_GATEWAY_API": "false", **settings,
    }  # fmt: skip
    with (directory / "istiod.log").open("wb") as log:
        process = subprocess.Popen(["nice", *command], stdout=log, stderr=log, env=environment, cwd=directory)
    try:
        deadline = time.monotonic() + STARTED_S
        while subprocess.run(["curl", "-fs", f"http://127.0.0.1:{http_port}/ready"], capture_output=True).returncode:
            told = (directory / "istiod.log").read_text()[-4000:]
            assert process.poll() is None, f"istiod ended:\n{told}"
            assert time.monotonic() < deadline, f"istiod is not ready:\n{told}"
            time.sleep(0.2)
        yield grpc_port
    finally:
        process.kill()
        process.wait()


def inbound_listener(channel: grpc.Channel, world: World, server: Server) -> listener_pb2.Listener:
    """The listener that takes a pod's inbound connections, as istiod tells the pod's sidecar."""
    node = base_pb2.Node(
        id=f"sidecar~{server.address}~{server.name}.{server.namespace}~{server.namespace}.svc.cluster.local"
    )
    node.metadata.update(
        {
            "NAMESPACE": server.namespace, "NAME": server.name, "LABELS": server.labels, "CLUSTER_ID": "Kubernetes",
            "INSTANCE_IPS": server.address, "SERVICE_ACCOUNT": server.name, "ISTIO_VERSION": "1.31.0",
            "MESH_ID": world.options.trust_domain,
        }
    )  # fmt: skip
    requests: queue.SimpleQueue[discovery_pb2.DiscoveryRequest] = queue.SimpleQueue()
    requests.put(discovery_pb2.DiscoveryRequest(node=node, type_url=LISTENER))
    stream = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel).StreamAggregatedResources(iter(requests.get, None))
    try:
        for response in stream:
            for resource in response.resources:
                found = listener_pb2.Listener()
                if resource.Unpack(found) and found.name == INBOUND:
                    return found
    finally:
        stream.cancel()
    raise AssertionError(f"istiod has no {INBOUND} for {server}")


def chains_of(inbound: listener_pb2.Listener, port: int) -> Chains:
    """What the filter chains of a port judge by: for peers that speak the mesh's mTLS, and for those in the clear.

    A port that istiod knows has its own; any other has the chains without a port, of which Envoy picks those for HTTP
    when it recognizes it.
    """
    mine = [chain for chain in inbound.filter_chains if chain.filter_chain_match.destination_port.value == port]
    if not mine:
        assert port in UNDECLARED, f"no chain for port {port} among {[chain.name for chain in inbound.filter_chains]}"
        unnamed = [c for c in inbound.filter_chains if not c.filter_chain_match.HasField("destination_port")]
        mine = [chain for chain in unnamed if _is_http(chain) is (port in HTTP_PORTS)]
    tls = [c for c in mine if c.filter_chain_match.transport_protocol == "tls" and c.HasField("transport_socket")]
    plaintext = [c for c in mine if c.filter_chain_match.transport_protocol in ("raw_buffer", "") and c not in tls]
    return Chains(*(_judges(found[0]) if found else None for found in (tls, plaintext)))


def _is_http(chain: listener_components_pb2.FilterChain) -> bool:
    return any(each.typed_config.type_url == _MANAGER for each in chain.filters)


def _judges(chain: listener_components_pb2.FilterChain) -> list[Filter]:
    """The chain's RBAC filters before an application of ours."""
    found = []
    for each in chain.filters:
        if each.typed_config.type_url == _NETWORK_RBAC:
            found.append(_filter(each.name, _NETWORK_RBAC, each.typed_config.value))
        elif each.typed_config.type_url == _MANAGER:
            manager = http_connection_manager_pb2.HttpConnectionManager()
            each.typed_config.Unpack(manager)
            return [*found, _filter(each.name, _MANAGER, _to_the_application(manager).SerializeToString())]
    return [*found, echo()]


def _to_the_application(
    manager: http_connection_manager_pb2.HttpConnectionManager,
) -> http_connection_manager_pb2.HttpConnectionManager:
    """The same manager without what upstream Envoy lacks or needs a mesh for; it judges as before."""
    kept = [each for each in manager.http_filters if each.typed_config.type_url in _HTTP_KEPT]
    del manager.http_filters[:]
    manager.http_filters.extend(kept)
    del manager.access_log[:]
    manager.ClearField("tracing")
    manager.ClearField("route_config")
    route = manager.route_config.virtual_hosts.add(name="application", domains=["*"]).routes.add()
    route.match.prefix = "/"
    route.route.cluster = CLUSTER_INBOUND
    return manager


def _filter(name: str, type_url: str, value: bytes) -> Filter:
    return Filter(name=name, typed_config=AnyMessage(type_url=type_url, value=value))


def custom_resource_definitions(share: Path) -> list[dict[str, object]]:
    """Istio's own, with their validation."""
    text = (share / "manifests/charts/base/files/crd-all.gen.yaml").read_text()
    return [each for each in yaml.safe_load_all(text) if each]
