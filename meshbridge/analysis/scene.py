"""The cluster as findings are looked for in it: pods that no policy tells apart are one, and compiled once.

Everything a finding claims about verdicts is read from the maps that the compiler makes for the kernel.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Final

from meshbridge.analysis.finding import listed, place_of
from meshbridge.bypass.bypasspolicy import NO_BYPASS_POLICIES, BypassPolicies
from meshbridge.evaluation.cluster import Cluster
from meshbridge.identity.model import Entity, IpAddress, IpFamily, IpNetwork, Peer, Workload
from meshbridge.identity.networks import NetworkIndex
from meshbridge.identity.numbering import FIRST_LOCAL, RESERVED
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import Decision, Lookup
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Anything, Direction, Document, NetworkRule, Origin, PolicyMap, Verdict
from meshbridge.policy.parse import parse
from meshbridge.policy.parse.cluster import Node, Service
from meshbridge.policy.parse.ports import LAST_PORT, PROTOCOLS
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.selectors import label_keys

HOST: Final = 1
"""The number of the pod's own node."""

REMOTE_NODE: Final = 6
ISTIOD: Final = {"app": "istiod"}
DNS: Final = {"k8s-app": "kube-dns"}
"""How the servers that every pod needs are labelled."""

_ENDED: Final = frozenset({"Succeeded", "Failed"})
_MEANT: Final = ("istio.io/", "prometheus.io/", "meshbridge.io/")
_INCIDENTAL: Final = frozenset({"sidecar.istio.io/status"})
_WORLD: Final = {
    IpFamily.IPV4: frozenset({Entity.WORLD, Entity.WORLD_IPV4}),
    IpFamily.IPV6: frozenset({Entity.WORLD, Entity.WORLD_IPV6}),
}
_KNOWN_LABELS: Final = frozenset({"app", "app.kubernetes.io/name", "istio", "k8s-app"})
_DNS_NAMESPACE: Final = "kube-system"
_WORLDS: Final = (9, 10)
_DENY: Final = {Verdict.DENY}
_CLOSE_ENOUGH: Final = 0.75
EVERYBODY: Final = -1
"""The mask of all peers, those included that are not known."""

MAX_SUPPOSED: Final = 1_000
"""How many maps of rules that are not in force are kept, since other kinds of pods may ask for the same."""


@dataclass(frozen=True, slots=True, eq=False)
class Pods:
    """Pods that nothing here tells apart; ``pod`` is one of them, ``number`` their identity."""

    pod: Workload
    names: tuple[str, ...]
    number: int
    selected: PolicySet

    def __str__(self) -> str:
        more = f" (and {len(self.names) - 1} like it)" if len(self.names) > 1 else ""
        return f"{self.names[0]}{more}"


