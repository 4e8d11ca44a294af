"""The node's state and the one step that brings the kernel to it.

Everything here blocks and belongs to one worker thread.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Any, Final

import structlog

from meshbridge import abi
from meshbridge.agent.compilation import Compilation
from meshbridge.agent.endpoints import UNKNOWN_POD, Endpoints, Hooked, find_interfaces, sources_of
from meshbridge.agent.enforcer import Enforcer
from meshbridge.agent.evidence import Watched
from meshbridge.agent.ghosts import STARTING, Ghosts
from meshbridge.agent.identities import PeerNumbers
from meshbridge.agent.names import Names, labels_of
from meshbridge.agent.probing import Announce, Prober, Question, Volleys
from meshbridge.agent.proofs import Proofs, Wanted
from meshbridge.agent.redirects import Seen
from meshbridge.agent.reporting import node_report
from meshbridge.agent.view import Announced, Changes, LocalPod, NodeView
from meshbridge.bypass.owners import ProxyOwner
from meshbridge.bypass.proof import Outcome, Plan, Status
from meshbridge.datapath.ipcache import ipcache_key
from meshbridge.datapath.links import Link, LinkError, NodeNetwork, pod_interfaces, pod_mac, read_network
from meshbridge.datapath.policysets import RuleIds
from meshbridge.datapath.reconcile import DesiredEndpoint, DesiredState
from meshbridge.datapath.redirect import namespace_number
from meshbridge.errors import MeshBridgeError
from meshbridge.identity.model import Entity, IpAddress, IpNetwork, Peer, ProxyClass
from meshbridge.observe.flow import Flow
from meshbridge.observe.messages import rule_messages
from meshbridge.policy.model import Direction
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.selectors import is_node
from meshbridge.protos import observer_pb2 as pb
from meshbridge.xds.client import Update
from meshbridge.xds.nodereport import NodeReport

log = structlog.get_logger()

ATTACHED_LATE: Final = (
    "attached late: no CNI plugin announced it, so until then nothing was enforced on it; make the pod anew to be sure"
)
_INIT: Final = int(abi.ReservedIdentity.IDENTITY_INIT)
_NAMED_PODS: Final = 3
_KEPT_ENTITIES: Final = frozenset({Entity.KUBE_APISERVER})


class EndpointError(MeshBridgeError):
    """A pod's interface cannot be hooked."""


@dataclass(frozen=True, slots=True)
class Durations:
    """How long the parts of the last step took."""

    compile_s: float = 0.0
    enforced_s: float = 0.0
    apply_s: float = 0.0
    compiled: int = 0
    writes: int = 0


@dataclass(frozen=True, slots=True)
class Published:
    """What the last step left behind, for everybody who asks."""

    revision: int = 0
    endpoints: tuple[pb.EndpointState, ...] = ()
    ready: frozenset[str] = frozenset()
    problems: tuple[str, ...] = ()
    identities: int = 0
    addresses: int = 0
    policies: int = 0
    durations: Durations = Durations()
    report: NodeReport | None = None
    """What the controller is told of these pods, once it is in force; None: not known yet."""
    ghosts: Mapping[Direction, int] = field(default_factory=dict)
    """How many pods have a ghost bypass."""
    ghosts_found: int = 0
    watched: Mapping[int, Watched] = field(default_factory=dict)
    """What Envoys alone should send and answer, by endpoint number."""
    events: tuple[Flow, ...] = ()
    """What this step noticed; to be told once."""
    owners: Mapping[str, ProxyOwner] = field(default_factory=dict)
    """Whose packets the rules seen of a pod leave alone, by UID: who else sends as they do is to be looked for."""
    sidecars: Mapping[str, tuple[Link, ...]] = field(default_factory=dict)
    """The node's ends of the veths of pods with a sidecar, by UID: where redirect rules are to be looked for."""
    proofs: Mapping[str, Wanted] = field(default_factory=dict)
    """What is to be proved, by UID."""
    proved: Mapping[Status, int] = field(default_factory=dict)
    """How many of these pods are, are not, and are not known to be proved."""
    proofs_failed: int = 0


