"""Random clusters and random policies of Cilium's kinds: every field that decides at addresses and ports.

Names, labels, CIDRs and ports are few, so that rules meet each other and the flows they are asked about.
"""

from __future__ import annotations

import random
from typing import Any

NAMESPACES: dict[str, dict[str, str]] = {
    "shop": {"team": "a", "kubernetes.io/metadata.name": "shop"},
    "pay": {"team": "b", "kubernetes.io/metadata.name": "pay"},
    "ops": {"kubernetes.io/metadata.name": "ops"},
}
LABELS: dict[str, tuple[str, ...]] = {
    "app": ("web", "api", "db"),
    "role": ("x", "y"),
    "app.kubernetes.io/name": ("shop", "pay"),
    "pod-template-hash": ("h1", "h2"),
    "topology.kubernetes.io/zone": ("a", "b"),
    "annotation-like": ("x",),
    "example.com/empty": ("", "x"),
}
NODE_LABELS = {"zone": ("a", "b"), "node-role": ("edge", "core")}
GROUP_LABELS = {"site": ("north", "south"), "tier": ("one",)}
PORT_NAMES = ("http", "dns", "metrics")
CIDRS = (
    "0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.0.0/30", "192.168.0.0/16", "192.168.0.2/31", "198.51.100.0/24",
    "198.51.100.128/25", "198.51.100.200/32", "8.8.8.8/29", "::/0", "2001:db8::/32", "2001:db8:1::/48", "fd00::/8",
)  # fmt: skip
EXCEPTS: dict[str, tuple[str, ...]] = {
    "0.0.0.0/0": ("10.0.0.0/8", "198.51.100.0/24", "192.168.0.0/16"),
    "10.0.0.0/8": ("10.1.0.0/30", "10.200.0.0/16"),
    "198.51.100.0/24": ("198.51.100.128/25", "198.51.100.200/32"),
    "::/0": ("2001:db8::/32",),
    "2001:db8::/32": ("2001:db8:1::/48",),
}
ENTITIES = (
    "all", "world", "world-ipv4", "world-ipv6", "cluster", "cluster-mesh", "host", "remote-node", "health", "init",
    "unmanaged", "ingress", "kube-apiserver", "none",
)  # fmt: skip
PORTS = ("80", "443", "1000", "8080", "0", "010")
PROBES: tuple[tuple[int, int], ...] = (
    (6, 80), (6, 81), (6, 443), (6, 1000), (6, 8080), (6, 65535), (6, 8), (17, 53), (17, 80), (17, 1000), (132, 80),
    (132, 9000), (1, 8), (1, 3), (58, 128), (58, 135),
)  # fmt: skip
"""(IP protocol, port or ICMP type). Type 0 is not among them: Cilium has no way to ask for it."""


