"""The cluster as its documents say, kept up to date change by change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Final

import structlog

from meshbridge.bypass.bypasspolicy import KINDS as BYPASS_KINDS
from meshbridge.bypass.capture import bypasses_outbound
from meshbridge.controller.addresses import CONTESTED, AddressBook, Distinctions, Holder
from meshbridge.controller.objectaddresses import gateway_addresses, readable_addresses, readable_workload
from meshbridge.controller.policies import PolicyItem, problem_of, problems_of, read_policy
from meshbridge.controller.services import ServiceBook
from meshbridge.identity.model import Entity, IpAddress, Peer, Workload
from meshbridge.kube.manifests import Key
from meshbridge.kube.problems import Problem, ProblemReason
from meshbridge.policy.anchors import Anchor, anchors_at
from meshbridge.policy.cilium import DEFAULT_SETTINGS
from meshbridge.policy.egressregistry import REGISTRY_ONLY_KINDS
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Document
from meshbridge.policy.parse import CILIUM_CONFIG, POLICY_KINDS, Parsed, parse
from meshbridge.policy.parse.cluster import API_SERVER, EndpointSlice, Namespace, Node, Service
from meshbridge.policy.parse.clusternetworkpolicy import CLUSTER_POLICY_KINDS
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.priorities import equal_priorities
from meshbridge.policy.references import Resolver
from meshbridge.policy.selectors import ServiceReference
from meshbridge.xds.exclusions import Exclusions

log = structlog.get_logger()

TERMINAL_PHASES: Final = frozenset({"Succeeded", "Failed"})
EXTRA_ADDRESSES: Final = "meshbridge.io/extra-addresses"

_SENT_KINDS: Final = frozenset(POLICY_KINDS) | BYPASS_KINDS | REGISTRY_ONLY_KINDS
"""Objects that travel as they are."""

_ClassKey = tuple[str, frozenset[tuple[str, str]], frozenset[tuple[str, str]], str]


@dataclass(slots=True)
class Touched:
    """What of the cluster a batch of changes may have altered for its readers."""

    nodes: set[str] = field(default_factory=set)
    """Whose endpoints, or the policies that select them, may differ."""
    addresses: bool = False
    sidecars: bool = False
    destinations: bool = False
    """Who takes mTLS may differ, for all sidecars."""


@dataclass(frozen=True, slots=True)
class LocalEndpoint:
    """A pod as its node is told of it, under a UID that no other has there; with a ``fault`` it is closed."""

    uid: str
    workload: Workload
    fault: str = ""


@dataclass(slots=True)
class _Class:
    """Pods that every policy selects alike."""

    peer: Peer
    nodes: Counter[str] = field(default_factory=Counter)
    policies: set[str] = field(default_factory=set)


class Cluster:
    """What policies, pods, nodes and services there are, indexed for the questions nodes and sidecars ask.

    Cost: a policy is matched against those classes of equal pods that have a namespace and a label it asks for; a pod
    of a new class against the policies that ask for one of its labels or for none; any other pod costs a few dictionary
    entries.
    """

    def __init__(self, mesh: MeshSettings = DEFAULT_MESH, reports: Mapping[str, Exclusions] | None = None) -> None:
        """A cluster with nothing in it but what nodes reported; other settings need another cluster."""
        self.mesh = mesh
        self.reports = dict(reports or {})
        self.addresses = AddressBook()
        self.policies: dict[str, PolicyItem] = {}
        self.services: dict[Key, Service] = {}
        self.registry: dict[Key, Parsed] = {}
        """What of Istio's registry no node is ever sent."""
        self.service_book = ServiceBook(headless=mesh.registry_only)
        self._distinctions: Distinctions | None = None
        self._names: dict[Key, tuple[str, ...]] = {}
        self._policies_at: dict[Anchor, set[str]] = {}
        self._for_all: set[str] = set()
        self._naming_services: set[str] = set()
        self._service_documents: dict[Key, tuple[Document, str]] = {}
        self._namespaces: dict[str, Namespace] = {}
        self._written: dict[Key, Workload] = {}
        self._pods: dict[Key, Workload] = {}
        self._pods_on: dict[str, dict[Key, Workload]] = {}
        self._pods_in: dict[str, set[Key]] = {}
        self._mesh_policies: set[str] = set()
        self._bypassing_on: dict[str, set[Key]] = {}
        self._node_addresses: dict[Key, tuple[IpAddress, ...]] = {}
        self._refused_addresses: dict[Key, tuple[IpAddress, ...]] = {}
        self._refused_pods: dict[Key, LocalEndpoint] = {}
        self._by_uid: dict[tuple[str, str], set[Key]] = {}
        self._same_uid: dict[tuple[str, str], Problem] = {}
        self._classes: dict[str, dict[_ClassKey, _Class]] = {}
        self._classes_at: dict[Anchor, dict[_ClassKey, _Class]] = {}
        self._classes_on: dict[str, dict[_ClassKey, _Class]] = {}
        self._problems: dict[Key, tuple[Problem, ...]] = {}
        self._contested: dict[IpAddress, Problem] = {}

    @property
    def problems(self) -> Iterable[Problem]:
        """What its objects say that a person has to mend."""
        for problems in self._problems.values():
            yield from problems
        yield from self._contested.values()
        yield from self._same_uid.values()
        ranked = (p.parsed for p in self.policies.values() if p.parsed.document.kind in CLUSTER_POLICY_KINDS)
        yield from map(problem_of, equal_priorities(ranked))
        for service in self.services.values():
            for address in (*service.addresses, *service.outside_addresses):
                holder = self.addresses.holder(address)
                if holder is not None and holder.name:
                    text = (
                        f"Service {service.namespace}/{service.name} claims {address}, which is {holder}'s: egress to "
                        "it is judged as to that pod; take the address out of the Service"
                    )
                    yield Problem(ProblemReason.CONFLICT, text)

    @property
    def problems_of_objects(self) -> Mapping[Key, tuple[Problem, ...]]:
        """Those of its problems that one object's author has to mend."""
        return self._problems

    @property
    def workloads(self) -> Iterable[Workload]:
        """Every pod, with the labels of its namespace."""
        return self._pods.values()

    def pod(self, namespace: str, name: str) -> Workload | None:
        return self._pods.get(("", "Pod", namespace, name))

    @property
    def distinctions(self) -> Distinctions:
        """What any of its policies can tell apart."""
        if self._distinctions is None:
            found = Distinctions()
            for one in {id(item.distinctions): item.distinctions for item in self.policies.values()}.values():
                found |= one
            self._distinctions = found
        return self._distinctions

    def peer_authentications(self) -> PolicySet:
        """Every PeerAuthentication of the cluster."""
        found = (item.parsed for item in self.policies.values() if item.parsed.peer_authentication)
        return PolicySet.of_parsed(found, self.mesh)

    def endpoints(self, node: str) -> Iterable[LocalEndpoint]:
        """The pods on ``node`` whose traffic its kernel can tell apart by address.

        Pods with one UID are both closed: whichever the node gave the UID's interface and policies to, the other might
        be meant. So are pods that cannot be read.
        """
        for pod in self._pods_on.get(node, {}).values():
            if _is_endpoint(pod):
                problem = self._same_uid.get((node, pod.uid))
                if problem is None:
                    yield LocalEndpoint(pod.uid, pod)
                else:
                    yield LocalEndpoint(f"{pod.uid} of {pod.key}", pod, problem.text)
        yield from (refused for refused in self._refused_pods.values() if refused.workload.node == node)

    def needs_all_mesh_policies(self, node: str) -> bool:
        """Whether an endpoint on ``node`` sends past its own sidecar, so that its node has to know what refuses it."""
        return bool(self._bypassing_on.get(node))

    def policies_on(self, node: str) -> list[PolicyItem]:
        """The policies that select an endpoint on ``node``, and all of the mesh's where it needs them; by name."""
        names: set[str] = set(self._mesh_policies) if self.needs_all_mesh_policies(node) else set()
        for pods in self._classes_on.get(node, {}).values():
            names |= pods.policies
        names |= self._for_all
        found = [self.policies[name] for name in sorted(names)]
        return found + self._services_meant(names & self._naming_services)

    def _services_meant(self, names: Iterable[str]) -> list[PolicyItem]:
        """The Services that rules of policies name, and what is known of the endpoints of those without a selector."""
        references = frozenset[ServiceReference]().union(*(self.policies[name].service_references for name in names))
        if not references:
            return []
        resolver = Resolver(DEFAULT_SETTINGS, services=tuple(self.services.values()))
        meant = {(s.namespace, s.name) for reference in references for s in resolver.services_of(reference)}
        return [
            read_policy(document, self.mesh)
            for key, (document, service) in sorted(self._service_documents.items(), key=lambda one: one[0])
            if (key[2], service) in meant
        ]

    def _service_changed(self, key: Key, documents: tuple[Document, ...], service: str, touched: Touched) -> None:
        """Keep what a Service or an EndpointSlice says, for nodes with rules that name Services."""
        if documents:
            self._service_documents[key] = (documents[0], service)
        else:
            self._service_documents.pop(key, None)
        for classes in self._classes.values() if self._naming_services else ():
            for pods in classes.values():
                if not pods.policies.isdisjoint(self._naming_services):
                    touched.nodes.update(pods.nodes)

    def report(self, node: str, exclusions: Exclusions) -> None:
        """What ``node`` has seen of its own pods; of others' it is not believed, as nobody's UID there is theirs."""
        before = self.reports.pop(node, {})
        if exclusions:
            self.reports[node] = exclusions
        for uid in before.keys() | exclusions.keys():
            if before.get(uid) != exclusions.get(uid):
                for key in self._by_uid.get((node, uid), ()):
                    self._claim_addresses(f"pod {key[2]}/{key[3]}", self._pods[key], self._pods[key], Touched())

    def policies_of(self, pod: Workload) -> PolicySet:
        """The policies that select one pod."""
        pods = self._classes.get(pod.namespace, {}).get(_class_key(pod))
        names = sorted(pods.policies) if pods is not None else []
        return PolicySet.of_parsed((self.policies[name].parsed for name in names), self.mesh)

    def apply(self, changes: Mapping[Key, tuple[Document, ...]]) -> Touched:
        """Take in what changed: for each object its definitions now, none when it is gone."""
        touched = Touched()
        for key in sorted(changes, key=_in_order):
            try:
                self._put(key, changes[key], touched)
            except Exception as error:  # one object that trips us may not keep all others from nodes, again and again
                log.exception("object.not_taken_in", kind=key[1], namespace=key[2], name=key[3])
                text = (
                    f"{key[1]} {f'{key[2]}/' if key[2] else ''}{key[3]}: cannot be taken in "
                    f"({type(error).__name__}: {str(error)[:200]}), so what was known of it before stays in force; "
                    "that is a defect of MeshBridge: report it with the object"
                )
                self._problems[key] = (Problem(ProblemReason.REFUSED, text),)
        self._find_contested()
        self.service_book.refresh(self._backends_in)
        return touched

    def _backends_in(self, namespace: str) -> Iterable[Workload]:
        pods = (self._pods[key] for key in self._pods_in.get(namespace, ()))
        return [pod for pod in pods if pod.addresses and pod.phase not in TERMINAL_PHASES]

    def _put(self, key: Key, documents: tuple[Document, ...], touched: Touched) -> None:
        self._problems.pop(key, None)
        if key[:2] in _SENT_KINDS or key == CILIUM_CONFIG:
            self._put_policies(key, documents, touched)
            return
        parsed = parse(documents[0]) if documents else None
        read = parsed.objects[0] if parsed is not None and parsed.objects else None
        problems = problems_of(parsed) if parsed is not None else ()
        if isinstance(read, Workload):
            problems += _extra_address_problems(read, documents[0])
        if problems:
            self._problems[key] = problems
        if parsed is not None and parsed.registry:
            self.registry[key] = parsed
        else:
            self.registry.pop(key, None)
        match key[:2]:
            case ("", "Namespace"):
                self._put_namespace(key[3], read if isinstance(read, Namespace) else None, touched)
            case ("", "Pod"):
                self._put_pod(key, read if isinstance(read, Workload) else None, touched)
                self._put_refused_pod(key, documents[0] if documents and read is None else None, touched)
            case ("", "Node"):
                self._put_node(key, read if isinstance(read, Node) else None, documents, touched)
            case ("discovery.k8s.io", "EndpointSlice"):
                service_name = read.service if isinstance(read, EndpointSlice) else ""
                self._service_changed(key, documents if service_name else (), service_name, touched)
                self._put_slice(key, read if isinstance(read, EndpointSlice) else None, touched)
            case ("", "Service"):
                self._service_changed(key, documents if isinstance(read, Service) else (), key[3], touched)
                touched.sidecars = touched.destinations = True
                service = read if isinstance(read, Service) else None
                self.service_book.put(key, service)
                if service is not None:
                    self.services[key] = service
                else:
                    self.services.pop(key, None)
            case _:
                pass  # pod templates and service accounts: nothing here asks for them yet

    def _put_slice(self, key: Key, part: EndpointSlice | None, touched: Touched) -> None:
        """Its addresses are somebody's, if only the world's; those behind default/kubernetes are API servers."""
        before = self.service_book.put_slice(key, part)
        gone = before.addresses if before is not None else ()
        listed = part.addresses if part is not None else ()
        for address in gone:
            self.addresses.claim(address, f"slice {key[2]}/{key[3]}", None)
        for address in listed:
            world = frozenset({Entity.WORLD, Entity.WORLD_IPV4 if address.version == 4 else Entity.WORLD_IPV6})
            self.addresses.claim(address, f"slice {key[2]}/{key[3]}", Holder(Peer(entities=world), guessed=True))
        for address in (*gone, *listed):
            serves = self.service_book.is_behind(*API_SERVER, address)
            self.addresses.mark(address, frozenset({Entity.KUBE_APISERVER} if serves else ()))
        touched.addresses |= before != part

    def _put_policies(self, key: Key, documents: tuple[Document, ...], touched: Touched) -> None:
        self._distinctions = None
        touched.sidecars |= (key[0], key[1]) not in BYPASS_KINDS
        touched.destinations |= key[1] == "PeerAuthentication"
        items = [read_policy(document, self.mesh, number) for number, document in enumerate(documents, 1)]
        problems = tuple(problem for item in items for problem in item.problems)
        if problems:
            self._problems[key] = problems
        for name in self._names.pop(key, ()):
            old = self.policies.pop(name)
            self._forget_mesh_policy(name, touched)
            self._naming_services.discard(name)
            if name in self._for_all:
                self._for_all.remove(name)
                touched.nodes.update(self._classes_on)
            for anchor in old.anchors:
                _discard(self._policies_at, anchor, name)
            for pods in self._classes_near(old):
                if name in pods.policies:
                    pods.policies.discard(name)
                    touched.nodes.update(pods.nodes)
        if items:
            self._names[key] = tuple(item.name for item in items)
        for item in items:
            self.policies[item.name] = item
            if item.service_references:
                self._naming_services.add(item.name)
            if item.is_for_all:
                self._for_all.add(item.name)
                touched.nodes.update(self._classes_on)
            if item.is_of_mesh:
                self._mesh_policies.add(item.name)
                touched.nodes.update(self._bypassing_on)
            for anchor in item.anchors:
                self._policies_at.setdefault(anchor, set()).add(item.name)
            for pods in self._classes_near(item):
                if item.concerns(pods.peer):
                    pods.policies.add(item.name)
                    touched.nodes.update(pods.nodes)

    def _forget_mesh_policy(self, name: str, touched: Touched) -> None:
        if name in self._mesh_policies:
            self._mesh_policies.remove(name)
            touched.nodes.update(self._bypassing_on)

    def _classes_near(self, item: PolicyItem) -> Iterable[_Class]:
        """Every class that the policy may concern, once."""
        found: dict[_ClassKey, _Class] = {}
        for anchor in item.anchors:
            found.update(self._classes_at.get(anchor, {}))
        return found.values()

    def _put_namespace(self, name: str, namespace: Namespace | None, touched: Touched) -> None:
        before = self._namespace_labels(name)
        if namespace is None:
            self._namespaces.pop(name, None)
        else:
            self._namespaces[name] = namespace
        if self._namespace_labels(name) != before:
            for key in list(self._pods_in.get(name, ())):
                self._put_pod(key, self._written[key], touched)

    def _namespace_labels(self, name: str) -> Mapping[str, str]:
        namespace = self._namespaces.get(name)
        return namespace.labels if namespace is not None else {}

    def _put_pod(self, key: Key, written: Workload | None, touched: Touched) -> None:
        old = self._pods.pop(key, None)
        new = None
        if written is not None:
            # Everything behind this tells pods apart by UID; a manifest need not name one.
            uid = written.uid or written.key
            new = replace(written, uid=uid, namespace_labels=self._namespace_labels(written.namespace))
            self._written[key], self._pods[key] = written, new
            self._pods_in.setdefault(new.namespace, set()).add(key)
        else:
            self._written.pop(key, None)
            self._pods_in.get(key[2], set()).discard(key)
        if old == new:
            return
        touched.sidecars = touched.destinations = True
        for pod in (old, new):
            if pod is not None and pod.node:
                touched.nodes.add(pod.node)
        self.service_book.pod_changed(old, new)
        self._place(key, old, new)
        self._claim_addresses(f"pod {key[2]}/{key[3]}", old, new, touched)

    def _put_refused_pod(self, key: Key, document: Document | None, touched: Touched) -> None:
        """A pod that cannot be read has addresses all the same, and must not pass for the world."""
        claimant = f"refused pod {key[2]}/{key[3]}"
        before = self._refused_addresses.pop(key, ())
        after = readable_addresses(document) if document is not None else ()
        for address in before:
            self.addresses.claim(address, claimant, None)
        for address in after:
            self.addresses.claim(address, claimant, CONTESTED)
        if after:
            self._refused_addresses[key] = after
        touched.addresses |= before != after
        old = self._refused_pods.pop(key, None)
        pod = readable_workload(document) if document is not None else None
        if pod is not None:
            reasons = "; ".join(problem.text for problem in self._problems.get(key, ()))
            self._refused_pods[key] = LocalEndpoint(pod.uid, pod, reasons)
        touched.nodes.update(each.node for each in (old.workload if old else None, pod) if each is not None)

    def _place(self, key: Key, old: Workload | None, new: Workload | None) -> None:
        if old is not None:
            self._pods_on[old.node].pop(key)
            if bypassing := self._bypassing_on.get(old.node):
                bypassing.discard(key)
                if not bypassing:
                    del self._bypassing_on[old.node]
            if _is_endpoint(old):
                self._leave_class(old)
                self._by_uid[old.node, old.uid].discard(key)
        if new is not None:
            self._pods_on.setdefault(new.node, {})[key] = new
            if _is_endpoint(new) and bypasses_outbound(new):
                self._bypassing_on.setdefault(new.node, set()).add(key)
            if _is_endpoint(new):
                self._join_class(new)
                self._by_uid.setdefault((new.node, new.uid), set()).add(key)
        for pair in {(pod.node, pod.uid) for pod in (old, new) if pod is not None}:
            self._compare_uids(pair)

    def _compare_uids(self, pair: tuple[str, str]) -> None:
        keys = self._by_uid.get(pair, set())
        self._same_uid.pop(pair, None)
        if not keys:
            self._by_uid.pop(pair, None)
        elif len(keys) > 1:
            names = " and ".join(f"{namespace}/{name}" for _, _, namespace, name in sorted(keys))
            text = (
                f"pods {names} on node {pair[0]} have the UID {pair[1][:80]!r}; all are closed until it is one's alone"
            )
            self._same_uid[pair] = Problem(ProblemReason.CONFLICT, text)

    def _join_class(self, pod: Workload) -> None:
        key = _class_key(pod)
        classes = self._classes.setdefault(pod.namespace, {})
        pods = classes.get(key)
        if pods is None:
            pods = classes[key] = _Class(pod.peer(cluster=self.mesh.cluster))
            near: set[str] = set()
            for anchor in anchors_at(pods.peer):
                self._classes_at.setdefault(anchor, {})[key] = pods
                near |= self._policies_at.get(anchor, set())
            pods.policies.update(name for name in near if self.policies[name].concerns(pods.peer))
        pods.nodes[pod.node] += 1
        self._classes_on.setdefault(pod.node, {})[key] = pods

    def _leave_class(self, pod: Workload) -> None:
        key = _class_key(pod)
        pods = self._classes[pod.namespace][key]
        pods.nodes[pod.node] -= 1
        if not pods.nodes[pod.node]:
            del pods.nodes[pod.node]
            del self._classes_on[pod.node][key]
        if not pods.nodes:
            del self._classes[pod.namespace][key]
            for anchor in anchors_at(pods.peer):
                del self._classes_at[anchor][key]
                if not self._classes_at[anchor]:
                    del self._classes_at[anchor]

    def _claim_addresses(self, claimant: str, old: Workload | None, new: Workload | None, touched: Touched) -> None:
        before = old.addresses if old is not None and _holds_addresses(old) else ()
        after = new.addresses if new is not None and _holds_addresses(new) else ()
        for address in before:
            if address not in after:
                self.addresses.claim(address, claimant, None)
        if new is not None and after:
            peer = replace(
                new.peer(cluster=self.mesh.cluster),
                trust_domain=self.mesh.trust_domain,
                ports=frozenset(new.ports),
                excluded=self.reports.get(new.node, {}).get(new.uid, ()),
            )
            for address in after:
                self.addresses.claim(address, claimant, Holder(peer, new.name, new.uid, new.node))
        touched.addresses |= bool(before or after)

    def _put_node(self, key: Key, node: Node | None, documents: tuple[Document, ...], touched: Touched) -> None:
        before = self._node_addresses.pop(key, ())
        after: dict[IpAddress, Holder] = {}
        if node is not None:
            holder = Holder(replace(_NODE_PEER, labels=node.labels), node=key[3])
            guess = replace(holder, guessed=True)
            after = {**dict.fromkeys(gateway_addresses(documents[0]), guess), **dict.fromkeys(node.addresses, holder)}
            self._node_addresses[key] = tuple(after)
        for address in dict.fromkeys((*before, *after)):
            touched.addresses |= self.addresses.claim(address, f"node {key[3]}", after.get(address))

    def _find_contested(self) -> None:
        for address in self.addresses.stale:
            claimants = self.addresses.contested(address)
            if claimants:
                names = " and ".join(str(holder) for holder in claimants)
                text = f"{address} is held by {names}; until one of them lets it go it has nobody's labels"
                self._contested[address] = Problem(ProblemReason.CONFLICT, text)
            else:
                self._contested.pop(address, None)


