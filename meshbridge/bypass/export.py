"""Compensation as policies of other enforcers, for clusters whose CNI shall enforce it.

An export only subtracts: it denies what the kernel's entries would drop, leaves everything else to the user's own
policies, and switches no default deny on. What a dialect cannot say is left out, and said.

Spec: CILIUM.md §a (deny, enableDefaultDeny), §c (ClusterNetworkPolicy); Calico: GlobalNetworkPolicy, Tier, selectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any, Final

from meshbridge.bypass.compensated import Compensated, Omission, compensated_ports, ports_text
from meshbridge.bypass.inventory import Inventory
from meshbridge.bypass.partition import InexpressibleError, MeshPods, Names
from meshbridge.bypass.sets import IntSet
from meshbridge.policy.lowering import own_principal

Object = dict[str, Any]

MESH_LABEL: Final = "security.istio.io/tlsMode"
"""What Istio's injector puts on every pod that it gives a proxy, with the value ``istio``."""

MANAGED_BY: Final = {"app.kubernetes.io/managed-by": "meshbridge"}
_CILIUM_NAMESPACE = "k8s:io.kubernetes.pod.namespace"
_CILIUM_ACCOUNT = "k8s:io.cilium.k8s.policy.serviceaccount"
_NAMESPACE_NAME = "kubernetes.io/metadata.name"
_CALICO_TIER = "meshbridge"
_CILIUM_PORTS, _ADMIN_ITEMS, _ADMIN_PRIORITY = 40, 25, 500
_OUTSIDE_PODS = ("health", "ingress", "init", "kube-apiserver", "remote-node", "unmanaged", "world")


class Dialect(StrEnum):
    CILIUM = "cilium"
    CLUSTER_NETWORK_POLICY = "clusternetworkpolicy"
    CALICO = "calico"


def export(inventory: Inventory, dialect: Dialect) -> tuple[list[Object], list[Omission]]:
    """The objects, in an order that does not depend on the order of the inventory, and what is missing in them."""
    found, omissions = compensated_ports(inventory)
    omissions += _unmarked(inventory)
    objects: list[Object] = [_calico_tier()] if dialect is Dialect.CALICO and found else []
    for item in found:
        where = f"{item.subject.namespace}/{item.name} TCP {ports_text(item.ports)}"
        try:
            objects.append(_WRITERS[dialect](item))
        except InexpressibleError as error:
            omissions.append(Omission(where, error))
            continue
        if unsaid := _unsaid(item, dialect):
            omissions.append(Omission(where, unsaid))
    return objects, omissions


def _unsaid(item: Compensated, dialect: Dialect) -> InexpressibleError | None:
    """What an object leaves open although it says the rest."""
    if item.partition.anonymous:
        return None
    if dialect is Dialect.CLUSTER_NETWORK_POLICY:
        return InexpressibleError(
            "nodes and the world are not dropped: an ingress rule of a ClusterNetworkPolicy can name pods only",
            fix="export for Cilium or Calico, or let MeshBridge enforce",
        )
    if dialect is Dialect.CALICO and not item.probed:
        return InexpressibleError(
            "processes of the pod's own node are not dropped: Calico always lets them reach it",
            fix="let MeshBridge enforce, if that matters on this port",
        )
    return None


def _unmarked(inventory: Inventory) -> Iterator[Omission]:
    """Pods with a proxy and without the label: the exported rules would take them for pods without one."""
    for workload in inventory.workloads:
        proxied = isinstance(own_principal(workload.peer()), str) and bool(workload.addresses)
        if proxied and workload.labels.get(MESH_LABEL) != "istio":
            error = InexpressibleError(
                f"has a proxy and no label {MESH_LABEL}=istio: the exported rules take it for a pod without one",
                fix="label the pod, or let MeshBridge enforce",
            )
            yield Omission(workload.key, error)


def _metadata(item: Compensated, prefix: str = "") -> Object:
    key = repr((item.subject, item.ports.spans)).encode()
    name = f"{item.subject.namespace}-{item.name}"[:200].rstrip("-.")
    digest = hashlib.sha256(key).hexdigest()[:8]  # pods of several templates may share a name
    return {"name": f"{prefix}meshbridge-{name}-{digest}", "labels": dict(MANAGED_BY)}


# Cilium: a CiliumClusterwideNetworkPolicy of denials, with enableDefaultDeny false


def _cilium(item: Compensated) -> Object:
    parts = item.partition
    selectors = [_cilium_selector(pods) for pods in parts.denied]
    entities: list[str] = []
    if not parts.anonymous:
        selectors.append({"matchExpressions": [_IN_A_NAMESPACE, _expression(f"k8s:{MESH_LABEL}", "NotIn", ("istio",))]})
        entities = [*_OUTSIDE_PODS, *([] if item.probed else ["host"])]
    elif not parts.contested:
        entities = ["unmanaged"]
    rules: list[Object] = []
    for to_ports in _cilium_ports(item.ports):
        rules += [{"fromEndpoints": selectors, "toPorts": [to_ports]}] if selectors else []
        rules += [{"fromEntities": sorted(entities), "toPorts": [to_ports]}] if entities else []
    labels = {_CILIUM_NAMESPACE: item.subject.namespace, **{f"k8s:{k}": v for k, v in item.subject.labels}}
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": _metadata(item),
        "spec": {
            "endpointSelector": {"matchLabels": labels},
            "enableDefaultDeny": {"ingress": False, "egress": False},
            "ingressDeny": rules,
        },
    }


