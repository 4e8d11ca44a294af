"""What nodes tell the controller of their own pods: one stream a node, authenticated as all are.

Spec: protos/meshbridge/protos/reports.proto.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final, Protocol

import grpc
import structlog

from meshbridge.protos import reports_pb2, reports_pb2_grpc
from meshbridge.xds.auth import AuthenticationError, Authenticator, CallerKind, UnavailableError
from meshbridge.xds.messages import MessageError
from meshbridge.xds.nodereport import NO_REPORT, NodeReport, report_of

log = structlog.get_logger()

KEPT_S: Final = 60.0
"""How long a report counts after its stream has ended: longer than an agent takes to restart."""
INTERVAL_S: Final = 0.1
"""A node's reports are read no faster, as each may cost other nodes a revision."""


def refusal_code(error: AuthenticationError | UnavailableError) -> grpc.StatusCode:
    """How a call ends whose caller is not known."""
    unknown = isinstance(error, AuthenticationError)
    return grpc.StatusCode.UNAUTHENTICATED if unknown else grpc.StatusCode.UNAVAILABLE


class ReportSink(Protocol):
    def report(self, node: str, report: NodeReport) -> None:
        """All that ``node`` says of its own pods from now on."""


class ReportServer(reports_pb2_grpc.NodeReportsServicer):
    """Hands on what nodes report; a node is only asked about itself, by its token."""

    def __init__(self, authenticator: Authenticator, sink: ReportSink, kept_s: float = KEPT_S) -> None:
        self._authenticator, self._sink, self._kept_s = authenticator, sink, kept_s
        self._latest: dict[str, asyncio.Event] = {}

    async def Report(
        self, request_iterator: AsyncIterator[reports_pb2.NodeReport], context: grpc.aio.ServicerContext
    ) -> reports_pb2.ReportsEnded:
        try:
            caller, expires_s = await self._authenticator.authenticate(context.invocation_metadata() or ())
        except (AuthenticationError, UnavailableError) as error:
            await context.abort(refusal_code(error), str(error))
        if caller.kind is not CallerKind.NODE:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "only a node reports its pods")
        if (before := self._latest.get(caller.node)) is not None:
            before.set()
        superseded = self._latest[caller.node] = asyncio.Event()
        reader = asyncio.create_task(self._read(caller.node, request_iterator), name=f"read reports of {caller}")
        watcher = asyncio.create_task(superseded.wait(), name=f"watch for another stream of {caller}")
        try:
            await asyncio.wait({reader, watcher}, timeout=expires_s, return_when=asyncio.FIRST_COMPLETED)
            if superseded.is_set():
                await context.abort(grpc.StatusCode.ABORTED, "another stream of the node took this one's place")
            if not reader.done():
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token has expired")
            reader.result()
        except MessageError as error:
            self._sink.report(caller.node, NO_REPORT)
            log.warning("report.refused", client=str(caller), reason=str(error))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            asyncio.get_running_loop().call_later(self._kept_s, self._withdraw, caller.node, superseded)
            reader.cancel()
            watcher.cancel()
            await asyncio.gather(reader, watcher, return_exceptions=True)
        return reports_pb2.ReportsEnded()

    async def _read(self, node: str, reports: AsyncIterator[reports_pb2.NodeReport]) -> None:
        async for report in reports:
            self._sink.report(node, report_of(report, f"report of node {node}"))
            await asyncio.sleep(INTERVAL_S)

    def _withdraw(self, node: str, stream: asyncio.Event) -> None:
        if self._latest.get(node) is stream:
            del self._latest[node]
            self._sink.report(node, NO_REPORT)
            log.warning("report.withdrawn", node=node)
