"""The node as the controller describes it: its pods, who holds which address, and the policies, parsed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from ipaddress import ip_address
from sys import intern
from typing import Any, TypeVar

from meshbridge.abi import address_bytes
from meshbridge.agent.services import Services
from meshbridge.bypass.bypasspolicy import BypassPolicies, BypassPolicy, is_bypass_policy, parse_bypass_policy
from meshbridge.errors import MeshBridgeError
from meshbridge.identity.model import Entity, IpAddress, Peer, Workload
from meshbridge.identity.numbering import class_of
from meshbridge.policy.egressregistry import REGISTRY_ONLY_KINDS, Known, known_of
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Anything, Document
from meshbridge.policy.parse import Parsed, parse
from meshbridge.policy.policybook import PolicyBook
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.selectors import PeerSelector, Selector
from meshbridge.xds import types as xds
from meshbridge.xds.client import Update
from meshbridge.xds.messages import (
    HolderReader,
    MessageError,
    address_of,
    document_of,
    mesh_of,
    service_of,
    workload_of,
)

GONE_PHASES = frozenset({"Succeeded", "Failed"})
MIRROR = "kubernetes.io/config.mirror"
MAX_PARTS = 1 << 14
PeerSelectorT = TypeVar("PeerSelectorT", bound=PeerSelector)


@dataclass(frozen=True, slots=True)
class LocalPod:
    """A pod of this node, and the source addresses it may use besides its own.

    ``fault``: why it has to be closed, whatever policies say.
    """

    workload: Workload
    extra_addresses: tuple[IpAddress, ...] = ()
    fault: str = ""

    @property
    def is_hooked(self) -> bool:
        """Whether it has interfaces of its own that carry its addresses."""
        return not self.workload.host_network and self.workload.phase not in GONE_PHASES


@dataclass(frozen=True, slots=True)
class Announced:
    """What a CNI plugin said of a pod's network: for which container, and the addresses it was given."""

    pod: str
    container: str
    addresses: tuple[IpAddress, ...]


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds an address; ``name`` is the pod's, empty for anything else."""

    peer: Peer
    name: str
    node: str


VACANT = Holder(Peer(entities=frozenset({Entity.UNMANAGED})), "", "")
"""Who holds the address of a pod whose network is gone."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What an update touched: addresses in the ipcache's form, changed policies as they were and as they are.

    ``everything`` says that what depends on settings of the mesh, or on all of it, has to be computed anew.
    """

    addresses: frozenset[bytes] = frozenset()
    policies: tuple[Parsed, ...] = ()
    everything: bool = False

    def __or__(self, other: Changes) -> Changes:
        return Changes(
            self.addresses | other.addresses, self.policies + other.policies, self.everything or other.everything
        )


