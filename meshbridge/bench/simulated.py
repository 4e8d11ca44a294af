"""A large cluster as a platform team runs it: many namespaces, workloads of a few replicas, policies of all kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from random import Random
from typing import Any, Final

from meshbridge.bench.cluster import Object

REPLICAS: Final = 20
WORKLOADS_IN_NAMESPACE: Final = 5
DISTINGUISHED: Final = "tier"
"""A label that some policies look at, besides ``app``."""
IGNORED: Final = "pod-template-hash"
"""A label that no policy looks at."""
_FIRST_POD: Final = IPv4Address("10.128.0.1")
_FIRST_SERVICE: Final = IPv4Address("10.96.0.1")
_FIRST_NODE: Final = IPv4Address("10.0.0.1")
_NODES: Final = "10.0.0.0/16"
_BYPASSING: Final = 50
"""One workload in so many sends past its own sidecar, so that its nodes are sent all policies of the mesh."""


@dataclass(frozen=True, slots=True)
class Size:
    """How many of each. ``own_keys``: policies of each namespace look at a label key that no other's do."""

    nodes: int
    pods: int
    policies: int
    own_keys: bool = False

    def __str__(self) -> str:
        return f"{self.nodes:,} / {self.pods:,} / {self.policies:,}"

    @property
    def workloads(self) -> int:
        return -(-self.pods // REPLICAS)

    @property
    def namespaces(self) -> int:
        return -(-self.workloads // WORKLOADS_IN_NAMESPACE)


def node_names(size: Size) -> list[str]:
    return [f"node-{index}" for index in range(size.nodes)]


def objects(size: Size) -> Iterator[Object]:
    """All objects of the cluster; the same for the same size."""
    random = Random(8)
    for index in range(size.namespaces):
        labels = {"kubernetes.io/metadata.name": _namespace(index), "team": f"team-{index % 20}"}
        yield _object("v1", "Namespace", "", _namespace(index), labels=labels)
    for index, name in enumerate(node_names(size)):
        status = {"addresses": [{"type": "InternalIP", "address": str(_FIRST_NODE + index)}]}
        labels = {"topology.kubernetes.io/zone": f"zone-{index % 3}"}
        yield _object("v1", "Node", "", name, labels=labels, status=status)
    for workload in range(size.workloads):
        yield _service(workload)
    for index in range(size.pods):
        yield pod(size, index, random.randrange(size.nodes))
    for index in range(size.policies):
        yield policy(size, index, random)


def pod(size: Size, index: int, node: int, labels: Mapping[str, str] | None = None) -> Object:
    """Pod ``index`` of the cluster, running on a node; ``labels`` besides or in place of its own."""
    workload = index // REPLICAS
    key = {f"ns{workload // WORKLOADS_IN_NAMESPACE}.example.com/part": "main"} if size.own_keys else {}
    own = {
        "app": f"app-{workload}", DISTINGUISHED: f"tier-{workload % 4}", IGNORED: f"hash-{workload}",
        "app.kubernetes.io/name": f"name-{workload % 50}", **key, **(labels or {}),
    }  # fmt: skip
    annotations = {}
    spec: Object = {
        "nodeName": f"node-{node}",
        "serviceAccountName": f"sa-{workload % WORKLOADS_IN_NAMESPACE}",
        "containers": [{"name": "app", "image": "app", "ports": [{"name": "http", "containerPort": 8080}]}],
    }
    if workload % 2:
        annotations = {"sidecar.istio.io/status": '{"initContainers":["istio-init"],"containers":["istio-proxy"]}'}
        own["security.istio.io/tlsMode"] = "istio"
        bypassing = workload % _BYPASSING == 1
        if bypassing:
            annotations["traffic.sidecar.istio.io/excludeOutboundPorts"] = "5432"
        excluded = ["-o", "5432"] if bypassing else []
        arguments = ["istio-iptables", "-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*",
                     "-x", "", "-b", "*", "-d", "15090,15021,15020", *excluded]  # fmt: skip
        spec["initContainers"] = [{"name": "istio-init", "image": "proxyv2", "args": arguments}]
        spec["containers"].append(
            {"name": "istio-proxy", "image": "proxyv2", "args": ["proxy", "sidecar"],
             "securityContext": {"runAsUser": 1337}}
        )  # fmt: skip
    address = str(_FIRST_POD + index)
    status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
              "hostIP": str(_FIRST_NODE + node), "conditions": [{"type": "Ready", "status": "True"}]}  # fmt: skip
    namespace = _namespace(workload // WORKLOADS_IN_NAMESPACE)
    made = _object("v1", "Pod", namespace, f"pod-{index}", labels=own, spec=spec, status=status)
    made["metadata"] |= {"uid": f"uid-{index}", "annotations": annotations}
    return made


def policy(size: Size, index: int, random: Random, port: int = 8080) -> Object:
    """Policy ``index``: of one workload in most cases, every tenth of a namespace; a few name whole teams."""
    namespace = index % size.namespaces
    workload = namespace * WORKLOADS_IN_NAMESPACE + random.randrange(WORKLOADS_IN_NAMESPACE)
    other = random.randrange(size.workloads)
    app = {"matchLabels": {"app": f"app-{workload}"}}
    if size.own_keys:
        app = {"matchLabels": {f"ns{namespace}.example.com/part": "main"}}
    peer: dict[str, Any] = {"matchLabels": {"app": f"app-{other}"}}
    if namespace % 10 == 0:
        peer = {"matchLabels": {DISTINGUISHED: f"tier-{other % 4}"}}
    elif namespace % 10 == 1:
        peer = {"matchLabels": {"app.kubernetes.io/name": f"name-{other % 50}"}}
    of_other = {"kubernetes.io/metadata.name": _namespace(other // WORKLOADS_IN_NAMESPACE)}
    if namespace % 20 == 2:
        of_other = {"team": f"team-{other % 20}"}
    name = f"policy-{index}"
    ports = [{"port": port, "protocol": "TCP"}]
    if index % 10 == 0:
        spec: Object = {"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}
        return _object("networking.k8s.io/v1", "NetworkPolicy", _namespace(namespace), name, spec=spec)
    if index % 10 < 6:
        peers = [{"namespaceSelector": {"matchLabels": of_other}, "podSelector": peer}, {"ipBlock": {"cidr": _NODES}}]
        spec = {"podSelector": app, "ingress": [{"from": peers, "ports": ports}]}
        return _object("networking.k8s.io/v1", "NetworkPolicy", _namespace(namespace), name, spec=spec)
    if index % 10 < 8:
        texts = [{"port": str(port), "protocol": "TCP"}]
        spec = {"endpointSelector": app, "ingress": [{"fromEndpoints": [peer], "toPorts": [{"ports": texts}]}]}
        return _object("cilium.io/v2", "CiliumNetworkPolicy", _namespace(namespace), name, spec=spec)
    source = {"source": {"namespaces": [_namespace(other // WORKLOADS_IN_NAMESPACE)]}}
    rule = {"from": [source], "to": [{"operation": {"methods": ["GET"], "ports": [str(port)]}}]}
    spec = {"selector": app, "action": "ALLOW", "rules": [rule]}
    return _object("security.istio.io/v1", "AuthorizationPolicy", _namespace(namespace), name, spec=spec)


def everywhere(port: int) -> Object:
    """A policy that selects every pod."""
    rule = {"fromEntities": ["cluster"], "toPorts": [{"ports": [{"port": str(port), "protocol": "TCP"}]}]}
    spec = {"endpointSelector": {}, "ingress": [rule], "enableDefaultDeny": {"ingress": False}}
    return _object("cilium.io/v2", "CiliumClusterwideNetworkPolicy", "", "everywhere", spec=spec)


def _service(workload: int) -> Object:
    spec = {
        "clusterIP": str(_FIRST_SERVICE + workload), "clusterIPs": [str(_FIRST_SERVICE + workload)],
        "selector": {"app": f"app-{workload}"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
    }  # fmt: skip
    return _object("v1", "Service", _namespace(workload // WORKLOADS_IN_NAMESPACE), f"svc-{workload}", spec=spec)


def _namespace(index: int) -> str:
    return f"space-{index}"


def _object(
    version: str, kind: str, namespace: str, name: str, *, labels: dict[str, str] | None = None, **rest: Any
) -> Object:
    metadata: Object = {"name": name, **({"namespace": namespace} if namespace else {})}
    if labels:
        metadata["labels"] = labels
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **rest}
