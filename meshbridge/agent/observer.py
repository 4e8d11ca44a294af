"""The Observer service on the agent's Unix socket: flows, endpoints, status, and a CNI plugin's AddEndpoint."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, Protocol

import grpc

from meshbridge.agent.ring import FlowRing
from meshbridge.errors import MeshBridgeError
from meshbridge.observe.messages import HISTORY_KEY
from meshbridge.protos import observer_pb2 as pb

SERVICE: Final = "meshbridge.observer.v1.Observer"
_SUN_PATH_BYTES: Final = 108
_MAX_MESSAGE_BYTES: Final = 1 << 20
_DRAIN_S: Final = 0.5


class SocketError(MeshBridgeError):
    """The agent's socket cannot be opened."""


class NodeApi(Protocol):
    """What the service asks of the agent."""

    def endpoints(self) -> tuple[pb.EndpointState, ...]: ...

    def status(self) -> pb.Status: ...

    async def bypasses(self) -> pb.Bypasses: ...

    async def add_endpoint(self, request: pb.AddEndpointRequest) -> pb.AddEndpointResponse:
        """
        Raises:
            MeshBridgeError: the request cannot be met.
        """


class ObserverService:
    """Serves one node's agent. Records of flows pass as the bytes they are kept in."""

    def __init__(self, node: NodeApi, ring: FlowRing) -> None:
        self._node, self._ring = node, ring

    def handler(self) -> grpc.GenericRpcHandler:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "GetFlows": stream(self.get_flows, pb.GetFlowsRequest.FromString, None),
                "ListEndpoints": unary(
                    self.list_endpoints, pb.ListEndpointsRequest.FromString, pb.ListEndpointsResponse.SerializeToString
                ),
                "GetStatus": unary(self.get_status, pb.GetStatusRequest.FromString, pb.Status.SerializeToString),
                "GetBypasses": unary(
                    self.get_bypasses, pb.GetBypassesRequest.FromString, pb.Bypasses.SerializeToString
                ),
                "AddEndpoint": unary(
                    self.add_endpoint, pb.AddEndpointRequest.FromString, pb.AddEndpointResponse.SerializeToString
                ),
            },
        )

    async def get_flows(self, request: pb.GetFlowsRequest, context: Any) -> AsyncIterator[bytes]:
        follower = self._ring.follow() if request.follow else None
        if request.follow and follower is None:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many clients follow this agent; end one")
        try:
            past = self._ring.past(request.last)
            await context.send_initial_metadata(((HISTORY_KEY, str(len(past))),))
            for record in past:
                yield record
            if follower is not None:
                async for record in follower.records():
                    yield record
        finally:
            if follower is not None:
                self._ring.leave(follower)

    async def list_endpoints(self, _request: pb.ListEndpointsRequest, _context: Any) -> pb.ListEndpointsResponse:
        return pb.ListEndpointsResponse(endpoints=self._node.endpoints())

    async def get_status(self, _request: pb.GetStatusRequest, _context: Any) -> pb.Status:
        return self._node.status()

    async def get_bypasses(self, _request: pb.GetBypassesRequest, _context: Any) -> pb.Bypasses:
        return await self._node.bypasses()

    async def add_endpoint(self, request: pb.AddEndpointRequest, context: Any) -> pb.AddEndpointResponse:
        try:
            return await self._node.add_endpoint(request)
        except MeshBridgeError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise AssertionError from error  # abort does not return


async def start_observer(service: ObserverService, path: Path) -> grpc.aio.Server:
    """Serve on a Unix socket that only this user may open; the socket of an agent that died is replaced.

    Raises:
        SocketError: another agent answers there, or the path cannot be used.
    """
    claim_socket(path)
    server = grpc.aio.server(
        options=(("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)),
        maximum_concurrent_rpcs=256,
    )
    server.add_generic_rpc_handlers((service.handler(),))
    mask = os.umask(0o177)  # so that it is never open to others, not even between bind and chmod
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise SocketError(str(error), where=str(path)) from error
    finally:
        os.umask(mask)
    await server.start()
    return server


async def stop_observer(server: grpc.aio.Server) -> None:
    """End the streams that are open and close the socket."""
    await server.stop(_DRAIN_S)


def claim_socket(path: Path) -> None:
    """Make room for a socket at ``path``; one that nobody listens on any more is removed.

    Raises:
        SocketError: another agent answers there, or the path cannot be used.
    """
    if len(os.fsencode(path)) >= _SUN_PATH_BYTES:
        raise SocketError(f"the path has {len(os.fsencode(path))} bytes", where=str(path), fix="use a shorter --socket")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if path.is_socket():
            _refuse_if_alive(path)
            path.unlink()
    except OSError as error:
        raise SocketError(error.strerror or str(error), where=str(path), fix="run as root, or use --socket") from error


def _refuse_if_alive(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError, TimeoutError):
            return
    raise SocketError("an agent of this node is running", where=str(path), fix="stop it, or use another --node")
