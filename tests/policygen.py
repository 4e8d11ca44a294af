"""Random clusters and random policies over them, as raw objects, from one source of randomness.

Names, labels, addresses and ports are few, so that rules meet the flows they are asked about.
"""

from __future__ import annotations

import random
from ipaddress import ip_address
from typing import Any

from oracle import Holder

NAMESPACES = {"shop": {"team": "a"}, "pay": {"team": "b"}, "ops": {}}
APPS, ROLES = ("web", "api", "db"), ("x", "y")
PORTS = (80, 443, 1000, 8080)
PORT_SETS: tuple[tuple[tuple[str, int, str], ...], ...] = (
    (),
    (("http", 8080, "TCP"),),
    (("http", 80, "TCP"), ("dns", 443, "UDP"), ("http", 1000, "SCTP")),
)
CIDRS4 = (
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.0.0/29",
    "198.51.100.0/24",
    "198.51.100.128/25",
    "192.168.0.0/30",
)
CIDRS6 = ("::/0", "fd00::/8", "fd00:1::/125", "2001:db8::/32", "2001:db8:1::/48")
EXCEPTS = {
    "0.0.0.0/0": "10.0.0.0/8",
    "10.0.0.0/8": "10.1.0.0/29",
    "10.1.0.0/16": "10.1.0.0/29",
    "198.51.100.0/24": "198.51.100.128/25",
    "::/0": "2001:db8::/32",
    "2001:db8::/32": "2001:db8:1::/48",
}
REMOTE4, REMOTE6 = "192.168.0.2", "fd00:ffff::2"
NODE4, NODE6 = "192.168.0.1", "fd00:ffff::1"
NODE_LABELS = {"one": {"zone": "a"}, "two": {"zone": "b", "gpu": ""}}


def random_pods(rng: random.Random, count: int) -> list[Holder]:
    """Pods with one address of each family: two holders of the same pod."""
    found = []
    for index in range(count):
        namespace = rng.choice(list(NAMESPACES))
        labels = {"app": rng.choice(APPS)}
        if rng.random() < 0.6:
            labels["role"] = rng.choice(ROLES)
        if rng.random() < 0.2:
            labels["pod-template-hash"] = "h"
        common = {
            "namespace": namespace, "labels": labels, "namespace_labels": NAMESPACES[namespace],
            "service_account": rng.choice(("default", "robot")), "ports": rng.choice(PORT_SETS), "sidecar": True,
        }  # fmt: skip
        number = index + 1
        found.append(Holder(ip_address(f"10.{1 + index % 2}.0.{number}"), **common))  # type: ignore[arg-type]
        found.append(Holder(ip_address(f"fd00:{1 + index % 2}::{number:x}"), **common))  # type: ignore[arg-type]
    return found


def outsiders() -> list[Holder]:
    """The own node, another node, and the world inside and outside of policies' CIDRs; both families."""
    return [
        Holder(ip_address(NODE4), entities=("host",), labels=NODE_LABELS["one"]),
        Holder(ip_address(NODE6), entities=("host",), labels=NODE_LABELS["one"]),
        Holder(ip_address(REMOTE4), entities=("remote-node",), labels=NODE_LABELS["two"]),
        Holder(ip_address(REMOTE6), entities=("remote-node",), labels=NODE_LABELS["two"]),
        *(
            Holder(ip_address(a), entities=("world", "world-ipv4"))
            for a in ("198.51.100.1", "198.51.100.200", "8.8.8.8")
        ),
        Holder(ip_address("10.200.0.1"), entities=("world", "world-ipv4")),
        *(Holder(ip_address(a), entities=("world", "world-ipv6")) for a in ("2001:db8::1", "2001:db8:1::1", "2600::1")),
    ]


def maybe(rng: random.Random, chance: float) -> bool:
    return rng.random() < chance


def some(rng: random.Random, pool: tuple[Any, ...], most: int = 2) -> list[Any]:
    return rng.sample(list(pool), rng.randint(1, min(most, len(pool))))


