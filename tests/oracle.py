"""A slow, literal evaluator of policies: raw objects and one flow in, a verdict out.

It is written from the owners' texts alone and shares nothing with meshbridge.policy: no selector, no compiled form, no
precedence. What it costs does not matter; that it can be read against the texts does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

Address = IPv4Address | IPv6Address
INGRESS, EGRESS = "ingress", "egress"
TCP, UDP, SCTP, ICMP, ICMPV6 = 6, 17, 132, 1, 58
PROTOCOL = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}


@dataclass(frozen=True)
class Holder:
    """Who holds an address. A pod has a namespace; everything else has entities. A node's labels are the node's."""

    address: Address
    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict, hash=False)
    namespace_labels: dict[str, str] = field(default_factory=dict, hash=False)
    service_account: str = "default"
    entities: tuple[str, ...] = ()
    ports: tuple[tuple[str, int, str], ...] = ()
    sidecar: bool = False

    @property
    def is_pod(self) -> bool:
        return self.namespace != ""


@dataclass(frozen=True)
class Flow:
    """A new flow seen at one end. ``port`` is the destination port, or the ICMP type."""

    endpoint: Holder
    peer: Holder
    direction: str
    protocol: int
    port: int
    localhost: bool = False


def network_allows(objects: list[dict[str, Any]], flow: Flow) -> bool:
    """Whether the network policies let a new flow pass: tier by tier, the first that says something decides."""
    decided = _cluster_tier(objects, "Admin", flow)
    if decided is not None:
        return decided
    isolated = allowed = denied = False
    understood = False  # whether some object that is not refused isolates
    for each in objects:
        isolates = False
        if each["kind"] == "NetworkPolicy":
            isolates, passes = _kubernetes(each, flow)
            allowed = allowed or passes
        elif each["kind"] in ("CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"):
            for verdict in _cilium(each, flow):
                isolates = isolates or verdict == "isolated"
                allowed = allowed or verdict == "allowed"
                denied = denied or verdict == "denied"
        elif _is_refused(each) and _cluster_selects(each, flow) and _may_only_accept(each, flow):
            isolates = True
        isolated = isolated or isolates
        understood = understood or (isolates and not _is_refused(each))
    if denied:
        return False
    if isolated:
        localhost = flow.localhost and flow.direction == INGRESS
        return allowed or (localhost and (understood or not _baseline_denies(objects, flow)))
    if allowed:
        return True
    return _cluster_tier(objects, "Baseline", flow) is not False


# NetworkPolicy v1


def _kubernetes(policy: dict[str, Any], flow: Flow) -> tuple[bool, bool]:
    """(the policy isolates the endpoint in this direction, some rule of it lets the flow pass)."""
    spec, namespace = policy["spec"], policy["metadata"]["namespace"]
    if flow.endpoint.namespace != namespace or not _kubernetes_selector(spec["podSelector"], flow.endpoint.labels):
        return False, False
    types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
    if flow.direction.capitalize() not in types:
        return False, False
    if _is_refused(policy):
        return True, False
    peers_key = "from" if flow.direction == INGRESS else "to"
    for rule in spec.get(flow.direction) or []:
        peers, ports = rule.get(peers_key) or [], rule.get("ports") or []
        peer_ok = not peers or any(_kubernetes_peer(peer, namespace, flow.peer) for peer in peers)
        if peer_ok and (not ports or any(_kubernetes_port(port, flow) for port in ports)):
            return True, True
    return True, False


def _kubernetes_peer(peer: dict[str, Any], namespace: str, holder: Holder) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        inside = holder.address in ip_network(block["cidr"])
        return inside and not any(holder.address in ip_network(cidr) for cidr in block.get("except") or [])
    if not holder.is_pod:
        return False
    if "namespaceSelector" in peer:
        labels = {**holder.namespace_labels, "kubernetes.io/metadata.name": holder.namespace}
        if not _kubernetes_selector(peer["namespaceSelector"], labels):
            return False
    elif holder.namespace != namespace:
        return False
    return _kubernetes_selector(peer.get("podSelector", {}), holder.labels)


def _kubernetes_port(port: dict[str, Any], flow: Flow) -> bool:
    protocol = PROTOCOL[port.get("protocol", "TCP")]
    if protocol != flow.protocol:
        return False
    if "port" not in port:
        return True
    if isinstance(port["port"], str):
        return flow.port in _named(port["port"], protocol, flow)
    return port["port"] <= flow.port <= port.get("endPort", port["port"])


def _kubernetes_selector(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items()) and all(
        _expression(expression, labels.get(expression["key"])) for expression in selector.get("matchExpressions") or []
    )


def _expression(expression: dict[str, Any], value: str | None) -> bool:
    operator, values = expression["operator"], expression.get("values") or []
    if operator == "Exists":
        return value is not None
    if operator == "DoesNotExist":
        return value is None
    if operator == "In":
        return value in values
    return value not in values


def _named(name: str, protocol: int, flow: Flow) -> list[int]:
    """The ports of that name and protocol at the pod the flow goes to."""
    pod = flow.endpoint if flow.direction == INGRESS else flow.peer
    return [port for named, port, proto in pod.ports if named == name and PROTOCOL[proto] == protocol]


# ClusterNetworkPolicy, AdminNetworkPolicy and BaselineAdminNetworkPolicy

_CLUSTER_KINDS = {"ClusterNetworkPolicy": "", "AdminNetworkPolicy": "Admin", "BaselineAdminNetworkPolicy": "Baseline"}
_CLUSTER_PEERS = {INGRESS: {"namespaces", "pods"},
                  EGRESS: {"namespaces", "pods", "nodes", "networks", "domainNames"}}  # fmt: skip


def _cluster_tier(objects: list[dict[str, Any]], tier: str, flow: Flow) -> bool | None:
    """Whether a tier accepts or denies the flow; None: it leaves that to the next one."""
    policies = [
        each for each in objects
        if each["kind"] in _CLUSTER_KINDS and (_CLUSTER_KINDS[each["kind"]] or each["spec"]["tier"]) == tier
        and _cluster_selects(each, flow)
    ]  # fmt: skip
    if any(_is_refused(each) and each["spec"].get(flow.direction) and not _may_only_accept(each, flow)
           for each in policies):  # fmt: skip
        return False
    # Among equals the API leaves the choice open; the product goes by name. The baseline of old has no priority.
    policies.sort(key=lambda each: (each["spec"].get("priority", 1001), each["metadata"]["name"], each["kind"]))
    for policy in policies:
        for rule in policy["spec"].get(flow.direction) or [] if not _is_refused(policy) else []:
            action = _cluster_action(rule, flow)
            if action is not None:
                return {"Accept": True, "Allow": True, "Deny": False}.get(action)
    return None


def _baseline_denies(objects: list[dict[str, Any]], flow: Flow) -> bool:
    """Whether any rule of the Baseline tier would deny the flow: it stands for what a refused object does not say."""
    return any(
        _cluster_tier([{**each, "spec": {**each["spec"], flow.direction: [rule]}}], "Baseline", flow) is False
        for each in objects if each["kind"] in _CLUSTER_KINDS
        for rule in each["spec"].get(flow.direction) or []
    )  # fmt: skip


def _may_only_accept(policy: dict[str, Any], flow: Flow) -> bool:
    rules = policy["spec"].get(flow.direction) or []
    return bool(rules) and all(rule["action"] in ("Accept", "Allow") for rule in rules)


def _cluster_selects(policy: dict[str, Any], flow: Flow) -> bool:
    return policy["kind"] in _CLUSTER_KINDS and _cluster_peer(policy["spec"]["subject"], flow.endpoint)


def _cluster_action(rule: dict[str, Any], flow: Flow) -> str | None:
    """What the rule does with the flow; None when it does not match."""
    peers = rule["from" if flow.direction == INGRESS else "to"]
    if any(not set(peer) <= _CLUSTER_PEERS[flow.direction] or not peer for peer in peers):
        return None if rule["action"] in ("Accept", "Allow") else "Deny"
    if not any(_cluster_peer(peer, flow.peer) for peer in peers):
        return None
    ports = rule.get("protocols") or rule.get("ports")
    return rule["action"] if not ports or any(_cluster_port(port, flow) for port in ports) else None


def _cluster_peer(peer: dict[str, Any], holder: Holder) -> bool:
    labels = {**holder.namespace_labels, "kubernetes.io/metadata.name": holder.namespace}
    if "namespaces" in peer:
        return holder.is_pod and _kubernetes_selector(peer["namespaces"], labels)
    if "pods" in peer:
        return (
            holder.is_pod
            and _kubernetes_selector(peer["pods"].get("namespaceSelector", {}), labels)
            and _kubernetes_selector(peer["pods"]["podSelector"], holder.labels)
        )
    if "nodes" in peer:
        is_node = "host" in holder.entities or "remote-node" in holder.entities
        return is_node and _kubernetes_selector(peer["nodes"], holder.labels)
    return any(holder.address in ip_network(cidr) for cidr in peer.get("networks", []))  # nobody knows domain names


def _cluster_port(port: dict[str, Any], flow: Flow) -> bool:
    if name := port.get("destinationNamedPort") or port.get("namedPort"):
        return flow.port in _named(name, flow.protocol, flow)
    if "portNumber" in port or "portRange" in port:
        spot = port.get("portNumber") or port["portRange"]
        first, last = (spot["port"], spot["port"]) if "portNumber" in port else (spot["start"], spot["end"])
        return PROTOCOL[spot.get("protocol", "TCP")] == flow.protocol and first <= flow.port <= last
    ((protocol, value),) = port.items()
    spot = value["destinationPort"].get("range") or dict.fromkeys(
        ("start", "end"), value["destinationPort"].get("number")
    )
    return PROTOCOL[protocol.upper()] == flow.protocol and spot["start"] <= flow.port <= spot["end"]


# CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy


def _cilium(policy: dict[str, Any], flow: Flow) -> list[str]:
    """What each rule of the policy says of the flow: "isolated", "allowed", "denied"."""
    namespace = policy["metadata"].get("namespace") if policy["kind"] == "CiliumNetworkPolicy" else None
    specs = ([policy["spec"]] if "spec" in policy else []) + list(policy.get("specs") or [])
    said = []
    for spec in specs:
        if namespace is not None and flow.endpoint.namespace != namespace:
            continue
        if not _cilium_selector(spec["endpointSelector"], flow.endpoint, forced=namespace is not None):
            continue
        allows, denies = spec.get(flow.direction) or [], spec.get(f"{flow.direction}Deny") or []
        if _is_refused(policy):
            if flow.direction in spec or f"{flow.direction}Deny" in spec:
                said.append("denied" if f"{flow.direction}Deny" in spec else "isolated")
            continue
        if (allows or denies) and (spec.get("enableDefaultDeny") or {}).get(flow.direction, True):
            said.append("isolated")
        said += ["allowed" for rule in allows if _cilium_rule(rule, namespace, flow)]
        said += ["denied" for rule in denies if _cilium_rule(rule, namespace, flow)]
    return said


def _cilium_rule(rule: dict[str, Any], namespace: str | None, flow: Flow) -> bool:
    way = "from" if flow.direction == INGRESS else "to"
    kinds = [kind for kind in ("Endpoints", "Entities", "CIDR", "CIDRSet") if f"{way}{kind}" in rule]
    limited = rule.get("toPorts") or rule.get("icmps")
    if not kinds and not limited:
        return False
    if kinds and not any(_cilium_peer(kinds[0], peer, namespace, flow.peer) for peer in rule[f"{way}{kinds[0]}"]):
        return False
    if rule.get("icmps"):
        wanted = [each for element in rule["icmps"] for each in element["fields"]]
        return any(
            flow.protocol == (ICMPV6 if each.get("family") == "IPv6" else ICMP) and flow.port == each["type"]
            for each in wanted
        )
    if not rule.get("toPorts"):
        return True
    return any(_cilium_port(port, flow) for element in rule["toPorts"] for port in element.get("ports") or [])


def _cilium_port(port: dict[str, Any], flow: Flow) -> bool:
    text, protocol = port["port"], port.get("protocol", "ANY")
    if flow.protocol not in ([TCP, UDP, SCTP] if protocol == "ANY" else [PROTOCOL[protocol]]):
        return False
    if text == "0":
        return True
    if text.isdigit():
        return int(text) <= flow.port <= port.get("endPort", int(text))
    return flow.port in _named(text, flow.protocol, flow)


def _cilium_peer(kind: str, peer: Any, namespace: str | None, holder: Holder) -> bool:
    if kind == "Entities":
        return _entity(peer, holder)
    if kind == "Endpoints":
        keys = [*(peer.get("matchLabels") or {}), *(each["key"] for each in peer.get("matchExpressions") or [])]
        if any("reserved:" in key for key in keys):
            return _cilium_selector(peer, holder)
        if not holder.is_pod:
            return False
        elsewhere = any("io.kubernetes.pod.namespace" in k or "io.cilium.k8s.namespace.labels." in k for k in keys)
        if namespace is not None and not elsewhere and holder.namespace != namespace:
            return False
        return _cilium_selector(peer, holder)
    if "world" not in holder.entities:
        return False
    cidr = peer if kind == "CIDR" else peer["cidr"]
    excepts = [] if kind == "CIDR" else peer.get("except") or []
    return holder.address in ip_network(cidr) and not any(holder.address in ip_network(each) for each in excepts)


def _entity(name: str, holder: Holder) -> bool:
    if name == "all":
        return True
    if name == "cluster":
        inside = ("host", "remote-node", "init", "ingress", "health", "unmanaged", "kube-apiserver")
        return holder.is_pod or any(entity in inside for entity in holder.entities)
    return name in holder.entities


def _cilium_labels(holder: Holder) -> dict[str, str]:
    """The identity's labels with their sources, less those Cilium filters out."""
    found = {f"reserved:{entity}": "" for entity in holder.entities}
    if holder.is_pod:
        found |= {f"k8s:{key}": value for key, value in holder.labels.items() if key != "pod-template-hash"}
        found |= {f"k8s:io.cilium.k8s.namespace.labels.{k}": v for k, v in holder.namespace_labels.items()}
        found["k8s:io.kubernetes.pod.namespace"] = holder.namespace
        found["k8s:io.cilium.k8s.policy.serviceaccount"] = holder.service_account
    return found