class Scene:
    """Documents, and what follows from them.

    Cost: one compilation for each set of rules that selects some pods, whatever their number; a lookup for each
    question about two kinds of pods.
    """

    def __init__(
        self, documents: Iterable[Document], mesh: MeshSettings = DEFAULT_MESH, now: datetime | None = None
    ) -> None:
        """
        Args:
            now: When it is, for what BypassPolicies accept until some time; without it they are not read.
        """
        self.documents = tuple(documents)
        self.mesh = mesh
        self.bypass_policies = NO_BYPASS_POLICIES if now is None else BypassPolicies.of(self.documents, now)
        self.cluster = Cluster(self.documents, mesh)
        self.policies = self.cluster.policies
        self._compiled: dict[tuple[object, ...], tuple[tuple[NetworkRule, ...], Reach]] = {}
        self._supposed: dict[tuple[object, ...], tuple[tuple[NetworkRule, ...], Reach]] = {}
        self._declared: dict[int, dict[tuple[int, str], str]] = {}
        self._rules_on: dict[tuple[int, Direction], list[tuple[int, NetworkRule]]] = {}
        self._cuts: dict[int, list[int]] = {}
        self._labels: dict[frozenset[str] | None, list[str]] = {}
        self._close: dict[tuple[str, frozenset[str] | None], str] = {}
        self._masks: dict[int, tuple[NetworkRule, int]] = {}
        self._emptied: dict[int, tuple[NetworkRule, NetworkRule]] = {}

    @property
    def services(self) -> tuple[Service, ...]:
        return self.cluster.services

    @cached_property
    def workloads(self) -> tuple[Workload, ...]:
        """Every pod that is not over, as it will run."""
        return tuple(w for w in self.cluster.workloads if w.phase not in _ENDED)

    @cached_property
    def pods(self) -> tuple[Pods, ...]:
        """Every kind of pods with an identity of their own."""
        classes: dict[object, list[Workload]] = {}
        for workload in self.workloads:
            if not workload.host_network:
                classes.setdefault(self._class_of(workload), []).append(workload)
        return tuple(
            Pods(alike[0], tuple(w.key for w in alike), FIRST_LOCAL + number, self.policies.selecting(alike[0]))
            for number, alike in enumerate(classes.values())
        )

    def _class_of(self, workload: Workload) -> object:
        keys, proxy = self._label_keys, workload.proxy_container
        return (
            workload.namespace,
            tuple(sorted((k, v) for k, v in workload.labels.items() if k in keys or "istio.io/" in k)),
            workload.service_account,
            workload.proxy,
            workload.ports,
            workload.probe_ports,
            tuple(sorted((k, v) for k, v in workload.annotations.items() if _is_meant(k))),
            workload.init_args,
            tuple(sorted(workload.init_env.items())),
            (proxy.kind, proxy.native, proxy.uid, proxy.gid, tuple(sorted(proxy.env.items()))) if proxy else None,
            workload.init_containers,
            frozenset(IpFamily.of(address) for address in workload.addresses),
            self.networks_of(workload.addresses),
        )

    @cached_property
    def _label_keys(self) -> frozenset[str]:
        in_services = {key for service in self.services for key in service.selector or ()}
        in_rulings = label_keys(policy.subject for policy in self.bypass_policies.policies).pod
        return self.policies.referenced_labels().pod | in_services | in_rulings | _KNOWN_LABELS

    @cached_property
    def _networks(self) -> NetworkIndex:
        return NetworkIndex(self.policies.referenced_networks())

    def networks_of(self, addresses: Iterable[IpAddress]) -> frozenset[IpNetwork]:
        """The CIDRs policies name that contain any of ``addresses``."""
        return frozenset[IpNetwork]().union(*(self._networks.containing(address) for address in addresses))

    @property
    def identities(self) -> Mapping[int, Peer]:
        """Everybody whom the policies can tell apart: pods, nodes, the world in and out of their CIDRs."""
        return self._numbering[0]

    @property
    def _by_number(self) -> Mapping[int, Pods]:
        return self._numbering[1]

    def pod_of(self, number: int) -> Pods:
        return self._by_number[number]

    @cached_property
    def _numbering(self) -> tuple[Mapping[int, Peer], Mapping[int, Pods]]:
        """Who has each number, and which of them are pods: ``Pods.number`` in the family of the first address."""
        found, by_number = dict(RESERVED), {}
        further: list[tuple[Peer, Pods | None]] = []
        for pods in self.pods:
            first, *others = self._peers(pods.pod)
            found[pods.number], by_number[pods.number] = first, pods
            further += [(peer, pods) for peer in others]
        further += [(peer, None) for peer in self._outsiders()]
        for number, (peer, holder) in enumerate(further, FIRST_LOCAL + len(self.pods)):
            found[number] = peer
            if holder is not None:
                by_number[number] = holder
        return found, by_number

    def _peers(self, workload: Workload) -> list[Peer]:
        """The pod as policies see it by each of its addresses: those of one family may be in a CIDR alone."""
        named = self.policies.referenced_port_names()
        ports = frozenset(port for port in workload.ports if port.name in named)
        families = dict.fromkeys(map(IpFamily.of, workload.addresses)) or {IpFamily.IPV4: None}
        peers = []
        for family in families:
            networks = self.networks_of(a for a in workload.addresses if IpFamily.of(a) is family)
            peer = workload.peer(networks, self.mesh.cluster)
            peers.append(replace(peer, trust_domain=self.mesh.trust_domain, ports=ports))
        return peers

    def _outsiders(self) -> Iterator[Peer]:
        for network in sorted(self._networks.networks, key=str):
            yield Peer(entities=_WORLD[IpFamily.of(network)], networks=self._networks.covering(network))
        parsed = (parse(document) for document in self.documents if document.kind == "Node")
        for node in (found for each in parsed for found in each.objects if isinstance(found, Node)):
            for address in node.addresses:
                networks = self._networks.containing(address)
                for entity in (Entity.REMOTE_NODE, Entity.HOST):
                    yield Peer(labels=node.labels, entities=frozenset({entity}), networks=networks)
        yield _assumed(self.mesh.root_namespace, ISTIOD)
        yield _assumed(_DNS_NAMESPACE, DNS)

    def servers(self, labels: Mapping[str, str]) -> tuple[frozenset[int], bool]:
        """The pods with all of these labels, and True; where none is known the one that is mostly there, and False."""
        known = frozenset(p.number for p in self.pods if labels.items() <= p.pod.labels.items())
        if known:
            return known, True
        assumed = (n for n, peer in self.identities.items() if n not in self._by_number and peer.labels == labels)
        return frozenset(assumed), False

    @cached_property
    def sources(self) -> frozenset[int]:
        """Whom a person knows as the other end of a flow: pods, other nodes, the world."""
        world = {n for n, peer in self.identities.items() if Entity.WORLD in peer.entities and n >= FIRST_LOCAL}
        return frozenset(self._by_number) | {REMOTE_NODE, *_WORLDS} | world

    def at_address(self, address: IpAddress) -> int:
        """Who somebody outside of the cluster at this address is."""
        networks = self.networks_of([address])
        plain = _WORLDS[IpFamily.of(address)]
        return next(
            (n for n, p in self.identities.items() if p.networks == networks and Entity.WORLD in p.entities), plain
        )

    @cached_property
    def compiler(self) -> Compiler:
        return Compiler(self.identities)

    def reach(self, pods: Pods, direction: Direction, rules: tuple[NetworkRule, ...] | None = None) -> Reach:
        """Who reaches the pods, or whom they reach, under the network policies; or under ``rules`` in their place."""
        family = self.family_of(pods.pod)
        own = tuple(r for r in (pods.selected.network if rules is None else rules) if r.direction is direction)
        key = (tuple(map(id, own)), direction, family, pods.pod.ports, self.capture(pods).inbound[family])
        compiled = self._compiled if rules is None else self._supposed
        known = compiled.get(key)
        if known is None:
            if len(self._supposed) > MAX_SUPPOSED:
                self._supposed.clear()
            selected = replace(
                pods.selected, network=own, authorization=(), peer_authentication=(), request_authentication=(),
                refusals=(),
            )  # fmt: skip
            policy_map = self.compiler.map(pods.pod, selected, selected, self.capture(pods), direction, family)
            known = compiled[key] = (own, Reach(policy_map, self.identities))  # ids are keys while the rules live
        return known[1]

    def peers_of(self, rule: NetworkRule) -> int:
        """Everybody whom the rule's peers pick, as ``compiler.index`` has them."""
        known = self._masks.get(id(rule))
        if known is not None:
            return known[1]
        mask = EVERYBODY if isinstance(rule.peers, Anything) else 0
        for selector in () if isinstance(rule.peers, Anything) else rule.peers:
            mask |= self.compiler.index.matching(selector)
        self._masks[id(rule)] = rule, mask  # ids are keys while the rules live
        return mask

    def rules_on(self, pods: Pods, direction: Direction) -> list[tuple[int, NetworkRule]]:
        """The network rules that select the pods in a direction, each behind the mask of its peers."""
        found = self._rules_on.get((pods.number, direction))
        if found is None:
            rules = (rule for rule in pods.selected.network if rule.direction is direction)
            found = self._rules_on[pods.number, direction] = [(self.peers_of(rule), rule) for rule in rules]
        return found

    def cuts_of(self, pods: Pods) -> list[int]:
        """Where the ports that rules of the pods name by number begin, and where the others go on behind them."""
        found = self._cuts.get(pods.number)
        if found is None:
            matches = (
                match
                for rule in pods.selected.network
                if not isinstance(rule.ports, Anything)
                for match in rule.ports
                if not match.name
            )
            ends = {end for match in matches for end in (match.first, match.last + 1) if end <= LAST_PORT}
            found = self._cuts[pods.number] = sorted(ends)
        return found

    @cached_property
    def bits(self) -> Mapping[int, int]:
        """Each number's bit in the masks."""
        return {number: 1 << position for position, number in enumerate(self.identities)}

    def emptied(self, rule: NetworkRule) -> NetworkRule:
        """The rule without effect; the same one for the same rule, so that maps with it are known again."""
        known = self._emptied.get(id(rule))
        if known is None:
            known = self._emptied[id(rule)] = rule, without_effect(rule)
        return known[1]

    def capture(self, pods: Pods) -> Capture:
        return self.cluster.capture(pods.pod)

    def families_of(self, workload: Workload) -> frozenset[IpFamily]:
        """The families of its addresses; IPv4 where it has none yet."""
        return frozenset(map(IpFamily.of, workload.addresses)) or frozenset({IpFamily.IPV4})

    def family_of(self, workload: Workload) -> IpFamily:
        """The family of its first address; IPv4 where it has none yet."""
        return next((IpFamily.of(address) for address in workload.addresses), IpFamily.IPV4)

    def named(self, numbers: Iterable[int]) -> list[str]:
        """What people call these identities."""
        by_number = self._by_number
        return [str(by_number[n]) if n in by_number else _outsider(self.identities[n]) for n in sorted(numbers)]

    @cached_property
    def deny_only(self) -> Mapping[Direction, frozenset[tuple[str, str, str]]]:
        """By direction the policies, as (kind, namespace, name), with rules in it that all deny."""
        verdicts: dict[tuple[Direction, tuple[str, str, str]], set[Verdict]] = {}
        for rule in self.policies.network:
            origin = rule.origin
            named = (origin.kind, origin.namespace, origin.name)
            verdicts.setdefault((rule.direction, named), set()).add(rule.verdict)
        return {
            direction: frozenset(named for (of, named), every in verdicts.items() if of is direction and every == _DENY)
            for direction in Direction
        }

    @cached_property
    def namespaces(self) -> frozenset[str]:
        """Those that a Namespace, or anything in them but a policy, shows to exist."""
        kinds = {
            (group, kind) for group, kind, _, _ in (d.key for d in self.documents) if group in ("", "apps", "batch")
        }
        inhabited = {d.namespace for d in self.documents if (d.key[0], d.kind) in kinds and d.namespace}
        return frozenset(inhabited | {d.name for d in self.documents if d.kind == "Namespace"})

    @cached_property
    def knows_namespaces(self) -> bool:
        """Whether the documents say which namespaces there are."""
        return any(document.kind == "Namespace" for document in self.documents)

    @cached_property
    def inhabited(self) -> frozenset[str]:
        """The namespaces with pods."""
        return frozenset(workload.namespace for workload in self.workloads)

    @cached_property
    def by_origin(self) -> Mapping[tuple[str, str, str], Document]:
        """The document of a kind, namespace and name."""
        return {(d.kind, d.namespace, d.name): d for d in reversed(self.documents)}

    def document(self, origin: Origin) -> Document | None:
        return self.by_origin.get((origin.kind, origin.namespace, origin.name))

    def origin_of(self, pods: Pods, path: str = "") -> Origin:
        """Where the first of the pods was written down."""
        return self.origin_of_pod(pods.pod.key, path)

    def origin_of_pod(self, key: str, path: str = "") -> Origin:
        namespace, _, name = key.partition("/")
        document = self._pod_documents.get((namespace, name))
        return place_of(document, path) if document is not None else Origin("Pod", namespace, name)

    @cached_property
    def _pod_documents(self) -> Mapping[tuple[str, str], Document]:
        found: dict[tuple[str, str], Document] = {}
        for document in self.documents:
            of_pods = document.key[0] in ("apps", "batch") or (document.key[0] == "" and document.kind == "Pod")
            if of_pods and ((document.namespace, document.name) not in found or document.kind == "Pod"):
                found[document.namespace, document.name] = document
        return found

    def close_to(self, label: str, namespaces: Iterable[str] | None) -> str:
        """The ``key=value`` of some pod's labels most like ``label``; empty when none is like it."""
        where = None if namespaces is None else frozenset(namespaces)
        known = self._close.get((label, where))
        if known is None:
            labels = self._labels.get(where)
            if labels is None:
                labels = self._labels[where] = self._count_labels(where)
            near = difflib.get_close_matches(label, labels, 1, _CLOSE_ENOUGH)
            known = self._close[label, where] = near[0] if near else ""
        return known

    def _count_labels(self, namespaces: frozenset[str] | None) -> list[str]:
        counted = Counter(
            f"{key}={value}"
            for workload in self.workloads
            if namespaces is None or workload.namespace in namespaces
            for key, value in workload.labels.items()
        )
        return [label for label, _ in counted.most_common()]

    def declared_ports(self, pods: Pods) -> Mapping[tuple[int, str], str]:
        """The (port, protocol)s that containers and Services declare, with their names."""
        found = self._declared.get(pods.number)
        if found is None:
            found = self._declared[pods.number] = self._declared_by(pods.pod)
        return found

    @cached_property
    def _services_in(self) -> Mapping[str, list[Service]]:
        found: dict[str, list[Service]] = {}
        for service in self.services:
            found.setdefault(service.namespace, []).append(service)
        return found

    @cached_property
    def declaring(self) -> Mapping[tuple[int, str], frozenset[int]]:
        """By (port, protocol) the numbers of the pods that declare it."""
        found: dict[tuple[int, str], set[int]] = {}
        for pods in self.pods:
            for port in self.declared_ports(pods):
                found.setdefault(port, set()).add(pods.number)
        return {port: frozenset(numbers) for port, numbers in found.items()}

    def _declared_by(self, pod: Workload) -> dict[tuple[int, str], str]:
        found = {(port.port, port.protocol): port.name for port in pod.ports if port.protocol in PROTOCOLS}
        for service in self._services_in.get(pod.namespace, ()):
            if service.selects(pod):
                for port in service.ports:
                    target = port.target_at(pod.ports)
                    if target is not None and port.protocol in PROTOCOLS:
                        found.setdefault((target, port.protocol), port.name)
        return dict(sorted(found.items()))

    def probe_ports(self, pods: Pods) -> frozenset[int]:
        """The TCP ports that kubelet probes."""
        numbers = {port.name: port.port for port in pods.pod.ports}
        found = (p if isinstance(p, int) else numbers.get(p) for p in pods.pod.probe_ports)
        return frozenset(port for port in found if port is not None)


