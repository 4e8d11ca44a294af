"""Endpoints' policies as packed sets; what did not change is not compiled again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Final

import structlog

from meshbridge.agent.view import LocalPod
from meshbridge.bypass.audit import with_audits
from meshbridge.bypass.bypasspolicy import NO_BYPASS_POLICIES, BypassPolicies
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.findings import Finding, FindingCode
from meshbridge.bypass.findings import Severity as FindingSeverity
from meshbridge.bypass.ghosts import GhostBypass, ghost_bypasses
from meshbridge.bypass.rules import SeenRules
from meshbridge.bypass.sets import IntSet
from meshbridge.bypass.state import CaptureState, capture_of
from meshbridge.datapath.policysets import PackedSet, RuleIds, pack_map
from meshbridge.identity.model import Entity, IpAddress, IpFamily, IpNetwork, Peer, ProxyClass, TcpPorts, Workload
from meshbridge.policy.capture import Capture, PortClass, PortClasses, sidecar_excluding
from meshbridge.policy.compile import Compiler
from meshbridge.policy.coverage import denies_by_labels
from meshbridge.policy.frontends import FrontendPort, restricts, with_frontends
from meshbridge.policy.model import (
    Anything,
    Direction,
    EndpointPolicy,
    Judge,
    Layer,
    NetworkRule,
    Origin,
    PolicyMap,
)
from meshbridge.policy.policyset import PolicySet
from meshbridge.xds.exclusions import Exclusions

log = structlog.get_logger()

_JUDGES: Final = frozenset(Judge)
_FAMILIES: Final[Mapping[int, IpAddress]] = {4: IPv4Address("192.0.2.1"), 6: IPv6Address("2001:db8::1")}
_MAX_CAPTURES: Final = 1024
MAX_OUTBOUND_NETWORKS: Final = 256
"""Of all pods of a node: each is a prefix in the kernel's tables, and a pod's annotations may name many."""

Frontends = Mapping[int, tuple[FrontendPort, ...]]


@dataclass(frozen=True, slots=True)
class Compiled:
    """One pod's policy. ``sets`` None: it could not be compiled, for the reason in ``fault``.

    ``isolating`` are the policies that isolate it, by direction; ``notes`` say where its redirect rules are not what
    its specification asks for. ``judges_services``: its egress is restricted, so it depends on who is behind Services.
    """

    sets: tuple[PackedSet, ...] | None
    isolating: Mapping[Direction, tuple[Origin, ...]] = field(default_factory=dict)
    fault: str = ""
    notes: tuple[str, ...] = ()
    judges_services: bool = False


@dataclass(frozen=True, slots=True)
class Captured:
    """How a pod's TCP reaches Envoy by the redirect rules that were seen, and in ``notes`` what is wrong with those.

    ``excluded`` are the ports that past all doubt reach it past Envoy: its specification asks for it, and the rules do.
    ``ghosts`` are ports that do so although nobody asked for it. ``fault``: why nothing is known of it. ``state``: what
    all of it was made of, None without a sidecar.
    """

    capture: Capture
    notes: tuple[str, ...] = ()
    excluded: tuple[TcpPorts, ...] = ()
    fault: str = ""
    state: CaptureState | None = None
    ghosts: tuple[GhostBypass, ...] = ()


@dataclass(slots=True)
class Compilation:
    """The compiled policies of this node's pods.

    A pod is compiled again when it changed, when the redirect rules seen of it, a policy that selects it or what of its
    bypasses is audited did, when identities did that its policies could tell from others, or who is behind Services,
    where its egress is restricted.
    """

    rules: RuleIds
    compiled: dict[str, Compiled] = field(default_factory=dict)
    knows_destinations: bool = False
    """Whether the policies are all of the mesh's, so that it is known what destinations refuse."""
    bypass_policies: BypassPolicies = NO_BYPASS_POLICIES
    _pods: dict[str, Workload] = field(default_factory=dict)
    _seen: dict[str, SeenRules | None] = field(default_factory=dict)
    _captures: CaptureCache = field(default_factory=lambda: CaptureCache())
    _captured: dict[str, tuple[Workload, SeenRules | None, Captured]] = field(default_factory=dict)
    _used: dict[str, Capture] = field(default_factory=dict)
    _anywhere: bool = False
    _identities: Mapping[int, Peer] = field(default_factory=dict)
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
        """The ports on which these pods' Envoys are passed by for sure, by UID."""
        found = {uid: self._of(uid, pod.workload, seen.get(uid)).excluded for uid, pod in pods.items() if not pod.fault}
        return {uid: excluded for uid, excluded in found.items() if excluded}

    def ghosts(
        self, pods: Mapping[str, LocalPod], seen: Mapping[str, SeenRules]
    ) -> dict[str, tuple[Workload, tuple[GhostBypass, ...]]]:
        """What of these pods bypasses their Envoys although nobody asked for it, by UID."""
        found = {uid: (pod.workload, self._of(uid, pod.workload, seen.get(uid)).ghosts) for uid, pod in pods.items()}
        return {uid: held for uid, held in found.items() if held[1]}

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
        if captured.state is not None and self.bypass_policies.policies:
            audited = with_audits(captured.state, workload.peer(), self.bypass_policies)
            capture = capture if audited is captured.state else capture_of(audited, judges=_JUDGES)
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
            self._captured.pop(uid, None)
            self._used.pop(uid, None)
        rules = seen or {}
        added = _added(self._identities, identities)
        self._identities = identities
        # A pod's own address stays the pod's: whoever may write a Service could otherwise open a pod that is denied.
        services = {n: ports for n, ports in (frontends or {}).items() if n in identities and not identities[n].is_pod}
        moved = services != self._frontends
        self._frontends = services
        stale = [
            uid
            for uid, pod in pods.items()
            if changed is None
            or added is None
            or not _same(self._pods.get(uid), pod.workload)
            or self.compiled[uid].sets is None
            or pod.fault
            or self._seen.get(uid) != rules.get(uid)
            or self._used.get(uid) != self._capture(uid, pod.workload, rules.get(uid))
            or (moved and self.compiled[uid].judges_services)
            or _concerns(changed, pod.workload)
            or (_concerns_destinations(changed) and self._of(uid, pod.workload, rules.get(uid)).capture.outbound)
            or (added and self._tells_apart(policies, uid, pod.workload, rules.get(uid), added))
        ]
        if stale:
            destinations = _destinations(identities) if self.knows_destinations else {}
            batch = _Batch(Compiler(identities, destinations), policies, services, self.rules)
            for uid in stale:
                pod = pods[uid]
                closed = Compiled(None, fault=f"all its packets are dropped: {pod.fault}") if pod.fault else None
                self.compiled[uid] = closed or self._compile(batch, uid, pod.workload, rules.get(uid))
                self._pods[uid], self._seen[uid] = pods[uid].workload, rules.get(uid)
        return len(stale)

    def _compile(self, batch: _Batch, uid: str, workload: Workload, seen: SeenRules | None) -> Compiled:
        captured = self._of(uid, workload, seen)
        fault = captured.fault
        if not fault:
            try:
                self._used[uid] = self._capture(uid, workload, seen)
                return replace(batch.compile(workload, self._used[uid]), notes=captured.notes)
            except Exception as error:  # as above
                log.exception("endpoint.not_compiled", pod=workload.key)
                fault = str(error)
        return Compiled(None, fault=f"its policy cannot be compiled, so all its packets are dropped: {fault}")

    def _tells_apart(
        self, policies: PolicySet, uid: str, workload: Workload, seen: SeenRules | None, added: Mapping[int, Peer]
    ) -> bool:
        """Whether some policy of the pod may pick one of the new peers by what it is."""
        selecting = policies.selecting(workload)
        of_mesh = selecting.authorization or selecting.peer_authentication or selecting.request_authentication
        if of_mesh or selecting.refusals or self._of(uid, workload, seen).capture.outbound:
            return True
        return any(_picks(rule, peer) for rule in selecting.network for peer in added.values())


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
            found = Captured(capture, notes, excluded, state=state, ghosts=ghost_bypasses(state))
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