def _cilium_selector(selector: dict[str, Any], holder: Holder, *, forced: bool = False) -> bool:
    """``forced``: a subject of a namespaced policy, whose namespace replaces one under matchLabels."""
    labels = _cilium_labels(holder)

    def value_of(key: str) -> str | None:
        source, _, name = key.rpartition(":")
        wanted = [f"{source}:{name}"] if source not in ("", "any") else [f"k8s:{name}", f"reserved:{name}"]
        return next((labels[each] for each in wanted if each in labels), None)

    wanted = dict(selector.get("matchLabels") or {})
    if forced:
        wanted.pop("k8s:io.kubernetes.pod.namespace", None)
    return all(value_of(key) == value for key, value in wanted.items()) and all(
        _expression(each, value_of(each["key"])) for each in selector.get("matchExpressions") or []
    )


def _is_refused(policy: dict[str, Any]) -> bool:
    """Generators mark what must be refused by a field nobody knows, deep inside some rule."""
    return "notAField" in str(policy)


# The mesh, as Envoy judges it once it knows everything


@dataclass(frozen=True)
class Asked:
    """All that Envoy sees of one request, or of one TCP connection when ``http`` is false."""

    http: bool = True
    principal: str = ""
    method: str = "GET"
    path: str = "/"
    header: str | None = None
    claims: dict[str, Any] | None = field(default=None, hash=False)