class Reach:
    """Whom one map lets through; numbers without an entry of their own share one answer."""

    def __init__(self, policy_map: PolicyMap, identities: Mapping[int, Peer]) -> None:
        self.map = policy_map
        self._lookup = Lookup.of(policy_map)
        self._identities = identities
        self._named = frozenset(key.identity for key in policy_map.entries) & identities.keys()
        self._nobody = max(identities) + 1
        self._reached: dict[tuple[int, int], frozenset[int]] = {}

    @property
    def isolates(self) -> bool:
        return self.map.network_default.verdict is Verdict.DENY

    def decide(self, number: int, protocol: int, port: int, *, localhost: bool = False) -> Decision:
        return self._lookup.decide(number, protocol, port, localhost=localhost)

    def passes(self, number: int, protocol: int, port: int, *, localhost: bool = False) -> bool:
        """Whether a flow passes the network policies, as far as the packet shows."""
        return self.decide(number, protocol, port, localhost=localhost).network.verdict is not Verdict.DENY

    def passing(self, protocol: int, port: int) -> frozenset[int]:
        """Everybody whose flow passes."""
        found = self._reached.get((protocol, port))
        if found is None:
            passing = {number for number in self._named if self.passes(number, protocol, port)}
            if self.passes(self._nobody, protocol, port):
                passing |= self._identities.keys() - self._named
            found = self._reached[protocol, port] = frozenset(passing)
        return found


def without_effect(rule: NetworkRule) -> NetworkRule:
    """The rule with nobody in it: it still isolates, and decides no flow."""
    return replace(rule, peers=(), ports=(), http=())


def label_text(key: str, values: Iterable[str]) -> str:
    return f"{key}={'|'.join(values)}"


def ports_text(ports: Iterable[tuple[int, str, str]]) -> str:
    """``8080/TCP (http), 9090/TCP``."""
    return listed(f"{port}/{protocol}{f' ({name})' if name else ''}" for port, protocol, name in ports)


def _assumed(namespace: str, labels: Mapping[str, str]) -> Peer:
    return Peer(namespace=namespace, labels=labels)


def _is_meant(annotation: str) -> bool:
    return annotation not in _INCIDENTAL and any(part in annotation for part in _MEANT)


def _outsider(peer: Peer) -> str:
    if peer.networks and Entity.WORLD in peer.entities:
        return str(max(peer.networks, key=lambda network: network.prefixlen))
    return ", ".join(sorted(peer.entities))
