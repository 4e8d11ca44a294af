"""A small cluster that changes at random: its objects, the interfaces of its pods, and the redirect rules in them.

Names, labels, addresses and interfaces are few, so that what goes and what comes meet.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import policygen
from policygen import APPS, NAMESPACES, PORT_SETS, PORTS, ROLES

from meshbridge.bypass.iptables import parse_iptables_save
from meshbridge.bypass.rules import SeenRules
from meshbridge.datapath.links import Link, NodeNetwork
from meshbridge.demo import istio_init
from meshbridge.identity.model import IpAddress, IpFamily
from meshbridge.kube.manifests import Key
from meshbridge.policy.model import Document

NODE, OTHER_NODE = "one", "two"
NODE_ADDRESSES = {
    NODE: ((policygen.NODE4, policygen.NODE6),),
    OTHER_NODE: ((policygen.REMOTE4, policygen.REMOTE6), ("192.168.0.3", "fd00:ffff::3")),
}
POD_ADDRESSES = tuple((f"10.{1 + n % 2}.0.{n}", f"fd00:{1 + n % 2}::{n:x}") for n in range(1, 11))
OUTSIDERS = tuple(str(holder.address) for holder in policygen.outsiders())
MOST_LOCAL, MOST_REMOTE, MOST_POLICIES = 5, 4, 7

Changed = dict[Key, tuple[Document, ...]]


@dataclass
class Pod:
    """One pod as it was created; ``ifindex`` 0 when it is on the other node."""

    name: str
    namespace: str
    node: str
    uid: str
    addresses: tuple[str, str]
    labels: dict[str, str]
    annotations: dict[str, str]
    sidecar: bool
    ports: tuple[tuple[str, int, str], ...]
    account: str
    init_args: tuple[str, ...] = ()
    ifindex: int = 0

    def document(self) -> Document:
        annotations = {**self.annotations, **({"sidecar.istio.io/status": "{}"} if self.sidecar else {})}
        containers: list[dict[str, Any]] = [
            {"name": "app", "ports": [{"name": n, "containerPort": p, "protocol": t} for n, p, t in self.ports]}
        ]
        spec: dict[str, Any] = {"nodeName": self.node, "serviceAccountName": self.account, "containers": containers}
        if self.sidecar:
            containers.append({"name": "istio-proxy", "args": ["proxy", "sidecar"]})
            spec["initContainers"] = [{"name": "istio-init", "args": list(self.init_args)}]
        data = {
            "apiVersion": "v1", "kind": "Pod", "spec": spec,
            "metadata": {"name": self.name, "namespace": self.namespace, "uid": self.uid, "labels": self.labels,
                         "annotations": annotations},
            "status": {"phase": "Running", "podIPs": [{"ip": address} for address in self.addresses]},
        }  # fmt: skip
        return document(data)


def document(data: dict[str, Any]) -> Document:
    metadata = data["metadata"]
    return Document(data["kind"], data["apiVersion"], metadata.get("namespace", ""), metadata["name"], data)


@dataclass
class RandomCluster:
    """Everything there is now. ``change`` alters it and says which objects that touched."""

    rng: random.Random
    interfaces: tuple[int, ...]
    documents: dict[Key, Document] = field(default_factory=dict)
    seen: dict[str, SeenRules] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    links: dict[int, Link] = field(default_factory=dict)
    _policies: dict[str, Key] = field(default_factory=dict)
    _serial: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def start(self) -> Changed:
        """The objects of an empty cluster with two nodes."""
        names = [*NAMESPACES, "istio-system"]
        made = [self._namespace(name, NAMESPACES.get(name, {})) for name in names]
        made += [self._node(name, variants[0]) for name, variants in NODE_ADDRESSES.items()]
        return self._put(*made)

    def change(self) -> tuple[str, Changed]:
        """One random change: what it was, and every object it touched with its definitions now."""
        kinds: dict[str, tuple[int, Callable[[], Changed]]] = {
            "a policy is written": (30, self._write_policy),
            "a policy goes": (12, self._remove_policy),
            "a pod comes": (14, self._create_pod),
            "a pod goes": (8, self._delete_pod),
            "a pod is replaced at its address": (6, self._replace_pod),
            "a pod gets other labels": (7, self._relabel),
            "a pod gets other annotations": (5, self._annotate),
            "a namespace gets other labels": (5, self._relabel_namespace),
            "redirect rules come or go": (8, self._toggle_rules),
            "the other node gets other addresses": (2, self._move_node),
        }
        if self.rng.random() < 0.08:
            several = [self.rng.choice(list(kinds)) for _ in range(3)]
            touched: Changed = {}
            for name in several:
                touched |= kinds[name][1]()
            return "several at once", touched
        name = self.rng.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
        return name, kinds[name][1]()

    def network(self) -> NodeNetwork:
        """The node's network namespace."""
        own = frozenset(ip_address(address) for address in NODE_ADDRESSES[NODE][0])
        routes: dict[IpAddress, int] = {
            ip_address(address): pod.ifindex for pod in self.pods.values() if pod.ifindex for address in pod.addresses
        }
        return NodeNetwork(dict(self.links), own, routes)

    def local(self) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.node == NODE]

    # Changes

    def _write_policy(self) -> Changed:
        known = sorted(self._policies)
        if len(known) >= MOST_POLICIES or (known and self.rng.random() < 0.5):
            name = self.rng.choice(known)
        else:
            name = f"p{next(self._serial)}"
        made = self._policy(name)
        gone = self._policies.pop(name, None)
        touched = self._remove(gone) if gone is not None and gone != made.key else {}
        self._policies[name] = made.key
        return touched | self._put(made)

    def _policy(self, name: str) -> Document:
        roll = self.rng.random()
        if roll < 0.15:
            made = policygen.cluster_policy(self.rng, name)
        elif roll < 0.3:
            made = policygen.network_policy(self.rng, name)
        elif roll < 0.65:
            made = policygen.cilium_policy(self.rng, name)
        elif roll < 0.9:
            made = policygen.authorization_policy(self.rng, name)
        else:
            made = policygen.peer_authentication(self.rng, name)
        if roll < 0.65 and self.rng.random() < 0.08:
            policygen.spoil(self.rng, made)
        return document(made)

    def _remove_policy(self) -> Changed:
        if not self._policies:
            return self._write_policy()
        return self._remove(self._policies.pop(self.rng.choice(sorted(self._policies))))

    def _create_pod(self) -> Changed:
        free = [a for a in POD_ADDRESSES if all(pod.addresses != a for pod in self.pods.values())]
        local = self.rng.random() < 0.6
        others = [pod for pod in self.pods.values() if (pod.node == NODE) == local]
        if not free or len(others) >= (MOST_LOCAL if local else MOST_REMOTE):
            return self._delete_pod()
        name = f"pod-{next(self._serial)}"
        return self._add(name, self.rng.choice(list(NAMESPACES)), NODE if local else OTHER_NODE, self.rng.choice(free))

    def _add(self, name: str, namespace: str, node: str, addresses: tuple[str, str]) -> Changed:
        rng = self.rng
        pod = Pod(
            name, namespace, node, f"uid-{next(self._serial)}", addresses, self._labels(), self._annotations(),
            rng.random() < 0.7, rng.choice(PORT_SETS), rng.choice(("default", "robot")),
        )  # fmt: skip
        if pod.sidecar:
            pod.init_args = istio_init.render(pod.annotations, pod.name)
        if node == NODE:
            pod.ifindex = rng.choice([ifindex for ifindex in self.interfaces if ifindex not in self.links])
            self.links[pod.ifindex] = Link(pod.ifindex, f"veth-{pod.uid}")
            if pod.sidecar and rng.random() < 0.6:
                self.seen[pod.uid] = rules_of(pod)
        self.pods[name] = pod
        return self._put(pod.document())

    def _delete_pod(self) -> Changed:
        if not self.pods:
            return self._create_pod()
        return self._take_away(self.rng.choice(sorted(self.pods)))

    def _take_away(self, name: str) -> Changed:
        pod = self.pods.pop(name)
        self.links.pop(pod.ifindex, None)
        self.seen.pop(pod.uid, None)
        return self._remove(pod.document().key)

    def _replace_pod(self) -> Changed:
        """Another pod at the same address at once, mostly of the same name, often on the same interface number."""
        if not self.local():
            return self._create_pod()
        old = self.rng.choice(self.local())
        touched = self._take_away(old.name)
        name = old.name if self.rng.random() < 0.6 else f"pod-{next(self._serial)}"
        return touched | self._add(name, self.rng.choice((old.namespace, *NAMESPACES)), NODE, old.addresses)

    def _relabel(self) -> Changed:
        return self._alter(lambda pod: setattr(pod, "labels", self._labels()))

    def _annotate(self) -> Changed:
        """Later edits change nothing of the rules; that is what makes them contradict."""
        return self._alter(lambda pod: setattr(pod, "annotations", self._annotations()))

    def _alter(self, alter: Callable[[Pod], None]) -> Changed:
        if not self.pods:
            return self._create_pod()
        pod = self.rng.choice([self.pods[name] for name in sorted(self.pods)])
        alter(pod)
        return self._put(pod.document())

    def _relabel_namespace(self) -> Changed:
        name = self.rng.choice(list(NAMESPACES))
        return self._put(self._namespace(name, self.rng.choice(({"team": "a"}, {"team": "b"}, {}))))

    def _toggle_rules(self) -> Changed:
        candidates = [pod for pod in self.local() if pod.sidecar]
        if not candidates:
            return self._create_pod()
        pod = self.rng.choice(candidates)
        if self.seen.pop(pod.uid, None) is None:
            self.seen[pod.uid] = rules_of(pod)
        return {}

    def _move_node(self) -> Changed:
        return self._put(self._node(OTHER_NODE, self.rng.choice(NODE_ADDRESSES[OTHER_NODE])))

    # Their parts

    def _labels(self) -> dict[str, str]:
        labels = {"app": self.rng.choice(APPS)}
        if self.rng.random() < 0.6:
            labels["role"] = self.rng.choice(ROLES)
        return labels

    def _annotations(self) -> dict[str, str]:
        found = {}
        if self.rng.random() < 0.5:
            found["excludeInboundPorts"] = ",".join(map(str, policygen.some(self.rng, PORTS)))
        elif self.rng.random() < 0.3:
            found["includeInboundPorts"] = ",".join(map(str, policygen.some(self.rng, PORTS)))
        if self.rng.random() < 0.4:
            found["excludeOutboundPorts"] = ",".join(map(str, policygen.some(self.rng, PORTS)))
        if self.rng.random() < 0.2:
            found["excludeOutboundIPRanges"] = "10.1.0.0/16"
        return {istio_init.TRAFFIC + name: value for name, value in found.items()}

    def _namespace(self, name: str, labels: dict[str, str]) -> Document:
        own = {**labels, "kubernetes.io/metadata.name": name}
        return document({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": own}})

    def _node(self, name: str, addresses: tuple[str, str]) -> Document:
        status = {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]}
        metadata = {"name": name, "labels": self.rng.choice((policygen.NODE_LABELS[name], {"zone": "c"}))}
        return document({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "status": status})

    def _put(self, *made: Document) -> Changed:
        self.documents |= {d.key: d for d in made}
        return {d.key: (d,) for d in made}

    def _remove(self, key: Key) -> Changed:
        self.documents.pop(key, None)  # two policies may be one object: there is one baseline
        return {key: ()}


def rules_of(pod: Pod) -> SeenRules:
    """The rules Istio's init container writes for the arguments the pod was created with."""
    arguments = istio_init.parse(pod.init_args[1:])
    return SeenRules(tuple(parse_iptables_save(istio_init.rules(arguments, family), family) for family in IpFamily))