ASKED = [
    Asked(http, principal, method, path, header, claims)
    for http in (True, False)
    for principal in (
        "",
        "cluster.local/ns/shop/sa/default",
        "cluster.local/ns/pay/sa/robot",
        "cluster.local/ns/x/sa/x",
    )
    for method in (("GET", "POST") if http else ("",))
    for path in (("/", "/a/b") if http else ("",))
    for header in ((None, "ann", "bob") if http else (None,))
    for claims in (
        (None, {"iss": "iss", "sub": "ann", "scope": "read"}, {"iss": "x", "sub": "bob", "scope": "write"})
        if http
        else (None,)
    )
]
"""What a source may ask, as far as the generated policies can tell it apart."""


def mesh_allows(
    objects: list[dict[str, Any]], flow: Flow, asked: Asked, own_addresses: tuple[Address, ...] = ()
) -> bool:
    """Whether Envoy forwards anything of a request on a captured port to the application."""
    if _mtls_mode(objects, flow) == "STRICT" and not asked.principal:
        return False
    allow_policies, allowed = False, False
    for policy in objects:
        if policy["kind"] != "AuthorizationPolicy" or not _authorization_selects(policy, flow.endpoint):
            continue
        spec, action = policy["spec"], policy["spec"].get("action", "ALLOW")
        if action == "AUDIT" or policy["metadata"].get("annotations", {}).get("istio.io/dry-run") == "true":
            continue
        matched = any(_rule(rule, action, policy, flow, asked, own_addresses) for rule in spec.get("rules") or [])
        if action == "DENY" and matched:
            return False
        if action == "ALLOW":
            allow_policies, allowed = True, allowed or matched
    return allowed or not allow_policies


