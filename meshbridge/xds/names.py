"""Names in our Envoys' configuration. Counters, SDS requests and tests are found by them, so they never vary."""

from __future__ import annotations

from typing import Final

LISTENER_INBOUND: Final = "inbound"
LISTENER_OUTBOUND: Final = "outbound"

CLUSTER_INBOUND: Final = "inbound"
CLUSTER_OUTBOUND_MTLS: Final = "outbound_mtls"
CLUSTER_OUTBOUND_PLAINTEXT: Final = "outbound_plaintext"
CLUSTER_BLACKHOLE: Final = "blackhole"
CLUSTER_XDS: Final = "meshbridge_xds"
CLUSTER_AUTHZ: Final = "meshbridge_authz"
CLUSTER_ADMIN: Final = "meshbridge_admin"

# SDS resource names; Istio's, since people know them.
SECRET_CERTIFICATE: Final = "default"
SECRET_ROOT_CA: Final = "ROOTCA"

# Where jwt_authn leaves the claims and ext_authz picks them up.
JWT_METADATA_NAMESPACE: Final = "envoy.filters.http.jwt_authn"
JWT_PAYLOAD_KEY: Final = "payload"

# By which ext_authz is told that no jwt_authn looks at tokens.
OWNS_TOKENS: Final = "meshbridge.tokens"
OWNED: Final = "authz"

# What a client sidecar offers; Istio's names, so that PERMISSIVE terminates the mesh's own TLS and no other.
ALPN_MESH_TCP: Final = ("istio", "istio-peer-exchange")
ALPN_MESH_HTTP: Final = ("istio-http/1.0", "istio-http/1.1", "istio-h2")
