"""What a sidecar's Envoy is started with: who it is, where its configuration comes from, and its own ports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta

from envoy_data_plane.envoy.config.bootstrap.v3 import (
    Admin,
    Bootstrap,
    BootstrapDynamicResources,
    BootstrapStaticResources,
)
from envoy_data_plane.envoy.config.cluster.v3 import (
    CircuitBreakers,
    CircuitBreakersThresholds,
    Cluster,
    ClusterDiscoveryType,
)
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    ApiConfigSource,
    ApiConfigSourceApiType,
    ApiVersion,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HeaderValue,
    Http2ProtocolOptions,
    KeepaliveSettings,
    Node,
)
from envoy_data_plane.envoy.config.endpoint.v3 import (
    ClusterLoadAssignment,
    Endpoint,
    LbEndpoint,
    LocalityLbEndpoints,
)
from envoy_data_plane.envoy.config.listener.v3 import AdditionalAddress, Filter, FilterChain, Listener
from envoy_data_plane.envoy.config.route.v3 import Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpConnectionManager
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
    HttpProtocolOptions,
    HttpProtocolOptionsExplicitHttpConfig,
)
from envoy_data_plane.google.protobuf import Any, Struct

from meshbridge.identity.model import IpFamily, Workload
from meshbridge.xds.auth import pod_caller
from meshbridge.xds.clusters import HTTP_OPTIONS
from meshbridge.xds.filters import router
from meshbridge.xds.names import CLUSTER_ADMIN, CLUSTER_AUTHZ, CLUSTER_XDS
from meshbridge.xds.sidecar import HEALTH_PORT, METRICS_PORT
from meshbridge.xds.transport import ads_source, pipe_address, socket_address

ADMIN_PORT = 15000
CONNECT_TIMEOUT = timedelta(seconds=1)

_UNLIMITED = 2**32 - 1


@dataclass(frozen=True, slots=True)
class BootstrapInputs:
    """Where the two servers of the node listen (Unix sockets), and the token that says which pod this is."""

    workload: Workload
    token: str
    xds_socket: str
    authz_socket: str


def bootstrap_json(inputs: BootstrapInputs) -> str:
    """The bootstrap of one pod's Envoy as JSON. It holds the pod's token: keep the file readable to Envoy alone."""
    return json.dumps(bootstrap(inputs).to_dict(), indent=1)


def bootstrap(inputs: BootstrapInputs) -> Bootstrap:
    """ADS for everything dynamic; the two servers are static clusters, so that they are there before any answer."""
    workload = inputs.workload
    caller = pod_caller(workload.node, workload.namespace, workload.name, workload.service_account, workload.uid)
    ads = ApiConfigSource(
        api_type=ApiConfigSourceApiType.DELTA_GRPC,
        transport_api_version=ApiVersion.V3,
        set_node_on_first_message_only=True,
        grpc_services=[
            GrpcService(
                envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=CLUSTER_XDS),
                initial_metadata=[HeaderValue(key="authorization", value=f"Bearer {inputs.token}")],
            )
        ],
    )
    return Bootstrap(
        node=Node(
            # Has to be the token's own name for the pod; the server refuses any other.
            id=caller.node_id,
            cluster=f"{workload.service_account}.{workload.namespace}",
            metadata=Struct.from_dict(
                {
                    "NAMESPACE": workload.namespace,
                    "NAME": workload.name,
                    "UID": workload.uid,
                    "SERVICE_ACCOUNT": workload.service_account,
                    "NODE_NAME": workload.node,
                }
            ),
        ),
        admin=Admin(address=socket_address("127.0.0.1", ADMIN_PORT)),
        dynamic_resources=BootstrapDynamicResources(ads_config=ads, lds_config=ads_source(), cds_config=ads_source()),
        static_resources=BootstrapStaticResources(
            clusters=[
                _grpc_cluster(CLUSTER_XDS, inputs.xds_socket),
                _grpc_cluster(CLUSTER_AUTHZ, inputs.authz_socket),
                static_cluster(CLUSTER_ADMIN, socket_address("127.0.0.1", ADMIN_PORT)),
            ],
            listeners=[
                _admin_view("metrics", METRICS_PORT, "/stats/prometheus", "/stats/prometheus", workload),
                _admin_view("health", HEALTH_PORT, "/healthz/ready", "/ready", workload),
            ],
        ),
    )


def static_cluster(name: str, address: Address) -> Cluster:
    """A cluster of one endpoint that never changes."""
    endpoint = LbEndpoint(endpoint=Endpoint(address=address))
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.STATIC,
        connect_timeout=CONNECT_TIMEOUT,
        load_assignment=ClusterLoadAssignment(
            cluster_name=name, endpoints=[LocalityLbEndpoints(lb_endpoints=[endpoint])]
        ),
    )


def _grpc_cluster(name: str, socket_path: str) -> Cluster:
    cluster = static_cluster(name, pipe_address(socket_path))
    http2 = Http2ProtocolOptions(
        # A server that is gone without closing its socket is noticed, and the stream opened anew.
        connection_keepalive=KeepaliveSettings(interval=timedelta(seconds=30), timeout=timedelta(seconds=5))
    )
    explicit = HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=http2)
    cluster.typed_extension_protocol_options = {
        HTTP_OPTIONS: Any.pack(HttpProtocolOptions(explicit_http_config=explicit))
    }
    # Envoy's default of 1024 requests in flight would turn a burst into refusals.
    thresholds = CircuitBreakersThresholds(max_pending_requests=_UNLIMITED, max_requests=_UNLIMITED)
    cluster.circuit_breakers = CircuitBreakers(thresholds=[thresholds])
    return cluster


def _admin_view(name: str, port: int, path: str, admin_path: str, workload: Workload) -> Listener:
    """Show one page of the admin port, which itself stays on loopback, to the node and to Prometheus."""
    route = Route(match=RouteMatch(path=path), route=RouteAction(cluster=CLUSTER_ADMIN, prefix_rewrite=admin_path))
    manager = HttpConnectionManager(
        stat_prefix=name,
        route_config=RouteConfiguration(
            name=name, virtual_hosts=[VirtualHost(name=name, domains=["*"], routes=[route])]
        ),
        http_filters=[router()],
    )
    chain = FilterChain(
        filters=[Filter(name="envoy.filters.network.http_connection_manager", typed_config=Any.pack(manager))]
    )
    families = {IpFamily.of(address) for address in workload.addresses} or {IpFamily.IPV4}
    binds = {IpFamily.IPV4: "0.0.0.0", IpFamily.IPV6: "::"}
    addresses = [socket_address(binds[family], port) for family in sorted(families)]
    return Listener(
        name=name,
        stat_prefix=name,
        address=addresses[0],
        additional_addresses=[AdditionalAddress(address=address) for address in addresses[1:]],
        filter_chains=[chain],
    )