def _expressions(rng: random.Random, keys: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """A LabelSelector over ``keys``: values each key may have."""
    found: dict[str, Any] = {}
    for key, values in keys.items():
        roll = rng.random()
        if roll < 0.3:
            found.setdefault("matchLabels", {})[key] = rng.choice(values)
        elif roll < 0.5:
            operator = rng.choice(("In", "NotIn", "Exists", "DoesNotExist"))
            expression: dict[str, Any] = {"key": key, "operator": operator}
            if operator in ("In", "NotIn"):
                expression["values"] = some(rng, values)
            found.setdefault("matchExpressions", []).append(expression)
    return found


def _pod_selector(rng: random.Random) -> dict[str, Any]:
    keys = {"app": APPS, "role": ROLES}
    if maybe(rng, 0.1):
        keys["pod-template-hash"] = ("h",)
    return _expressions(rng, keys)


def network_policy(rng: random.Random, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = {"podSelector": _pod_selector(rng) if maybe(rng, 0.6) else {}}
    if maybe(rng, 0.5):
        spec["policyTypes"] = some(rng, ("Ingress", "Egress"))
    for direction, peers_key in (("ingress", "from"), ("egress", "to")):
        if maybe(rng, 0.6):
            spec[direction] = [_network_rule(rng, peers_key) for _ in range(rng.randint(0, 2))]
    return {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": rng.choice(list(NAMESPACES))}, "spec": spec,
    }  # fmt: skip


def _network_rule(rng: random.Random, peers_key: str) -> dict[str, Any]:
    rule: dict[str, Any] = {}
    if maybe(rng, 0.8):
        rule[peers_key] = [_network_peer(rng) for _ in range(rng.randint(0, 2))]
    if maybe(rng, 0.5):
        rule["ports"] = [_network_port(rng) for _ in range(rng.randint(0, 2))]
    return rule


def _network_peer(rng: random.Random) -> dict[str, Any]:
    roll = rng.random()
    if roll < 0.35:
        return {"ipBlock": _cidr_set(rng)}
    peer: dict[str, Any] = {}
    if roll < 0.75:
        peer["podSelector"] = _pod_selector(rng)
    if roll > 0.55:
        key = "kubernetes.io/metadata.name" if maybe(rng, 0.3) else "team"
        peer["namespaceSelector"] = _expressions(rng, {key: ("a", "b") if key == "team" else tuple(NAMESPACES)})
    return peer


def _network_port(rng: random.Random) -> dict[str, Any]:
    port: dict[str, Any] = {}
    if maybe(rng, 0.6):
        port["protocol"] = rng.choice(("TCP", "UDP", "SCTP"))
    roll = rng.random()
    if roll < 0.25:
        port["port"] = rng.choice(("http", "dns"))
    elif roll < 0.8:
        port["port"] = rng.choice(PORTS)
        if maybe(rng, 0.4):
            port["endPort"] = port["port"] + rng.choice((0, 1, 500, 7000))
    return port


def _cidr_set(rng: random.Random) -> dict[str, Any]:
    cidr = rng.choice(CIDRS4 + CIDRS6)
    found: dict[str, Any] = {"cidr": cidr}
    if cidr in EXCEPTS and maybe(rng, 0.5):
        found["except"] = [EXCEPTS[cidr]]
    return found


def cluster_policy(rng: random.Random, name: str) -> dict[str, Any]:
    """A ClusterNetworkPolicy or one of its forerunners; many rules, since only their order makes them interesting."""
    kind = rng.choice(("ClusterNetworkPolicy", "ClusterNetworkPolicy", "AdminNetworkPolicy",
                       "BaselineAdminNetworkPolicy"))  # fmt: skip
    spec: dict[str, Any] = {"subject": _cluster_pods(rng) if maybe(rng, 0.6) else {"namespaces": {}}}
    if kind == "ClusterNetworkPolicy":
        spec["tier"] = rng.choice(("Admin", "Admin", "Baseline"))
    if kind != "BaselineAdminNetworkPolicy":
        spec["priority"] = rng.choice((0, 1, 5, 1000))
    for direction, peers_key in (("ingress", "from"), ("egress", "to")):
        if maybe(rng, 0.7):
            spec[direction] = [_cluster_rule(rng, kind, peers_key) for _ in range(rng.randint(1, 4))]
    version = "v1alpha2" if kind == "ClusterNetworkPolicy" else "v1alpha1"
    metadata = {"name": "default" if kind == "BaselineAdminNetworkPolicy" else name}
    return {"apiVersion": f"policy.networking.k8s.io/{version}", "kind": kind, "metadata": metadata, "spec": spec}


def _cluster_pods(rng: random.Random) -> dict[str, Any]:
    namespaces = _expressions(rng, {"team": ("a", "b"), "kubernetes.io/metadata.name": tuple(NAMESPACES)})
    if maybe(rng, 0.4):
        return {"namespaces": namespaces}
    return {"pods": {"namespaceSelector": namespaces, "podSelector": _pod_selector(rng)}}


def _cluster_rule(rng: random.Random, kind: str, peers_key: str) -> dict[str, Any]:
    allow = "Accept" if kind == "ClusterNetworkPolicy" else "Allow"
    actions = (allow, "Deny") if kind == "BaselineAdminNetworkPolicy" else (allow, "Deny", "Pass")
    rule: dict[str, Any] = {"action": rng.choice(actions)}
    rule[peers_key] = [_cluster_peer(rng, rule["action"], kind, peers_key) for _ in range(rng.randint(1, 2))]
    if maybe(rng, 0.5):
        named = all(set(peer) <= {"namespaces", "pods"} for peer in rule[peers_key])
        new = kind == "ClusterNetworkPolicy" and maybe(rng, 0.7)
        port = _cluster_protocol if new else _cluster_port
        rule["protocols" if new else "ports"] = [port(rng, named) for _ in range(rng.randint(1, 2))]
    return rule


def _cluster_peer(rng: random.Random, action: str, kind: str, peers_key: str) -> dict[str, Any]:
    roll = rng.random()
    if roll < 0.03:
        return rng.choice(({}, {"tenants": {}}))
    if peers_key == "from" or roll < 0.5:
        return _cluster_pods(rng)
    if roll < 0.65:
        return {"nodes": _expressions(rng, {"zone": ("a", "b"), "gpu": ("",)})}
    if roll < 0.7 and action in ("Accept", "Allow") and kind != "BaselineAdminNetworkPolicy":
        return {"domainNames": ["*.example.com"]}
    return {"networks": some(rng, CIDRS4 + CIDRS6)}


def _cluster_protocol(rng: random.Random, named: bool) -> dict[str, Any]:
    if named and maybe(rng, 0.25):
        return {"destinationNamedPort": rng.choice(("http", "dns"))}
    first = rng.choice(PORTS)
    if maybe(rng, 0.6):
        port: dict[str, Any] = {"number": first}
    else:
        port = {"range": {"start": first, "end": first + rng.choice((1, 500, 7000))}}
    return {rng.choice(("tcp", "tcp", "udp", "sctp")): {"destinationPort": port}}


def _cluster_port(rng: random.Random, named: bool) -> dict[str, Any]:
    if named and maybe(rng, 0.25):
        return {"namedPort": rng.choice(("http", "dns"))}
    first = rng.choice(PORTS)
    if maybe(rng, 0.6):
        port: dict[str, Any] = {"port": first}
    else:
        port = {"start": first, "end": first + rng.choice((0, 500, 7000))}
    if maybe(rng, 0.7):
        port["protocol"] = rng.choice(("TCP", "UDP", "SCTP"))
    return {"portRange" if "start" in port else "portNumber": port}


def cilium_policy(rng: random.Random, name: str) -> dict[str, Any]:
    clusterwide = maybe(rng, 0.3)
    metadata = {"name": name} if clusterwide else {"name": name, "namespace": rng.choice(list(NAMESPACES))}
    policy: dict[str, Any] = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumClusterwideNetworkPolicy" if clusterwide else "CiliumNetworkPolicy",
        "metadata": metadata,
    }
    if maybe(rng, 0.85):
        policy["spec"] = _cilium_spec(rng)
    if "spec" not in policy or maybe(rng, 0.15):
        policy["specs"] = [_cilium_spec(rng) for _ in range(rng.randint(1, 2))]
    return policy


def _cilium_spec(rng: random.Random) -> dict[str, Any]:
    spec: dict[str, Any] = {"endpointSelector": _cilium_selector(rng) if maybe(rng, 0.6) else {}}
    lists = ("ingress", "ingressDeny", "egress", "egressDeny")
    for name in some(rng, lists, 3):
        rules = [_cilium_rule(rng, "from" if "ingress" in name else "to") for _ in range(rng.randint(1, 2))]
        spec[name] = rules
    if maybe(rng, 0.2):
        spec["enableDefaultDeny"] = {rng.choice(("ingress", "egress")): maybe(rng, 0.5)}
    return spec


def _cilium_selector(rng: random.Random) -> dict[str, Any]:
    prefix = rng.choice(("", "k8s:", "any:"))
    keys: dict[str, tuple[str, ...]] = {f"{prefix}app": APPS, f"{prefix}role": ROLES}
    roll = rng.random()
    if roll < 0.25:
        keys["k8s:io.kubernetes.pod.namespace"] = tuple(NAMESPACES)
    elif roll < 0.4:
        keys["k8s:io.cilium.k8s.namespace.labels.team"] = ("a", "b")
    elif roll < 0.5:
        keys["io.cilium.k8s.policy.serviceaccount"] = ("default", "robot")
    elif roll < 0.55:
        keys["pod-template-hash"] = ("h",)
    return _expressions(rng, keys)


def _cilium_rule(rng: random.Random, way: str) -> dict[str, Any]:
    rule: dict[str, Any] = {}
    roll = rng.random()
    if roll < 0.4:
        peers = [_cilium_selector(rng) for _ in range(rng.randint(0, 2))]
        if maybe(rng, 0.1):
            peers.append({"matchLabels": {f"reserved:{rng.choice(('host', 'world', 'remote-node'))}": ""}})
        rule[f"{way}Endpoints"] = peers
    elif roll < 0.6:
        entities = ("all", "cluster", "world", "host", "remote-node", "world-ipv6", "none")
        rule[f"{way}Entities"] = some(rng, entities)
    elif roll < 0.7:
        rule[f"{way}CIDR"] = some(rng, CIDRS4 + CIDRS6)
    elif roll < 0.85:
        rule[f"{way}CIDRSet"] = [_cidr_set(rng) for _ in range(rng.randint(0, 2))]
    if maybe(rng, 0.1):
        family = rng.choice(("IPv4", "IPv6"))
        rule["icmps"] = [{"fields": [{"family": family, "type": 8 if family == "IPv4" else 128}]}]
    elif maybe(rng, 0.55):
        rule["toPorts"] = [_cilium_ports(rng) for _ in range(rng.randint(0, 2))]
    return rule


def _cilium_ports(rng: random.Random) -> dict[str, Any]:
    if maybe(rng, 0.1):
        return {}
    ports = []
    for _ in range(rng.randint(0, 2)):
        port: dict[str, Any] = {"port": rng.choice(("0", "http", "dns", *(str(p) for p in PORTS)))}
        if maybe(rng, 0.6):
            port["protocol"] = rng.choice(("TCP", "UDP", "SCTP", "ANY"))
        if port["port"].isdigit() and port["port"] != "0" and maybe(rng, 0.3):
            port["endPort"] = int(port["port"]) + rng.choice((0, 3, 900))
        ports.append(port)
    return {"ports": ports}


PRINCIPALS = ("cluster.local/ns/shop/sa/default", "cluster.local/ns/pay/*", "*", "*/sa/robot")


def authorization_policy(rng: random.Random, name: str, *, l4_only: bool = False) -> dict[str, Any]:
    """An AuthorizationPolicy; ``l4_only``: of nothing but addresses and ports, so that it is decided without Envoy."""
    spec: dict[str, Any] = {"action": rng.choice(("ALLOW", "ALLOW", "DENY", "DENY", "AUDIT"))}
    if maybe(rng, 0.7):
        spec["selector"] = {"matchLabels": {"app": rng.choice(APPS)}}
    spec["rules"] = [_authorization_rule(rng, l4_only) for _ in range(rng.randint(1, 2))]
    if spec["action"] == "ALLOW" and maybe(rng, 0.1):
        spec["rules"] = []
    metadata: dict[str, Any] = {"name": name, "namespace": rng.choice((*NAMESPACES, "istio-system"))}
    if spec["action"] != "AUDIT" and maybe(rng, 0.1):
        metadata["annotations"] = {"istio.io/dry-run": "true"}
    return {
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec,
    }  # fmt: skip


def _authorization_rule(rng: random.Random, l4_only: bool) -> dict[str, Any]:
    rule: dict[str, Any] = {}
    if maybe(rng, 0.6):
        rule["from"] = [{"source": _source(rng, l4_only)} for _ in range(rng.randint(1, 2))]
    if maybe(rng, 0.6):
        rule["to"] = [{"operation": _operation(rng, l4_only)} for _ in range(rng.randint(1, 2))]
    if maybe(rng, 0.3):
        rule["when"] = [_when(rng, l4_only)]
    return rule


def _source(rng: random.Random, l4_only: bool) -> dict[str, Any]:
    fields = {"ipBlocks": CIDRS4 + CIDRS6}
    if not l4_only:
        fields |= {
            "principals": PRINCIPALS,
            "namespaces": ("shop", "p*", "*"),
            "serviceAccounts": ("default", "pay/robot"),
            "requestPrincipals": ("*", "iss/*", "iss/bob"),
            "remoteIpBlocks": CIDRS4,
        }
    return _fields(rng, fields)


def _operation(rng: random.Random, l4_only: bool) -> dict[str, Any]:
    fields: dict[str, tuple[str, ...]] = {"ports": tuple(str(port) for port in PORTS)}
    if not l4_only:
        fields |= {"methods": ("GET", "POST", "*"), "paths": ("/", "/a", "/a*", "*/b")}
    return _fields(rng, fields)


def _fields(rng: random.Random, pools: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    names = some(rng, tuple(pools), 2)
    if "serviceAccounts" in names:
        names = [name for name in names if name not in ("principals", "namespaces")]
    found = {}
    for name in names:
        key = f"not{name[0].upper()}{name[1:]}" if maybe(rng, 0.25) else name
        found[key] = some(rng, pools[name])
    return found


def _when(rng: random.Random, l4_only: bool) -> dict[str, Any]:
    keys: dict[str, tuple[str, ...]] = {
        "source.ip": CIDRS4, "destination.port": ("80", "8080"), "destination.ip": ("10.1.0.0/16", "fd00:1::/64"),
    }  # fmt: skip
    if not l4_only:
        keys |= {"request.headers[x-user]": ("ann", "*"), "request.auth.claims[scope]": ("read", "write"),
                 "source.namespace": ("shop", "pay")}  # fmt: skip
    key = rng.choice(list(keys))
    return {"key": key, "notValues" if maybe(rng, 0.3) else "values": some(rng, keys[key])}


def peer_authentication(rng: random.Random, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = {"mtls": {"mode": rng.choice(("UNSET", "PERMISSIVE", "STRICT", "STRICT"))}}
    namespace = rng.choice((*NAMESPACES, "istio-system"))
    if namespace != "istio-system" and maybe(rng, 0.5):
        spec["selector"] = {"matchLabels": {"app": rng.choice(APPS)}}
        if maybe(rng, 0.5):
            spec["portLevelMtls"] = {str(rng.choice(PORTS)): {"mode": rng.choice(("PERMISSIVE", "STRICT", "UNSET"))}}
    return {
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec,
    }  # fmt: skip


def random_tiers(rng: random.Random) -> list[dict[str, Any]]:
    """Policies of every tier that mostly select the same pods, so that what one leaves open another decides."""
    found = [cluster_policy(rng, f"c{index}") for index in range(rng.randint(1, 4))]
    for policy in found:
        if maybe(rng, 0.7):
            policy["spec"]["subject"] = {"namespaces": {}}
    found = list({policy["metadata"]["name"]: policy for policy in found}.values())  # there is one default
    for index in range(rng.randint(0, 3)):
        found.append((network_policy if maybe(rng, 0.6) else cilium_policy)(rng, f"n{index}"))
    if maybe(rng, 0.1):
        spoil(rng, rng.choice(found))
    return found


def spoil(rng: random.Random, policy: dict[str, Any]) -> None:
    """Put a field nobody knows into some rule of a network policy, so that the whole object has to be refused."""
    specs = [policy["spec"]] if "spec" in policy else []
    specs += policy.get("specs") or []
    rules = [rule for spec in specs for name, value in spec.items() if isinstance(value, list) and "gress" in name
             for rule in value]  # fmt: skip
    if rules:
        rng.choice(rules)["notAField"] = 1


def random_policies(
    rng: random.Random, *, network: int = 4, mesh: int = 0, l4_only: bool = False
) -> list[dict[str, Any]]:
    """Up to so many objects of each family, a few of the network's spoilt; or what ``random_tiers`` makes."""
    tiers = network > 0 and maybe(rng, 0.2)
    found = random_tiers(rng) if tiers else []
    for index in range(0 if tiers else rng.randint(0, network)):
        kinds = (network_policy, network_policy, cilium_policy, cilium_policy, cluster_policy)
        policy = rng.choice(kinds)(rng, f"n{index}")
        if policy["metadata"]["name"] == "default" and any(e["metadata"]["name"] == "default" for e in found):
            continue  # there is only one
        if maybe(rng, 0.1):
            spoil(rng, policy)
        found.append(policy)
    for index in range(rng.randint(0, mesh)):
        if maybe(rng, 0.2) and not l4_only:
            found.append(peer_authentication(rng, f"m{index}"))
        else:
            found.append(authorization_policy(rng, f"m{index}", l4_only=l4_only))
    rng.shuffle(found)
    return found