def random_pods(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Pods as the engine reads them."""
    found = []
    for index in range(count):
        namespace = rng.choice(list(NAMESPACES))
        names = rng.sample(PORT_NAMES, rng.randint(0, 2))
        found.append({
            "namespace": namespace,
            "labels": {key: rng.choice(values) for key, values in LABELS.items() if rng.random() < 0.5},
            "namespaceLabels": NAMESPACES[namespace],
            "serviceAccount": rng.choice(("default", "robot")),
            "address": f"10.{rng.choice((1, 2))}.0.{index + 1}" if rng.random() < 0.8 else f"fd00:1::{index + 1:x}",
            "ports": [
                {"name": n, "port": rng.choice((80, 443, 8080)), "protocol": rng.choice(("TCP", "TCP", "UDP"))}
                for n in names
            ],
        })  # fmt: skip
    return found


def random_others(rng: random.Random) -> list[dict[str, Any]]:
    """Everybody who is no pod: nodes with labels, reserved entities, the world inside and outside of CIDRs."""

    def node(address: str, *entities: str) -> dict[str, Any]:
        labels = {key: rng.choice(values) for key, values in NODE_LABELS.items() if rng.random() < 0.7}
        return {"entities": list(entities), "address": address, "nodeLabels": labels}

    world = (
        "198.51.100.1", "198.51.100.200", "8.8.8.8", "10.200.0.1", "10.1.0.99", "2001:db8::1", "2001:db8:1::1",
        "2600::1",
    )  # fmt: skip
    return [
        node("192.168.0.1", "host"),
        node("192.168.0.2", "remote-node"),
        node("192.168.0.3", "remote-node"),
        node("192.168.0.4", "remote-node", "kube-apiserver"),
        *({"entities": [entity]} for entity in ("health", "init", "ingress")),
        {"entities": ["kube-apiserver"], "address": "203.0.113.9"},
        *({"entities": [], "address": address} for address in world),
    ]


def random_groups(rng: random.Random) -> list[dict[str, Any]]:
    """CiliumCIDRGroups."""
    return [
        {
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumCIDRGroup",
            "metadata": {
                "name": name,
                "labels": {k: rng.choice(v) for k, v in GROUP_LABELS.items() if maybe(rng, 0.7)},
            },
            "spec": {"externalCIDRs": some(rng, CIDRS[1:])},
        }
        for name in ("partners", "offices")
    ]


def maybe(rng: random.Random, chance: float) -> bool:
    return rng.random() < chance


def some(rng: random.Random, pool: tuple[Any, ...], most: int = 2) -> list[Any]:
    return rng.sample(list(pool), rng.randint(1, min(most, len(pool))))


def selector_over(rng: random.Random, keys: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """A label selector with a few requirements on ``keys``, whose values these are."""
    found: dict[str, Any] = {}
    for key in rng.sample(list(keys), min(len(keys), rng.randint(0, 2))):
        values = keys[key]
        if maybe(rng, 0.5) or key.endswith("policy.cluster"):
            found.setdefault("matchLabels", {})[key] = rng.choice(values)
            continue
        expression: dict[str, Any] = {"key": key, "operator": rng.choice(("In", "NotIn", "Exists", "DoesNotExist"))}
        if expression["operator"] in ("In", "NotIn"):
            expression["values"] = some(rng, values)
        found.setdefault("matchExpressions", []).append(expression)
    return found


def endpoint_selector(rng: random.Random, nodes: bool = False) -> dict[str, Any]:
    """``nodes``: nothing about namespaces, as then Cilium takes nodes for members of any that is not named."""
    prefix = rng.choice(("", "", "k8s:", "any:"))
    keys = {f"{prefix}{key}": values for key, values in LABELS.items()}
    special = rng.choice(("", "k8s:", "any:"))
    if not nodes and maybe(rng, 0.35):
        keys = dict(rng.sample(list(keys.items()), 2))
        keys[f"{special}{rng.choice(list(SPECIAL))}"] = ()
        keys = {key: SPECIAL.get(key.rpartition(":")[2], values) for key, values in keys.items()}
    if maybe(rng, 0.06):
        keys["container:app"] = ("web",)
    return selector_over(rng, keys)


SPECIAL: dict[str, tuple[str, ...]] = {
    "io.kubernetes.pod.namespace": tuple(NAMESPACES),
    "io.cilium.k8s.namespace.labels.team": ("a", "b"),
    "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name": tuple(NAMESPACES),
    "io.cilium.k8s.policy.serviceaccount": ("default", "robot"),
    "io.cilium.k8s.policy.cluster": ("default", "other"),
}


def peer_selector(rng: random.Random, nodes: bool) -> dict[str, Any]:
    if maybe(rng, 0.1):
        key = f"reserved:{rng.choice(('host', 'remote-node', 'world-ipv4', 'health', 'kube-apiserver'))}"
        if maybe(rng, 0.6):
            return {"matchLabels": {key: ""}}
        found = endpoint_selector(rng, nodes)
        # Not DoesNotExist: where nothing has to be there, Cilium takes everybody: docs/adr/0131.
        found.setdefault("matchExpressions", []).append({"key": key, "operator": "Exists"})
        return found
    return endpoint_selector(rng, nodes)


def cidr_set(rng: random.Random) -> dict[str, Any]:
    roll = rng.random()
    if roll < 0.15:
        return {"cidrGroupRef": rng.choice(("partners", "offices", "nobody"))}
    if roll < 0.3:
        keys = {f"{rng.choice(('', 'cidrgroup:'))}{key}": values for key, values in GROUP_LABELS.items()}
        # Never empty: to Cilium's selector cache that is the selector of everybody: docs/adr/0131.
        found: dict[str, Any] = {"cidrGroupSelector": selector_over(rng, keys) or {"matchLabels": {"site": "north"}}}
    else:
        found = {"cidr": rng.choice(CIDRS)}
    excepts = EXCEPTS.get(found.get("cidr", "0.0.0.0/0"))
    if excepts and maybe(rng, 0.5):
        found["except"] = some(rng, excepts)
    return found


def cilium_policy(rng: random.Random, name: str, *, nodes: bool = False) -> dict[str, Any]:
    """A CiliumNetworkPolicy or a clusterwide one. ``nodes``: with rules by labels of nodes."""
    clusterwide = maybe(rng, 0.4)
    metadata = {"name": name} if clusterwide else {"name": name, "namespace": rng.choice(list(NAMESPACES))}
    policy: dict[str, Any] = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumClusterwideNetworkPolicy" if clusterwide else "CiliumNetworkPolicy",
        "metadata": metadata,
    }
    if maybe(rng, 0.85):
        policy["spec"] = _spec(rng, nodes)
    if "spec" not in policy or maybe(rng, 0.1):
        policy["specs"] = [_spec(rng, nodes) for _ in range(rng.randint(1, 2))]
    return policy


def _spec(rng: random.Random, nodes: bool) -> dict[str, Any]:
    kind = "nodeSelector" if maybe(rng, 0.02) else "endpointSelector"
    spec: dict[str, Any] = {kind: endpoint_selector(rng, nodes) if maybe(rng, 0.5) else {}}
    for name in some(rng, ("ingress", "ingressDeny", "egress", "egressDeny"), 3):
        way = "from" if "ingress" in name else "to"
        spec[name] = [
            _rule(rng, way, nodes, deny="Deny" in name or kind == "nodeSelector")
            for _ in range(rng.randint(0 if maybe(rng, 0.1) else 1, 2))
        ]
    if maybe(rng, 0.25):
        spec["enableDefaultDeny"] = {way: maybe(rng, 0.4) for way in some(rng, ("ingress", "egress"))}
    if maybe(rng, 0.1):
        spec |= {"description": "no effect", "labels": [{"key": "a", "value": "b"}], "log": {"value": "noted"}}
    return spec


def _rule(rng: random.Random, way: str, nodes: bool, deny: bool) -> dict[str, Any]:
    rule: dict[str, Any] = {}
    kinds = ["Endpoints", "Endpoints", "Entities", "CIDR", "CIDRSet", ""]
    for kind in [rng.choice(["Nodes", *kinds] if nodes else kinds)] if maybe(rng, 0.97) else rng.sample(kinds[1:5], 2):
        if kind:
            rule[f"{way}{kind}"] = _peers(rng, kind, nodes)
    roll = rng.random()
    if roll < 0.1:
        rule["icmps"] = [_icmp(rng) for _ in range(rng.randint(0, 2))]
    elif roll < 0.65:
        rule["toPorts"] = [_to_ports(rng, way, deny) for _ in range(rng.randint(0 if maybe(rng, 0.1) else 1, 2))]
        if maybe(rng, 0.01):
            rule["icmps"] = [_icmp(rng)]
    return rule


def _peers(rng: random.Random, kind: str, nodes: bool) -> list[Any]:
    if maybe(rng, 0.05):
        return []
    match kind:
        case "Endpoints":
            return [peer_selector(rng, nodes) for _ in range(rng.randint(1, 2))]
        case "Entities":
            return some(rng, ENTITIES) if maybe(rng, 0.99) else ["everybody"]
        case "Nodes":
            return [selector_over(rng, NODE_LABELS) for _ in range(rng.randint(1, 2))]
        case "CIDR":
            return [cidr if maybe(rng, 0.7) else cidr.partition("/")[0] for cidr in some(rng, CIDRS)]
        case _:
            return [cidr_set(rng) for _ in range(rng.randint(1, 2))]


def _icmp(rng: random.Random) -> dict[str, Any]:
    types: dict[str, tuple[Any, ...]] = {"IPv4": (8, "8", 3, "EchoRequest"), "IPv6": (128, "EchoRequest", 135)}
    fields = []
    for _ in range(rng.randint(0 if maybe(rng, 0.1) else 1, 2)):
        family = rng.choice(("IPv4", "IPv6", ""))
        fields.append({"type": rng.choice(types[family or "IPv4"])} | ({"family": family} if family else {}))
    return {"fields": fields}


def _to_ports(rng: random.Random, way: str, deny: bool) -> dict[str, Any]:
    if maybe(rng, 0.06):
        return {}
    ports = [_port(rng) for _ in range(rng.randint(0 if maybe(rng, 0.1) else 1, 3))]
    found: dict[str, Any] = {"ports": ports}
    if way == "from" and not deny and maybe(rng, 0.12):
        found["rules"] = {"http": [{"method": "GET"}]} if maybe(rng, 0.9) else {}
        if found["rules"] and maybe(rng, 0.9):
            for port in ports:
                port["protocol"] = "TCP"
                if port["port"] == "0":
                    port["port"] = "80"
    return found


def _port(rng: random.Random) -> dict[str, Any]:
    port: dict[str, Any] = {"port": rng.choice(PORTS + PORT_NAMES[:2])}
    if maybe(rng, 0.03):
        port["port"] = rng.choice(("HTTP", "08", "0x50", "70000", "-1", "a--b", "1_000", ""))
    if maybe(rng, 0.6):
        port["protocol"] = rng.choice(("TCP", "TCP", "UDP", "SCTP", "ANY"))
    if port["port"] in ("80", "443", "1000", "8080") and maybe(rng, 0.3):
        port["endPort"] = max(0, int(port["port"]) + rng.choice((0, -5, 1, 3, 900, 8000)))
    return port


def network_policy(rng: random.Random, name: str) -> dict[str, Any]:
    """A NetworkPolicy without ipBlock, on labels that both keep: what is left is the same by both owners."""
    keys = {"app": LABELS["app"], "role": LABELS["role"]}

    def peer() -> dict[str, Any]:
        found: dict[str, Any] = {}
        roll = rng.random()
        if roll < 0.7:
            found["podSelector"] = selector_over(rng, keys)
        if roll > 0.5:
            found["namespaceSelector"] = selector_over(rng, {"team": ("a", "b")})
        return found

    def port() -> dict[str, Any]:
        found: dict[str, Any] = {"protocol": rng.choice(("TCP", "UDP"))} if maybe(rng, 0.5) else {}
        roll = rng.random()
        if roll < 0.2:
            found["port"] = "http"
        elif roll < 0.9:
            found["port"] = rng.choice((80, 443, 1000))
            if maybe(rng, 0.3):
                found["endPort"] = found["port"] + rng.choice((0, 1, 9000))
        return found

    spec: dict[str, Any] = {"podSelector": selector_over(rng, keys), "policyTypes": ["Ingress", "Egress"]}
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        spec[direction] = [
            {
                **({peers: [peer() for _ in range(rng.randint(0, 2))]} if maybe(rng, 0.8) else {}),
                **({"ports": [port() for _ in range(rng.randint(0, 2))]} if maybe(rng, 0.6) else {}),
            }
            for _ in range(rng.randint(0, 2))
        ]
    return {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": rng.choice(list(NAMESPACES))}, "spec": spec,
    }  # fmt: skip
