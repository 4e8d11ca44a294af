"""A random mesh, and random connections and requests to its pods: as documents, and as questions ``evaluate`` reads.

Everything follows from the seed. Servers are few per policy and values few per field, so that both verdicts are common.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml
from envoy_policies import ISSUERS, PolicyGenerator

from meshbridge.controller.meshconfig import read_mesh_config
from meshbridge.evaluation.cluster import Cluster
from meshbridge.identity.model import Workload
from meshbridge.policy.mesh import MeshSettings, MtlsMode, PeerAuthentication, effective_mtls
from meshbridge.policy.model import Document
from meshbridge.policy.policyset import PolicySet

HTTP_PORTS, TCP_PORTS = (8080, 8081, 7000), (9000, 9001, 7001)
UNDECLARED = (7000, 7001)
"""Ports of no Service, whose protocol Envoy has to find out."""
NAMESPACES = ("finance", "shop")
ROOT_NAMESPACE = "istio-system"


@dataclass(frozen=True)
class MeshOptions:
    """What MeshConfig says."""

    trust_domain: str = "cluster.local"
    aliases: tuple[str, ...] = ()
    paths: str = "DEFAULT"

    @property
    def trust_domains(self) -> tuple[str, ...]:
        return (self.trust_domain, *self.aliases)


@dataclass(frozen=True)
class Server:
    """A pod with a sidecar that policies guard."""

    number: int
    namespace: str
    labels: dict[str, str] = field(hash=False)
    ipv6: bool = False

    @property
    def name(self) -> str:
        return f"s{self.number}"

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def address(self) -> str:
        return f"fd00:2::{self.number + 1:x}" if self.ipv6 else f"10.2.0.{self.number + 1}"


@dataclass(frozen=True)
class Client:
    """Who opens connections: a pod, or an address outside when it has no namespace."""

    namespace: str
    name: str
    addresses: tuple[str, str]


CLIENTS = (
    Client("finance", "client", ("10.1.0.1", "fd00:1::1")),
    Client("shop", "client", ("10.1.0.2", "fd00:1::2")),
    Client("shop", "batch", ("10.1.1.3", "fd00:1:1::3")),
    Client("", "", ("192.0.2.7", "2001:db8::7")),
)


@dataclass(frozen=True)
class Point:
    """One connection, or one request on one, and the question that is put to ``evaluate``.

    ``claims`` are in the token that the request carries, which is ``signed`` by the issuer or by somebody else. The
    flow's claims are those that Envoy believes: none where no RequestAuthentication has it look at tokens.
    """

    server: Server
    flow: dict[str, Any] = field(hash=False)
    claims: dict[str, Any] | None = field(default=None, hash=False)
    signed: bool = True

    @property
    def is_http(self) -> bool:
        return "http" in self.flow

    @property
    def connection(self) -> tuple[Any, ...]:
        """Requests for which this is equal may share a connection."""
        flow = self.flow
        return self.server, flow["port"], flow["src_ip"], flow["dst_ip"], flow["peer_principal"], flow["sni"]


@dataclass(frozen=True)
class World:
    """Servers, clients, and the policies of a mesh, from a seed."""

    seed: int
    options: MeshOptions
    size: int = 30
    ipv6: bool = True
    misguided: bool = False

    @cached_property
    def servers(self) -> tuple[Server, ...]:
        rng = random.Random(f"servers {self.seed}")
        found = []
        for number in range(self.size):
            labels = {"app": f"s{number}", "tier": rng.choice("abcdef"), "jwt": rng.choice(["yes", "yes", "no"])}
            found.append(Server(number, NAMESPACES[number % 2], labels, self.ipv6 and number % 3 == 2))
        return tuple(found)

    @cached_property
    def policies(self) -> list[dict[str, Any]]:
        """AuthorizationPolicy, PeerAuthentication, RequestAuthentication: in namespaces, and in the root one."""
        rng = random.Random(f"policies {self.seed}")
        generator = PolicyGenerator(rng, self.options.trust_domains, self.misguided)
        return generator.policies([(server.namespace, server.labels) for server in self.servers], ROOT_NAMESPACE)

    @property
    def mesh_config(self) -> dict[str, Any]:
        return {
            "rootNamespace": ROOT_NAMESPACE,
            "trustDomain": self.options.trust_domain,
            "trustDomainAliases": list(self.options.aliases),
            "pathNormalization": {"normalization": self.options.paths},
        }

    def cluster(self, policies: list[dict[str, Any]] | None = None) -> Cluster:
        """The mesh as ``meshbridge evaluate`` sees it."""
        documents = [document(each) for each in (*self.objects, *(self.policies if policies is None else policies))]
        return Cluster(documents, self.mesh)

    @property
    def objects(self) -> list[dict[str, Any]]:
        """All but the policies."""
        return [*self._namespaces(), *self._services(), *self._pods(), self._config()]

    @cached_property
    def mesh(self) -> MeshSettings:
        return read_mesh_config(document(self._config()))

    def _config(self) -> dict[str, Any]:
        metadata = {"name": "istio", "namespace": ROOT_NAMESPACE}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata,
                "data": {"mesh": yaml.safe_dump(self.mesh_config)}}  # fmt: skip

    def _namespaces(self) -> Iterator[dict[str, Any]]:
        for name in (*NAMESPACES, ROOT_NAMESPACE):
            yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}

    def _services(self) -> Iterator[dict[str, Any]]:
        ports = [{"name": f"{protocol}-{port}", "port": port, "protocol": "TCP"}
                 for protocol, numbers in (("http", HTTP_PORTS), ("tcp", TCP_PORTS)) for port in numbers
                 if port not in UNDECLARED]  # fmt: skip
        for server in self.servers:
            metadata = {"name": server.name, "namespace": server.namespace}
            spec = {"selector": {"app": server.name}, "ports": ports}
            yield {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}

    def _pods(self) -> Iterator[dict[str, Any]]:
        for server in self.servers:
            yield _pod(server.namespace, server.name, server.labels, (server.address,))
        for client in CLIENTS:
            if client.namespace:
                yield _pod(client.namespace, client.name, {"app": client.name}, client.addresses)

    def _terminates_tls(self, server: Server, port: int) -> bool:
        """Whether a client's certificate is looked at; where mTLS is off, TLS is the application's business."""
        peer = Workload(server.namespace, server.name, "", "", (), server.labels).peer()
        return effective_mtls(self._modes, peer, self.mesh).at(port)[0] is not MtlsMode.DISABLE

    @cached_property
    def _modes(self) -> tuple[PeerAuthentication, ...]:
        return PolicySet.of([document(each) for each in self.policies], self.mesh).peer_authentication

    def points(self, per_port: int) -> Iterator[Point]:
        """Connections and requests, ``per_port`` to each port of each server; several requests to a connection."""
        rng = random.Random(f"points {self.seed}")
        for server in self.servers:
            for port in (*HTTP_PORTS, *TCP_PORTS):
                left = per_port
                while left > 0:
                    connection = self._connection(rng, server, port)
                    requests = 1 if port in TCP_PORTS else min(left, rng.randint(2, 6))
                    left -= requests
                    for _ in range(requests):
                        yield (
                            self._request(rng, server, connection) if port in HTTP_PORTS else Point(server, connection)
                        )

    def _connection(self, rng: random.Random, server: Server, port: int) -> dict[str, Any]:
        client = rng.choice(CLIENTS)
        source = client.addresses[server.ipv6]
        principal = rng.choice(self.principals) if self._terminates_tls(server, port) and rng.random() < 0.7 else None
        return {
            "dst": server.key, "dst_ip": server.address, "port": port,
            "src": f"{client.namespace}/{client.name}" if client.namespace else source, "src_ip": source,
            "peer_principal": principal,
            **({"app_protocol": "tcp"} if port in UNDECLARED and port in TCP_PORTS else {}),
            "sni": rng.choice(["", "server.test", f"{server.name}.test"]) if principal else "",
        }  # fmt: skip

    @property
    def principals(self) -> list[str]:
        accounts = ("ns/finance/sa/client", "ns/shop/sa/client", "ns/shop/sa/batch")
        return [f"spiffe://{domain}/{account}" for domain in self.options.trust_domains for account in accounts]

    def _request(self, rng: random.Random, server: Server, connection: dict[str, Any]) -> Point:
        method = rng.choice(["GET", "GET", "POST", "PUT", "DELETE"])
        path = rng.choice(PATHS)
        host = rng.choice([server.name, f"{server.name}.test", f"{server.name.upper()}:{connection['port']}", "x.test"])
        headers = dict(rng.choice(HEADERS))
        flow: dict[str, Any] = {**connection}
        if rng.random() < 0.2:
            headers["x-forwarded-for"] = rng.choice(FORWARDED_FOR)
        claims = _claims(rng, rng.choice(ISSUERS)) if rng.random() < 0.75 else None
        signed = rng.random() < 0.85
        flow["token"] = "absent"
        if claims is not None and server.labels["jwt"] == "yes":
            flow |= {"token": "valid", "claims": claims} if signed else {"token": "bad"}
        flow["http"] = {"method": method, "path": path, "host": host, "headers": headers}
        return Point(server, flow, claims, signed)


PATHS = (
    "/api/v1/process", "/api/v1/process?x=/admin", "/api/v2/x/process", "/", "/a*b", "/api", "/api/", "/API/v1/process",
    "/static/a=b;c/d.css", "/%61pi", "/api/v1/process/", "/x/../api", "//api", "/api/./v1/process", "/a//v1///b",
    "/api//v1///process", "/api%2Fv1/process", "/api%5cv1\\process", "/api/%2e%2e/static/x/y", "/api/v1%2fprocess?a%2f",
)  # fmt: skip
FORWARDED_FOR = (
    "198.51.100.4", "192.0.2.9, 198.51.100.4", "198.51.100.4,192.0.2.9", "198.51.100.4, nobody", " 192.0.2.200 ", "",
    "fd00:1::7", "10.1.0.77, 2001:db8::1",
)  # fmt: skip
HEADERS: tuple[dict[str, Any], ...] = (
    {}, {}, {"x-a": "1"}, {"x-a": "value"}, {"x-a": "1,value"}, {"x-a": ["1", "value"]}, {"x-a": ["", "x"]},
    {"x-b": "no"},
)  # fmt: skip


def _claims(rng: random.Random, issuer: str) -> dict[str, Any]:
    claims: dict[str, Any] = {"iss": issuer, "sub": rng.choice(["me", "you", ""]), "exp": 4_000_000_000}
    claims["scope"] = rng.choice(["transactions", "read transactions", ["read"], ["read write"], "other", ""])
    if rng.random() < 0.5:
        claims |= {"deep": {"level": rng.choice(["one", ["one", "two"], 1])}, "groups": ["a", "x"], "azp": "app"}
    if rng.random() < 0.5:
        claims["aud"] = rng.choice(["shop", ["shop", "bank"], ["bank"]])
    return claims


def _pod(namespace: str, name: str, labels: dict[str, str], addresses: tuple[str, ...]) -> dict[str, Any]:
    containers = [
        {"name": "app", "image": "app"},
        {"name": "istio-proxy", "image": "proxyv2", "args": ["proxy", "sidecar"]},
    ]
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels, "uid": f"uid-{namespace}-{name}"},
        "spec": {"nodeName": "one", "serviceAccountName": name, "containers": containers},
        "status": {"phase": "Running", "podIPs": [{"ip": address} for address in addresses]},
    }  # fmt: skip


def document(data: dict[str, Any]) -> Document:
    """A document as the reader of manifests makes it."""
    metadata = data["metadata"]
    return Document(data["kind"], data["apiVersion"], metadata.get("namespace", ""), metadata["name"], data)


def lines(points: list[Point]) -> list[bytes]:
    """The points as the lines of a file of flows."""
    return [json.dumps(point.flow).encode() for point in points]
