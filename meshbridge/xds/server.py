"""The delta ADS server: authenticates a stream, then keeps its client at the newest snapshot.

Spec: envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import Counter, Gauge

from meshbridge.errors import SettingsError
from meshbridge.protos.reports_pb2_grpc import add_NodeReportsServicer_to_server
from meshbridge.xds.auth import AuthenticationError, Authenticator, Caller, CallerKind, UnavailableError
from meshbridge.xds.reports import ReportServer, refusal_code
from meshbridge.xds.snapshot import DeltaSession, Nack, ProtocolError, Response, Snapshot

log = structlog.get_logger()

STREAMS = Gauge("meshbridge_xds_streams", "Open delta ADS streams.", ["kind"])
RESPONSES = Counter("meshbridge_xds_responses", "Responses sent.", ["type"])
NACKS = Counter("meshbridge_xds_nacks", "Responses that clients refused.", ["type"])
CERTIFICATE_EXPIRY = Gauge(
    "meshbridge_xds_certificate_expiry_seconds", "When the controller's certificate ends, since the epoch."
)
UNANSWERED = Gauge(
    "meshbridge_xds_streams_unanswered", "Streams whose client has not answered a response for 30 s, by kind.", ["kind"]
)
REFUSED_CALLS = Counter("meshbridge_xds_refused_calls", "Streams refused, by reason.", ["reason"])

SERVICE_NAME = "envoy.service.discovery.v3.AggregatedDiscoveryService"
UNIX = "unix:"
UNANSWERED_S = 30.0
MAX_MESSAGE_BYTES = 16 << 20  # a client with 100,000 addresses names them all when it reconnects
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),  # nodes that are gone are let go
    ("grpc.keepalive_timeout_ms", 60_000),
    ("grpc.http2.ping_timeout_ms", 60_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),  # clients ask every 20 s whether we are there
)
SOCKET_MODE = 0o666  # every call carries a token; Envoys run as other users


Refusals = Mapping[tuple[str, str], str]
"""By type URL and name: why a client does not take it."""


class Feed(Protocol):
    """One stream's view of its client."""

    @property
    def snapshot(self) -> Snapshot | None:
        """None while the client's node or pod is not known: the stream waits."""

    @property
    def refusal(self) -> str:
        """Not empty: the client is gone or may have nothing, and the stream has to end."""

    def refuses(self, refusals: Refusals) -> None:
        """All of its snapshot that the client cannot use, from now on."""

    def close(self) -> None: ...


class SnapshotSource(Protocol):
    def open(self, caller: Caller, wake: Callable[[], None]) -> Feed:
        """A feed for ``caller``; ``wake`` is called in the event loop after every change of it."""


class DeltaServer:
    """Serves every client its own snapshot.

    A client never waits for another, and never holds more than one unread response per type here. What it says it has
    is read once there is something to compare it with: a thousand that come to a controller which has just started
    wait with it in their connections, not in its memory.
    """

    def handler(self) -> grpc.GenericRpcHandler:
        """The service for a gRPC server. Responses come encoded, as most of each is shared by many streams."""
        method = grpc.stream_stream_rpc_method_handler(
            self.DeltaAggregatedResources, request_deserializer=DeltaDiscoveryRequest.FromString
        )
        return grpc.method_handlers_generic_handler(SERVICE_NAME, {"DeltaAggregatedResources": method})

    def __init__(self, authenticator: Authenticator, source: SnapshotSource) -> None:
        self._authenticator, self._source = authenticator, source
        self._streams: set[_Stream] = set()
        for kind in CallerKind:
            UNANSWERED.labels(kind).set_function(partial(self._unanswered, kind))

    def _unanswered(self, kind: CallerKind) -> int:
        return sum(stream.is_unanswered(kind) for stream in list(self._streams))

    def drain(self) -> None:
        """End every stream; clients keep what they have and come back to whoever listens next."""
        for stream in self._streams:
            stream.end(grpc.StatusCode.UNAVAILABLE, "the controller is stopping")

    async def DeltaAggregatedResources(
        self, request_iterator: AsyncIterator[DeltaDiscoveryRequest], context: grpc.aio.ServicerContext
    ) -> None:
        try:
            caller, expires_s = await self._authenticator.authenticate(context.invocation_metadata() or ())
        except (AuthenticationError, UnavailableError) as error:
            code = refusal_code(error)
            REFUSED_CALLS.labels(code.name.lower()).inc()
            log.warning("stream.refused", reason=str(error), peer=context.peer())
            await context.abort(code, str(error))
        expiry: asyncio.TimerHandle | None = None
        stream = _Stream(caller, context)
        stream.feed = feed = self._source.open(caller, stream.wake)
        self._streams.add(stream)
        STREAMS.labels(caller.kind).inc()
        log.info("stream.opened", client=str(caller))
        if caller.kind is CallerKind.NODE:  # an Envoy cannot renew a header of its bootstrap: it ends with its pod
            expiry = asyncio.get_running_loop().call_later(
                expires_s, stream.end, grpc.StatusCode.UNAUTHENTICATED, "the token has expired"
            )
        reader = asyncio.create_task(stream.read(request_iterator), name=f"read {caller}")
        try:
            await stream.write_until_ended(reader)
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            if expiry is not None:
                expiry.cancel()
            feed.close()
            self._streams.discard(stream)
            STREAMS.labels(caller.kind).dec()
            log.info("stream.closed", client=str(caller))


