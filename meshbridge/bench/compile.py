"""From policies and pods to a node's packed sets, without a kernel: from nothing, and after one change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from random import Random
from statistics import median
from typing import Any, Final

from meshbridge.agent.compilation import Compilation
from meshbridge.agent.identities import PeerNumbers
from meshbridge.agent.view import LocalPod
from meshbridge.bench.figures import Column, Section, Target, Value
from meshbridge.bench.workbench import Workbench
from meshbridge.bypass.annotations import TRAFFIC, MeshDefaults, render_init_args
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.iptables import parse_iptables_save
from meshbridge.bypass.redirect_config import restore_text
from meshbridge.bypass.rules import SeenRules
from meshbridge.datapath.ipcache import ipcache_key
from meshbridge.datapath.policysets import RuleIds
from meshbridge.identity.model import IpFamily, Peer, ProxyClass, Workload
from meshbridge.policy.model import Document
from meshbridge.policy.parse import parse
from meshbridge.policy.policybook import PolicyBook
from meshbridge.policy.policyset import PolicySet

COLD_LIMIT_S: Final = 5.0
CHANGE_LIMIT_MS: Final = 50.0
_NAMESPACES: Final = 50
_FIRST: Final = int(IPv4Address("10.0.0.0"))
_EXCLUDED: Final = {TRAFFIC + "excludeInboundPorts": "9090"}
_NEW: Final = int(IPv4Address("10.255.0.1"))


@dataclass(frozen=True, slots=True)
class Size:
    """Policies and pods of a cluster, the distinct sets of labels among the pods, and the node's own endpoints."""

    policies: int
    label_sets: int
    pods: int
    endpoints: int

    def __str__(self) -> str:
        return f"{self.policies:,} / {self.label_sets:,} / {self.pods:,} / {self.endpoints:,}"


_BASE: Final = Size(1_000, 500, 10_000, 10)
_FULL: Final = Size(10_000, 5_000, 100_000, 100)
_SIZES: Final = {
    "1 ×": _BASE,
    "10 × policies": replace(_BASE, policies=10_000),
    "10 × label sets": replace(_BASE, label_sets=5_000),
    "10 × pods": replace(_BASE, pods=100_000),
    "10 × endpoints": replace(_BASE, endpoints=100),
    "10 × all": _FULL,
}
_COLUMNS: Final = (
    Column("variant", "grown"),
    Column("size", "policies / label sets / pods / endpoints"),
    Column("identities", "identities", ",d"),
    Column("entries", "entries", ",d"),
    Column("cold", "cold s", ".2f"),
    *(
        column
        for key, title in (("pod", "pod"), ("policy", "policy"), ("network", "CIDR"))
        for column in (Column(key, f"one {title} ms", ".1f"), Column(f"{key}_worst", f"worst {title} ms", ".1f"))
    ),
)
_NOTES: Final = (
    "CPU time of one process, without any kernel table: parse, put together, number, compile, pack.",
    "Cold: from raw objects to every endpoint's packed sets. One pod: one with labels no other has. One policy: one "
    "that selects an endpoint gets another port. One CIDR: the same, and its peers are a CIDR that no other names.",
    "Policies: 70 % CiliumNetworkPolicy, 20 % NetworkPolicy with a CIDR, 10 % AuthorizationPolicy; every second pod "
    "has a sidecar, which captures all TCP but one port. Median and worst of 20.",
)


def measure(bench: Workbench) -> list[Section]:
    sizes = {name: size for name, size in _SIZES.items() if not bench.quick or size in (_BASE, _FULL)}
    rows: list[dict[str, Value]] = []
    for name, size in sizes.items():
        bench.tell(f"compile: {name}: {size}")
        rows.append({"variant": name, "size": str(size), **measure_size(size, bench.pick(20, 5))})
    full = rows[-1]
    targets = [Target(f"from nothing at {_FULL}", _number(full["cold"]), COLD_LIMIT_S, "s")]
    targets += [
        Target(f"one {what} changed at {_FULL}, the worst", _number(full[f"{key}_worst"]), CHANGE_LIMIT_MS, "ms")
        for key, what in (("pod", "pod"), ("policy", "policy"), ("network", "policy with a new CIDR"))
    ]
    return [Section("compile", "Compiling for one node, by the size of the cluster", _COLUMNS, rows, targets, _NOTES)]


