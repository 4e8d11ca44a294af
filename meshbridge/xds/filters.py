"""The filters that judge inbound traffic: jwt_authn and ext_authz on HTTP, ext_authz on TCP."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from envoy_data_plane.envoy.config.accesslog.v3 import (
    AccessLogFilter,
    AndFilter,
    ComparisonFilter,
    ComparisonFilterOp,
    ResponseFlagFilter,
    StatusCodeFilter,
)
from envoy_data_plane.envoy.config.core.v3 import (
    ApiVersion,
    DataSource,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
    RuntimeUInt32,
)
from envoy_data_plane.envoy.config.listener.v3 import Filter
from envoy_data_plane.envoy.config.route.v3 import (
    Route,
    RouteAction,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)
from envoy_data_plane.envoy.extensions.filters.http.ext_authz.v3 import CheckSettings, ExtAuthzPerRoute
from envoy_data_plane.envoy.extensions.filters.http.ext_authz.v3 import ExtAuthz as HttpExtAuthz
from envoy_data_plane.envoy.extensions.filters.http.jwt_authn.v3 import (
    JwtAuthentication,
    JwtClaimToHeader,
    JwtHeader,
    JwtProvider,
    JwtProviderNormalizePayload,
    JwtRequirement,
    JwtRequirementAndList,
    JwtRequirementOrList,
    RequirementRule,
)
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.network.ext_authz.v3 import ExtAuthz as TcpExtAuthz
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    HttpConnectionManager,
    HttpConnectionManagerForwardClientCertDetails,
    HttpConnectionManagerPathWithEscapedSlashesAction,
    HttpConnectionManagerSetCurrentClientCertDetails,
    HttpConnectionManagerUpgradeConfig,
    HttpFilter,
    LocalReplyConfig,
    ResponseMapper,
)
from envoy_data_plane.envoy.extensions.filters.network.tcp_proxy.v3 import TcpProxy, UpstreamConnectMode
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from envoy_data_plane.google.protobuf import Any, Empty

from meshbridge.policy.mesh import DEFAULT_MESH, JwtRule, PathNormalization
from meshbridge.xds.jwks import usable_jwks
from meshbridge.xds.names import (
    CLUSTER_AUTHZ,
    CLUSTER_INBOUND,
    JWT_METADATA_NAMESPACE,
    JWT_PAYLOAD_KEY,
    OWNED,
    OWNS_TOKENS,
)

# A hung judge must not hold requests; Envoy's own default would be 200 ms, Istio's is 600 s.
AUTHZ_TIMEOUT = timedelta(milliseconds=500)

# Bytes kept of a client that speaks before its TCP connection has been judged.
EARLY_DATA_BYTES = 64 * 1024

REASON_HEADER = "x-meshbridge-reason"
_ESCAPED_SLASHES = HttpConnectionManagerPathWithEscapedSlashesAction
_EXT_AUTHZ = "envoy.filters.http.ext_authz"
_UNDECIDED = "meshbridge: the authorization server of this node gave no answer; the request is refused\n"


def http_filters(
    jwt_rules: tuple[JwtRule, ...],
    *,
    peer_verified: bool,
    stat_prefix: str,
    paths: PathNormalization = DEFAULT_MESH.path_normalization,
) -> list[Filter]:
    """Judge every HTTP request: tokens first, then our decision on what they said."""
    # Keys that have to be fetched are ext_authz's to know, and so are then all tokens: jwt_authn refuses what it does
    # not know.
    owns_tokens = any(not rule.jwks for rule in jwt_rules)
    filters = [_http_ext_authz()] if owns_tokens else [*jwt_authn(jwt_rules), _http_ext_authz()]
    return http_manager(
        filters, peer_verified=peer_verified, stat_prefix=stat_prefix, paths=paths, owns_tokens=owns_tokens
    )


def http_manager(
    filters: Sequence[HttpFilter],
    *,
    peer_verified: bool,
    stat_prefix: str,
    paths: PathNormalization = DEFAULT_MESH.path_normalization,
    owns_tokens: bool = False,
) -> list[Filter]:
    """Put every HTTP request through the filters and forward it to the pod.

    The path is normalized first, as the mesh's ``paths`` say, so that what is judged is what is forwarded. With
    ``owns_tokens`` ext_authz is told that it alone looks at tokens.
    """
    details = HttpConnectionManagerForwardClientCertDetails
    manager = HttpConnectionManager(
        stat_prefix=stat_prefix,
        route_config=_all_to_the_pod(owns_tokens=owns_tokens),
        http_filters=[*filters, router()],
        normalize_path=paths is not PathNormalization.NONE,
        merge_slashes=paths in (PathNormalization.MERGE_SLASHES, PathNormalization.DECODE_AND_MERGE_SLASHES),
        path_with_escaped_slashes_action=_ESCAPED_SLASHES.UNESCAPE_AND_FORWARD
        if paths is PathNormalization.DECODE_AND_MERGE_SLASHES
        else _ESCAPED_SLASHES.KEEP_UNCHANGED,
        # The route's timeouts are off; a stream idle for long is the application's business.
        stream_idle_timeout=timedelta(0),
        use_remote_address=False,
        forward_client_cert_details=details.SANITIZE_SET if peer_verified else details.SANITIZE,
        set_current_client_cert_details=HttpConnectionManagerSetCurrentClientCertDetails(uri=True)
        if peer_verified
        else None,
        upgrade_configs=[HttpConnectionManagerUpgradeConfig(upgrade_type="websocket")],
        local_reply_config=_say_when_undecided(),
    )
    return [Filter(name="envoy.filters.network.http_connection_manager", typed_config=Any.pack(manager))]


def tcp_filters(*, client_first: bool, stat_prefix: str) -> list[Filter]:
    """Judge a connection on its first byte from the client.

    With ``client_first`` the application is not even connected before that, so that its greeting never reaches a
    client that is refused; without, the greeting goes out first, as with Istio.
    """
    authz = TcpExtAuthz(
        stat_prefix=stat_prefix,
        grpc_service=_authz_service(),
        failure_mode_allow=False,
        transport_api_version=ApiVersion.V3,
        include_tls_session=True,
    )
    proxy = TcpProxy(stat_prefix=stat_prefix, cluster=CLUSTER_INBOUND)
    if client_first:
        proxy.upstream_connect_mode = UpstreamConnectMode.ON_DOWNSTREAM_DATA
        proxy.max_early_data_bytes = EARLY_DATA_BYTES
    return [
        Filter(name="envoy.filters.network.ext_authz", typed_config=Any.pack(authz)),
        Filter(name="envoy.filters.network.tcp_proxy", typed_config=Any.pack(proxy)),
    ]


def tcp_proxy(cluster: str, stat_prefix: str) -> Filter:
    """Forward bytes without judging them."""
    proxy = TcpProxy(stat_prefix=stat_prefix, cluster=cluster)
    return Filter(name="envoy.filters.network.tcp_proxy", typed_config=Any.pack(proxy))


def jwt_authn(rules: tuple[JwtRule, ...]) -> list[HttpFilter]:
    """Verify tokens, if anybody asks for them, and leave the claims for who judges behind it."""
    if not rules:
        return []
    providers = {f"origins-{index}": _provider(rule) for index, rule in enumerate(rules)}
    config = JwtAuthentication(
        providers=providers,
        rules=[RequirementRule(match=RouteMatch(prefix="/"), requires=_token_rule(tuple(providers)))],
    )
    return [HttpFilter(name=JWT_METADATA_NAMESPACE, typed_config=Any.pack(config))]


def _provider(rule: JwtRule) -> JwtProvider:
    return JwtProvider(
        issuer=rule.issuer,
        audiences=list(rule.audiences),
        local_jwks=DataSource(inline_string=usable_jwks(rule.jwks)),
        forward=rule.forward_original_token,
        from_headers=[JwtHeader(name=x.header, value_prefix=x.prefix) for x in rule.locations if x.header],
        from_params=[x.parameter for x in rule.locations if x.parameter],
        from_cookies=[x.cookie for x in rule.locations if x.cookie],
        forward_payload_header=rule.output_payload_to_header,
        claim_to_headers=[
            JwtClaimToHeader(header_name=header, claim_name=claim) for header, claim in rule.output_claims_to_headers
        ],
        payload_in_metadata=JWT_PAYLOAD_KEY,
        # As Istio: OAuth writes these claims as one text with spaces, and policies ask for one of the words.
        normalize_payload_in_metadata=JwtProviderNormalizePayload(
            space_delimited_claims=sorted({*rule.space_delimited, "permission", "scope"})
        ),
    )


def _token_rule(providers: tuple[str, ...]) -> JwtRequirement:
    """No token passes, every token there is has to be valid for its issuer.

    With several issuers sharing a place for the token the inner AND always fails, so one valid token is enough.
    """
    valid_or_missing = [_any_of(JwtRequirement(provider_name=name), _missing()) for name in providers]
    if len(providers) == 1:
        return valid_or_missing[0]
    every = JwtRequirement(requires_all=JwtRequirementAndList(requirements=valid_or_missing))
    return _any_of(*(JwtRequirement(provider_name=name) for name in providers), every)


def _any_of(*requirements: JwtRequirement) -> JwtRequirement:
    return JwtRequirement(requires_any=JwtRequirementOrList(requirements=list(requirements)))


def _missing() -> JwtRequirement:
    return JwtRequirement(allow_missing=Empty())


def _http_ext_authz() -> HttpFilter:
    config = HttpExtAuthz(
        grpc_service=_authz_service(),
        transport_api_version=ApiVersion.V3,
        failure_mode_allow=False,
        # Not 403: that is a decision, and this is the lack of one.
        status_on_error=HttpStatus(code=StatusCode.ServiceUnavailable),
        metadata_context_namespaces=[JWT_METADATA_NAMESPACE],
        # Joined by commas, a header that is sent twice would get past a rule for one of its values.
        encode_raw_headers=True,
        include_tls_session=True,
        stat_prefix="meshbridge",
    )
    return HttpFilter(name=_EXT_AUTHZ, typed_config=Any.pack(config))


def _authz_service() -> GrpcService:
    return GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=CLUSTER_AUTHZ), timeout=AUTHZ_TIMEOUT)


def router() -> HttpFilter:
    """The last HTTP filter of every chain."""
    return HttpFilter(name="envoy.filters.http.router", typed_config=Any.pack(Router()))


def _all_to_the_pod(*, owns_tokens: bool) -> RouteConfiguration:
    told = ExtAuthzPerRoute(check_settings=CheckSettings(context_extensions={OWNS_TOKENS: OWNED}))
    route = Route(
        name="default",
        match=RouteMatch(prefix="/"),
        route=RouteAction(cluster=CLUSTER_INBOUND, timeout=timedelta(0)),
        typed_per_filter_config={_EXT_AUTHZ: Any.pack(told)} if owns_tokens else {},
    )
    host = VirtualHost(name="inbound", domains=["*"], routes=[route])
    return RouteConfiguration(name="inbound", virtual_hosts=[host], validate_clusters=False)


def _say_when_undecided() -> LocalReplyConfig:
    """Name the cause in the 503 that ext_authz makes of an error or a timeout."""
    undecided = AccessLogFilter(
        and_filter=AndFilter(
            filters=[
                AccessLogFilter(
                    status_code_filter=StatusCodeFilter(
                        comparison=ComparisonFilter(
                            op=ComparisonFilterOp.EQ,
                            value=RuntimeUInt32(default_value=503, runtime_key="meshbridge.undecided"),
                        )
                    )
                ),
                AccessLogFilter(response_flag_filter=ResponseFlagFilter(flags=["UAEX"])),
            ]
        )
    )
    header = HeaderValueOption(
        header=HeaderValue(key=REASON_HEADER, value="authorization server gave no answer"),
        append_action=HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    mapper = ResponseMapper(filter=undecided, body=DataSource(inline_string=_UNDECIDED), headers_to_add=[header])
    return LocalReplyConfig(mappers=[mapper])
