"""Key sets that policies name by address: fetched in the background, refreshed, and kept while their server is away.

Only what a policy names is ever asked for. Requests never wait: until the first fetch there are no keys, so tokens are
refused.

Spec: Istio, RequestAuthentication ``jwksUri``; istio, pilot/pkg/model/jwks_resolver.go (refresh, eviction, addresses
that are refused).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import (
    BaseHandler,
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
)

import structlog

from meshbridge.authz import metrics
from meshbridge.authz.response import header_value
from meshbridge.errors import MeshBridgeError
from meshbridge.policy.mesh import KeySource

log = structlog.get_logger()

REFRESH_S: Final = 300.0
"""As Envoy's default for keys it fetches itself."""

RETRY_S: Final = 2.0
MAX_RETRY_S: Final = 60.0
MISS_S: Final = 10.0
"""A token of an unknown key asks for a refresh, as keys may have been rotated; not more often than this."""

KEEP_S: Final = 7 * 24 * 3600.0
"""Keys nobody could refresh for so long are no longer believed; as istiod does."""

MAX_BYTES: Final = 256 * 1024
MAX_REDIRECTS: Final = 3
MAX_SOURCES: Final = 1000
_CHUNK: Final = 16 * 1024
_NAT64: Final = IPv6Network("64:ff9b::/96")
_METADATA: Final = tuple(ip_network(text) for text in ("fd00:ec2::254/128", "100.100.100.200/32", "192.0.0.192/32"))


class KeySetError(MeshBridgeError):
    """A key set that cannot be fetched; ``what`` says why, and names no secret of the address."""


Fetch = Callable[[KeySource], str]


@dataclass(slots=True)
class _Held:
    """``text`` is the last good key set, "" before there was one. Times are of the clock that never goes back."""

    text: str = ""
    fetched_s: float = 0.0
    due_s: float = 0.0
    tried_s: float = float("-inf")
    failures: int = 0
    problem: str = "it has not been fetched yet"