def measure_size(size: Size, repeats: int) -> dict[str, Value]:
    """The figures of one size."""
    node = _Node(size)
    cold_s = _timed(node.start)
    found: dict[str, Value] = {
        "identities": len(node.numbers.identities),
        "entries": sum(len(packed) for each in node.compilation.compiled.values() for packed in each.sets or ()),
        "cold": cold_s,
    }
    for key, changes in (
        ("pod", node.new_pods()), ("policy", node.changed_policies(networks=False)),
        ("network", node.changed_policies(networks=True)),
    ):  # fmt: skip
        times = [_timed(next(changes)) * 1e3 for _ in range(repeats)]
        found |= {key: median(times), f"{key}_worst": max(times)}
    return found


@dataclass(slots=True)
class _Node:
    """A cluster with one node's state as the agent keeps it."""

    size: Size
    book: PolicyBook = field(default_factory=PolicyBook)
    numbers: PeerNumbers = field(default_factory=PeerNumbers)
    compilation: Compilation = field(default_factory=lambda: Compilation(RuleIds()))
    documents: list[Document] = field(init=False)
    peers: list[Peer] = field(init=False)
    pods: dict[str, LocalPod] = field(init=False)
    seen: dict[str, SeenRules] = field(init=False)

    def __post_init__(self) -> None:
        random = Random(1)
        self.peers = [_peer(index) for index in range(self.size.label_sets)]
        self.documents = [_document(random, index, self.size.label_sets) for index in range(self.size.policies)]
        self.pods = {f"uid-{index}": _endpoint(index, self.peers) for index in range(self.size.endpoints)}
        sidecars = {uid: pod for uid, pod in self.pods.items() if pod.workload.proxy is ProxyClass.SIDECAR}
        self.seen = {uid: _redirect_rules(pod) for uid, pod in sidecars.items()}

    def start(self) -> None:
        holders = {
            ipcache_key(IPv4Address(_FIRST + index)): self.peers[index % len(self.peers)]
            for index in range(self.size.pods)
        }
        for document in self.documents:
            self.book.put(document.name, parse(document))
        policies = self.book.policies()
        self.numbers.renumber(holders, policies.referenced_networks())
        self._update(policies, None)

    def _update(self, policies: PolicySet, changed: PolicySet | None) -> None:
        self.compilation.update(self.pods, policies, self.numbers.identities, changed, self.seen)

    def new_pods(self) -> Iterator[Callable[[], None]]:
        index = 0
        while True:
            index += 1
            peer = Peer("ns-1", {"app": f"new-{index}", "tier": f"t-{index % 10}"}, service_account="s-1")
            address = ipcache_key(IPv4Address(_NEW + index))

            def change(address: bytes = address, peer: Peer = peer) -> None:
                self.numbers.change({address: peer})
                self._update(self.book.policies(), self.book.among(()))

            yield change

    def changed_policies(self, *, networks: bool) -> Iterator[Callable[[], None]]:
        mine = {(pod.workload.namespace, pod.workload.labels["app"]) for pod in self.pods.values()}
        chosen = [
            document
            for document in self.documents
            if document.kind == "CiliumNetworkPolicy"
            and (document.namespace, document.data["spec"]["endpointSelector"]["matchLabels"]["app"]) in mine
        ]
        index = 0
        while True:
            index += 1
            document = chosen[index % len(chosen)]
            (rule,) = document.data["spec"]["ingress"]
            changed: dict[str, Any] = {"toPorts": [{"ports": [{"port": str(20_000 + index), "protocol": "TCP"}]}]}
            if networks:
                changed = {"fromCIDR": [f"192.168.{index}.0/24"]}
            spec = {**document.data["spec"], "ingress": [{**({} if networks else rule), **changed}]}
            new = replace(document, data={**document.data, "spec": spec})

            def change(new: Document = new) -> None:
                parsed, before = parse(new), self.book[new.name]
                self.book.put(new.name, parsed)
                policies = self.book.policies()
                if policies.referenced_networks() != self.numbers.networks:
                    self.numbers.tell_apart(policies.referenced_networks())
                self._update(policies, self.book.among((before, parsed)))

            yield change


