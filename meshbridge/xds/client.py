"""The delta ADS client of agents and authz servers: whole revisions, whatever the connection does.

It keeps names and versions, never the messages: whoever takes an update turns it into its own model.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import structlog
from envoy.config.core.v3.base_pb2 import Node
from envoy.service.discovery.v3 import ads_pb2_grpc
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from google.protobuf.message import DecodeError, Message
from google.rpc.status_pb2 import Status

from meshbridge.errors import MeshBridgeError, SettingsError
from meshbridge.protos import reports_pb2_grpc
from meshbridge.protos.agent_pb2 import Address, Endpoint, Mesh, Policy, Problem, Revision, Service
from meshbridge.protos.reports_pb2 import NodeReport as ReportMessage
from meshbridge.xds import types as xds
from meshbridge.xds.bearer import bearer
from meshbridge.xds.nodereport import NodeReport, report_message

log = structlog.get_logger()

MESSAGES: Final[Mapping[str, type[Message]]] = {
    xds.POLICY: Policy,
    xds.ADDRESS: Address,
    xds.SERVICE: Service,
    xds.MESH: Mesh,
    xds.ENDPOINT: Endpoint,
    xds.PROBLEM: Problem,
    xds.REVISION: Revision,
}
"""What a node subscribes to, in the order the subscriptions are sent: the revision last."""

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
REPORT_RETRY_S = 2.0
MAX_REPLICAS: Final = 16
MAX_CA_BYTES: Final = 1 << 20
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A controller whose machine is gone says so to nobody, and a node that only listens would believe in it for ever.
    ("grpc.keepalive_time_ms", 20_000),
    # A minute: of a thousand agents that come at once many wait longer than ten seconds, and must not begin anew.
    ("grpc.keepalive_timeout_ms", 60_000),
    ("grpc.http2.ping_timeout_ms", 60_000),
    ("grpc.http2.max_pings_without_data", 0),
)


def read_ca(path: Path) -> bytes:
    """The certificates in a file, for ``ControllerClient``.

    Raises:
        SettingsError: it cannot be read, or holds none.
    """
    try:
        with path.open("rb") as file:
            found = file.read(MAX_CA_BYTES)
    except OSError as error:
        raise SettingsError(
            f"cannot be read: {error.strerror}", where=f"--controller-ca {path}", fix="name a PEM file"
        ) from error
    if b"-----BEGIN CERTIFICATE-----" not in found:
        raise SettingsError("holds no certificate", where=f"--controller-ca {path}", fix="name a PEM file")
    return found


@dataclass(frozen=True, slots=True)
class Update:
    """All that changed from the last update to ``revision``; taken together it is a whole state, never half of one.

    Whoever takes it may empty ``changed`` as it goes.
    """

    revision: int
    changed: Mapping[str, dict[str, Message]]
    removed: Mapping[str, frozenset[str]]


@dataclass(slots=True)
class _Changes:
    changed: dict[str, dict[str, Message]] = field(default_factory=lambda: {type_url: {} for type_url in MESSAGES})
    removed: dict[str, set[str]] = field(default_factory=lambda: {type_url: set() for type_url in MESSAGES})

    def put(self, type_url: str, name: str, message: Message) -> None:
        self.removed[type_url].discard(name)
        self.changed[type_url][name] = message

    def drop(self, type_url: str, name: str) -> None:
        self.changed[type_url].pop(name, None)
        self.removed[type_url].add(name)

    def merge(self, later: _Changes) -> None:
        for type_url in MESSAGES:
            for name, message in later.changed[type_url].items():
                self.put(type_url, name, message)
            for name in later.removed[type_url]:
                self.drop(type_url, name)


class ControllerClient:
    """Follows the controller's view of one node.

    ``updates`` yields as long as the task runs: while the controller is away nothing changes, afterwards only what
    differs is sent again. Revisions that came in while the consumer was busy arrive as one update. A revision with a
    resource that cannot be decoded is refused to the controller and withheld until every resource can: acting without
    it could loosen what it says.
    """

    def __init__(
        self, target: str, node: str, token: Callable[[], str], ca: Path | None = None, server_name: str = ""
    ) -> None:
        """
        Args:
            target: ``unix:PATH`` of the controller, or ``HOST:PORT``.
            node: name of the node, as in its token.
            token: read before every connection, so that a renewed token is used.
            ca: PEM file of whoever may have signed the controller's certificate; read before every connection, so it
                may come later and change.
            server_name: What that certificate has to be for; ``HOST`` where nothing is given.

        Raises:
            SettingsError: TCP without a CA: whoever answered there would be believed, and be given the token.
        """
        if ca is None and not target.startswith("unix:"):
            raise SettingsError(
                "TCP without a CA", where=f"--controller {target}", fix="use unix:PATH, or give --controller-ca"
            )
        self._target, self._node, self._token, self._ca, self._server_name = target, node, token, ca, server_name
        self._channel: grpc.aio.Channel | None = None
        self._trusted = b""
        self._versions: dict[str, dict[str, str]] = {type_url: {} for type_url in MESSAGES}
        self._undecodable: set[tuple[str, str]] = set()
        self._partial, self._whole = _Changes(), _Changes()
        self._ready = asyncio.Event()
        self._report: ReportMessage | None = None
        self._replicas: tuple[str, ...] = ()
        self._changed = asyncio.Event()
        self.connected = False
        self.revision_received = 0

    def report(self, report: NodeReport) -> None:
        """Tell the controller this of the node's own pods, now and whenever it is connected anew."""
        message = report_message(report)
        if message != self._report:
            self._report = message
            self._tell_reporters()

    def _tell_reporters(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def updates(self) -> AsyncIterator[Update]:
        """Yield every state to act on, newest first in time: what was skipped is contained in what follows."""
        follower = asyncio.create_task(self._follow(), name="follow-controller")
        follower.add_done_callback(lambda _: self._ready.set())
        try:
            while True:
                await self._ready.wait()
                if follower.done():
                    follower.result()
                self._ready.clear()
                yield self._take_whole()  # and no longer held here: a first update is megabytes
        finally:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)

    def _take_whole(self) -> Update:
        taken, self._whole = self._whole, _Changes()
        return Update(
            revision=self.revision_received,
            changed=taken.changed,
            removed={type_url: frozenset(names) for type_url, names in taken.removed.items()},
        )

    async def _follow(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        quiet = False
        reporter = asyncio.create_task(self._report_to_replicas(), name="report-to-replicas")
        try:
            while True:
                try:
                    await self._run_stream(await self._current_channel())
                    reason = "the controller ended the stream"
                except grpc.aio.AioRpcError as error:
                    reason = f"{error.code().name}: {error.details()}"
                except (OSError, MeshBridgeError, asyncio.InvalidStateError) as error:
                    # no token or CA to be had, or the stream ended while it was written to
                    reason = str(error)
                if self.connected:
                    backoff_s, quiet = BACKOFF_FIRST_S, False
                if not quiet:
                    log.warning("controller.disconnected", target=self._target, reason=reason)
                self.connected, quiet = False, True
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1))
                backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)
        finally:
            reporter.cancel()
            await asyncio.gather(reporter, return_exceptions=True)
            await self._drop_channel()

    async def _current_channel(self) -> grpc.aio.Channel:
        """The channel that believes the CA's file as it is now."""
        trusted = read_ca(self._ca) if self._ca is not None else b""
        if self._channel is not None and trusted != self._trusted:
            await self._drop_channel()
        if self._channel is None:
            self._channel, self._trusted = self._new_channel(self._target, trusted), trusted
        return self._channel

    def _new_channel(self, target: str, trusted: bytes) -> grpc.aio.Channel:
        if not trusted:
            return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        named = (("grpc.ssl_target_name_override", self._server_name),) if self._server_name else ()
        credentials = grpc.ssl_channel_credentials(trusted)
        return grpc.aio.secure_channel(target, credentials, options=(*CHANNEL_OPTIONS, *named))

    async def _drop_channel(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def _run_stream(self, channel: grpc.aio.Channel) -> None:
        """Subscribe, take each response in, and answer it with an ACK or a NACK, until the stream ends."""
        stub = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel)
        call = stub.DeltaAggregatedResources(metadata=bearer(self._token()))
        self._undecodable.clear()  # what still exists is sent again, as it is not among the versions
        reporter = asyncio.create_task(self._report_here(channel), name="report")
        try:
            for type_url, versions in self._versions.items():
                await call.write(
                    DeltaDiscoveryRequest(
                        node=Node(id=self._node), type_url=type_url, initial_resource_versions=versions
                    )
                )
            async for response in call:
                if not self.connected:
                    self.connected = True
                    log.info("controller.connected", target=self._target)
                answer = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
                refusal = self._take(response)
                if refusal:
                    answer.error_detail.CopyFrom(
                        Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message=refusal)
                    )
                await call.write(answer)
        finally:
            call.cancel()
            reporter.cancel()
            await asyncio.gather(reporter, return_exceptions=True)

    async def _report_here(self, channel: grpc.aio.Channel) -> None:
        """Have the controller of the stream know the newest report, as long as it names no controllers."""
        while True:
            while self._replicas:
                await self._changed.wait()
            reporting = asyncio.create_task(self._keep_reporting(self._target, channel), name="report")
            try:
                while not self._replicas:
                    await self._changed.wait()
            finally:
                reporting.cancel()
                await asyncio.gather(reporting, return_exceptions=True)

    async def _report_to_replicas(self) -> None:
        """Have every controller that is named know the newest report: any of them may lead."""
        reporting: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                wanted = self._replicas if self._report is not None else ()
                for target in reporting.keys() - set(wanted):
                    reporting.pop(target).cancel()
                for target in set(wanted) - reporting.keys():
                    reporting[target] = asyncio.create_task(self._keep_reporting(target), name=f"report to {target}")
                await self._changed.wait()
        finally:
            for task in reporting.values():
                task.cancel()
            await asyncio.gather(*reporting.values(), return_exceptions=True)

    async def _keep_reporting(self, target: str, channel: grpc.aio.Channel | None = None) -> None:
        """Have a controller know the newest report for as long as the task runs.

        Args:
            channel: to it; None: one of its own, made anew after every failure.
        """
        told = ""
        while True:
            while self._report is None:
                await self._changed.wait()  # who has nothing to report must not take the place of who has
            reason = ""
            try:
                if channel is not None:
                    await self._report_once(channel)
                else:
                    trusted = read_ca(self._ca) if self._ca is not None else b""
                    async with self._new_channel(target, trusted) as own:
                        await self._report_once(own)
            except grpc.aio.AioRpcError as error:
                reason = str(error.details())
            except (OSError, MeshBridgeError) as error:
                reason = str(error)
            if reason and reason != told:
                log.warning("report.ended", target=target, reason=reason)
            told = reason
            await asyncio.sleep(REPORT_RETRY_S)

    async def _report_once(self, channel: grpc.aio.Channel) -> None:
        stub = reports_pb2_grpc.NodeReportsStub(channel)  # type: ignore[no-untyped-call]  # generated
        await stub.Report(self._reports(), metadata=bearer(self._token()))

    async def _reports(self) -> AsyncIterator[ReportMessage]:
        told: ReportMessage | None = None
        while True:
            changed = self._changed
            if self._report is not None and self._report is not told:
                told = self._report
                yield told
            else:
                await changed.wait()

    def _take(self, response: DeltaDiscoveryResponse) -> str:
        """Take in all of a response, or nothing; returns why nothing, else ""."""
        type_url = response.type_url
        if type_url not in MESSAGES:
            return f"type {type_url[:200]!r} was not subscribed to"
        messages: dict[str, Message] = {}
        for resource in response.resources:
            try:
                if resource.resource.type_url != type_url:
                    raise DecodeError(f"unexpected type {resource.resource.type_url[:200]!r}")
                messages[resource.name] = MESSAGES[type_url].FromString(resource.resource.value)
            except DecodeError as error:
                self._undecodable.add((type_url, resource.name))
                log.error("resource.refused", type=type_url, name=resource.name, reason=str(error))
                return f"{resource.name}: {error}"
        for resource in response.resources:
            self._versions[type_url][resource.name] = resource.version
            self._undecodable.discard((type_url, resource.name))
            self._partial.put(type_url, resource.name, messages[resource.name])
        for name in response.removed_resources:
            self._versions[type_url].pop(name, None)
            self._undecodable.discard((type_url, name))
            self._partial.drop(type_url, name)
        if type_url == xds.REVISION and messages:
            self._finish_revision()
        return ""

    def _finish_revision(self) -> None:
        numbers = [
            message.number for message in self._partial.changed[xds.REVISION].values() if isinstance(message, Revision)
        ]
        if self._undecodable:
            log.error("revision.withheld", revision=max(numbers, default=0), resources=len(self._undecodable))
            return
        self.revision_received = max(numbers, default=self.revision_received)
        revisions = self._partial.changed[xds.REVISION].values()
        named = tuple(name for m in revisions if isinstance(m, Revision) for name in m.controllers)
        if named != self._replicas:
            self._replicas = named[:MAX_REPLICAS]
            self._tell_reporters()
        self._whole.merge(self._partial)
        self._partial = _Changes()
        self._ready.set()
