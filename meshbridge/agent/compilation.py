"""Endpoints' policies as packed sets; what did not change is not compiled again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Final

import structlog

from meshbridge.agent.batch import Batch, Compiled, Frontends, Growth
from meshbridge.agent.evidence import Watched
from meshbridge.agent.view import LocalPod
from meshbridge.bypass.audit import with_audits
from meshbridge.bypass.bypasspolicy import NO_BYPASS_POLICIES, BypassPolicies
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.findings import Finding, FindingCode
from meshbridge.bypass.findings import Severity as FindingSeverity
from meshbridge.bypass.ghosts import GhostBypass, ghost_bypasses, impostor_bypasses, proxy_uids
from meshbridge.bypass.owners import NO_IMPOSTORS, Impostors, ProxyOwner, proxy_owner, with_impostors
from meshbridge.bypass.proof import Demand, demand_of
from meshbridge.bypass.rules import SeenRules
from meshbridge.bypass.sets import IntSet
from meshbridge.bypass.state import CaptureState, Truth, capture_of
from meshbridge.datapath.policysets import RuleIds
from meshbridge.identity.model import Entity, IpAddress, IpFamily, IpNetwork, Peer, ProxyClass, TcpPorts, Workload
from meshbridge.policy.capture import Capture, PortClass, PortClasses, sidecar_excluding
from meshbridge.policy.compile import Compiler
from meshbridge.policy.coverage import denies_by_labels
from meshbridge.policy.egressregistry import Known
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Anything, Judge, Layer, NetworkRule
from meshbridge.policy.peers import PeerIndex
from meshbridge.policy.policyset import PolicySet
from meshbridge.xds.exclusions import Exclusions

log = structlog.get_logger()

_JUDGES: Final = frozenset(Judge)
_FAMILIES: Final[Mapping[int, IpAddress]] = {4: IPv4Address("192.0.2.1"), 6: IPv6Address("2001:db8::1")}
_MAX_CAPTURES: Final = 1024
_INDEXED: Final = 4096
"""Of fewer identities an index is made anew when it is needed: to keep it takes more memory than it saves time."""
MAX_OUTBOUND_NETWORKS: Final = 256
"""Of all pods of a node: each is a prefix in the kernel's tables, and a pod's annotations may name many."""


@dataclass(frozen=True, slots=True)
class Captured:
    """How a pod's TCP reaches Envoy by the redirect rules that were seen, and in ``notes`` what is wrong with those.

    ``excluded`` are the ports that past all doubt reach it past Envoy: its specification asks for it, and the rules do.
    ``ghosts`` are ports that do so although nobody asked for it. ``owner``: whose packets the rules leave alone.
    ``fault``: why nothing is known of it. ``state``: what all of it was made of, None without a sidecar.
    """

    capture: Capture
    notes: tuple[str, ...] = ()
    excluded: tuple[TcpPorts, ...] = ()
    fault: str = ""
    state: CaptureState | None = None
    ghosts: tuple[GhostBypass, ...] = ()
    proxy_uids: frozenset[int] = frozenset()
    owner: ProxyOwner | None = None


@dataclass(slots=True)
class Compilation:
    """The compiled policies of this node's pods.

    A pod is compiled again when it changed, when the redirect rules seen of it, a policy that selects it or what of its
    bypasses is audited did, or when identities changed or went. Towards identities that came it is compiled where its
    policies could tell them from others, and towards Services where its egress is restricted.
    """

    rules: RuleIds
    compiled: dict[str, Compiled] = field(default_factory=dict)
    knows_destinations: bool = False
    """Whether the policies are all of the mesh's, so that it is known what destinations refuse."""
    bypass_policies: BypassPolicies = NO_BYPASS_POLICIES
    impostors: Mapping[str, Impostors] = field(default_factory=dict)
    """Processes of these pods, by UID, that send as if they were the pods' proxies."""
    several: frozenset[str] = frozenset()
    """Pods, by UID, with more than one interface under our programs: their rules may tell interfaces apart, and a port
    that bypasses Envoy on one of them is judged so on all."""
    known: Known | None = None
    """What REGISTRY_ONLY lets pods send to past their Envoys."""
    mesh: MeshSettings = DEFAULT_MESH
    _pods: dict[str, Workload] = field(default_factory=dict)
    _seen: dict[str, SeenRules | None] = field(default_factory=dict)
    _captures: CaptureCache = field(default_factory=lambda: CaptureCache())
    _captured: dict[str, tuple[Workload, SeenRules | None, Captured]] = field(default_factory=dict)
    _demands: dict[str, tuple[Workload, Captured, Demand | None]] = field(default_factory=dict)
    _demanded_by: tuple[object, ...] = ()
    """The policies by which ``_demands`` were made, and when they next mean something else."""
    _used: dict[str, Capture] = field(default_factory=dict)
    _selected: dict[str, PolicySet] = field(default_factory=dict)
    _anywhere: bool = False
    _identities: Mapping[int, Peer] = field(default_factory=dict)
    _index: PeerIndex | None = None
    _frontends: Frontends = field(default_factory=dict)

    def outbound_networks(self, pods: Mapping[str, LocalPod], seen: Mapping[str, SeenRules]) -> frozenset[IpNetwork]:
        """The destinations these pods send to past their Envoys, for peers to be told apart by them.

        None where nothing is compensated towards them. None of too many either: what is sent to some then counts as
        sent to all from the next ``update`` on, which drops nothing that its destination would let in.
        """
        found: set[IpNetwork] = set()
        for uid, pod in pods.items() if self.knows_destinations else ():
            found |= self._of(uid, pod.workload, seen.get(uid)).capture.networks
        self._anywhere = len(found) > MAX_OUTBOUND_NETWORKS
        return frozenset() if self._anywhere else frozenset(found)

    def exclusions(self, pods: Mapping[str, LocalPod], seen: Mapping[str, SeenRules]) -> Exclusions:
        """The ports on which these pods' Envoys are passed by for sure, by UID.

        Without those that are audited: nothing is dropped in Envoy's place there, so nothing may be at the source.
        """
        found = {uid: self._enforced(uid, pod.workload, seen.get(uid)) for uid, pod in pods.items() if not pod.fault}
        return {uid: excluded for uid, excluded in found.items() if excluded}

    def _enforced(self, uid: str, workload: Workload, seen: SeenRules | None) -> tuple[TcpPorts, ...]:
        excluded = self._of(uid, workload, seen).excluded
        audited = self._capture(uid, workload, seen).audited if excluded else ()
        if not audited:
            return excluded
        kept = {f: _ports_of(excluded, f) - _ports_of(audited, f) for f in IpFamily}
        return tuple(TcpPorts(family, first, last) for family in IpFamily for first, last in kept[family])

    def ghosts(
        self, pods: Mapping[str, LocalPod], seen: Mapping[str, SeenRules]
    ) -> dict[str, tuple[Workload, tuple[GhostBypass, ...]]]:
        """What of these pods bypasses their Envoys although nobody asked for it, by UID."""
        found = {uid: (pod.workload, self._ghosts(uid, pod.workload, seen.get(uid))) for uid, pod in pods.items()}
        return {uid: held for uid, held in found.items() if held[1]}

    def _ghosts(self, uid: str, workload: Workload, seen: SeenRules | None) -> tuple[GhostBypass, ...]:
        captured, impostors = self._of(uid, workload, seen), self.impostors.get(uid)
        if impostors is None or captured.state is None:
            return captured.ghosts
        return captured.ghosts + impostor_bypasses(captured.state, workload, impostors)

    def owner(self, uid: str, workload: Workload, seen: SeenRules) -> ProxyOwner | None:
        """Whose packets the rules seen of a pod leave alone; None where they redirect nothing, or are not known."""
        return self._of(uid, workload, seen).owner

    def watched(self, uid: str, workload: Workload, seen: SeenRules | None) -> Watched | None:
        """What the rules seen of a pod leave to its Envoy; None where nothing is known of it."""
        captured = self._of(uid, workload, seen)
        if seen is None or captured.state is None:
            return None
        return Watched(uid, workload.namespace, workload.name, captured.capture, captured.proxy_uids)

    def demand(self, uid: str, workload: Workload, seen: SeenRules | None) -> Demand | None:
        """What is to be proved of a pod; None: no BypassPolicy asks for it."""
        policies = self.bypass_policies
        if not policies.asks_for_proof:
            return None
        of = (policies.policies, policies.next_change)
        if self._demanded_by != of:
            self._demanded_by, self._demands = of, {}
        captured = self._of(uid, workload, seen)
        known = self._demands.get(uid)
        if known is None or known[0] is not workload or known[1] is not captured:
            demand = demand_of(captured.state, workload.peer(), policies)
            known = self._demands[uid] = (workload, captured, demand)
        return known[2]

    def _of(self, uid: str, workload: Workload, seen: SeenRules | None) -> Captured:
        held = self._captured.get(uid)
        if held is None or held[0] is not workload or held[1] is not seen:
            try:
                captured = self._captures.of(workload, seen)
            except Exception as error:  # whatever it is: this pod closes, the others go on, and it is said why
                log.exception("endpoint.not_understood", pod=workload.key)
                captured = Captured(Capture.none(), fault=str(error))
            held = self._captured[uid] = (workload, seen, captured)
        return held[2]

    def _capture(self, uid: str, workload: Workload, seen: SeenRules | None) -> Capture:
        """The pod's capture as it is compiled: with its audits, and its outbound ranges if those are not too many."""
        captured = self._of(uid, workload, seen)
        capture = captured.capture
        if captured.state is not None:
            state = with_impostors(captured.state, self.impostors.get(uid, NO_IMPOSTORS))
            if self.bypass_policies.policies:
                state = with_audits(state, workload.peer(), self.bypass_policies)
            if uid in self.several:
                capture = capture_of(state, judges=_JUDGES, interface=None)
            elif state is not captured.state:
                capture = capture_of(state, judges=_JUDGES)
        if capture.outbound and self.known is not None:
            capture = replace(capture, registry=self.known.registry_of(workload, self.mesh))
        return capture.anywhere() if self._anywhere else capture

    def update(
        self,
        pods: Mapping[str, LocalPod],
        policies: PolicySet,
        identities: Mapping[int, Peer],
        changed: PolicySet | None = None,
        seen: Mapping[str, SeenRules] | None = None,
        frontends: Frontends | None = None,
    ) -> int:
        """Bring ``compiled`` up to date for these pods, by UID; returns how many had to be compiled.

        Args:
            seen: the redirect rules in the pods' namespaces, as far as they were read; without them nothing of a pod
                counts as captured.
            changed: the policies that changed, as they were and as they are; None: any may have.
            frontends: the ports of Services, by the identity of their addresses.
        """
        for uid in self.compiled.keys() - pods.keys():
            del self.compiled[uid], self._pods[uid], self._seen[uid]
            for held in (self._captured, self._demands, self._used, self._selected):
                held.pop(uid, None)
        rules = seen or {}
        added = self._take_identities(identities)
        # A pod's own address stays the pod's: whoever may write a Service could otherwise open a pod that is denied.
        services = {n: ports for n, ports in (frontends or {}).items() if n in identities and not identities[n].is_pod}
        moved = {n for n in services.keys() | self._frontends.keys() if services.get(n) != self._frontends.get(n)}
        self._frontends = services
        stale = {
            uid
            for uid, pod in pods.items()
            if changed is None
            or added is None
            or not _same(self._pods.get(uid), pod.workload)
            or self.compiled[uid].sets is None
            or pod.fault
            or self._seen.get(uid) != rules.get(uid)
            or self._used.get(uid) != self._capture(uid, pod.workload, rules.get(uid))
            or changed.concerns(pod.workload)
            or (_concerns_destinations(changed) and self._used[uid].outbound)
        }
        grown = 0
        if added or moved:
            growth = self._growth(policies, added or {}, moved)
            for uid in [uid for uid in pods if uid not in stale]:
                if (moved and self.compiled[uid].judges_services) or (added and self._tells_apart(uid, added)):
                    if self._grow(growth, uid):
                        grown += 1
                    else:
                        stale.add(uid)
        if stale:
            batch = Batch(self._compiler(), policies, services, self.rules)
            for uid in [uid for uid in pods if uid in stale]:
                pod = pods[uid]
                closed = Compiled(None, fault=f"all its packets are dropped: {pod.fault}") if pod.fault else None
                self.compiled[uid] = closed or self._compile(batch, uid, pod.workload, rules.get(uid))
                self._pods[uid], self._seen[uid] = pods[uid].workload, rules.get(uid)
        if len(identities) < _INDEXED:
            self._index = None
        return len(stale) + grown

    def _compile(self, batch: Batch, uid: str, workload: Workload, seen: SeenRules | None) -> Compiled:
        captured = self._of(uid, workload, seen)
        fault = captured.fault
        if not fault:
            try:
                self._used[uid] = self._capture(uid, workload, seen)
                self._selected[uid] = batch.policies.selecting(workload)
                compiled = batch.compile(workload, self._selected[uid], self._used[uid])
                return replace(compiled, notes=captured.notes)
            except Exception as error:  # as above
                log.exception("endpoint.not_compiled", pod=workload.key)
                fault = str(error)
        return Compiled(None, fault=f"its policy cannot be compiled, so all its packets are dropped: {fault}")

    def _take_identities(self, identities: Mapping[int, Peer]) -> Mapping[int, Peer] | None:
        """Those that came; None when any changed or went."""
        added = _added(self._identities, identities)
        self._identities = identities
        if added is None or (self._index is not None and not self._index.extend(added)):
            self._index = None
        return added

    def _compiler(self) -> Compiler:
        if self._index is None:
            self._index = PeerIndex(self._identities)
        return Compiler(self._index, _destinations(self._identities) if self.knows_destinations else {})

    def _growth(self, policies: PolicySet, added: Mapping[int, Peer], moved: Set[int]) -> Growth:
        services = {n: self._frontends[n] for n in moved | added.keys() if n in self._frontends}
        behind = {backend.identity for ports in services.values() for port in ports for backend in port.backends}
        peers = {n: self._identities[n] for n in (moved | behind | added.keys()) if n in self._identities}
        compiler = Compiler(peers, _destinations(peers) if self.knows_destinations else {})
        batch = Batch(compiler, policies, services, self.rules)
        return Growth(batch, frozenset(added), frozenset(moved), services=bool(self._frontends))

    def _grow(self, growth: Growth, uid: str) -> bool:
        """Whether it was enough to compile a pod towards some peers."""
        try:
            grown = growth.of(self.compiled[uid], self._pods[uid], self._selected[uid], self._used[uid])
        except Exception:  # whatever it is, it closes the pod if it happens again
            log.exception("endpoint.not_grown", pod=self._pods[uid].key)
            return False
        if grown is not None:
            self.compiled[uid] = grown
        return grown is not None

    def _tells_apart(self, uid: str, added: Iterable[int]) -> bool:
        """Whether some policy of the pod may pick one of the new peers by what it is."""
        selecting = self._selected[uid]
        of_mesh = selecting.authorization or selecting.peer_authentication or selecting.request_authentication
        if of_mesh or selecting.refusals or self._used[uid].outbound:
            return True
        return any(_picks(rule, self._identities[number]) for rule in selecting.network for number in added)