@dataclass(slots=True)
class NodeView:
    """The newest state received, holders by their address in the ipcache's form.

    ``unusable`` not empty: some resource means nothing here, so nothing is acted on.

    Peers that are equal are the same object, and documents are kept parsed only: ten thousand addresses and a thousand
    policies have to fit into an agent of 60 MB.
    """

    revision: int = 0
    pods: dict[str, LocalPod] = field(default_factory=dict)
    holders: dict[bytes, Holder] = field(default_factory=dict)
    policies: PolicyBook = field(default_factory=PolicyBook)
    bypass_policies: dict[str, BypassPolicy] = field(default_factory=dict)
    mesh: MeshSettings = DEFAULT_MESH
    all_mesh_policies: bool = False
    services: Services = field(default_factory=Services)
    registry: dict[str, Known] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    announced: dict[str, Announced] = field(default_factory=dict)
    """By UID: pods whose addresses a CNI plugin told before the controller did."""
    announced_holders: dict[bytes, Holder] = field(default_factory=dict)
    """The pods of ``announced`` that the controller has told of, by those addresses."""
    unusable: dict[tuple[str, str], str] = field(default_factory=dict)
    _peers: dict[int, Peer] = field(default_factory=dict)
    """By the hash of their class."""
    _parts: dict[Any, Any] = field(default_factory=dict)
    _containers: dict[str, str] = field(default_factory=dict)
    """By UID: the container whose network was announced last."""
    _vacant: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    """Addresses of pods whose network is gone, with namespace and name of who the controller says still holds each."""
    _told: dict[str, tuple[IpAddress, ...]] = field(default_factory=dict)
    """By UID: what the controller tells of pods that have the addresses announced in place of it."""
    _superseded: dict[str, tuple[IpAddress, ...]] = field(default_factory=dict)
    """By UID: what it told when that was announced; it is of the container before."""

    def apply(self, update: Update) -> Changes:
        """Take in all that changed up to a whole revision.

        The update is used up: its messages are freed as they are read, so that a first update never stands in memory
        beside all that is made of it.
        """
        services = _touched(update, xds.SERVICE)
        addresses = set(self._told_of(services))
        before = {name: self.policies.get(name) for name in _touched(update, xds.POLICY)}
        for type_url, names in update.removed.items():
            for name in names:
                self.unusable.pop((type_url, name), None)
                if type_url == xds.ADDRESS:
                    with suppress(ValueError):  # such a name was never taken in
                        addresses.add(key := address_bytes(ip_address(name)))
                        self.holders.pop(key, None)
                        self._vacant.pop(key, None)
                else:
                    self._remove(type_url, name)
        everything = bool(_touched(update, xds.MESH))
        reader = HolderReader()
        for type_url, messages in update.changed.items():
            while messages:
                name, message = messages.popitem()
                self.unusable.pop((type_url, name), None)
                try:
                    if type_url == xds.ADDRESS:
                        addresses.add(self._put_address(name, message, reader))
                    else:
                        self._put(type_url, name, message)
                except MeshBridgeError as error:
                    self.unusable[type_url, name] = str(error)
        self.revision = update.revision
        addresses.update(self._complete_pods())
        if len(self._peers) > 2 * len(self.holders) + 1024:
            self._peers = {hash(class_of(holder.peer)): holder.peer for holder in self.holders.values()}
        policies = (*before.values(), *(self.policies.get(name) for name in before))
        addresses.update(self._told_of(services))
        changed = tuple(parsed for parsed in policies if parsed is not None)
        return Changes(
            addresses=frozenset(addresses),
            policies=changed,
            everything=everything or any(parsed.objects or parsed.cilium is not None for parsed in changed),
        )

    def announce(self, uid: str, announced: Announced) -> Changes:
        """The pod has these addresses, until the controller tells others than it does now."""
        self._withdraw(uid)
        self.announced[uid] = announced
        self._containers[uid] = announced.container
        for address in announced.addresses:
            self._vacant.pop(address_bytes(address), None)
        pod = self.pods.get(uid)
        self._superseded[uid] = pod.workload.addresses if pod is not None else ()
        return Changes(addresses=frozenset(self._complete_pods()))

    def withdraw(self, uid: str, container: str) -> Changes:
        """The container's network is gone: its addresses are nobody's until announced, or told to be another's.

        Whoever gets one of them next would else be taken for this pod until the controller tells.
        """
        uid = next((known for known, latest in self._containers.items() if latest == container), uid)
        if self._containers.get(uid) != container:
            return Changes()  # of a sandbox before, or from before this agent
        pod = self.pods.get(uid)
        touched = {address_bytes(address) for address in pod.workload.addresses} if pod is not None else set()
        if pod is not None:
            self._vacant |= dict.fromkeys(touched, (pod.workload.namespace, pod.workload.name))
        del self._containers[uid]
        self._withdraw(uid)
        return Changes(addresses=frozenset(self._complete_pods() | touched))

    def containers(self) -> dict[str, str]:
        """Those whose network was announced and is not gone, by the UID of their pod."""
        return dict(self._containers)

    def adopt(self) -> tuple[dict[str, str], Changes]:
        """Static pods that were announced and are told of now: their UIDs as a kubelet has them, and as all others do.

        A kubelet gives a static pod the hash of its manifest for a UID, and so its CNI plugins; its mirror in the API
        server has another, and the hash in an annotation.
        """
        waiting = self.announced.keys() - self.pods.keys()
        if not waiting:
            return {}, Changes()
        mirrors = {pod.workload.annotations.get(MIRROR): uid for uid, pod in self.pods.items()}
        found = {
            old: new
            for old in waiting
            if (new := mirrors.get(old)) and self.pods[new].workload.key == self.announced[old].pod
        }
        changes = Changes()
        for old, new in found.items():
            announced = self.announced[old]
            self._withdraw(old)
            del self._containers[old]
            changes |= self.announce(new, announced)
        return found, changes

    def _withdraw(self, uid: str) -> None:
        self.announced.pop(uid, None)
        self._superseded.pop(uid, None)
        told = self._told.pop(uid, None)
        if told is not None:
            self.pods[uid] = _with_addresses(self.pods[uid], told)

    def _complete_pods(self) -> set[bytes]:
        """Give pods the addresses announced for them, until others are told; which addresses were touched."""
        touched = set(self.announced_holders)
        self.announced_holders = {}
        for uid, announced in list(self.announced.items()):
            pod = self.pods.get(uid)
            if pod is None:
                continue
            told = self._told.get(uid, pod.workload.addresses)
            if told == announced.addresses or (told and told != self._superseded[uid]):
                self._withdraw(uid)
                continue
            self._told[uid] = told
            self.pods[uid] = _with_addresses(pod, announced.addresses)
            workload = self.pods[uid].workload
            holder = Holder(self._shared(workload.peer()), workload.name, intern(workload.node))
            self.announced_holders |= {address_bytes(address): holder for address in announced.addresses}
        return touched | set(self.announced_holders)

    def holder(self, address: bytes) -> Holder | None:
        """Who holds an address: a pod of this node that a CNI plugin gave it to, else who the controller says."""
        announced, told = self.announced_holders.get(address), self.holders.get(address)
        if announced is not None or told is None:
            return announced
        return VACANT if self._vacant.get(address) == (told.peer.namespace, told.name) else told

    @property
    def known(self) -> Known | None:
        """What REGISTRY_ONLY lets this node's pods send to past their sidecars; None: nobody asks."""
        asked = self.mesh.registry_only and self.all_mesh_policies
        return Known.all_of(self.registry.values()) if asked else None

    def _told_of(self, services: Iterable[str]) -> Iterator[bytes]:
        """The addresses of which these Services say something."""
        names = list(services)
        yield from self.services.addresses(names)
        if self.mesh.registry_only:
            yield from self.services.backends(names)

    def policy_set(self) -> PolicySet:
        """All policies as one value."""
        return self.policies.policies(self.mesh)

    def bypass_policies_at(self, now: datetime) -> BypassPolicies:
        """Every BypassPolicy that selects an endpoint here, as it is to be read at that time."""
        return BypassPolicies(tuple(sorted(self.bypass_policies.values(), key=lambda policy: policy.origin)), now)

    def _put(self, type_url: str, name: str, message: Any) -> None:
        if type_url == xds.ENDPOINT:
            extra = tuple(address_of(packed, f"Endpoint {name}") for packed in message.extra_addresses)
            self._told.pop(name, None)
            self.pods[name] = LocalPod(workload_of(message), extra, message.fault)
        elif type_url == xds.POLICY:
            self._put_policy(name, document_of(message))
        elif type_url == xds.SERVICE:
            self.services.put(name, service_of(message))
        elif type_url == xds.MESH:
            self.mesh, self.all_mesh_policies = mesh_of(message), message.all_mesh_policies
        elif type_url == xds.PROBLEM:
            self.problems[name] = message.text

    def _put_policy(self, name: str, document: Document) -> None:
        if is_bypass_policy(document):
            self.bypass_policies[name] = parse_bypass_policy(document)
        elif document.key[:2] in REGISTRY_ONLY_KINDS:
            self.registry[name] = known_of(document, parse(document))
        else:
            self.policies.put(name, self._compact(parse(document)))

    def _put_address(self, name: str, message: Any, reader: HolderReader) -> bytes:
        held = reader.read(message)
        if str(held.address) != name:
            raise MessageError(f"it is about {held.address}", where=f"Address {name!r}")
        key = address_bytes(held.address)
        if self._vacant.get(key, (held.peer.namespace, held.name)) != (held.peer.namespace, held.name):
            del self._vacant[key]
        self.holders[key] = Holder(self._shared(held.peer), held.name, intern(held.node))
        return key

    def _remove(self, type_url: str, name: str) -> None:
        if type_url == xds.ENDPOINT:
            self._told.pop(name, None)
            if self.pods.pop(name, None) is not None:
                self._withdraw(name)
                self._containers.pop(name, None)
        elif type_url == xds.POLICY:
            self.policies.put(name, None)
            self.bypass_policies.pop(name, None)
            self.registry.pop(name, None)
        elif type_url == xds.SERVICE:
            self.services.put(name, None)
        elif type_url == xds.MESH:
            self.mesh, self.all_mesh_policies = DEFAULT_MESH, False
        elif type_url == xds.PROBLEM:
            self.problems.pop(name, None)

    def _shared(self, peer: Peer) -> Peer:
        shared = self._peers.setdefault(hash(class_of(peer)), peer)
        return shared if shared == peer else peer

    def _compact(self, parsed: Parsed) -> Parsed:
        """The same without the object's text, where nothing is to be said about it, and with shared selectors."""
        rules = tuple(
            replace(
                rule,
                subject=self._one(rule.subject),
                peers=rule.peers if isinstance(rule.peers, Anything) else tuple(map(self._one, rule.peers)),
                ports=self._parts.setdefault(rule.ports, rule.ports),
            )
            for rule in parsed.network
        )
        if parsed.refusals or parsed.notices:
            return replace(parsed, network=rules)
        source = replace(parsed.document.source, lines={})
        return replace(parsed, network=rules, document=replace(parsed.document, data={}, source=source))

    def _one(self, selector: PeerSelectorT) -> PeerSelectorT:
        """An equal selector that is there already: the same few stand in most policies."""
        if len(self._parts) > MAX_PARTS:
            self._parts.clear()
        known = self._parts.get(selector)
        if known is None:
            if isinstance(selector, Selector):
                shared = tuple(self._parts.setdefault(r, r) for r in selector.requirements)
                selector = replace(selector, requirements=shared)
            known = self._parts[selector] = selector
        return known


def _with_addresses(pod: LocalPod, addresses: tuple[IpAddress, ...]) -> LocalPod:
    return replace(pod, workload=replace(pod.workload, addresses=addresses))


def _touched(update: Update, type_url: str) -> set[str]:
    return {*update.changed.get(type_url, ()), *update.removed.get(type_url, ())}