def _peer(index: int) -> Peer:
    labels = {"app": f"a-{index}", "tier": f"t-{index % 10}"}
    proxy = ProxyClass.SIDECAR if index % 2 else ProxyClass.NONE
    return Peer(f"ns-{index % _NAMESPACES}", labels, service_account=f"s-{index % 7}", proxy=proxy)


def _endpoint(index: int, peers: list[Peer]) -> LocalPod:
    place = index * 37 % len(peers)
    peer = peers[place]
    workload = Workload(
        peer.namespace or "", f"pod-{index}", f"uid-{index}", "node", (IPv4Address(_FIRST + place),), peer.labels,
        annotations=_EXCLUDED, service_account=peer.service_account, proxy=peer.proxy,
        init_args=render_init_args(_EXCLUDED, MeshDefaults()) if peer.proxy is ProxyClass.SIDECAR else None,
    )  # fmt: skip
    return LocalPod(workload)


def _redirect_rules(pod: LocalPod) -> SeenRules:
    """What istio-init makes of a pod."""
    config, _ = parse_init_args(pod.workload.init_args or (), pod.workload.init_env)
    return SeenRules(tuple(parse_iptables_save(restore_text(config, family), family) for family in IpFamily))


def _document(random: Random, index: int, label_sets: int) -> Document:
    target, other = random.randrange(label_sets), random.randrange(label_sets)
    app, namespace = {"app": f"a-{target}"}, f"ns-{target % _NAMESPACES}"
    tier = {"matchLabels": {"tier": f"t-{other % 10}"}}
    spec: Mapping[str, Any]
    if index % 10 < 7:
        kind, version = "CiliumNetworkPolicy", "cilium.io/v2"
        of_other = {"app": f"a-{other}", "k8s:io.kubernetes.pod.namespace": f"ns-{other % _NAMESPACES}"}
        ports = [{"port": str(7000 + index % 100), "protocol": "TCP"}]
        rule = {"fromEndpoints": [{"matchLabels": of_other}, tier], "toPorts": [{"ports": ports}]}
        spec = {"endpointSelector": {"matchLabels": app}, "ingress": [rule]}
    elif index % 10 < 9:
        kind, version = "NetworkPolicy", "networking.k8s.io/v1"
        of = [{"namespaceSelector": {}, "podSelector": tier}, {"ipBlock": {"cidr": f"10.{index % 64}.0.0/16"}}]
        spec = {"podSelector": {"matchLabels": app}, "ingress": [{"from": of, "ports": [{"port": 8000 + index % 50}]}]}
    else:
        kind, version = "AuthorizationPolicy", "security.istio.io/v1"
        source = {"source": {"namespaces": [f"ns-{other % _NAMESPACES}"]}}
        spec = {
            "selector": {"matchLabels": app}, "action": "ALLOW",
            "rules": [{"from": [source], "to": [{"operation": {"ports": ["8080"]}}]}],
        }  # fmt: skip
    name = f"p-{index}"
    data = {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec}
    return Document(kind, version, namespace, name, data)


def _timed(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _number(value: Value) -> float:
    assert isinstance(value, float | int)
    return float(value)