@dataclass(slots=True)
class _Batch:
    """What endpoints compiled in one go share: the compiler's layers, and the packed form of equal maps."""

    compiler: Compiler
    policies: PolicySet
    frontends: Frontends
    rules: RuleIds
    _answering: dict[int, tuple[PolicyMap, PolicyMap]] = field(default_factory=dict)
    _packed: dict[int, tuple[PolicyMap, PackedSet]] = field(default_factory=dict)
    _by_content: dict[PackedSet, PackedSet] = field(default_factory=dict)

    def compile(self, workload: Workload, capture: Capture) -> Compiled:
        policy = self.compiler.endpoint(workload, self.policies, capture)
        judges = any(restricts(policy.map(Direction.EGRESS, family)) for family in IpFamily)
        isolating = {direction: _isolating(policy, direction) for direction in Direction}
        return Compiled(self._pack(policy), isolating, judges_services=judges)

    def _pack(self, policy: EndpointPolicy) -> tuple[PackedSet, ...]:
        ingress = tuple(self._pack_map(policy.map(Direction.INGRESS, family)) for family in IpFamily)
        return ingress + tuple(
            self._pack_map(self._with_services(policy.map(Direction.EGRESS, family))) for family in IpFamily
        )

    def _with_services(self, egress: PolicyMap) -> PolicyMap:
        known = self._answering.get(id(egress))
        if known is None:
            known = self._answering[id(egress)] = (egress, with_frontends(egress, self.frontends))
        return known[1]

    def _pack_map(self, policy: PolicyMap) -> PackedSet:
        known = self._packed.get(id(policy))
        if known is None:
            packed = pack_map(policy, self.rules)
            known = self._packed[id(policy)] = (policy, self._by_content.setdefault(packed, packed))
        return known[1]


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
    if any(after.get(number) != peer for number, peer in before.items()):
        return None
    return {number: peer for number, peer in after.items() if number not in before}


def _concerns(changed: PolicySet, workload: Workload) -> bool:
    selecting = changed.selecting(workload)
    return bool(
        selecting.network
        or selecting.authorization
        or selecting.peer_authentication
        or selecting.request_authentication
        or selecting.refusals
    )


def _picks(rule: NetworkRule, peer: Peer) -> bool:
    if rule.default_deny and Entity.HOST in peer.entities:
        return True  # where it isolates, the own node is let in besides
    if isinstance(rule.peers, Anything):
        # Only names of ports are looked up on each peer.
        return not isinstance(rule.ports, Anything) and any(port.name for port in rule.ports)
    if Entity.UNMANAGED in peer.entities and denies_by_labels(rule):
        return True
    return any(selector.matches(peer) for selector in rule.peers)


def _isolating(policy: EndpointPolicy, direction: Direction) -> tuple[Origin, ...]:
    """The policies that isolate the pod in a direction, of both families."""
    found: set[Origin] = set()
    for family in IpFamily:
        for layer in Layer:
            found.update(policy.map(direction, family).default(layer).origins)
    return tuple(sorted(found))