def _authorization_selects(policy: dict[str, Any], endpoint: Holder) -> bool:
    if policy["metadata"]["namespace"] not in ("istio-system", endpoint.namespace):
        return False
    wanted = (policy["spec"].get("selector") or {}).get("matchLabels") or {}
    return all(endpoint.labels.get(key) == value for key, value in wanted.items())


def _mtls_mode(objects: list[dict[str, Any]], flow: Flow) -> str:
    """PERMISSIVE unless said otherwise; mesh, then namespace, then workload, then its port."""
    mode = "PERMISSIVE"
    every = [each for each in objects if each["kind"] == "PeerAuthentication"]
    every.sort(key=lambda each: each["metadata"]["name"])

    def first(found: list[dict[str, Any]]) -> dict[str, Any]:
        return found[0]["spec"] if found else {}

    here = flow.endpoint.namespace
    mesh = first([p for p in every if p["metadata"]["namespace"] == "istio-system" and "selector" not in p["spec"]])
    namespace = first([p for p in every if p["metadata"]["namespace"] == here and "selector" not in p["spec"]])
    workload = first(
        [
            p
            for p in every
            if p["metadata"]["namespace"] == here
            and "selector" in p["spec"]
            and p["spec"]["selector"]["matchLabels"].items() <= flow.endpoint.labels.items()
        ]
    )
    for spec in (mesh, namespace, workload):
        wanted = (spec.get("mtls") or {}).get("mode", "UNSET")
        mode = mode if wanted == "UNSET" else wanted
    port_mode = ((workload.get("portLevelMtls") or {}).get(str(flow.port)) or {}).get("mode", "UNSET")
    return mode if port_mode == "UNSET" else port_mode


