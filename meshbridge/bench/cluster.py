"""Made-up clusters of a chosen size as manifests: pods with their status, and policies that select and name them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

NAMESPACE = "bench"
FIRST_PEER = IPv4Address("10.100.0.1")
FIRST_PORT = 7000
ELSEWHERE = "elsewhere"
ELSEWHERE_ADDRESS = "10.99.0.1"
PODS_PER_FILE = 1000
Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """A pod as the bench knows it: what a kubelet would report. With ``init_arguments`` it has a sidecar."""

    name: str
    node: str
    address: str
    labels: dict[str, str]
    service_account: str = "default"
    init_arguments: tuple[str, ...] = ()

    @property
    def uid(self) -> str:
        return f"uid-{self.name}"


@dataclass(frozen=True, slots=True)
class Scale:
    """How large: endpoints on the measured node, addresses of peers elsewhere, policies over all.

    Policies are shared out among endpoints and peers: policy i selects the endpoint ``app: a(i mod endpoints)`` and
    allows the class of peers ``peer: p(i mod policies)`` on one port; peers are spread over those classes.
    """

    endpoints: int
    addresses: int
    policies: int

    @property
    def short(self) -> str:
        return f"{self.endpoints:,} / {self.addresses:,} / {self.policies:,}"

    def __str__(self) -> str:
        return f"{self.endpoints:,} endpoints, {self.addresses:,} addresses, {self.policies:,} policies"


def population(scale: Scale, places: Iterable[Place], host: str) -> list[Object]:
    """The given pods on the node at ``host``, peers elsewhere and all policies."""
    elsewhere = {ELSEWHERE: ELSEWHERE_ADDRESS}
    return [
        *base(elsewhere)[1:],
        *(pod(place, host) for place in places),
        *(pod(place, ELSEWHERE_ADDRESS) for place in peer_places(scale)),
        *policies(scale),
    ]


def endpoint_labels(scale: Scale, number: int) -> dict[str, str]:
    """What policies of this scale select an endpoint by."""
    return {"app": f"a{number % scale.endpoints}"}


def peer_places(scale: Scale) -> list[Place]:
    """As many peers as ``scale.addresses``, in as many classes as there are policies."""
    return [
        Place(f"peer-{i}", ELSEWHERE, str(FIRST_PEER + i), {"peer": f"p{i % scale.policies}"})
        for i in range(scale.addresses)
    ]


def policies(scale: Scale) -> list[Object]:
    return [
        allow(f"allow-{i}", endpoint_labels(scale, i), [{"peer": f"p{i}"}], [FIRST_PORT + i % 100])
        for i in range(scale.policies)
    ]


def allow(
    name: str,
    subject: dict[str, str],
    peers: Iterable[dict[str, str]],
    ports: Iterable[int],
    *,
    protocol: str = "TCP",
    egress: bool = False,
) -> Object:
    """A CiliumNetworkPolicy that isolates ``subject`` in one direction and allows each of ``peers`` on each port."""
    rule = {
        "toEndpoints" if egress else "fromEndpoints": [{"matchLabels": peer} for peer in peers],
        "toPorts": [{"ports": [{"port": str(port), "protocol": protocol} for port in ports]}],
    }
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"endpointSelector": {"matchLabels": subject}, "egress" if egress else "ingress": [rule]},
    }


def pod(place: Place, host: str) -> Object:
    """The pod as the API server would have it after injection, running."""
    spec: Object = {
        "nodeName": place.node,
        "serviceAccountName": place.service_account,
        "containers": [{"name": "app", "image": "bench"}],
    }
    annotations = {"sidecar.istio.io/inject": "true" if place.init_arguments else "false"}
    labels = dict(place.labels)
    if place.init_arguments:
        spec["initContainers"] = [{"name": "istio-init", "args": list(place.init_arguments)}]
        spec["containers"].append(
            {"name": "istio-proxy", "args": ["proxy", "sidecar"], "securityContext": {"runAsUser": 1337}}
        )
        annotations["sidecar.istio.io/status"] = '{"initContainers":["istio-init"],"containers":["istio-proxy"]}'
        labels["security.istio.io/tlsMode"] = "istio"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": place.name, "namespace": NAMESPACE, "uid": place.uid, "labels": labels, "annotations": annotations,
        },
        "spec": spec,
        "status": {
            "phase": "Running",
            "hostIP": host,
            "podIP": place.address,
            "podIPs": [{"ip": place.address}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }  # fmt: skip


def authorize(name: str, subject: dict[str, str], principal: str, method: str, path: str) -> Object:
    """An Istio AuthorizationPolicy that allows one principal one method below one path."""
    operation = {"methods": [method], "paths": [f"{path}*"]}
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "selector": {"matchLabels": subject},
            "action": "ALLOW",
            "rules": [{"from": [{"source": {"principals": [principal]}}], "to": [{"operation": operation}]}],
        },
    }


def base(nodes: dict[str, str]) -> list[Object]:
    """The namespace and the nodes (name → address)."""
    found: list[Object] = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}]
    for name, address in nodes.items():
        found.append(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name},
                "status": {"addresses": [{"type": "InternalIP", "address": address}]},
            }
        )
    return found


def files(objects: Iterable[Object], stem: str) -> Iterator[tuple[str, str]]:
    """File names and texts: some thousand documents in each, since one giant file is nobody's cluster."""
    listed = list(objects)
    for number, start in enumerate(range(0, len(listed), PODS_PER_FILE)):
        texts = (json.dumps(document, indent=1) for document in listed[start : start + PODS_PER_FILE])
        yield f"{stem}-{number}.yaml", "\n---\n".join(texts) + "\n"
