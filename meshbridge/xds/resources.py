"""Everything a sidecar's Envoy is sent besides its secrets, as bytes made once and shared by all who ask."""

from __future__ import annotations

from collections.abc import Mapping

from meshbridge.xds.clusters import build_clusters
from meshbridge.xds.listeners import inbound_listener, outbound_listener
from meshbridge.xds.sidecar import Sidecar
from meshbridge.xds.types import CLUSTER, LISTENER


def sidecar_resources(sidecar: Sidecar) -> Mapping[str, Mapping[str, bytes]]:
    """Serialise the sidecar's listeners and clusters: type URL → name → the message itself, not wrapped in Any.

    Equal input gives equal bytes, so a version can be their hash.
    """
    listeners = (inbound_listener(sidecar), outbound_listener(sidecar))
    return {
        CLUSTER: {cluster.name: bytes(cluster) for cluster in build_clusters(sidecar)},
        LISTENER: {listener.name: bytes(listener) for listener in listeners},
    }
