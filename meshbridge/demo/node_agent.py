"""The CNI plugin's part: telling the node's agent of a new pod before anything runs in it."""

from __future__ import annotations

import grpc

from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import NETNS, NodeLayout
from meshbridge.demo.records import PodRecord
from meshbridge.protos import observer_pb2, observer_pb2_grpc

_TIMEOUT_S = 20.0


def add_endpoint(record: PodRecord, wait_ready: bool) -> None:
    """The agent has hooked the pod's interface; with ``wait_ready``, its policy is in the kernel too."""
    request = observer_pb2.AddEndpointRequest(
        namespace=record.namespace,
        pod=record.name,
        uid=record.uid,
        interfaces=[record.network.interface],
        netns=str(NETNS / record.netns),
        wait_ready=wait_ready,
        timeout_s=_TIMEOUT_S,
    )
    with _channel(record.layout) as channel:
        stub = observer_pb2_grpc.ObserverStub(channel)  # type: ignore[no-untyped-call]  # generated
        try:
            response = stub.AddEndpoint(request, timeout=_TIMEOUT_S + 2.0, wait_for_ready=True)
        except grpc.RpcError as error:
            raise DemoError(f"the agent does not take the pod: {_details(error)}", where=f"pod {record.key}") from error
    if wait_ready and not response.ready:
        raise DemoError(
            f"the agent has no policy for it after {_TIMEOUT_S:g} s",
            where=f"pod {record.key}",
            fix="look at `meshbridge status`",
        )


def status(node: NodeLayout, timeout_s: float = 2.0) -> observer_pb2.Status | None:
    """What the node's agent says of itself; None when nobody answers."""
    with _channel(node) as channel:
        try:
            stub = observer_pb2_grpc.ObserverStub(channel)  # type: ignore[no-untyped-call]  # generated
            answer = stub.GetStatus(observer_pb2.GetStatusRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return None
        assert isinstance(answer, observer_pb2.Status)
        return answer


def _channel(node: NodeLayout) -> grpc.Channel:
    # a Unix socket has no authority, and servers may refuse the path that grpc would send as one
    options = [("grpc.default_authority", "localhost")]
    return grpc.insecure_channel(f"unix:{node.agent_socket}", options=options)


def _details(error: grpc.RpcError) -> str:
    details = getattr(error, "details", None)
    return str(details()) if callable(details) else str(error)
