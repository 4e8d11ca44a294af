"""Addresses and TLS contexts: how our Envoys connect, and whose certificates they believe."""

from __future__ import annotations

from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    AggregatedConfigSource,
    ApiVersion,
    ConfigSource,
    Pipe,
    SocketAddress,
    TransportSocket,
)
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
    CertificateValidationContext,
    CommonTlsContext,
    CommonTlsContextCombinedCertificateValidationContext,
    DownstreamTlsContext,
    SdsSecretConfig,
    SubjectAltNameMatcher,
    SubjectAltNameMatcherSanType,
    TlsParameters,
    TlsParametersTlsProtocol,
    UpstreamTlsContext,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from meshbridge.xds.names import SECRET_CERTIFICATE, SECRET_ROOT_CA


def ads_source() -> ConfigSource:
    """The one ADS stream every dynamic resource comes over."""
    return ConfigSource(ads=AggregatedConfigSource(), resource_api_version=ApiVersion.V3)


def socket_address(address: str, port: int) -> Address:
    return Address(socket_address=SocketAddress(address=address, port_value=port))


def pipe_address(path: str) -> Address:
    return Address(pipe=Pipe(path=path))


def downstream_tls(trust_domains: tuple[str, ...], alpn: tuple[str, ...]) -> TransportSocket:
    """Terminate TLS of mesh peers only: a client without a certificate of our CA and trust domains is refused."""
    context = DownstreamTlsContext(
        common_tls_context=_common_context(trust_domains, alpn),
        require_client_certificate=True,
        # A resumed session would keep the principal of an old certificate past its expiry.
        disable_stateless_session_resumption=True,
        disable_stateful_session_resumption=True,
    )
    return TransportSocket(name="envoy.transport_sockets.tls", typed_config=Any.pack(context))


def upstream_tls(trust_domains: tuple[str, ...], alpn: tuple[str, ...]) -> TransportSocket:
    """Present the pod's own certificate, and talk only to a server of our CA and trust domains."""
    context = UpstreamTlsContext(
        common_tls_context=_common_context(trust_domains, alpn), sni=trust_domains[0], max_session_keys=0
    )
    return TransportSocket(name="envoy.transport_sockets.tls", typed_config=Any.pack(context))


def _common_context(trust_domains: tuple[str, ...], alpn: tuple[str, ...]) -> CommonTlsContext:
    spiffe_names = [
        SubjectAltNameMatcher(
            san_type=SubjectAltNameMatcherSanType.URI, matcher=StringMatcher(prefix=f"spiffe://{trust_domain}/")
        )
        for trust_domain in trust_domains
    ]
    return CommonTlsContext(
        tls_params=TlsParameters(
            tls_minimum_protocol_version=TlsParametersTlsProtocol.TLSv1_2,
            tls_maximum_protocol_version=TlsParametersTlsProtocol.TLSv1_3,
        ),
        tls_certificate_sds_secret_configs=[SdsSecretConfig(name=SECRET_CERTIFICATE, sds_config=ads_source())],
        combined_validation_context=CommonTlsContextCombinedCertificateValidationContext(
            default_validation_context=CertificateValidationContext(match_typed_subject_alt_names=spiffe_names),
            validation_context_sds_secret_config=SdsSecretConfig(name=SECRET_ROOT_CA, sds_config=ads_source()),
        ),
        alpn_protocols=list(alpn),
    )