_HTTP_ONLY = ("requestPrincipals", "request.", "hosts", "methods", "paths")


def _rule(
    rule: dict[str, Any],
    action: str,
    policy: dict[str, Any],
    flow: Flow,
    asked: Asked,
    own_addresses: tuple[Address, ...],
) -> bool:
    groups = [[element["source"] for element in rule.get("from") or []] or [{}]]
    groups.append([element["operation"] for element in rule.get("to") or []] or [{}])
    when = {}
    for position, each in enumerate(rule.get("when") or []):
        when[position] = (each["key"], each.get("values") or [], each.get("notValues") or [])
    names = [name for group in groups for fields in group for name in fields] + [key for key, _, _ in when.values()]
    if not asked.http and action == "ALLOW" and any(_is_http_only(name) for name in names):
        return False

    def holds(name: str, values: list[str]) -> bool:
        return any(_value(name, value, policy, flow, asked, own_addresses) for value in values)

    def fields_hold(fields: dict[str, list[str]]) -> bool:
        for name, values in fields.items():
            if not asked.http and _is_http_only(name):
                continue
            negative = name.startswith("not")
            plain = name[3].lower() + name[4:] if negative else name
            if holds(plain, values) is negative:
                return False
        return True

    for group in groups:
        if not any(fields_hold(fields) for fields in group):
            return False
    for key, values, not_values in when.values():
        if not asked.http and _is_http_only(key):
            continue
        if (values and not holds(key, values)) or holds(key, not_values):
            return False
    return True


def _is_http_only(name: str) -> bool:
    plain = name[3].lower() + name[4:] if name.startswith("not") else name
    return plain.startswith(_HTTP_ONLY)


def _text(pattern: str, value: str) -> bool:
    if pattern == "*":
        return value != ""
    if pattern.startswith("*"):
        return value.endswith(pattern[1:])
    return value.startswith(pattern[:-1]) if pattern.endswith("*") else value == pattern


def _value(
    name: str, value: str, policy: dict[str, Any], flow: Flow, asked: Asked, own_addresses: tuple[Address, ...]
) -> bool:
    claims = asked.claims or {}
    if name in ("principals", "source.principal"):
        return bool(asked.principal) and _text(value, asked.principal)
    if name in ("namespaces", "source.namespace"):
        pattern = ".*/ns/" + re.escape(value).replace(r"\*", ".*") + "/.*"
        return re.fullmatch(pattern, "spiffe://" + asked.principal) is not None
    if name in ("serviceAccounts", "source.serviceAccount"):
        namespace, account = value.split("/") if "/" in value else (policy["metadata"]["namespace"], value)
        return asked.principal.endswith(f"/ns/{namespace}/sa/{account}")
    if name in ("ipBlocks", "source.ip"):
        return flow.peer.address in ip_network(value)
    if name in ("remoteIpBlocks", "remote.ip"):
        forwarded = ip_address("198.51.100.9") if asked.http and asked.header else flow.peer.address
        return forwarded in ip_network(value)
    if name in ("ports", "destination.port"):
        return int(value) == flow.port
    if name == "destination.ip":
        return any(address in ip_network(value) for address in own_addresses)
    if name == "methods":
        return _text(value, asked.method)
    if name == "paths":
        return _text(value, asked.path)
    if name == "request.headers[x-user]":
        return asked.header is not None and _text(value, asked.header)
    if name == "requestPrincipals":
        issuer, _, subject = value.rpartition("/") if value != "*" else ("*", "", "*")
        return bool(claims) and _text(issuer, claims["iss"]) and _text(subject, claims["sub"])
    if name == "request.auth.claims[scope]":
        return bool(claims) and value in claims["scope"]
    raise AssertionError(name)
