"""CheckRequest → what we know of the request. Any field may be missing, odd or hostile; what cannot be read denies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Any, Final

from envoy.config.core.v3.address_pb2 import Address
from envoy.service.auth.v3.attribute_context_pb2 import AttributeContext
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct, Value

from meshbridge.errors import MeshBridgeError
from meshbridge.identity.model import IpAddress

JWT_METADATA_NAMESPACE: Final = "envoy.filters.http.jwt_authn"
JWT_PAYLOAD_KEY: Final = "payload"
OWNS_TOKENS: Final = "meshbridge.tokens"
OWNED: Final = "authz"

MAX_CHECK_BYTES: Final = 1 << 20
MAX_HEADERS: Final = 1_000
MAX_CLAIM_DEPTH: Final = 16
MAX_CLAIMS: Final = 10_000


class UnusableCheckError(MeshBridgeError):
    """A CheckRequest that does not say who asks whom; it is denied."""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """``path`` is as Envoy forwards it, with its query. Header names are lower case.

    ``repeated`` are the values of headers that came more than once, if the Envoy tells them apart; ``headers`` has them
    joined by commas.
    """

    method: str
    path: str
    host: str
    headers: Mapping[str, str] = field(hash=False)
    request_id: str = ""
    repeated: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Check:
    """One question of an Envoy.

    ``principal`` is the verified certificate's first name, "" on plaintext. ``claims`` are those of a token that
    jwt_authn has verified, None when it has told nothing. ``http`` is None on a TCP filter chain. ``owns_tokens``: no
    jwt_authn stands behind us, so what it would do to the request's headers is ours to do.
    """

    source: IpAddress
    destination: IpAddress
    destination_port: int
    principal: str = ""
    sni: str = ""
    http: HttpRequest | None = None
    claims: Mapping[str, Any] | None = field(default=None, hash=False)
    owns_tokens: bool = False


def decode_check(data: bytes) -> Check:
    """Read one serialised CheckRequest.

    Raises:
        UnusableCheckError: too large, cut short, or without the addresses of both ends.
    """
    if len(data) > MAX_CHECK_BYTES:
        raise UnusableCheckError(f"the CheckRequest has {len(data)} bytes", fix=f"at most {MAX_CHECK_BYTES} are read")
    try:
        return _read(CheckRequest.FromString(data).attributes)
    except DecodeError as error:
        raise UnusableCheckError("the CheckRequest cannot be decoded") from error


def forwarded_for(header: str) -> IpAddress | None:
    """The address Istio's sidecars take for the client's: the last of x-forwarded-for, None when it is none."""
    if not header:
        return None
    try:
        return _parse(header.rpartition(",")[2].strip())
    except ValueError:
        return None


def _read(attributes: AttributeContext) -> Check:
    source, _ = _end(attributes.source.address, "source")
    destination, port = _end(attributes.destination.address, "destination")
    return Check(
        source=source,
        destination=destination,
        destination_port=port,
        principal=attributes.source.principal,
        sni=attributes.tls_session.sni,
        http=_http(attributes.request.http) if attributes.request.HasField("http") else None,
        claims=_claims(attributes.metadata_context.filter_metadata),
        owns_tokens=attributes.context_extensions.get(OWNS_TOKENS, "") == OWNED,
    )


def _end(address: Address, which: str) -> tuple[IpAddress, int]:
    kind = address.WhichOneof("address")
    if kind != "socket_address":
        raise UnusableCheckError(f"the {which} address is {kind or 'missing'}, not an IP address and a port")
    socket = address.socket_address
    if socket.WhichOneof("port_specifier") == "named_port" or not 0 <= socket.port_value <= 65535:
        raise UnusableCheckError(f"the {which} port is not a port number")
    try:
        return _parse(socket.address), socket.port_value
    except ValueError as error:
        raise UnusableCheckError(f"the {which} address {socket.address[:64]!r} is not an IP address") from error


@lru_cache(maxsize=8192)
def _parse(text: str) -> IpAddress:
    """One form for one address: IPv4 where it is v4-mapped, and without the zone of a link-local one."""
    address = ip_address(text)
    if not isinstance(address, IPv6Address):
        return address
    return address.ipv4_mapped or IPv6Address(int(address))


def _http(http: AttributeContext.HttpRequest) -> HttpRequest:
    count = len(http.headers) + len(http.header_map.headers)
    if count > MAX_HEADERS:
        raise UnusableCheckError(f"the request has {count} headers")
    headers = {name.lower(): value for name, value in http.headers.items()}
    lines: dict[str, list[str]] = {}
    for line in http.header_map.headers:
        value = line.raw_value.decode("utf-8", "replace") if line.raw_value else line.value
        lines.setdefault(line.key.lower(), []).append(value)
    return HttpRequest(
        method=http.method,
        path=http.path,
        host=http.host,
        headers=headers | {name: ",".join(values) for name, values in lines.items()},
        request_id=http.id,
        repeated={name: tuple(values) for name, values in lines.items() if len(values) > 1},
    )


def _claims(filter_metadata: Mapping[str, Struct]) -> Mapping[str, Any] | None:
    if JWT_METADATA_NAMESPACE not in filter_metadata:
        return None
    payload = filter_metadata[JWT_METADATA_NAMESPACE].fields.get(JWT_PAYLOAD_KEY)
    if payload is None or payload.WhichOneof("kind") != "struct_value":
        return None
    return _Claims().read(payload.struct_value)


@dataclass(slots=True)
class _Claims:
    """Copies a payload into plain values, within bounds."""

    left: int = MAX_CLAIMS

    def read(self, struct: Struct, depth: int = 0) -> dict[str, Any]:
        return {name: self._value(value, depth + 1) for name, value in struct.fields.items()}

    def _value(self, value: Value, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > MAX_CLAIM_DEPTH:
            raise UnusableCheckError("the token's claims are too many or nested too deep")
        match value.WhichOneof("kind"):
            case "string_value":
                return value.string_value
            case "number_value":
                return value.number_value
            case "bool_value":
                return value.bool_value
            case "struct_value":
                return self.read(value.struct_value, depth)
            case "list_value":
                return [self._value(item, depth + 1) for item in value.list_value.values]
        return None
