"""Which outbound chain a connection takes: a tree over port, address and what the client speaks.

A matcher, not filter_chain_match, which would repeat every address for every port somebody names. Written with upb: it
holds an entry per address of the mesh and is rebuilt whenever one comes or goes; see docs/adr/0033.

Spec: xds.type.matcher.v3.Matcher and IPMatcher; Envoy, Listener.filter_chain_matcher.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from envoy.extensions.matching.common_inputs.network.v3.network_inputs_pb2 import (
    ApplicationProtocolInput,
    DestinationIPInput,
    DestinationPortInput,
)
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import StringValue
from xds.core.v3.cidr_pb2 import CidrRange
from xds.type.matcher.v3.ip_pb2 import IPMatcher
from xds.type.matcher.v3.matcher_pb2 import Matcher

from meshbridge.xds.sidecar import OUTBOUND_PORT, UNCAPTURED_PORTS, MtlsDestination

CHAIN_BLACKHOLE = "blackhole"
CHAIN_PLAINTEXT = "plaintext"
CHAIN_MTLS = "mtls"
CHAIN_MTLS_HTTP = "mtls_http"


@lru_cache(maxsize=8)
def chain_matcher(destinations: tuple[MtlsDestination, ...], http_protocols: tuple[str, ...]) -> bytes:
    """The serialised Matcher that names a chain for every connection; the same for all sidecars of a mesh.

    An address not among ``destinations`` gets plaintext, as do the sidecar's own ports everywhere.
    """
    by_port = {str(port): _go(CHAIN_PLAINTEXT) for port in sorted(UNCAPTURED_PORTS)}
    by_port[str(OUTBOUND_PORT)] = _go(CHAIN_BLACKHOLE)
    matcher = _exact(DestinationPortInput(), by_port, otherwise=_then(_by_address(destinations, http_protocols)))
    encoded: bytes = matcher.SerializeToString(deterministic=True)
    return encoded


def _by_address(destinations: Sequence[MtlsDestination], http_protocols: Iterable[str]) -> Matcher:
    to_mesh = _then(
        _exact(
            ApplicationProtocolInput(),
            # The input is a list in quotes; http_inspector reports one protocol.
            {f"'{protocol}'": _go(CHAIN_MTLS_HTTP) for protocol in http_protocols},
            otherwise=_go(CHAIN_MTLS),
        )
    )
    groups: dict[tuple[bool, tuple[int, ...]], IPMatcher.IPRangeMatcher] = {}
    addresses = IPMatcher()
    for entry in destinations:
        group = (entry.mtls, tuple(sorted(entry.except_ports)))
        if group not in groups:
            groups[group] = addresses.range_matchers.add(on_match=_by_exception(*group, to_mesh))
        groups[group].ranges.append(_host(entry))
    matcher = Matcher(on_no_match=_go(CHAIN_PLAINTEXT))
    if groups:
        _typed(matcher.matcher_tree.input, DestinationIPInput())
        _typed(matcher.matcher_tree.custom_match, addresses)
    return matcher


def _by_exception(mtls: bool, except_ports: tuple[int, ...], to_mesh: Matcher.OnMatch) -> Matcher.OnMatch:
    plaintext = _go(CHAIN_PLAINTEXT)
    usual, exception = (to_mesh, plaintext) if mtls else (plaintext, to_mesh)
    if not except_ports:
        return usual
    return _then(_exact(DestinationPortInput(), {str(port): exception for port in except_ports}, otherwise=usual))


def _exact(what: Message, cases: dict[str, Matcher.OnMatch], *, otherwise: Matcher.OnMatch) -> Matcher:
    matcher = Matcher(on_no_match=otherwise)
    _typed(matcher.matcher_tree.input, what)
    for value, on_match in cases.items():
        matcher.matcher_tree.exact_match_map.map[value].CopyFrom(on_match)
    return matcher


def _then(matcher: Matcher) -> Matcher.OnMatch:
    return Matcher.OnMatch(matcher=matcher)


def _go(chain: str) -> Matcher.OnMatch:
    on_match = Matcher.OnMatch()
    _typed(on_match.action, StringValue(value=chain))
    return on_match


def _typed(extension: Message, message: Message) -> None:
    """Fill a TypedExtensionConfig; Envoy finds the extension by the type, the name is for people."""
    extension.name = message.DESCRIPTOR.full_name  # type: ignore[attr-defined]
    extension.typed_config.Pack(message)  # type: ignore[attr-defined]


def _host(entry: MtlsDestination) -> CidrRange:
    message = CidrRange(address_prefix=str(entry.address))
    message.prefix_len.value = entry.address.max_prefixlen
    return message
