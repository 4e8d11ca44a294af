"""The two listeners of a sidecar: 15006 takes what iptables redirects into the pod, 15001 what it redirects out.

Inbound filter chains are a table over (port, TLS or not, ALPN). Envoy prunes in that order and never goes back: once a
chain names a port, chains without a port no longer apply to it, so every named port gets a complete set. Outbound the
address decides as well, so a matcher names the chain (``destinations.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    DataSource,
    SubstitutionFormatString,
    TrafficDirection,
    TransportSocket,
)
from envoy_data_plane.envoy.config.listener.v3 import (
    AdditionalAddress,
    Filter,
    FilterChain,
    FilterChainMatch,
    Listener,
    ListenerFilter,
    ListenerFilterChainMatchPredicate,
    ListenerFilterChainMatchPredicateMatchSet,
)
from envoy_data_plane.envoy.extensions.filters.common.set_filter_state.v3 import FilterStateValue
from envoy_data_plane.envoy.extensions.filters.listener.http_inspector.v3 import HttpInspector
from envoy_data_plane.envoy.extensions.filters.listener.original_dst.v3 import OriginalDst
from envoy_data_plane.envoy.extensions.filters.listener.tls_inspector.v3 import TlsInspector
from envoy_data_plane.envoy.extensions.filters.network.set_filter_state.v3 import Config as SetFilterState
from envoy_data_plane.envoy.type.v3 import Int32Range
from envoy_data_plane.google.protobuf import Any
from envoy_data_plane.xds.type.matcher.v3 import Matcher

from meshbridge.identity.model import IpFamily
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import MtlsMode
from meshbridge.xds.destinations import (
    CHAIN_BLACKHOLE,
    CHAIN_MTLS,
    CHAIN_MTLS_HTTP,
    CHAIN_PLAINTEXT,
    chain_matcher,
)
from meshbridge.xds.filters import http_filters, tcp_filters, tcp_proxy
from meshbridge.xds.names import (
    ALPN_MESH_HTTP,
    ALPN_MESH_TCP,
    CLUSTER_BLACKHOLE,
    CLUSTER_OUTBOUND_MTLS,
    CLUSTER_OUTBOUND_PLAINTEXT,
    LISTENER_INBOUND,
    LISTENER_OUTBOUND,
)
from meshbridge.xds.sidecar import (
    INBOUND_PORT,
    OUTBOUND_PORT,
    Sidecar,
)
from meshbridge.xds.transport import downstream_tls, socket_address

TLS = "tls"
PLAINTEXT = "raw_buffer"

# What http_inspector reports for requests in the clear, and what a client of HTTP offers in a TLS hello of its own.
_INSPECTED_HTTP = ("http/1.0", "http/1.1", "h2c")
_ALPN_HTTP = ("h2", "http/1.1", "http/1.0")

# How long a client may stay silent before it is taken for one that waits for the server to speak.
INSPECT_INBOUND = timedelta(seconds=5)
INSPECT_OUTBOUND = timedelta(milliseconds=200)


@dataclass(frozen=True, slots=True)
class _Chain:
    """One row of the inbound table; without ``alpn`` whatever is left of its transport."""

    transport: str
    alpn: tuple[str, ...]
    terminates_tls: bool
    http: bool


def inbound_listener(sidecar: Sidecar) -> Listener:
    """Port 15006: what passes here has been judged, and in STRICT mode carries a mesh certificate."""
    ports = sorted((set(sidecar.protocols) | set(sidecar.mtls.ports)) - {INBOUND_PORT})
    chains = [_filter_chain(f"{INBOUND_PORT}_blackhole", [_to_nowhere()], port=INBOUND_PORT)]
    for port in (*ports, None):
        chains.extend(_inbound_chains(sidecar, port))
    declared = [port for port in ports if _protocol(sidecar, port) is not AppProtocol.AUTO]
    never_tls = [port for port in ports if _mode(sidecar, port) is MtlsMode.DISABLE]
    any_v4, any_v6 = "0.0.0.0", "::"
    return _listener(
        LISTENER_INBOUND,
        _addresses(sidecar, any_v4, any_v6, INBOUND_PORT),
        chains,
        [_original_dst(), _tls_inspector(never_tls), _http_inspector(declared)],
        direction=TrafficDirection.INBOUND,
        timeout=INSPECT_INBOUND,
    )


def outbound_listener(sidecar: Sidecar) -> Listener:
    """Port 15001: to addresses with a sidecar go mTLS and the pod's certificate, to others plain bytes."""
    to_mesh = tcp_proxy(CLUSTER_OUTBOUND_MTLS, f"{LISTENER_OUTBOUND}_mtls")
    in_the_clear = tcp_proxy(CLUSTER_OUTBOUND_PLAINTEXT, f"{LISTENER_OUTBOUND}_plaintext")
    listener = _listener(
        LISTENER_OUTBOUND,
        # REDIRECT sends local packets to loopback, so nothing else has to be open.
        _addresses(sidecar, "127.0.0.1", "::1", OUTBOUND_PORT),
        [
            FilterChain(name=CHAIN_BLACKHOLE, filters=[_to_nowhere()]),
            FilterChain(name=CHAIN_MTLS_HTTP, filters=[_offer_alpn(ALPN_MESH_HTTP[1]), to_mesh]),
            FilterChain(name=CHAIN_MTLS, filters=[to_mesh]),
            FilterChain(name=CHAIN_PLAINTEXT, filters=[in_the_clear]),
        ],
        [_original_dst(), _http_inspector(())],
        direction=TrafficDirection.OUTBOUND,
        timeout=INSPECT_OUTBOUND,
    )
    listener.filter_chain_matcher = Matcher.parse(chain_matcher(sidecar.destinations, _INSPECTED_HTTP))
    return listener