@dataclass(slots=True)
class _End:
    code: grpc.StatusCode
    reason: str


class _Stream:
    feed: Feed

    def __init__(self, caller: Caller, context: grpc.aio.ServicerContext) -> None:
        self._caller, self._context = caller, context
        self._session = DeltaSession()
        self._awake = asyncio.Event()
        self._known = asyncio.Event()
        self._end: _End | None = None
        self._identified = False
        self._refusals: Refusals = {}
        self._unanswered_since: float | None = None

    def wake(self) -> None:
        self._awake.set()
        if self.feed.snapshot is not None:
            self._known.set()

    def is_unanswered(self, kind: CallerKind) -> bool:
        """Whether the client, one of that kind, has left a response without an answer for long."""
        since = self._unanswered_since
        return self._caller.kind is kind and since is not None and time.monotonic() - since > UNANSWERED_S

    def end(self, code: grpc.StatusCode, reason: str) -> None:
        """Have the stream end with that status, as soon as it writes nothing."""
        self._end = _End(code, reason)
        self.wake()

    async def read(self, requests: AsyncIterator[DeltaDiscoveryRequest]) -> None:
        """Take in requests until the client ends the stream or breaks the protocol."""
        try:
            async for request in requests:
                self._check_node(request)
                if self._end is not None:
                    break
                nack = self._session.receive(request)
                self._unanswered_since = time.monotonic() if self._session.is_waiting else None
                if nack is not None:
                    self._report(nack)
                self.wake()
                await self._known.wait()
        except ProtocolError as error:
            self._end = _End(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self.wake()

    async def write_until_ended(self, reader: asyncio.Task[None]) -> None:
        while True:
            self._awake.clear()
            if self.feed.refusal:
                self._end = _End(grpc.StatusCode.PERMISSION_DENIED, self.feed.refusal)
            if self._end is not None:
                if self._end.code is not grpc.StatusCode.UNAVAILABLE:
                    REFUSED_CALLS.labels(self._end.code.name.lower()).inc()
                    log.warning("stream.refused", client=str(self._caller), reason=self._end.reason)
                await self._context.abort(self._end.code, self._end.reason)
            if reader.done():
                return
            response = None
            if self._identified and self.feed.snapshot is not None:
                response = self._session.next_response(self.feed.snapshot)
            if response is None:
                self._tell_refusals()
                await self._awake.wait()
            else:
                await self._write(response)

    def _tell_refusals(self) -> None:
        refusals = self._session.refusals(self.feed.snapshot) if self.feed.snapshot is not None else {}
        if refusals != self._refusals:
            self._refusals = refusals
            self.feed.refuses(refusals)

    async def _write(self, response: Response) -> None:
        RESPONSES.labels(_short(response.type_url)).inc()
        if self._unanswered_since is None:
            self._unanswered_since = time.monotonic()
        await self._context.write(response.content)

    def _check_node(self, request: DeltaDiscoveryRequest) -> None:
        """A client names itself in its first request at the latest; another's name ends the stream."""
        node_id = request.node.id
        if not node_id and self._identified:
            return
        if node_id != self._caller.node_id:
            self._end = _End(
                grpc.StatusCode.PERMISSION_DENIED,
                f"node.id {node_id[:200]!r} is not the token's; use {self._caller.node_id!r}",
            )
        self._identified = True

    def _report(self, nack: Nack) -> None:
        NACKS.labels(_short(nack.type_url)).inc()
        log.warning(
            "resources.refused",
            client=str(self._caller),
            type=_short(nack.type_url),
            names=list(nack.names[:10]),
            count=len(nack.names),
            reason=nack.message,
        )


class ServerCertificate:
    """What a server on TCP presents: a chain and its key, PEM. ``repr`` shows no key."""

    def __init__(self, chain: bytes, key: bytes, where: str) -> None:
        """
        Raises:
            SettingsError: see ``use``.
        """
        self._pair = b"", b""
        self._news: grpc.ServerCertificateConfiguration | None = None
        self.use(chain, key, where)

    def use(self, chain: bytes, key: bytes, where: str) -> None:
        """Present this from the next connection on.

        Raises:
            SettingsError: it is no certificate with its key; what was presented before still is.
        """
        try:
            certificate = x509.load_pem_x509_certificate(chain)
            fits = load_pem_private_key(key, password=None).public_key() == certificate.public_key()
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            what = f"cannot be used: {type(error).__name__}"
            raise SettingsError(what, where=where, fix="give a PEM chain and its own key") from None
        if not fits:
            raise SettingsError("the key is another certificate's", where=where, fix="give a PEM chain and its own key")
        CERTIFICATE_EXPIRY.set(certificate.not_valid_after_utc.timestamp())
        if (key, chain) != self._pair:
            self._pair = key, chain
            self._news = grpc.ssl_server_certificate_configuration([self._pair])

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for one server, which present what ``use`` was given last."""
        self._news = None
        return grpc.dynamic_ssl_server_credentials(
            grpc.ssl_server_certificate_configuration([self._pair]), self._take_news
        )

    def _take_news(self) -> grpc.ServerCertificateConfiguration | None:
        """What to present from now on, once; None: as before.

        gRPC asks at each handshake, and puts away what another of its threads may be about to use: were it answered
        every time, the process would crash when some hundred agents connect at once.
        """
        news, self._news = self._news, None
        return news


async def start_server(
    servicer: DeltaServer,
    listen: str,
    certificate: ServerCertificate | None = None,
    reports: ReportServer | None = None,
) -> grpc.aio.Server:
    """Serve ADS, what nodes report, and gRPC health on ``unix:PATH``, or on ``HOST:PORT`` with TLS.

    Raises:
        SettingsError: TCP without TLS, an address that cannot be used, or a socket another process answers on.
    """
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((servicer.handler(),))
    if reports is not None:
        add_NodeReportsServicer_to_server(reports, server)  # type: ignore[no-untyped-call]  # generated
    health_servicer = health.aio.HealthServicer()
    await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    path = Path(listen.removeprefix(UNIX)) if listen.startswith(UNIX) else None
    try:
        if path is not None:
            _make_room(path)
            server.add_insecure_port(f"{UNIX}{path}")
        elif certificate is not None:
            server.add_secure_port(listen, certificate.credentials())
        else:
            raise SettingsError(
                "TCP without TLS", where=f"--listen {listen}", fix="use unix:PATH, or give certificate and key"
            )
        await server.start()
        if path is not None:
            path.chmod(SOCKET_MODE)
    except (OSError, RuntimeError) as error:
        raise SettingsError(
            f"cannot listen: {error}", where=f"--listen {listen}", fix="choose another address"
        ) from error
    return server


def _make_room(path: Path) -> None:
    """Leave no file at ``path``, unless somebody listens there."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    where = f"--listen {UNIX}{path}"
    if not stat.S_ISSOCK(mode):
        raise SettingsError("a file that is no socket is there", where=where, fix="remove it or choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            path.unlink(missing_ok=True)
        else:
            raise SettingsError("another process listens there", where=where, fix="stop it or choose another path")


def _short(type_url: str) -> str:
    return type_url.rpartition(".")[2]
