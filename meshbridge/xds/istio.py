"""What Istio has to be told so that its Envoys ask our ext_authz server: as objects, which the user applies.

Either as Istio's own provider (MeshConfig and AuthorizationPolicies with ``action: CUSTOM``), or, where another
provider has that place at a workload, as a filter of our own by EnvoyFilter (docs/adr/0261).

Spec: istio, pilot/pkg/security/authz/builder; networking.istio.io/v1alpha3 EnvoyFilter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshbridge.policy.mesh import OUR_PROVIDER
from meshbridge.policy.registry import CLUSTER_DOMAIN
from meshbridge.xds.filters import AUTHZ_TIMEOUT
from meshbridge.xds.names import JWT_METADATA_NAMESPACE

Object = dict[str, Any]

PART_OF: Final = {"app.kubernetes.io/part-of": "meshbridge"}
"""Not managed-by: whoever applies these objects keeps them, no controller of ours removes them."""

NAMESPACE: Final = "meshbridge-system"
SERVICE: Final = "meshbridge-authz"
PORT: Final = 9191
FILTER: Final = "meshbridge.ext_authz"
"""Not the name of Istio's filter, whose metadata ours would overwrite."""

ENVOY_FILTER: Final = "meshbridge-ext-authz"
STATUS_ON_ERROR: Final = 503

_EXT_AUTHZ: Final = "type.googleapis.com/envoy.extensions.filters.{}.ext_authz.v3.ExtAuthz"
_TIMEOUT: Final = f"{AUTHZ_TIMEOUT.total_seconds():g}s"


@dataclass(frozen=True, slots=True)
class Authz:
    """Where the mesh finds our server, and what an Envoy does that gets no answer."""

    namespace: str = NAMESPACE
    service: str = SERVICE
    port: int = PORT
    fail_open: bool = False

    @property
    def host(self) -> str:
        return f"{self.service}.{self.namespace}.{CLUSTER_DOMAIN}"

    @property
    def cluster(self) -> str:
        """The cluster that istiod gives every sidecar for the Service."""
        return f"outbound|{self.port}||{self.host}"


def provider(authz: Authz) -> Object:
    """The element of MeshConfig's ``extensionProviders``. Istio's own timeout would be 600 s."""
    service = {
        "service": authz.host,
        "port": authz.port,
        "timeout": _TIMEOUT,
        "failOpen": authz.fail_open,
        "statusOnError": str(STATUS_ON_ERROR),
    }
    return {"name": OUR_PROVIDER, "envoyExtAuthzGrpc": service}


def custom_policy(namespace: str, labels: Mapping[str, str], name: str = ENVOY_FILTER) -> Object:
    """Asks our provider about every request to these pods; without labels, to all of the namespace.

    In Istio's root namespace that is the whole mesh.
    """
    spec: Object = {"action": "CUSTOM", "provider": {"name": OUR_PROVIDER}, "rules": [{}]}
    if labels:
        spec = {"selector": {"matchLabels": dict(labels)}, **spec}
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(PART_OF)},
        "spec": spec,
    }


def envoy_filter(authz: Authz, namespace: str, labels: Mapping[str, str], name: str = ENVOY_FILTER) -> Object:
    """A filter of ours in the inbound chains of these pods; without labels, of all of the namespace.

    It stands last: what Istio's filters refuse is refused without asking, and tokens that jwt_authn has verified come
    with their claims.
    """
    spec: Object = {
        "configPatches": [
            _patch("HTTP_FILTER", "envoy.filters.network.http_connection_manager", _http(authz), "router"),
            _patch("NETWORK_FILTER", "envoy.filters.network.tcp_proxy", _tcp(authz)),
        ]
    }
    if labels:
        spec = {"workloadSelector": {"labels": dict(labels)}, **spec}
    return {
        "apiVersion": "networking.istio.io/v1alpha3",
        "kind": "EnvoyFilter",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(PART_OF)},
        "spec": spec,
    }


def _patch(where: str, network_filter: str, value: Object, http_filter: str = "") -> Object:
    found: Object = {"name": network_filter}
    if http_filter:
        found["subFilter"] = {"name": f"envoy.filters.http.{http_filter}"}
    return {
        "applyTo": where,
        "match": {"context": "SIDECAR_INBOUND", "listener": {"filterChain": {"filter": found}}},
        "patch": {"operation": "INSERT_BEFORE", "value": value},
    }


def _http(authz: Authz) -> Object:
    config = {
        "@type": _EXT_AUTHZ.format("http"),
        **_asking(authz),
        "status_on_error": {"code": STATUS_ON_ERROR},
        "metadata_context_namespaces": [JWT_METADATA_NAMESPACE],
        "encode_raw_headers": True,
    }
    return {"name": FILTER, "typed_config": config}


def _tcp(authz: Authz) -> Object:
    return {"name": FILTER, "typed_config": {"@type": _EXT_AUTHZ.format("network"), **_asking(authz)}}


def _asking(authz: Authz) -> Object:
    service = {"envoy_grpc": {"cluster_name": authz.cluster, "authority": authz.host}, "timeout": _TIMEOUT}
    return {
        "grpc_service": service,
        "transport_api_version": "V3",
        "failure_mode_allow": authz.fail_open,
        "include_tls_session": True,
        "stat_prefix": "meshbridge",
    }
