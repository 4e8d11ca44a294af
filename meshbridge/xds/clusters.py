"""The four clusters of a sidecar: into the pod, out with mTLS, out in the clear, and nowhere."""

from __future__ import annotations

from datetime import timedelta

from envoy_data_plane.envoy.config.cluster.v3 import (
    CircuitBreakers,
    CircuitBreakersThresholds,
    Cluster,
    ClusterDiscoveryType,
    ClusterLbPolicy,
)
from envoy_data_plane.envoy.config.core.v3 import (
    BindConfig,
    ExtraSourceAddress,
    Http1ProtocolOptions,
    Http2ProtocolOptions,
    SocketAddress,
    TransportSocket,
)
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
    HttpProtocolOptions,
    HttpProtocolOptionsUseDownstreamHttpConfig,
)
from envoy_data_plane.google.protobuf import Any

from meshbridge.xds.names import (
    ALPN_MESH_TCP,
    CLUSTER_BLACKHOLE,
    CLUSTER_INBOUND,
    CLUSTER_OUTBOUND_MTLS,
    CLUSTER_OUTBOUND_PLAINTEXT,
)
from meshbridge.xds.sidecar import Sidecar
from meshbridge.xds.transport import upstream_tls

CONNECT_TIMEOUT = timedelta(seconds=5)
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

# Source addresses of connections into the pod: istio-iptables lets exactly these past its redirection over lo.
INBOUND_SOURCE_V4 = "127.0.0.6"
INBOUND_SOURCE_V6 = "::6"

_UNLIMITED = 2**32 - 1


def build_clusters(sidecar: Sidecar) -> list[Cluster]:
    """Every cluster the sidecar's listeners name."""
    return [
        inbound_cluster(),
        _original_destination(
            CLUSTER_OUTBOUND_MTLS, transport_socket=upstream_tls(sidecar.trust_domains, ALPN_MESH_TCP[:1])
        ),
        _original_destination(CLUSTER_OUTBOUND_PLAINTEXT),
        Cluster(name=CLUSTER_BLACKHOLE, type=ClusterDiscoveryType.STATIC, connect_timeout=CONNECT_TIMEOUT),
    ]


def inbound_cluster() -> Cluster:
    """To the pod's own address and the port the client dialled, in the HTTP version it spoke."""
    cluster = _original_destination(CLUSTER_INBOUND)
    cluster.upstream_bind_config = BindConfig(
        source_address=SocketAddress(address=INBOUND_SOURCE_V4, port_value=0),
        extra_source_addresses=[ExtraSourceAddress(address=SocketAddress(address=INBOUND_SOURCE_V6, port_value=0))],
    )
    same_version = HttpProtocolOptionsUseDownstreamHttpConfig(
        http_protocol_options=Http1ProtocolOptions(), http2_protocol_options=Http2ProtocolOptions()
    )
    cluster.typed_extension_protocol_options = {
        HTTP_OPTIONS: Any.pack(HttpProtocolOptions(use_downstream_protocol_config=same_version))
    }
    return cluster


def _original_destination(name: str, transport_socket: TransportSocket | None = None) -> Cluster:
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.ORIGINAL_DST,
        lb_policy=ClusterLbPolicy.CLUSTER_PROVIDED,
        connect_timeout=CONNECT_TIMEOUT,
        transport_socket=transport_socket,
        # Envoy's default of 1024 would refuse what policy allows.
        circuit_breakers=CircuitBreakers(
            thresholds=[
                CircuitBreakersThresholds(
                    max_connections=_UNLIMITED,
                    max_pending_requests=_UNLIMITED,
                    max_requests=_UNLIMITED,
                    max_retries=_UNLIMITED,
                )
            ]
        ),
    )