def _mode(sidecar: Sidecar, port: int | None) -> MtlsMode:
    return sidecar.mtls.mode if port is None else sidecar.mtls.at(port)[0]


def _protocol(sidecar: Sidecar, port: int | None) -> AppProtocol:
    return AppProtocol.AUTO if port is None else sidecar.protocols.get(port, AppProtocol.AUTO)


def _inbound_chains(sidecar: Sidecar, port: int | None) -> Iterator[FilterChain]:
    protocol = _protocol(sidecar, port)
    client_first = sidecar.restricted and port not in sidecar.server_first_ports
    for row in _rows(_mode(sidecar, port), protocol):
        kind = f"{'http' if row.http else 'tcp'}_{'mtls' if row.terminates_tls else 'plaintext'}"
        stat_prefix = f"{LISTENER_INBOUND}_{kind}"
        if row.http:
            filters = http_filters(
                sidecar.jwt_rules, peer_verified=row.terminates_tls, stat_prefix=stat_prefix,
                paths=sidecar.path_normalization,
            )  # fmt: skip
            tls_alpn: tuple[str, ...] = _ALPN_HTTP[:2]
        else:
            filters = tcp_filters(client_first=client_first, stat_prefix=stat_prefix)
            tls_alpn = ALPN_MESH_TCP[:1]
        opaque = "_tls_opaque" if row.transport == TLS and not row.terminates_tls else ""
        yield _filter_chain(
            f"{port or 'any'}_{kind}{opaque}",
            filters,
            port=port,
            transport=row.transport,
            alpn=row.alpn,
            transport_socket=downstream_tls(sidecar.trust_domains, tls_alpn) if row.terminates_tls else None,
        )


def _rows(mode: MtlsMode, protocol: AppProtocol) -> tuple[_Chain, ...]:
    """Which chains a port has; what matches none of them is closed at once.

    Each transport gets a row for what is left: a chain for any transport is not tried once one names the transport.

    STRICT terminates every TLS and has nothing for plaintext. PERMISSIVE terminates the mesh's own TLS, which it knows
    by ALPN; other TLS belongs to the application and passes without a principal, as plaintext does.
    """
    http_only = protocol is AppProtocol.HTTP
    detect = protocol is AppProtocol.AUTO
    mesh_alpn = ALPN_MESH_TCP + ALPN_MESH_HTTP
    if mode is MtlsMode.STRICT:
        if detect:
            return (
                _Chain(TLS, ALPN_MESH_HTTP + _ALPN_HTTP, terminates_tls=True, http=True),
                _Chain(TLS, (), terminates_tls=True, http=False),
            )
        return (_Chain(TLS, (), terminates_tls=True, http=http_only),)
    found_http = (_Chain(PLAINTEXT, _INSPECTED_HTTP, terminates_tls=False, http=True),) if detect else ()
    plaintext = (
        *found_http,
        _Chain(PLAINTEXT, (), terminates_tls=False, http=http_only),
        _Chain(TLS, (), terminates_tls=False, http=False),
    )
    if mode is MtlsMode.DISABLE:
        return plaintext
    if detect:
        return (
            _Chain(TLS, ALPN_MESH_HTTP, terminates_tls=True, http=True),
            _Chain(TLS, ALPN_MESH_TCP, terminates_tls=True, http=False),
            *plaintext,
        )
    return (_Chain(TLS, mesh_alpn, terminates_tls=True, http=http_only), *plaintext)


