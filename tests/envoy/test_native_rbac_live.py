"""The same policies and requests to Envoy's own RBAC and to ``policy.l7``: one verdict, or one of them is wrong."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from envoy_data_plane.envoy.config.core.v3 import DataSource
from envoy_data_plane.envoy.config.listener.v3 import Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter
from envoy_data_plane.envoy.config.route.v3 import (
    DirectResponseAction,
    Route,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)
from envoy_data_plane.envoy.extensions.filters.listener.tls_inspector.v3 import TlsInspector
from envoy_data_plane.envoy.extensions.filters.network.echo.v3 import Echo
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpConnectionManager
from envoy_data_plane.google.protobuf import Any as AnyMessage
from meshnet import ENVOY, AdsServer, Authority

from meshbridge.identity.model import ProxyClass, Workload
from meshbridge.policy.l7 import Request, RequestJudge
from meshbridge.policy.mesh import JwtRule, MeshSettings
from meshbridge.policy.model import Document, Origin
from meshbridge.policy.policyset import PolicySet
from meshbridge.xds.bootstrap import BootstrapInputs, bootstrap
from meshbridge.xds.filters import jwt_authn, router
from meshbridge.xds.rbac import http_rbac, tcp_rbac
from meshbridge.xds.snapshot import LISTENER, SECRET
from meshbridge.xds.transport import downstream_tls, socket_address

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("envoy")]

ROUNDS, REQUESTS = 60, 12
ISSUER = "https://issuer.test"
MESH = MeshSettings(trust_domain="cluster.local", trust_domain_aliases=("td2",))
JWT_KEY = ec.generate_private_key(ec.SECP256R1())
POD = Workload("finance", "server", "uid-s", "node-a", (ip_address("127.0.0.1"),), proxy=ProxyClass.SIDECAR)
IDENTITIES = [
    None,
    ("cluster.local", "finance", "client"),
    ("cluster.local", "other", "client"),
    ("td2", "finance", "client"),
]

VALUES: dict[str, list[str]] = {
    "principals": [
        "*",
        "cluster.local/ns/finance/sa/client",
        "td2/ns/*",
        "*/sa/client",
        "foreign/ns/finance/sa/client",
    ],
    "namespaces": ["finance", "fin*", "*"],
    "ipBlocks": ["127.0.0.1", "127.0.0.2/31", "127.0.0.0/8", "10.0.0.0/8", "::1"],
    "remoteIpBlocks": ["192.0.2.0/24", "127.0.0.0/8"],
    "requestPrincipals": ["*", f"{ISSUER}/me", f"{ISSUER}/*", "*/me", "nobody/me", "https://*", "*me"],
    "methods": ["GET", "POST", "P*", "*"],
    "paths": ["/api/v1/process", "/api/*", "*/process", "*", "/api/{*}/process", "/{**}", "/a*b", "/api"],
    "hosts": ["server", "SERVER", "ser*", "*.test", "*"],
    "ports": ["PORT", "1"],
}
WHEN: dict[str, list[str]] = {
    "request.headers[x-a]": ["1", "*", "v*", "*e"],
    "request.auth.claims[scope]": ["transactions", "read", "t*", "*"],
    "request.auth.claims[deep][level]": ["one", "*"],
    "request.auth.claims[groups]": ["a", "b*"],
    "request.auth.audiences": ["shop", "*"],
    "request.auth.presenter": ["app"],
    "source.ip": ["127.0.0.2", "127.0.0.0/8"],
    "source.namespace": ["finance", "other"],
    "destination.port": ["PORT", "1"],
    "destination.ip": ["127.0.0.1", "10.0.0.1"],
    "connection.sni": ["server.test", "*"],
}
SOURCE = ("principals", "namespaces", "ipBlocks", "remoteIpBlocks", "requestPrincipals")
OPERATION = ("methods", "paths", "hosts", "ports")


@dataclass
class Generator:
    rng: random.Random
    port: int

    def some(self, values: list[str]) -> list[str]:
        picked = self.rng.sample(values, self.rng.randint(1, min(3, len(values))))
        return [value.replace("PORT", str(self.port)) for value in picked]

    def clause(self, fields: tuple[str, ...]) -> dict[str, list[str]]:
        found = {}
        for name in self.rng.sample(fields, self.rng.choice([1, 1, 2])):
            written = name if self.rng.random() < 0.75 else f"not{name[0].upper()}{name[1:]}"
            found[written] = self.some(VALUES[name])
        return found

    def rule(self) -> dict[str, Any]:
        rule: dict[str, Any] = {}
        if self.rng.random() < 0.4:
            rule["from"] = [{"source": self.clause(SOURCE)} for _ in range(self.rng.randint(1, 2))]
        if self.rng.random() < 0.4:
            rule["to"] = [{"operation": self.clause(OPERATION)} for _ in range(self.rng.randint(1, 2))]
        if self.rng.random() < 0.3:
            keys = self.rng.sample(sorted(WHEN), self.rng.randint(1, 2))
            names = ["values" if self.rng.random() < 0.75 else "notValues" for _ in keys]
            rule["when"] = [{"key": key, name: self.some(WHEN[key])} for key, name in zip(keys, names, strict=True)]
        return rule

    def documents(self) -> list[Document]:
        found = []
        for number in range(self.rng.randint(1, 3)):
            action = self.rng.choice(["ALLOW", "ALLOW", "DENY", "AUDIT"])
            spec: dict[str, Any] = {"action": action, "rules": [self.rule() for _ in range(self.rng.randint(1, 3))]}
            if self.rng.random() < 0.1 and action == "ALLOW":
                del spec["rules"]
            metadata = {"name": f"p{number}", "namespace": "finance"}
            if self.rng.random() < 0.1 and action != "AUDIT":
                metadata["annotations"] = {"istio.io/dry-run": "true"}  # type: ignore[assignment]
            data = {"metadata": metadata, "spec": spec}
            found.append(Document("AuthorizationPolicy", "security.istio.io/v1", "finance", f"p{number}", data))
        return found

    def question(self) -> Question:
        rng = self.rng
        claims: dict[str, Any] | None = None
        if rng.random() < 0.6:
            claims = {"iss": ISSUER, "sub": rng.choice(["me", "you"]), "exp": int(time.time()) + 600}
            claims["scope"] = rng.choice(["transactions", "read transactions", ["read"], "other"])
            if rng.random() < 0.5:
                claims |= {"deep": {"level": "one"}, "groups": ["a", "x"], "aud": ["shop"], "azp": "app"}
        return Question(
            identity=rng.choice(IDENTITIES),
            source=rng.choice(["127.0.0.1", "127.0.0.2", "127.0.0.3"]),
            method=rng.choice(["GET", "POST", "PUT"]),
            path=rng.choice(["/api/v1/process", "/api/v1/process?x=1", "/api/v2/x/process", "/", "/a*b", "/api"]),
            host=rng.choice(["server", "Server", "x.test", f"server:{self.port}"]),
            headers=rng.choice([{}, {"x-a": "1"}, {"x-a": "value"}, {"x-forwarded-for": "192.0.2.9"}]),
            claims=claims,
        )


@dataclass(frozen=True)
class Question:
    identity: tuple[str, str, str] | None
    source: str
    method: str
    path: str
    host: str
    headers: dict[str, str] = field(hash=False)
    claims: dict[str, Any] | None = field(hash=False)

    @property
    def principal(self) -> str | None:
        if self.identity is None:
            return None
        domain, namespace, account = self.identity
        return f"spiffe://{domain}/ns/{namespace}/sa/{account}"

    def request(self, port: int, *, http: bool) -> Request:
        forwarded = self.headers.get("x-forwarded-for")
        bare = {
            "source": ip_address(self.source),
            "port": port,
            "destination": ip_address("127.0.0.1"),
            "principal": self.principal,
            "sni": "server.test" if self.identity else "",
            "http": http,
        }
        if not http:
            return Request(**bare)  # type: ignore[arg-type]
        return Request(
            **bare,  # type: ignore[arg-type]
            method=self.method,
            path=self.path,
            host=self.host,
            headers=self.headers,
            remote=ip_address(forwarded) if forwarded else None,
            claims=(self.claims,) if self.claims else (),
        )


@dataclass
class Rbac:
    """One Envoy whose listeners hold the policies of the moment."""

    ads: AdsServer
    directory: Path
    authority: Authority
    secrets: dict[str, bytes]
    http_port: int
    tcp_port: int
    version: int = 0
    contexts: dict[tuple[str, str, str], ssl.SSLContext] = field(default_factory=dict)

    def apply(self, policies: PolicySet) -> None:
        """Send the policies and wait until Envoy answers with them."""
        self.version += 1
        listeners = (self.http_listener(policies), self.tcp_listener(policies))
        self.ads.update({LISTENER: {item.name: bytes(item) for item in listeners}, SECRET: self.secrets})
        deadline = time.monotonic() + 10
        while f"server: v{self.version}\r\n" not in self.http(Question(None, "127.0.0.1", "GET", "/", "x", {}, None)):
            assert time.monotonic() < deadline, f"not applied: {policies.authorization}"
            time.sleep(0.005)

    def chains(self, filters: list[Filter]) -> list[FilterChain]:
        tls = downstream_tls(("cluster.local", "td2"), ())
        return [
            FilterChain(
                filter_chain_match=FilterChainMatch(transport_protocol="tls"), filters=filters, transport_socket=tls
            ),
            FilterChain(filter_chain_match=FilterChainMatch(transport_protocol="raw_buffer"), filters=filters),
        ]

    def listener(self, name: str, port: int, filters: list[Filter]) -> Listener:
        inspector = ListenerFilter(name="tls_inspector", typed_config=AnyMessage.pack(TlsInspector()))
        return Listener(
            name=name,
            address=socket_address("127.0.0.1", port),
            filter_chains=self.chains(filters),
            listener_filters=[inspector],
        )

    def http_listener(self, policies: PolicySet) -> Listener:
        key = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(JWT_KEY.public_key())) | {"kid": "k1"}
        rule = JwtRule(ISSUER, Origin("RequestAuthentication", "finance", "a"), jwks=json.dumps({"keys": [key]}))
        answer = DirectResponseAction(status=200, body=DataSource(inline_string="ok"))
        host = VirtualHost(
            name="x", domains=["*"], routes=[Route(match=RouteMatch(prefix="/"), direct_response=answer)]
        )
        manager = HttpConnectionManager(
            stat_prefix="rbac",
            server_name=f"v{self.version}",
            route_config=RouteConfiguration(name="x", virtual_hosts=[host]),
            http_filters=[*jwt_authn((rule,)), *http_rbac(policies.authorization, MESH), router()],
        )
        # The last name in order: when it is applied the TCP listener is as well.
        return self.listener("z-http", self.http_port, [Filter(name="hcm", typed_config=AnyMessage.pack(manager))])

    def tcp_listener(self, policies: PolicySet) -> Listener:
        echo = Filter(name="envoy.filters.network.echo", typed_config=AnyMessage.pack(Echo()))
        return self.listener("a-tcp", self.tcp_port, [*tcp_rbac(policies.authorization, MESH, "rbac"), echo])

    def http(self, question: Question) -> str:
        lines = [f"{question.method} {question.path} HTTP/1.1", f"host: {question.host}", "connection: close"]
        lines += [f"{name}: {value}" for name, value in question.headers.items()]
        if question.claims:
            token = jwt.encode(question.claims, JWT_KEY, algorithm="ES256", headers={"kid": "k1"})
            lines.append(f"authorization: Bearer {token}")
        data = "\r\n".join([*lines, "content-length: 0", "", ""]).encode()
        return self.talk(question, self.http_port, data, b"\r\n\r\n").decode()

    def talk(self, question: Question, port: int, data: bytes, until: bytes) -> bytes:
        raw = socket.create_connection(("127.0.0.1", port), 5, (question.source, 0))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.ExitStack() as stack:
            stack.enter_context(raw)
            connection: socket.socket = raw
            if question.identity:
                connection = stack.enter_context(
                    self.context(question.identity).wrap_socket(raw, server_hostname="server.test")
                )
            received = b""
            with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
                connection.sendall(data)
                while until not in received and (chunk := connection.recv(4096)):
                    received += chunk
            return received

    def context(self, identity: tuple[str, str, str]) -> ssl.SSLContext:
        if identity not in self.contexts:
            domain, namespace, account = identity
            pem = self.directory / f"{domain}-{namespace}-{account}.pem"
            pem.write_bytes(b"".join(self.authority.issue(namespace, account, domain)))
            context = self.contexts[identity] = ssl.create_default_context(cadata=self.authority.root_pem.decode())
            context.check_hostname = False
            context.load_cert_chain(pem)
        return self.contexts[identity]

    def tcp(self, question: Question) -> bool:
        return self.talk(question, self.tcp_port, b"hello", b"hello") == b"hello"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [item.getsockname()[1] for item in sockets]


@pytest.fixture
def rbac(tmp_path: Path) -> Iterator[Rbac]:
    authority = Authority()
    secrets = dict(authority.secrets(POD))
    ads = AdsServer(tmp_path / "xds.sock", POD, {LISTENER: {}, SECRET: secrets})
    http_port, tcp_port, admin_port = free_ports(3)
    config = bootstrap(BootstrapInputs(POD, ads.token, str(tmp_path / "xds.sock"), str(tmp_path / "authz.sock")))
    assert config.static_resources is not None
    assert config.dynamic_resources is not None
    assert config.admin is not None
    config.static_resources.listeners = []
    config.dynamic_resources.cds_config = None
    config.admin.address = socket_address("127.0.0.1", admin_port)
    (tmp_path / "bootstrap.json").write_text(json.dumps(config.to_dict()))
    with (tmp_path / "envoy.log").open("wb") as log:
        command = [str(ENVOY), "-c", str(tmp_path / "bootstrap.json"), "--concurrency", "1", "--use-dynamic-base-id"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 10
            while not ads.callers:
                assert time.monotonic() < deadline, (tmp_path / "envoy.log").read_text()[-3000:]
                time.sleep(0.05)
            yield Rbac(ads, tmp_path, authority, secrets, http_port, tcp_port)
        finally:
            process.kill()
            process.wait()
            ads.stop()


def test_native_rbac_and_our_judge_agree(rbac: Rbac) -> None:
    seen = {True: 0, False: 0}
    for seed in range(ROUNDS):
        generator = Generator(random.Random(seed), rbac.http_port)
        policies = PolicySet.of(generator.documents(), MESH)
        assert not policies.refusals
        with_listener(rbac, policies)
        judge = RequestJudge.of(POD, policies)
        for _ in range(REQUESTS):
            question = generator.question()
            told = (seed, question, [policy.rules for policy in policies.authorization])
            expected = judge.decide(question.request(rbac.http_port, http=True)).allowed
            answer = rbac.http(question)
            assert answer.startswith(("HTTP/1.1 200", "HTTP/1.1 403")), answer
            assert answer.startswith("HTTP/1.1 200") == expected, told
            over_tcp = judge.decide(question.request(rbac.tcp_port, http=False)).allowed
            assert rbac.tcp(question) == over_tcp, told
            seen[expected] += 1
            seen[over_tcp] += 1
    assert min(seen.values()) > ROUNDS, seen


def with_listener(rbac: Rbac, policies: PolicySet) -> None:
    try:
        rbac.apply(policies)
    except ConnectionRefusedError:  # before the first listener
        time.sleep(0.5)
        rbac.apply(policies)
