"""Type URLs of what the controller serves: apart from the server's modules, which an agent need not hold."""

from __future__ import annotations

from typing import Final

PREFIX: Final = "type.googleapis.com/"
CLUSTER: Final = PREFIX + "envoy.config.cluster.v3.Cluster"
LOAD_ASSIGNMENT: Final = PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENER: Final = PREFIX + "envoy.config.listener.v3.Listener"
ROUTE: Final = PREFIX + "envoy.config.route.v3.RouteConfiguration"
SECRET: Final = PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"
EXTENSION_CONFIG: Final = PREFIX + "envoy.config.core.v3.TypedExtensionConfig"
POLICY: Final = PREFIX + "meshbridge.agent.v1.Policy"
ADDRESS: Final = PREFIX + "meshbridge.agent.v1.Address"
MESH: Final = PREFIX + "meshbridge.agent.v1.Mesh"
SERVICE: Final = PREFIX + "meshbridge.agent.v1.Service"
ENDPOINT: Final = PREFIX + "meshbridge.agent.v1.Endpoint"
PROBLEM: Final = PREFIX + "meshbridge.agent.v1.Problem"
REVISION: Final = PREFIX + "meshbridge.agent.v1.Revision"