def _offer_alpn(protocol: str) -> Filter:
    """Tell the peer's sidecar in the TLS hello that HTTP follows: it cannot look before it has chosen a chain."""
    value = FilterStateValue(
        object_key="envoy.network.application_protocols",
        format_string=SubstitutionFormatString(text_format_source=DataSource(inline_string=protocol)),
    )
    config = SetFilterState(on_new_connection=[value])
    return Filter(name="envoy.filters.network.set_filter_state", typed_config=Any.pack(config))


def _to_nowhere() -> Filter:
    """Whoever dials a listener's own port was not redirected: forwarding would come back here for ever."""
    return tcp_proxy(CLUSTER_BLACKHOLE, CLUSTER_BLACKHOLE)


def _filter_chain(
    name: str,
    filters: list[Filter],
    *,
    port: int | None,
    transport: str = "",
    alpn: tuple[str, ...] = (),
    transport_socket: TransportSocket | None = None,
) -> FilterChain:
    match = FilterChainMatch(transport_protocol=transport, application_protocols=list(alpn))
    if port is not None:
        match.destination_port = port
    return FilterChain(name=name, filter_chain_match=match, filters=filters, transport_socket=transport_socket)


def _listener(
    name: str,
    addresses: list[Address],
    chains: list[FilterChain],
    listener_filters: list[ListenerFilter],
    *,
    direction: TrafficDirection,
    timeout: timedelta,
) -> Listener:
    return Listener(
        name=name,
        stat_prefix=name,
        address=addresses[0],
        additional_addresses=[AdditionalAddress(address=address) for address in addresses[1:]],
        filter_chains=chains,
        listener_filters=listener_filters,
        listener_filters_timeout=timeout,
        # A silent client goes on as "not TLS, not HTTP": closed in STRICT mode, a server-first protocol elsewhere.
        continue_on_listener_filters_timeout=True,
        traffic_direction=direction,
    )


def _addresses(sidecar: Sidecar, v4: str, v6: str, port: int) -> list[Address]:
    """Listen in the families the pod has; a pod without addresses yet gets IPv4."""
    families = {IpFamily.of(address) for address in sidecar.workload.addresses} or {IpFamily.IPV4}
    binds = {IpFamily.IPV4: v4, IpFamily.IPV6: v6}
    return [socket_address(binds[family], port) for family in sorted(families)]


def _original_dst() -> ListenerFilter:
    return ListenerFilter(name="envoy.filters.listener.original_dst", typed_config=Any.pack(OriginalDst()))


def _tls_inspector(except_ports: Iterable[int]) -> ListenerFilter:
    return ListenerFilter(
        name="envoy.filters.listener.tls_inspector",
        typed_config=Any.pack(TlsInspector()),
        filter_disabled=_on_ports(except_ports),
    )


def _http_inspector(except_ports: Iterable[int]) -> ListenerFilter:
    return ListenerFilter(
        name="envoy.filters.listener.http_inspector",
        typed_config=Any.pack(HttpInspector()),
        filter_disabled=_on_ports(except_ports),
    )


def _on_ports(ports: Iterable[int]) -> ListenerFilterChainMatchPredicate | None:
    """An inspector waits for the client's first bytes; where the answer is known it would only delay."""
    rules = [
        ListenerFilterChainMatchPredicate(destination_port_range=Int32Range(start=port, end=port + 1)) for port in ports
    ]
    if len(rules) > 1:
        return ListenerFilterChainMatchPredicate(or_match=ListenerFilterChainMatchPredicateMatchSet(rules=rules))
    return rules[0] if rules else None