@dataclass(slots=True)
class CaptureCache:
    """Captures by what they depend on: the replicas of a Deployment, and all pods without annotations, share one."""

    _known: dict[tuple[object, ...], Captured] = field(default_factory=dict)

    def of(self, workload: Workload, seen: SeenRules | None) -> Captured:
        if workload.proxy is not ProxyClass.SIDECAR:
            return Captured(Capture.none())
        asked = _anonymous(workload)
        key = (asked, seen, *(tuple(sorted(m.items())) for m in _mappings_of(asked)))
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _MAX_CAPTURES:
                self._known.clear()
            state = capture_state(asked, seen=seen)
            notes = tuple(map(_note, filter(_is_wrong, state.findings)))
            excluded = _settled(state) if seen is not None else ()
            capture = capture_of(state, judges=_JUDGES)
            found = Captured(
                capture, notes, excluded, state=state, ghosts=ghost_bypasses(state), proxy_uids=proxy_uids(asked),
                owner=proxy_owner(asked) if state.truth is Truth.RULES else None,
            )  # fmt: skip
            self._known[key] = found
        return found


def _settled(state: CaptureState) -> tuple[TcpPorts, ...]:
    """What is excluded both as it is and as it was asked for.

    The rest may change at any moment: rules are still to come, or somebody took them away.
    """
    now, asked = state.inbound(), state.inbound(intended=True)
    return tuple(
        TcpPorts(family, first, last)
        for family in IpFamily
        for first, last in _excluded(now[family]) & _excluded(asked[family])
    )


