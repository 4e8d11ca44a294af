"""The whole configuration of a sidecar against files read in review: rewrite with UPDATE_GOLDEN=1."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from envoy.config.listener.v3 import listener_pb2
from envoy_data_plane.envoy.config.listener.v3 import Listener
from google.protobuf.json_format import MessageToDict

from meshbridge.identity.model import ProxyClass, Workload
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import EffectiveMtls, JwtRule, MtlsMode
from meshbridge.policy.model import Origin
from meshbridge.xds.bootstrap import BootstrapInputs, bootstrap_json
from meshbridge.xds.clusters import build_clusters
from meshbridge.xds.listeners import inbound_listener, outbound_listener
from meshbridge.xds.resources import sidecar_resources
from meshbridge.xds.sidecar import MtlsDestination, Sidecar
from meshbridge.xds.types import CLUSTER, LISTENER

for module in (
    "filters.http.ext_authz.v3.ext_authz_pb2",
    "filters.http.jwt_authn.v3.config_pb2",
    "filters.http.router.v3.router_pb2",
    "filters.listener.http_inspector.v3.http_inspector_pb2",
    "filters.listener.original_dst.v3.original_dst_pb2",
    "filters.listener.tls_inspector.v3.tls_inspector_pb2",
    "filters.network.ext_authz.v3.ext_authz_pb2",
    "filters.network.http_connection_manager.v3.http_connection_manager_pb2",
    "filters.network.set_filter_state.v3.set_filter_state_pb2",
    "filters.network.tcp_proxy.v3.tcp_proxy_pb2",
    "transport_sockets.tls.v3.tls_pb2",
):
    importlib.import_module(f"envoy.extensions.{module}")  # so that Any is shown as what it holds

GOLDEN = Path(__file__).parents[2] / "golden" / "xds"
ORIGIN = Origin("PeerAuthentication", "finance", "strict")
JWKS = (
    '{"keys":[{"kty":"EC","crv":"P-256","kid":"a","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",'
    '"y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}'
)

POD = Workload(
    "finance",
    "transaction-service",
    "uid-1",
    "node-a",
    (ip_address("10.1.0.5"), ip_address("fd00::5")),
    service_account="transactions",
    proxy=ProxyClass.SIDECAR,
)
ONLY_V4 = dataclasses.replace(POD, addresses=(ip_address("10.1.0.5"),))

SIDECARS = {
    "strict-http-jwt": Sidecar(
        POD,
        trust_domains=("cluster.local", "old.example"),
        mtls=EffectiveMtls(MtlsMode.STRICT, ORIGIN),
        protocols={8080: AppProtocol.HTTP},
        jwt_rules=(JwtRule("https://issuer.example", ORIGIN, jwks=JWKS, audiences=("shop",)),),
        destinations=(
            MtlsDestination(ip_address("10.1.0.6")),
            MtlsDestination(ip_address("fd00::6")),
            MtlsDestination(ip_address("10.96.0.10"), mtls=False, except_ports=frozenset({80})),
        ),
        restricted=True,
    ),
    "permissive-port-modes": Sidecar(
        ONLY_V4,
        mtls=EffectiveMtls(
            MtlsMode.PERMISSIVE, None, {9000: (MtlsMode.STRICT, ORIGIN), 9001: (MtlsMode.DISABLE, ORIGIN)}
        ),
        protocols={9000: AppProtocol.TCP, 9001: AppProtocol.HTTP, 3306: AppProtocol.TCP},
        server_first_ports=frozenset({3306}),
    ),
}


def agrees(name: str, actual: Any) -> bool:
    path = GOLDEN / f"{name}.json"
    text = json.dumps(actual, indent=1, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    return text == path.read_text()


@pytest.mark.parametrize("name", SIDECARS)
def test_listeners_are_the_reviewed_ones(name: str) -> None:
    sidecar = SIDECARS[name]
    for listener in (inbound_listener(sidecar), outbound_listener(sidecar)):
        # Read back by the other library: what is reviewed are the bytes that are sent.
        assert agrees(f"{name}-{listener.name}", MessageToDict(listener_pb2.Listener.FromString(bytes(listener))))


def test_clusters_are_the_reviewed_ones() -> None:
    assert agrees("clusters", [cluster.to_dict() for cluster in build_clusters(SIDECARS["strict-http-jwt"])])


def test_bootstrap_is_the_reviewed_one() -> None:
    inputs = BootstrapInputs(POD, "pod-token", "/run/meshbridge/xds.sock", "/run/meshbridge/node-a/authz.sock")
    assert agrees("bootstrap", json.loads(bootstrap_json(inputs)))


@pytest.mark.parametrize("name", SIDECARS)
def test_equal_input_gives_equal_bytes(name: str) -> None:
    once, again = sidecar_resources(SIDECARS[name]), sidecar_resources(dataclasses.replace(SIDECARS[name]))
    assert once == again
    assert set(once) == {CLUSTER, LISTENER}
    assert set(once[CLUSTER]) == {"inbound", "outbound_mtls", "outbound_plaintext", "blackhole"}


def chains(listener: Listener, port: int | None) -> list[tuple[str, tuple[str, ...], bool]]:
    """(transport, ALPN, terminates TLS) of every chain of a port."""
    return [
        (match.transport_protocol, tuple(match.application_protocols), chain.transport_socket is not None)
        for chain in listener.filter_chains
        if (match := chain.filter_chain_match) is not None and match.destination_port == port
    ]


@pytest.mark.parametrize("port", [8080, None], ids=["a declared port", "any other port"])
def test_strict_has_no_chain_that_plaintext_could_match(port: int | None) -> None:
    found = chains(inbound_listener(SIDECARS["strict-http-jwt"]), port)
    assert found
    assert all(transport == "tls" and terminates for transport, _, terminates in found)


def test_a_port_mode_beats_the_workloads() -> None:
    listener = inbound_listener(SIDECARS["permissive-port-modes"])
    assert chains(listener, 9000) == [("tls", (), True)]
    assert [terminates for *_, terminates in chains(listener, 9001)] == [False, False]


@pytest.mark.parametrize("mode", [MtlsMode.STRICT, MtlsMode.PERMISSIVE, MtlsMode.DISABLE])
@pytest.mark.parametrize("protocol", list(AppProtocol))
def test_no_two_chains_match_the_same(mode: MtlsMode, protocol: AppProtocol) -> None:
    """Envoy refuses a listener in which they do."""
    sidecar = Sidecar(POD, mtls=EffectiveMtls(mode, ORIGIN), protocols={80: protocol})
    for port in (80, None):
        found = chains(inbound_listener(sidecar), port)
        keys = [(transport, alpn) for transport, alphabet, _ in found for alpn in alphabet or ("",)]
        assert len(keys) == len(set(keys))


FIRST_BYTES = {
    "a request in the clear": ("raw_buffer", ("http/1.1",)),
    "bytes of another protocol, or none": ("raw_buffer", ()),
    "a TLS hello without ALPN": ("tls", ()),
    "a TLS hello of a client of HTTP": ("tls", ("h2", "http/1.1")),
}


@pytest.mark.parametrize("first", FIRST_BYTES.values(), ids=FIRST_BYTES.keys())
@pytest.mark.parametrize("mode", [MtlsMode.PERMISSIVE, MtlsMode.DISABLE])
@pytest.mark.parametrize("protocol", list(AppProtocol))
def test_nothing_is_closed_for_what_it_speaks_where_mtls_is_not_demanded(
    mode: MtlsMode, protocol: AppProtocol, first: tuple[str, tuple[str, ...]]
) -> None:
    """As Envoy looks for a chain: by transport, then by ALPN, and never back."""
    transport, offered = first
    listener = inbound_listener(Sidecar(POD, mtls=EffectiveMtls(mode, ORIGIN), protocols={80: protocol}))
    for port in (80, None):
        found = chains(listener, port)
        transports = {transport for transport, *_ in found}
        of_transport = [alpn for t, alpn, _ in found if t == (transport if transport in transports else "")]
        assert any(not alpn or not set(alpn).isdisjoint(offered) for alpn in of_transport)


def test_every_http_chain_asks_us_and_every_tcp_chain_too() -> None:
    for sidecar in SIDECARS.values():
        text = json.dumps(inbound_listener(sidecar).to_dict())
        listener = inbound_listener(sidecar)
        judged = text.count("ext_authz.v3.ExtAuthz")
        assert judged == len(listener.filter_chains) - 1  # all but the black hole
        assert text.count('"failureModeAllow": true') == 0


def test_listeners_bind_only_the_families_of_the_pod() -> None:
    assert inbound_listener(SIDECARS["permissive-port-modes"]).additional_addresses == []
    assert len(inbound_listener(SIDECARS["strict-http-jwt"]).additional_addresses) == 1