@dataclass(slots=True)
class Node:
    """One node: what is wanted of it, what it has, and the step from one to the other."""

    name: str
    enforcer: Enforcer
    names: Names
    publish: Callable[[Published], None]
    first_look: Callable[[Mapping[str, tuple[Link, ...]]], Seen] = lambda _: Seen()
    published: Published = Published()
    _seen: Seen = field(default_factory=Seen)
    _view: NodeView = field(default_factory=NodeView)
    _endpoints: Endpoints = field(default_factory=Endpoints)
    _network: NodeNetwork = field(default_factory=lambda: NodeNetwork({}, frozenset(), {}))
    _own_addresses: frozenset[bytes] = frozenset()
    _policies: PolicySet = field(default_factory=PolicySet)
    _policy_networks: frozenset[IpNetwork] = frozenset()
    _registered: frozenset[bytes] = frozenset()
    _peers: PeerNumbers = field(default_factory=PeerNumbers)
    _compilation: Compilation = field(default_factory=lambda: Compilation(RuleIds()))
    _ghosts: Ghosts = field(init=False)
    _proofs: Proofs = field(init=False)
    _prober: Prober = field(init=False)
    _informed: bool = False
    _pending: Changes = field(default_factory=lambda: Changes(everything=True))
    _fault: str = ""
    _unguarded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By UID: interfaces inside pods, as of the last look, that lead out past all that we can hook."""

    def __post_init__(self) -> None:
        self._ghosts, self._proofs = Ghosts(self.name), Proofs(self.name)
        self._prober = Prober(self.enforcer)

    def start(self) -> None:
        """Take over what an earlier agent left: nothing changes until the first revision is there."""
        observed = self.enforcer.observed
        self._see(read_network())
        self.names.rules = RuleIds(observed.highest_rule_id())
        self._compilation = Compilation(self.names.rules)
        self._endpoints = Endpoints(
            highest_id=max((record.id for record in observed.endpoints.values()), default=0),
            highest_incarnation=max(self.enforcer.highest_incarnation(), int(time.time())),
        )
        for ifindex, record in observed.endpoints.items():
            link = self._network.links.get(ifindex)
            if link is not None and ifindex in self.enforcer.resumed:
                hooked = Hooked(ifindex, link.name, record.id, record.incarnation)
                self._endpoints.hooked[ifindex] = hooked
        log.info("datapath.taken_over", interfaces=len(self._endpoints.hooked), attach_mode=self.enforcer.mode.value)

    def take(self, update: Update) -> None:
        """Act on a whole revision."""
        changes = self._view.apply(update)
        self._pending |= changes
        if self._view.unusable:
            log.error("revision.unusable", revision=update.revision, reasons=sorted(self._view.unusable.values())[:3])
        else:
            self._informed = True
        self.step()

    def look_at_network(self) -> None:
        """Act on addresses, links and routes as they are now."""
        self._see(read_network())
        self._look_inside()
        self.step()

    def _look_inside(self) -> None:
        """Find interfaces of pods that lead out of them past all that we can hook."""
        reached: dict[int, set[int]] = {}
        for link in self._network.links.values():
            if link.peer_netns is not None:
                reached.setdefault(link.peer_netns, set()).add(link.peer_index)
        self._unguarded = {}
        for hooked in self._endpoints.hooked.values():
            namespace = self._namespace_of(hooked)
            if namespace is None or hooked.uid in self._unguarded:
                continue
            with contextlib.suppress(LinkError):  # the pod goes
                self._unguarded[hooked.uid] = tuple(
                    name
                    for name, found in pod_interfaces(namespace).items()
                    if found.leads_out and found.ifindex not in reached[namespace]
                )

    def _namespace_of(self, hooked: Hooked) -> int | None:
        link = self._network.links.get(hooked.ifindex)
        return link.peer_netns if link is not None else None

    def take_seen(self, seen: Seen) -> None:
        """Act on the redirect rules in the pods' namespaces as they are now, and on BypassPolicies that expired."""
        expiry = self._compilation.bypass_policies.next_change
        if seen != self._seen or (expiry is not None and datetime.now(UTC) >= expiry):
            self._seen = seen
            self._compilation.impostors = {
                uid: processes.impostors for uid, processes in seen.processes.items() if processes.impostors
            }
            self.step()

    def bypasses(
        self, audited: Sequence[Mapping[str, Any]] = (), observed: Sequence[bytes] = ()
    ) -> Callable[[], bytes]:
        """What makes the report on bypasses, from the state as it is now; it takes long, and may run elsewhere."""
        from meshbridge.agent.bypasses import bypasses_json  # 0.3 MB that an agent nobody asks need not hold
        from meshbridge.bypass.encryption import encryption_of_links

        pods = [pod.workload for pod in self._view.pods.values() if pod.is_hooked and not pod.fault]
        others = {
            f"{holder.peer.namespace}/{holder.name}": self._peers.identities[number]
            for address, holder in self._view.holders.items()
            if holder.name and (number := self._peers.number(address)) is not None
        }
        rulings = self._view.bypass_policies_at(datetime.now(UTC))
        return partial(
            bypasses_json,
            pods,
            self._policies,
            rulings,
            self._seen,
            others,
            audited,
            self._proofs.records(),
            observed,
            encryption_of_links(self.name, ((link.name, link.kind) for link in self._network.links.values())),
        )

    def question(self, uid: str, wanted: Wanted) -> Question | None:
        """What a proof starts from; None: it is no longer what is wanted."""
        if self.published.proofs.get(uid) != wanted:
            return None
        netns = self._seen.namespaces.get(uid, "")
        return self._prober.question(wanted, self._network.links, netns, self._view.holders, self._peers.ipcache)

    def fire(self, question: Question, plan: Plan, magics: Sequence[bytes], announce: Announce) -> Volleys | None:
        """Send the probes of a plan on every interface of the pod; None: it was planned for something else than holds.

        Raises:
            MeshBridgeError: they cannot be sent.
        """
        wanted = question.wanted
        if self.published.proofs.get(wanted.workload.uid) != wanted:
            return None
        return self._prober.fire(question, plan, magics, announce, self._peers.ipcache)

    def take_outcome(self, uid: str, wanted: Wanted, outcome: Outcome) -> None:
        """A proof came to this. Where it failed, the kernel is no longer trusted to hold what was written."""
        changed, events = self._proofs.take(uid, wanted, outcome, time.time_ns())
        if changed:
            self._publish(self.published.durations, events)
        if outcome.refutes and self.published.proofs.get(uid) == wanted:
            self.enforcer.distrust()
            self.step()

    def add_endpoint(self, pod: str, uid: str, interfaces: Iterable[str]) -> list[Hooked]:
        """The pod's interfaces are hooked, and drop everything until its policy is known.

        Raises:
            EndpointError: an interface does not exist, or cannot be hooked.
        """
        self._see(read_network())
        links = []
        for name in interfaces:
            link = self._network.by_name(name)
            if link is None:
                raise EndpointError(
                    f"no interface {name!r} in the agent's network namespace", where=f"pod {pod}",
                    fix="name the host side of the pod's veth",
                )  # fmt: skip
            links.append(link)
        return self._hook(pod, uid, links)

    def add_pod(self, uid: str, announced: Announced, netns: str, interfaces: frozenset[str]) -> list[Hooked]:
        """Every interface of this node that leads into the namespace is hooked, and drops all until policy is known.

        Args:
            netns: path of the pod's network namespace.
            interfaces: names of interfaces inside it that have to be behind one of those.

        Raises:
            MeshBridgeError: an interface cannot be hooked, or is none of ours to hook; nothing of the pod may run.
        """
        self._see(read_network())
        where = f"pod {announced.pod}"
        links = self._links_into(netns)
        inside = pod_interfaces(links[0].peer_netns) if links and links[0].peer_netns is not None else {}
        reached = {link.peer_index for link in links}
        missing = sorted(name for name in interfaces if name not in inside or inside[name].ifindex not in reached)
        if missing:
            raise EndpointError(
                f"no veth of this node leads to {', '.join(missing)}, so nothing could be enforced there", where=where,
                fix="use a CNI plugin that makes veths (not macvlan, ipvlan, host-device or SR-IOV), or exempt the pod "
                "by another network",
            )  # fmt: skip
        hooked = self._hook(announced.pod, uid, links, announced)
        log.info("pod.announced", pod=announced.pod, uid=uid, container=announced.container)
        return hooked

    def check_pod(self, netns: str, pod: str) -> None:
        """
        Raises:
            EndpointError: an interface that leads into the namespace does not run our programs.
        """
        self._see(read_network())
        links, attached = self._links_into(netns), self.enforcer.attached()
        bare = sorted(link.name for link in links if link.ifindex not in attached)
        if bare or not links:
            names = ", ".join(bare) or "no interface of this node leads into it, so there is nothing that"
            raise EndpointError(f"{names} does not run MeshBridge's programs", where=f"pod {pod}", fix="delete the pod")

    def release_pod(self, uid: str, container: str) -> None:
        """What was announced for the container counts no more; its interfaces stay hooked until they are gone."""
        changes = self._view.withdraw(uid, container)
        if changes.addresses:
            self._pending |= changes
            self.step()

    def keep_pods(self, containers: frozenset[str]) -> None:
        """Of what was announced only these containers are left."""
        for uid, container in self._view.containers().items():
            if container not in containers:
                self.release_pod(uid, container)

    def _links_into(self, netns: str) -> list[Link]:
        number = namespace_number(netns)
        return [] if number < 0 else [link for link in self._network.links.values() if link.peer_netns == number]

    def _hook(self, pod: str, uid: str, links: Iterable[Link], announced: Announced | None = None) -> list[Hooked]:
        found = []
        for link in links:
            if link.ifindex in self._endpoints.hooked and link.ifindex not in self.enforcer.attached():
                self._endpoints.release([link.ifindex])  # the number of an interface that is gone
            hooked = self._endpoints.take(link, uid, pod_mac(link))
            self.enforcer.attach(hooked.ifindex, hooked.incarnation)
            found.append(hooked)
            log.info("endpoint.hooked", pod=pod, uid=uid, interface=link.name, endpoint=hooked.id)
        if announced is not None:
            self._pending |= self._view.announce(uid, announced)
        self.step()
        return found

    def _see(self, network: NodeNetwork) -> None:
        addresses = frozenset(map(ipcache_key, network.addresses))
        self._pending |= Changes(addresses=addresses ^ self._own_addresses)
        self._network, self._own_addresses = network, addresses

    def step(self) -> None:
        """Bring the kernel to what is wanted, and publish how that went."""
        if not self._informed or self._view.unusable:
            self._publish(self.published.durations)
            return
        durations = self.published.durations
        try:
            durations = self._enforce()
            self._fault = ""
        except Exception as error:  # one object that trips us must not end the agent: it would, again and again
            self._fault = f"the kernel does not hold what revision {self._view.revision} asks for: {error}"
            log.exception("revision.not_applied", revision=self._view.revision)
        self._publish(durations)

    @property
    def failed(self) -> bool:
        """Whether the last step has to be tried again."""
        return bool(self._fault)

    def _enforce(self) -> Durations:
        started = time.perf_counter()
        fresh = self._match_interfaces()
        pods = self._hooked_pods()
        self._compilation.knows_destinations = self._view.all_mesh_policies
        self._compilation.known, self._compilation.mesh = self._view.known, self._view.mesh
        self._compilation.bypass_policies = self._view.bypass_policies_at(datetime.now(UTC))
        if self._pending.everything and not self._compilation.compiled:
            # what is captured now stays captured when an agent takes over
            self._seen = self.first_look(self._sidecars())
        self._number_peers(pods)
        view, pending = self._view, self._pending
        touched = None if pending.everything else view.policies.among(pending.policies, view.mesh)
        interfaces = Counter(hooked.uid for hooked in self._endpoints.hooked.values())
        self._compilation.several = frozenset(uid for uid, count in interfaces.items() if count > 1)
        compiled = self._compilation.update(
            pods, self._policies, self._peers.identities, touched, self._seen.rules,
            self._view.services.frontends(self._peers.number),
        )  # fmt: skip
        compiled_s = time.perf_counter() - started
        applied = self.enforcer.apply(DesiredState(self._desired_endpoints(pods), self._peers.ipcache))
        for hooked in fresh:
            self.enforcer.attach(hooked.ifindex, hooked.incarnation)
        self.enforcer.sweep()
        self._pending = Changes()
        if applied.writes:
            log.info(
                "policy.applied", revision=self._view.revision, endpoints=len(self._endpoints.hooked),
                compiled=compiled, writes=applied.writes, compile_ms=round(compiled_s * 1e3, 1),
                duration_ms=round(applied.duration_s * 1e3, 1),
            )  # fmt: skip
        return Durations(compiled_s, compiled_s + applied.enforced_s, applied.duration_s, compiled, applied.writes)

    def _hooked_pods(self) -> dict[str, LocalPod]:
        return {
            uid: pod
            for uid, pod in self._view.pods.items()
            if pod.is_hooked and (pod.workload.addresses or self._endpoints.of_pod(uid))
        }

    def _match_interfaces(self) -> list[Hooked]:
        """Drop interfaces that are gone, find those of pods without one; those still to be hooked are returned."""
        attached = self.enforcer.attached()
        self._endpoints.release(self._endpoints.hooked.keys() - attached)
        pinned = self.enforcer.addresses_of_interfaces() if self._endpoints.unclaimed() else {}
        abandoned = self._endpoints.abandoned(self._view.pods.keys())
        if abandoned:
            self._see(read_network())  # a route read too early would give the device of a dying pod to its successor
        adopted, changes = self._view.adopt()
        self._pending |= changes
        for told, uid in adopted.items():
            for hooked in self._endpoints.of_pod(told):
                self._endpoints.resume(hooked.ifindex, uid, hooked.mac)
        fresh = []
        found = find_interfaces(self._view.pods, self._endpoints, self._network, pinned, abandoned)
        matched = list(found)
        for uid, link, resumed in matched:
            if resumed:
                self._endpoints.resume(link.ifindex, uid, pod_mac(link))
            else:
                fresh.append(self._endpoints.take(link, uid, pod_mac(link), late=True))
                log.warning("endpoint.hooked_late", pod=self._view.pods[uid].workload.key, interface=link.name)
        if matched:
            self._look_inside()
        return fresh

    def _number_peers(self, pods: Mapping[str, LocalPod]) -> None:
        """Bring policies, identities and the ipcache up to date with what changed since the last step."""
        if self._pending.policies or self._pending.everything:
            self._policies = self._view.policy_set()
            self._policy_networks = self._policies.referenced_networks()
        networks = self._policy_networks | self._compilation.outbound_networks(pods, self._seen.rules)
        known = self._compilation.known
        networks |= known.networks if known is not None else frozenset()
        self._registered = frozenset(self._view.services.backends()) if known is not None else frozenset()
        changed = {address: self._holder(address) for address in self._pending.addresses}
        same = networks == self._peers.networks
        current = not self._pending.everything and (same or self._peers.tell_apart(networks))
        if not current or (changed and not self._peers.change(changed)):
            self._renumber(networks)
        self.names.holders, self.names.identities = self._view.holders, self._peers.identities

    def _renumber(self, networks: frozenset[IpNetwork]) -> None:
        first = not self._peers.identities
        view = self._view
        known = (view.holders.keys(), view.announced_holders, self._own_addresses, view.services.addresses())
        holders = {address: self._holder(address) for address in dict.fromkeys(chain(*known))}
        self._peers.renumber(
            {address: peer for address, peer in holders.items() if peer is not None},
            networks,
            observed=self.enforcer.identities_of_addresses() if first else None,
            highest=self.enforcer.highest_identity() if first else 0,
        )

    def _holder(self, address: bytes) -> Peer | None:
        told = self._view.holder(address)
        peer = told.peer if told else None
        if address in self._own_addresses:
            peer = self._own_address(address)
        peer = self._view.services.peer(address, peer)
        return replace(peer, registered=True) if peer is not None and address in self._registered else peer

    def _is_held(self, address: IpAddress) -> bool:
        return self._holder(ipcache_key(address)) is not None

    def _own_address(self, address: bytes) -> Peer:
        """The node's own addresses are ``host`` here, whatever they are called elsewhere."""
        told = self._view.holders.get(address)
        if told is None:
            return Peer(entities=frozenset({Entity.HOST}))
        labels = told.peer.labels if is_node(told.peer) else {}
        return Peer(labels=labels, entities=told.peer.entities & _KEPT_ENTITIES | {Entity.HOST})

    def _desired_endpoints(self, pods: Mapping[str, LocalPod]) -> dict[int, DesiredEndpoint]:
        return {
            hooked.ifindex: self._desired_endpoint(hooked, pods.get(hooked.uid))
            for hooked in self._endpoints.hooked.values()
        }

    def _desired_endpoint(self, hooked: Hooked, pod: LocalPod | None) -> DesiredEndpoint:
        if pod is None:
            return DesiredEndpoint(hooked.ifindex, hooked.id, hooked.incarnation, _INIT)
        return DesiredEndpoint(
            ifindex=hooked.ifindex,
            id=hooked.id,
            incarnation=hooked.incarnation,
            identity=self._identity_of(pod),
            sets=self._compilation.compiled[pod.workload.uid].sets,
            addresses=sources_of(pod, self._is_held),
            flags=int(abi.EndpointFlags.ENDPOINT_F_MAC) if hooked.mac else 0,
            mac=hooked.mac or bytes(6),
        )

    # What is told

    def _publish(self, durations: Durations, told: Iterable[Flow] = ()) -> None:
        ghosts = self._compilation.ghosts(self._hooked_pods(), self._seen.rules)
        proofs = self._wanted()
        events = [*told, *self._ghosts.update(ghosts, time.time_ns()), *self._proofs.update(proofs, time.time_ns())]
        states = tuple(self._states())
        applied = self._informed and not self._view.unusable and not self._fault
        self.published = Published(
            revision=self._view.revision if applied else self.published.revision,
            endpoints=states,
            ready=frozenset(state.uid for state in states if state.state == "ready") if applied else frozenset(),
            problems=tuple(self._problems(states)),
            identities=len(self._peers.identities),
            addresses=len(self._peers.ipcache.exact),
            policies=len(self._view.policies) + len(self._view.bypass_policies),
            durations=durations,
            report=self._report(states) if applied else self.published.report,
            ghosts={direction: self._ghosts.pods(direction) for direction in Direction},
            ghosts_found=self._ghosts.found,
            watched=self._watched(),
            owners=self._owners(),
            events=tuple(events),
            sidecars=self._sidecars(),
            proofs=proofs,
            proved=self._proofs.pods(),
            proofs_failed=self._proofs.failed,
        )
        self.publish(self.published)

    def _report(self, states: Iterable[pb.EndpointState]) -> NodeReport:
        exclusions = self._compilation.exclusions(self._hooked_pods(), self._seen.rules)
        return node_report(exclusions, self._view.bypass_policies.values(), states)

    def _wanted(self) -> dict[str, Wanted]:
        found: dict[str, Wanted] = {}
        for uid, pod in self._hooked_pods().items():
            demand = self._compilation.demand(uid, pod.workload, self._seen.rules.get(uid))
            if demand is not None and pod.workload.addresses:
                compiled = self._compilation.compiled.get(uid)
                sets, fault = (compiled.sets, compiled.fault) if compiled is not None else (None, "")
                hooked = tuple(self._endpoints.of_pod(uid))
                found[uid] = Wanted(pod.workload, demand, hooked, sets, self._fault or fault)
        return found

    def _watched(self) -> dict[int, Watched]:
        found: dict[int, Watched] = {}
        for hooked in self._endpoints.hooked.values():
            pod, seen = self._view.pods.get(hooked.uid), self._seen.rules.get(hooked.uid)
            watched = self._compilation.watched(hooked.uid, pod.workload, seen) if pod is not None else None
            if watched is not None:
                found[hooked.id] = watched
        return found

    def _owners(self) -> dict[str, ProxyOwner]:
        found: dict[str, ProxyOwner] = {}
        for uid in {hooked.uid for hooked in self._endpoints.hooked.values()}:
            pod, seen = self._view.pods.get(uid), self._seen.rules.get(uid)
            # the init containers of one that is starting may run as the proxy's user, as istio-validation does
            if pod is not None and seen is not None and pod.workload.phase != STARTING:
                owner = self._compilation.owner(uid, pod.workload, seen)
                found |= {uid: owner} if owner is not None else {}
        return found

    def _sidecars(self) -> dict[str, tuple[Link, ...]]:
        found: dict[str, tuple[Link, ...]] = {}
        for hooked in self._endpoints.hooked.values():
            pod, link = self._view.pods.get(hooked.uid), self._network.links.get(hooked.ifindex)
            if link is not None and pod is not None and pod.is_hooked and pod.workload.proxy is ProxyClass.SIDECAR:
                found[hooked.uid] = (*found.get(hooked.uid, ()), link)
        return found

    def _problems(self, states: Iterable[pb.EndpointState]) -> list[str]:
        found = dict.fromkeys(sorted(self._view.problems.values()))
        found |= dict.fromkeys(str(refusal) for refusal in self._policies.refusals)
        refused = (policy.refusal for policy in self._view.bypass_policies.values())
        found |= dict.fromkeys(sorted(str(refusal) for refusal in refused if refusal is not None))
        found |= dict.fromkeys(self._proofs.problems())
        found |= dict.fromkeys(f"not understood, so no revision is acted on: {t}" for t in self._view.unusable.values())
        pods: dict[str, list[str]] = {}
        for state in states:
            if state.message:
                pods.setdefault(state.message, []).append(f"{state.namespace}/{state.pod}")
        found |= dict.fromkeys(f"{_named(names)}: {message}" for message, names in pods.items())
        return [*([self._fault] if self._fault else []), *found]

    def _states(self) -> Iterable[pb.EndpointState]:
        for hooked in sorted(self._endpoints.hooked.values(), key=lambda h: h.id):
            yield self._state(hooked)
        for uid, pod in sorted(self._view.pods.items()):
            # a pod without an address has no network yet
            if self._informed and pod.is_hooked and pod.workload.addresses and not self._endpoints.of_pod(uid):
                state = self._pod_state(pod)
                state.state = "not-hooked"
                self._add_conditions(state)
                why = f"it is to be closed ({pod.fault}), but " if pod.fault else ""
                state.message = (
                    f"{why}no interface of it was found, so nothing is enforced on it: its CNI plugin did not announce "
                    "it and no route leads to its address"
                )
                yield state

    def _state(self, hooked: Hooked) -> pb.EndpointState:
        pod = self._view.pods.get(hooked.uid)
        state = self._pod_state(pod) if pod else pb.EndpointState(uid=hooked.uid, identity=_INIT)
        state.id, state.interface, state.attach_mode = hooked.id, hooked.name, self.enforcer.mode.value
        compiled = self._compilation.compiled.get(hooked.uid)
        if pod is None or not pod.is_hooked:
            waiting = hooked.uid != UNKNOWN_POD and pod is None
            state.state = "waiting-for-policy" if waiting or not self._informed else "disconnected"
        elif compiled is None:
            state.state = "waiting-for-policy"
        elif compiled.sets is None:
            state.state, state.message = "not-ready", compiled.fault
        else:
            unseen = self._seen.problems.get(hooked.uid)
            notes = [unseen] if unseen else list(compiled.notes)
            looked = self._seen.processes.get(hooked.uid)
            notes += [looked.problem] if looked is not None and looked.problem else []
            refused = sorted(map(str, frozenset(pod.extra_addresses) - sources_of(pod, self._is_held)))
            degraded = list(self._degraded(hooked))
            notes += [message for _, message in degraded]
            notes += [f"it may not send from {', '.join(refused)}, which others hold"] if refused else []
            state.state, state.message = "ready", "; ".join(notes)
            for reason, message in degraded[:1]:
                state.conditions.add(type="Degraded", status=True, reason=reason, message=message)
            for direction, enforced, policies in (
                (Direction.INGRESS, "ingress_enforced", state.ingress_policies),
                (Direction.EGRESS, "egress_enforced", state.egress_policies),
            ):
                setattr(state, enforced, bool(compiled.isolating[direction]))
                policies.extend(rule_messages(compiled.isolating[direction]))
        self._add_conditions(state)
        return state

    def _add_conditions(self, state: pb.EndpointState) -> None:
        for of in (self._ghosts, self._proofs):
            if (condition := of.condition(state.uid)) is not None:
                state.conditions.append(condition)

    def _degraded(self, hooked: Hooked) -> Iterable[tuple[str, str]]:
        """Reasons and sentences, the worst first."""
        if unguarded := self._unguarded.get(hooked.uid):
            yield (
                "InterfaceNotHooked",
                (f"nothing is enforced on its {', '.join(unguarded)}: no veth of this node leads there"),
            )
        if hooked.late:
            yield "AttachedLate", ATTACHED_LATE

    def _identity_of(self, pod: LocalPod) -> int:
        addresses = pod.workload.addresses
        return (self._peers.of(addresses[0]) if addresses else None) or _INIT

    def _pod_state(self, pod: LocalPod) -> pb.EndpointState:
        workload = pod.workload
        return pb.EndpointState(
            namespace=workload.namespace,
            pod=workload.name,
            uid=workload.uid,
            identity=self._identity_of(pod),
            labels=labels_of(workload.peer()),
            addresses=[address.packed for address in workload.addresses],
        )


def _named(pods: list[str]) -> str:
    """``pod a/b``, or several, of which no more than a line holds."""
    shown = ", ".join(pods[:_NAMED_PODS]) + (f" and {len(pods) - _NAMED_PODS} more" if len(pods) > _NAMED_PODS else "")
    return f"pod {shown}" if len(pods) == 1 else f"pods {shown}"