def _excluded(classes: PortClasses) -> IntSet:
    return IntSet.of(*((r.first, r.last) for r in classes.ranges if r.port_class is PortClass.EXCLUDED))


def _ports_of(ports: Iterable[TcpPorts], family: IpFamily) -> IntSet:
    return IntSet.of(*((p.first, p.last) for p in ports if p.family is family))


def _destinations(identities: Mapping[int, Peer]) -> dict[int, Mapping[IpFamily, PortClasses]]:
    """Every destination whose own Envoy or kernel judges, as captured but for what its node has seen to be excluded.

    Where that is not told only what is certain is dropped; its own node closes it to more than that.
    """
    found = {number: peer.excluded for number, peer in identities.items() if peer.proxy is ProxyClass.SIDECAR}
    classes = {excluded: sidecar_excluding(excluded) for excluded in set(found.values())}
    return {number: classes[excluded] for number, excluded in found.items()}


def _concerns_destinations(changed: PolicySet) -> bool:
    refused = any(refusal.layer is Layer.MESH for refusal in changed.refusals)
    return bool(changed.authorization or changed.peer_authentication or refused)


def _is_wrong(finding: Finding) -> bool:
    return finding.severity is FindingSeverity.ERROR or finding.code is FindingCode.RULE_NOT_UNDERSTOOD


