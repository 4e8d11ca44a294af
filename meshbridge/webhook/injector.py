"""The mesh-wide values that Istio's injector falls back to where a pod's annotations say nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.policy.mesh import MeshSettings

CONFIG_MAP: Final = "istio-sidecar-injector"

_PROXY: Final = {
    "include_ip_ranges": "includeIPRanges",
    "exclude_ip_ranges": "excludeIPRanges",
    "include_inbound_ports": "includeInboundPorts",
    "exclude_inbound_ports": "excludeInboundPorts",
    "include_outbound_ports": "includeOutboundPorts",
    "exclude_outbound_ports": "excludeOutboundPorts",
    "status_port": "statusPort",
}


def mesh_defaults(config_map: Mapping[str, Any], mesh: MeshSettings) -> MeshDefaults:
    """What ``data.values`` of the ConfigMap says; what it leaves out, or says in a wrong type, is Istio's default.

    Spec: istio manifests/charts/istio-control/istio-discovery, files/injection-template.yaml.
    """
    values: Any = None
    with suppress(ValueError, TypeError, RecursionError):
        values = json.loads(_mapping(config_map, "data").get("values", ""))
    proxy = _mapping(_mapping(values, "global"), "proxy")
    said: dict[str, Any] = {f: str(proxy[name]) for f, name in _PROXY.items() if isinstance(proxy.get(name), str | int)}
    cni = _mapping(_mapping(values, "pilot"), "cni") or _mapping(values, "istio_cni")  # since 1.23, and before
    return MeshDefaults(**said, interception_mode=mesh.interception, cni=cni.get("enabled") is True)


def _mapping(given: Any, name: str) -> Mapping[str, Any]:
    found = given.get(name) if isinstance(given, Mapping) else None
    return found if isinstance(found, Mapping) else {}
