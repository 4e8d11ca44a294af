"""Random mesh policies and a small cast of sources, for the tests that compare kernel verdicts with Envoy's."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any

from hypothesis import strategies as st
from mesh_oracle import CONTENTS, Caller, admits

from meshbridge.identity.model import ContainerPort, Entity, IpFamily, Peer, ProxyClass, Workload
from meshbridge.identity.numbering import Numbering, number_peers
from meshbridge.policy.capture import Capture, PortClass, PortClasses
from meshbridge.policy.model import Document, Judge
from meshbridge.policy.policyset import PolicySet

PORTS = (8080, 9090, 9091)
SERVER_LABELS = {"app": "api"}


def _pod(key: str, address: str, proxy: ProxyClass, labels: dict[str, str] | None = None) -> Workload:
    namespace, _, name = key.partition("/")
    return Workload(
        namespace, name, uid=key, node="one", addresses=(ip_address(address),), labels=labels or {"app": name},
        proxy=proxy, ports=(ContainerPort("http", 8080), ContainerPort("metrics", 9090)),
    )  # fmt: skip


SERVER = replace(_pod("shop/api", "10.1.0.2", ProxyClass.SIDECAR, SERVER_LABELS), probe_ports=(9091,))
NODE, PROBE_PORT = "192.168.0.1", 9091
CLIENTS = (
    _pod("shop/web", "10.1.0.1", ProxyClass.SIDECAR),
    _pod("pay/ledger", "10.2.0.1", ProxyClass.SIDECAR),
    _pod("pay/plain", "10.2.0.2", ProxyClass.NONE),
    _pod("ops/gateway", "10.3.0.1", ProxyClass.GATEWAY),
    _pod("ops/mesh", "10.3.0.2", ProxyClass.AMBIENT),
)
OTHERS = {
    "192.168.0.1": Peer(entities=frozenset({Entity.HOST})),
    "192.168.0.2": Peer(entities=frozenset({Entity.REMOTE_NODE})),
    "203.0.113.7": Peer(entities=frozenset({Entity.WORLD, Entity.WORLD_IPV4})),
}
ADDRESSES = (*(str(client.addresses[0]) for client in CLIENTS), *OTHERS)


def caller(address: str) -> Caller:
    """The name a source has: its own where it has a proxy, none else."""
    for client in CLIENTS:
        if str(client.addresses[0]) == address and client.proxy is not ProxyClass.NONE:
            return Caller(f"spiffe://cluster.local/ns/{client.namespace}/sa/default", address)
    return Caller(None, address)


def _some(*values: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True)


_PRINCIPALS = _some("cluster.local/ns/shop/sa/default", "cluster.local/ns/pay/sa/default", "*")
_NAMES = _some("shop", "pay", "ops")
_CIDRS = _some("10.1.0.0/16", "10.2.0.1/32", "192.168.0.0/24", "203.0.113.0/24")


def _fields(kinds: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """One or two of the fields, never none: an empty source would say nothing."""
    chosen = st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=2, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: kinds[name] for name in names}))


_SOURCES = st.one_of(
    _fields({"principals": _PRINCIPALS, "notPrincipals": _PRINCIPALS, "ipBlocks": _CIDRS, "notIpBlocks": _CIDRS}),
    _fields({"namespaces": _NAMES, "notNamespaces": _NAMES, "ipBlocks": _CIDRS, "requestPrincipals": st.just(["*"])}),
    _fields({"serviceAccounts": _some("default", "pay/default")}),
)
_OPERATIONS = st.one_of(
    _fields({"ports": _some("8080", "9090"), "notPorts": _some("8080", "9090")}),
    _fields(
        {
            "ports": _some("8080", "9090"),
            "methods": _some("GET", "POST"),
            "notMethods": _some("GET", "POST"),
            "paths": _some("/metrics", "/m*", "/"),
            "notPaths": _some("/metrics", "/"),
        }
    ),
)
_WHENS = st.one_of(
    st.builds(lambda v: {"key": "source.namespace", "values": v}, _some("shop", "pay")),
    st.builds(lambda v: {"key": "source.ip", "notValues": v}, _CIDRS),
    st.builds(lambda v: {"key": "destination.port", "values": v}, _some("8080", "9090")),
    st.builds(lambda v: {"key": "request.headers[x-team]", "values": v}, _some("a", "b")),
)


def _rule(sources: list[Any], operations: list[Any], whens: list[Any]) -> dict[str, Any]:
    rule: dict[str, Any] = {}
    if kept := [{"source": source} for source in sources if source]:
        rule["from"] = kept
    if kept := [{"operation": operation} for operation in operations if operation]:
        rule["to"] = kept
    if whens:
        rule["when"] = whens
    return rule


_RULES = st.builds(
    _rule,
    st.lists(_SOURCES, min_size=1, max_size=2) | st.just([]),
    st.lists(_OPERATIONS, min_size=1, max_size=2) | st.just([]),
    st.just([]) | st.lists(_WHENS, max_size=1),
)
_SELECTORS = st.sampled_from([None, None, {"matchLabels": SERVER_LABELS}, {"matchLabels": {"app": "other"}}])
_NAMESPACES = st.sampled_from(["shop", "shop", "shop", "istio-system", "pay"])


def _authorization(
    number: int, namespace: str, action: str, rules: list[Any], selector: Any, dry_run: bool
) -> dict[str, Any]:
    spec: dict[str, Any] = {"action": action}
    if rules or action == "ALLOW":
        spec["rules"] = rules
    if action == "ALLOW" and not rules:
        del spec["rules"]
    if selector:
        spec["selector"] = selector
    annotations = {"istio.io/dry-run": "true"} if dry_run and action in ("ALLOW", "DENY") else {}
    metadata = {"name": f"p{number}", "namespace": namespace, "annotations": annotations}
    return {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec}


_AUTHORIZATION = st.builds(
    _authorization,
    st.integers(0, 10**6),
    _NAMESPACES,
    st.sampled_from(["ALLOW", "ALLOW", "DENY", "AUDIT"]),
    st.integers(0, 7).flatmap(lambda n: st.lists(_RULES, min_size=1, max_size=2) if n else st.just([])),
    _SELECTORS,
    st.sampled_from([False, False, False, True]),
).filter(lambda policy: policy["spec"]["action"] == "ALLOW" or policy["spec"].get("rules"))
_MODES = st.sampled_from(["STRICT", "PERMISSIVE", "DISABLE", "UNSET"])


def _peer_authentication(number: int, namespace: str, mode: str, selector: Any, port_modes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {"mtls": {"mode": mode}}
    if selector and namespace != "istio-system":
        spec["selector"] = selector
        if port_modes:
            spec["portLevelMtls"] = {port: {"mode": port_mode} for port, port_mode in port_modes.items()}
    metadata = {"name": f"a{number}", "namespace": namespace, "annotations": {}}
    return {"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": metadata, "spec": spec}


def _one_per_scope(policies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    scopes = {(p["metadata"]["namespace"], str(p["spec"].get("selector"))): p for p in policies}
    return list(scopes.values())


_PEER_AUTHENTICATION = st.builds(
    _peer_authentication,
    st.integers(0, 10**6),
    st.sampled_from(["shop", "istio-system", "pay"]),
    _MODES,
    st.sampled_from([None, {"matchLabels": SERVER_LABELS}]),
    st.dictionaries(st.sampled_from(PORTS), _MODES, max_size=2),
)


@dataclass(frozen=True)
class World:
    """Raw policies, the class of each port of the server, and what the product makes of both."""

    raw: list[dict[str, Any]]
    classes: dict[int, PortClass]

    @property
    def policies(self) -> PolicySet:
        # as the API server's JSON has it: mapping keys are text
        texts = [json.loads(json.dumps(data)) for data in self.raw]
        return PolicySet.of(
            Document(d["kind"], d["apiVersion"], d["metadata"]["namespace"], d["metadata"]["name"], d) for d in texts
        )

    @property
    def capture(self) -> Capture:
        return capture_with(self.classes)

    def numbering(self) -> Numbering:
        holders = {ip_address(address): peer for address, peer in OTHERS.items()}
        holders |= {client.addresses[0]: client.peer() for client in (*CLIENTS, SERVER)}
        return number_peers(holders, self.policies.referenced_networks())

    def always_admitted(self, address: str, port: int) -> bool:
        """Whether Envoy would let in this source whatever it sends."""
        return all(
            admits(self.raw, SERVER.namespace, dict(SERVER.labels), port, caller(address), content)
            for content in CONTENTS
        )

    def sometimes_admitted(self, address: str, port: int, principal: str | None) -> bool:
        """Whether Envoy would let in something of this source, if it presents a certificate."""
        who = replace(caller(address), principal=principal)
        return any(admits(self.raw, SERVER.namespace, dict(SERVER.labels), port, who, content) for content in CONTENTS)


def capture_with(classes: dict[int, PortClass]) -> Capture:
    ports = PortClasses.of(PortClass.CAPTURED, classes)
    return Capture(dict.fromkeys(IpFamily, ports), frozenset({Judge.ENVOY}))


WORLDS = st.builds(
    World,
    st.builds(
        lambda authorization, authentication: [*authorization, *_one_per_scope(authentication)],
        st.lists(_AUTHORIZATION, min_size=1, max_size=3, unique_by=lambda p: p["metadata"]["name"]),
        st.lists(_PEER_AUTHENTICATION, max_size=2, unique_by=lambda p: p["metadata"]["name"]),
    ),
    st.fixed_dictionaries(
        {
            port: st.sampled_from([PortClass.EXCLUDED, PortClass.EXCLUDED, PortClass.CAPTURED, PortClass.UNGUARDED])
            for port in PORTS
        }
    ),
)