def _note(finding: Finding) -> str:
    """A finding of a pod without a name, for whoever knows the name."""
    return f"{finding.subject.removeprefix('pod /').removeprefix(', ') or 'redirect rules'}: {finding.what}"


def _anonymous(workload: Workload) -> Workload:
    """The pod as redirection sees it: without its name, and of its labels and addresses only what matters there."""
    return replace(
        workload,
        namespace="",
        name="",
        uid="",
        node="",
        addresses=tuple(_FAMILIES[address.version] for address in workload.addresses),
        labels={key: value for key, value in workload.labels.items() if "istio.io/" in key},
        namespace_labels={key: value for key, value in workload.namespace_labels.items() if "istio" in key},
        service_account="",
        ports=(),
        probe_ports=(),
    )


def _mappings_of(workload: Workload) -> Iterable[Mapping[str, str]]:
    """The parts of a workload that its hash leaves out."""
    yield from (workload.labels, workload.namespace_labels, workload.annotations, workload.init_env)
    if workload.proxy_container is not None:
        yield workload.proxy_container.env


def _same(one: Workload | None, other: Workload) -> bool:
    return one is other or one == other


def _added(before: Mapping[int, Peer], after: Mapping[int, Peer]) -> Mapping[int, Peer] | None:
    """The identities that came; None when any changed or went."""
    if before is after:
        return {}
    if any((known := after.get(number)) is not peer and known != peer for number, peer in before.items()):
        return None
    return {number: peer for number, peer in after.items() if number not in before}


def _picks(rule: NetworkRule, peer: Peer) -> bool:
    if rule.default_deny and Entity.HOST in peer.entities:
        return True  # where it isolates, the own node is let in besides
    if isinstance(rule.peers, Anything):
        # Only names of ports are looked up on each peer.
        return not isinstance(rule.ports, Anything) and any(port.name for port in rule.ports)
    if Entity.UNMANAGED in peer.entities and denies_by_labels(rule):
        return True
    return any(selector.matches(peer) for selector in rule.peers)