@dataclass(slots=True)
class KeySets:
    """What is known of each key set. Threads may share it; one of its own fetches.

    ``wanted`` says which are named by policies now; others are forgotten.
    """

    wanted: Callable[[], Iterable[KeySource]]
    fetch: Fetch = field(default=lambda source: fetch_key_set(source))
    clock: Callable[[], float] = time.monotonic
    _held: dict[KeySource, _Held] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _stopped: bool = False
    _thread: threading.Thread | None = None

    def text(self, source: KeySource) -> str:
        """The last good key set; "" where there is none."""
        held = self._held.get(source)
        return held.text if held is not None else ""

    def problem(self, source: KeySource) -> str:
        """Why there is no key set, as a clause."""
        held = self._held.get(source)
        return held.problem if held is not None else _Held().problem

    def missed(self, source: KeySource) -> None:
        """A token names a key that the set does not have: look again soon, but not for every such token."""
        with self._changed:
            held = self._held.get(source)
            if held is not None and held.text and self.clock() - held.tried_s >= MISS_S:
                held.due_s = self.clock()
                self._changed.notify_all()

    def refresh(self) -> float:
        """Fetch what is due; how many seconds until something is again."""
        self._reconcile()
        for source, held in list(self._held.items()):
            if held.due_s <= self.clock():
                self._fetch(source, held)
        return max(0.0, min((held.due_s - self.clock() for held in self._held.values()), default=REFRESH_S))

    def start(self) -> None:
        """Refresh in the background until ``stop``."""
        self._thread = threading.Thread(target=self._run, name="key-sets", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the background work; a fetch under way is not waited for."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def wake(self) -> None:
        """Look now at what policies name."""
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._stopped:
            try:
                pause_s = self.refresh()
            except Exception:
                log.exception("keys.failed")
                pause_s = MAX_RETRY_S
            with self._changed:
                if not self._stopped:
                    self._changed.wait(min(pause_s, REFRESH_S) + 0.01)

    def _reconcile(self) -> None:
        wanted = dict.fromkeys(self.wanted())
        with self._changed:
            for source in [source for source in self._held if source not in wanted]:
                del self._held[source]
            for source in wanted:
                if source not in self._held and len(self._held) < MAX_SOURCES:
                    self._held[source] = _Held(due_s=self.clock())

    def _fetch(self, source: KeySource, held: _Held) -> None:
        held.tried_s = self.clock()
        try:
            text = self.fetch(source)
        except KeySetError as error:
            metrics.KEY_SETS.labels("failed").inc()
            held.failures += 1
            held.problem = error.what
            held.due_s = self.clock() + min(RETRY_S * 2 ** min(held.failures - 1, 8), MAX_RETRY_S)
            if held.text and self.clock() - held.fetched_s >= KEEP_S:
                held.text = ""
            log.warning(
                "keys.not_fetched", server=_server(source.uri), error=error.what, keeps_last=bool(held.text),
                failures=held.failures,
            )  # fmt: skip
            return
        metrics.KEY_SETS.labels("fetched").inc()
        if text != held.text:
            log.info("keys.changed", server=_server(source.uri))
        held.text, held.fetched_s, held.failures, held.problem = text, self.clock(), 0, ""
        held.due_s = self.clock() + REFRESH_S


def fetch_key_set(source: KeySource) -> str:
    """The key set at an address, or at the one that the issuer's discovery document names.

    Raises:
        KeySetError: it cannot be had within the source's time, is too large, or is no key set.
    """
    deadline_s = time.monotonic() + source.timeout_s
    if not source.discovers:
        return _key_set(_get(source.uri, deadline_s))
    found = _object(_get(source.uri, deadline_s)).get("jwks_uri")
    if not isinstance(found, str) or not found.startswith("https://" if source.uri.startswith("https://") else "http"):
        raise KeySetError("the issuer's discovery document names no usable jwks_uri")
    return _key_set(_get(found, deadline_s))


def _key_set(text: str) -> str:
    keys = _object(text).get("keys")
    if not isinstance(keys, list) or not keys:
        raise KeySetError("what is there is no key set")
    return text


def _object(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise KeySetError("what is there is no JSON") from None
    if not isinstance(found, dict):
        raise KeySetError("what is there is no JSON object")
    return found


def _get(uri: str, deadline_s: float) -> str:
    if urlsplit(uri).scheme not in ("http", "https"):
        raise KeySetError("its address is neither http nor https")
    parts: list[bytes] = []
    size = 0
    connections = _Connections(deadline_s)
    end = threading.Timer(_left(deadline_s), connections.shut)
    end.daemon = True
    end.start()
    try:
        request = Request(uri, headers={"accept": "application/json", "user-agent": "meshbridge"})
        with _opener(connections).open(request, timeout=_left(deadline_s)) as response:
            while chunk := response.read1(_CHUNK):
                size += len(chunk)
                if size > MAX_BYTES:
                    raise KeySetError(f"it is larger than {MAX_BYTES} bytes")
                parts.append(chunk)
        _left(deadline_s)
        return b"".join(parts).decode()
    except UnicodeDecodeError:
        raise KeySetError("what is there is no text") from None
    except URLError as error:
        raise KeySetError(f"its server does not give it: {header_value(str(error.reason))}") from None
    except (OSError, HTTPException, ValueError) as error:
        _left(deadline_s)
        raise KeySetError(f"its server does not give it: {type(error).__name__}") from None
    finally:
        end.cancel()
        connections.close()


def _left(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise KeySetError("it takes too long")
    return left_s


class _Connections:
    """The connections of one fetch. A socket's timeout is one of every read, so at the end of the time they are shut:
    a server that sends a byte now and then would hold us for ever."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._made: list[socket.socket] = []

    def make(self, address: tuple[str, int], *_: object) -> socket.socket:
        """A connection to the first of a name's addresses that may be one of a key server."""
        failure: OSError = OSError("the name has no address")
        for family, kind, protocol, _name, resolved in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            if _is_forbidden(str(resolved[0])):
                failure = OSError("its address is link-local or a cloud's metadata service")
                continue
            made = socket.socket(family, kind, protocol)
            try:
                made.settimeout(_left(self._deadline_s))
                made.connect(resolved)
            except OSError as error:
                made.close()
                failure = error
            else:
                self._made.append(made.dup())  # TLS takes the socket itself away
                _left(self._deadline_s)  # else shut() may have come too early for it
                return made
        raise failure

    def shut(self) -> None:
        """Have whoever reads or writes find an end."""
        for made in self._made:
            with contextlib.suppress(OSError):
                made.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for made in self._made:
            made.close()


def _opener(connections: _Connections) -> OpenerDirector:
    """HTTP and HTTPS only, a few redirects, no proxy of the environment, and no address that is never a key server."""
    opener = OpenerDirector()
    handlers: list[BaseHandler] = [
        _Http(connections), _Https(connections), _Redirects(), HTTPErrorProcessor(), HTTPDefaultErrorHandler(),
    ]  # fmt: skip
    for handler in handlers:
        opener.add_handler(handler)
    return opener


class _Redirects(HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if req.full_url.startswith("https://") and not newurl.startswith("https://"):
            raise URLError("it redirects to a server without TLS")
        fp.close()  # the library would read all of it
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_forbidden(text: str) -> bool:
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    elif address in _NAT64:
        address = IPv4Address(int(address) & 0xFFFFFFFF)
    return address.is_link_local or address.is_multicast or any(address in network for network in _METADATA)


class _HttpConnection(HTTPConnection):
    def __init__(self, connections: _Connections, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._create_connection = connections.make


class _HttpsConnection(HTTPSConnection):
    def __init__(self, connections: _Connections, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._create_connection = connections.make


class _Http(HTTPHandler):
    def __init__(self, connections: _Connections) -> None:
        super().__init__()
        self._connections = connections

    def http_open(self, req: Request) -> Any:
        return self.do_open(partial(_HttpConnection, self._connections), req)


class _Https(HTTPSHandler):
    def __init__(self, connections: _Connections) -> None:
        super().__init__()
        self._connections = connections

    def https_open(self, req: Request) -> Any:
        return self.do_open(partial(_HttpsConnection, self._connections), req)


def _server(uri: str) -> str:
    """Where an address points, without what may be secret in it."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