_NODE_PEER: Final = Peer(entities=frozenset({Entity.REMOTE_NODE}))


def extra_addresses(pod: Workload) -> tuple[IpAddress, ...]:
    """The further source addresses its annotation allows a pod; what is no address allows nothing."""
    return tuple(dict.fromkeys(address for _, address in _extra_addresses(pod) if address is not None))


def _extra_addresses(pod: Workload) -> Iterable[tuple[str, IpAddress | None]]:
    for text in filter(None, pod.annotations.get(EXTRA_ADDRESSES, "").split(",")):
        try:
            yield text, ip_address(text.strip())
        except ValueError:
            yield text, None


def _extra_address_problems(pod: Workload, document: Document) -> tuple[Problem, ...]:
    file, line = document.source.file, document.source.line("")
    return tuple(
        Problem(
            ProblemReason.NOTICE,
            f"{file}:{line}: Pod {pod.key}, annotation {EXTRA_ADDRESSES}: {text.strip()[:80]!r} is no address and "
            "allows nothing; write IPv4 or IPv6 addresses with commas between",
            file,
            line,
        )
        for text, address in _extra_addresses(pod)
        if address is None
    )


def _is_endpoint(pod: Workload) -> bool:
    """Whether its node is told of it; before it has an address, too, so that its policy is there when it gets one."""
    return bool(pod.node) and not pod.host_network and pod.phase not in TERMINAL_PHASES


def _holds_addresses(pod: Workload) -> bool:
    return bool(pod.addresses) and not pod.host_network and pod.phase not in TERMINAL_PHASES


def _class_key(pod: Workload) -> _ClassKey:
    return (
        pod.namespace,
        frozenset(pod.labels.items()),
        frozenset(pod.namespace_labels.items()),
        f"{pod.service_account}/{pod.proxy}",
    )


def _discard(at: dict[Anchor, set[str]], anchor: Anchor, name: str) -> None:
    at[anchor].discard(name)
    if not at[anchor]:
        del at[anchor]


def _in_order(key: Key) -> tuple[int, Key]:
    """Namespaces before their pods, so that no pod is looked at twice."""
    return (0 if key[:2] == ("", "Namespace") else 1, key)