def _cilium_ports(ports: IntSet) -> Iterator[Object]:
    entries = [
        {"port": str(max(first, 1)), "protocol": "TCP", **({"endPort": last} if last > first else {})}
        for first, last in ports
        if last
    ]
    for start in range(0, len(entries), _CILIUM_PORTS):
        yield {"ports": entries[start : start + _CILIUM_PORTS]}


def _cilium_selector(pods: MeshPods) -> Object:
    expressions = [_IN_A_NAMESPACE, _expression(f"k8s:{MESH_LABEL}", "In", ("istio",))]
    for key, names in ((_CILIUM_NAMESPACE, pods.namespaces), (_CILIUM_ACCOUNT, pods.accounts)):
        if not names.is_any:
            expressions.append(_expression(key, "NotIn" if names.inverted else "In", names.names))
    return {"matchExpressions": expressions}


def _expression(key: str, operator: str, values: tuple[str, ...]) -> Object:
    return {"key": key, "operator": operator, **({"values": list(values)} if values else {})}


_IN_A_NAMESPACE: Final = {"key": _CILIUM_NAMESPACE, "operator": "Exists"}


# ClusterNetworkPolicy: denials in the Admin tier; an Accept would overrule users' policies, and so would a Pass: all
# that come after it in the tier


def _cluster_network_policy(item: Compensated) -> Object:
    parts = item.partition
    ports = [{"tcp": {"destinationPort": _port_or_range(first, last)}} for first, last in item.ports if last]
    denied = [_admin_pods(pods) for pods in parts.denied]
    if not parts.anonymous:
        without = {"matchExpressions": [_expression(MESH_LABEL, "NotIn", ("istio",))]}
        denied.append({"pods": {"namespaceSelector": {}, "podSelector": without}})
    rules = [{"action": "Deny", "from": [pods], "protocols": ports} for pods in denied]
    if len(rules) > _ADMIN_ITEMS or len(ports) > _ADMIN_ITEMS:
        raise InexpressibleError(
            f"needs {max(len(rules), len(ports))} rules or ports, and a ClusterNetworkPolicy holds {_ADMIN_ITEMS}",
            fix="export for Cilium or Calico, or let MeshBridge enforce",
        )
    pods = {
        "namespaceSelector": {"matchLabels": {_NAMESPACE_NAME: item.subject.namespace}},
        "podSelector": {"matchLabels": dict(item.subject.labels)},
    }
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": _metadata(item),
        "spec": {"tier": "Admin", "priority": _ADMIN_PRIORITY, "subject": {"pods": pods}, "ingress": rules},
    }


def _admin_pods(pods: MeshPods) -> Object:
    if not pods.accounts.is_any:
        raise InexpressibleError(
            f"depends on service accounts ({', '.join(pods.accounts.names)}), and a ClusterNetworkPolicy names none",
            fix="export for Cilium or Calico, or let MeshBridge enforce",
        )
    names = pods.namespaces
    operator = "NotIn" if names.inverted else "In"
    where = {} if names.is_any else {"matchExpressions": [_expression(_NAMESPACE_NAME, operator, names.names)]}
    return {"pods": {"namespaceSelector": where, "podSelector": {"matchLabels": {MESH_LABEL: "istio"}}}}


def _port_or_range(first: int, last: int) -> Object:
    first = max(first, 1)
    return {"number": first} if first == last else {"range": {"start": first, "end": last}}


# Calico: a tier of its own, whose end passes on; in the default tier a Pass would skip the user's policies


def _calico_tier() -> Object:
    return {
        "apiVersion": "projectcalico.org/v3",
        "kind": "Tier",
        "metadata": {"name": _CALICO_TIER, "labels": dict(MANAGED_BY)},
        "spec": {"order": 50, "defaultAction": "Pass"},
    }


def _calico(item: Compensated) -> Object:
    parts = item.partition
    ports = [first if first == last else f"{max(first, 1)}:{last}" for first, last in item.ports if last]
    destination = {"ports": ports}
    if parts.anonymous:
        rules = [_calico_rule("Deny", destination, pods) for pods in parts.denied]
    else:
        rules = [_calico_rule("Pass", destination, pods) for pods in parts.allowed]
        rules.append(_calico_rule("Deny", destination))
    selector = [f"projectcalico.org/namespace == '{item.subject.namespace}'"]
    selector += [f"{key} == '{value}'" for key, value in item.subject.labels]
    return {
        "apiVersion": "projectcalico.org/v3",
        "kind": "GlobalNetworkPolicy",
        "metadata": _metadata(item, f"{_CALICO_TIER}."),
        "spec": {
            "tier": _CALICO_TIER,
            "selector": " && ".join(selector),
            "types": ["Ingress"],
            "ingress": rules,
        },
    }


def _calico_rule(action: str, destination: Object, pods: MeshPods | None = None) -> Object:
    rule = {"action": action, "protocol": "TCP", "destination": destination}
    if pods is None:
        return rule
    terms = [f"{MESH_LABEL} == 'istio'"]
    terms += _calico_terms("projectcalico.org/namespace", pods.namespaces)
    terms += _calico_terms("projectcalico.org/serviceaccount", pods.accounts)
    return {**rule, "source": {"selector": " && ".join(terms)}}


def _calico_terms(label: str, names: Names) -> list[str]:
    if names.is_any:
        return []
    listed = ", ".join(f"'{name}'" for name in names.names)
    return [f"{label} {'not in' if names.inverted else 'in'} {{{listed}}}"]


_WRITERS: Final[Mapping[Dialect, Callable[[Compensated], Object]]] = {
    Dialect.CILIUM: _cilium,
    Dialect.CLUSTER_NETWORK_POLICY: _cluster_network_policy,
    Dialect.CALICO: _calico,
}
