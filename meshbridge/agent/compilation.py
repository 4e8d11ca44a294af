"""Endpoints' policies as packed sets; what did not change is not compiled again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from meshbridge.agent.view import LocalPod
from meshbridge.bypass.capture import capture_state
from meshbridge.datapath.policysets import PackedSet, RuleIds, pack_map
from meshbridge.identity.model import IpFamily, Peer, ProxyClass, Workload
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import Compiler
from meshbridge.policy.model import Direction, EndpointPolicy, Judge, Layer, Origin, PolicyMap
from meshbridge.policy.policyset import PolicySet

log = structlog.get_logger()

_JUDGES: Final = frozenset(Judge)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One pod's policy. ``sets`` None: it could not be compiled, for the reason in ``fault``.

    ``isolating`` are the policies that isolate it, by direction.
    """

    sets: tuple[PackedSet, ...] | None
    isolating: Mapping[Direction, tuple[Origin, ...]] = field(default_factory=dict)
    fault: str = ""


@dataclass(slots=True)
class Compilation:
    """The compiled policies of this node's pods.

    A pod is compiled again when the policies that select it, what it is captured for, or the identities changed.
    """

    rules: RuleIds
    compiled: dict[str, Compiled] = field(default_factory=dict)
    _inputs: dict[str, tuple[object, ...]] = field(default_factory=dict)
    _identities: Mapping[int, Peer] = field(default_factory=dict)

    def update(self, pods: Mapping[str, LocalPod], policies: PolicySet, identities: Mapping[int, Peer]) -> int:
        """Bring ``compiled`` up to date for these pods, by UID; returns how many had to be compiled."""
        if identities is not self._identities and identities != self._identities:
            self._inputs.clear()
        self._identities = identities
        for uid in self.compiled.keys() - pods.keys():
            del self.compiled[uid]
            self._inputs.pop(uid, None)
        wanted = {uid: _inputs(pod.workload, policies) for uid, pod in pods.items()}
        stale = [uid for uid, inputs in wanted.items() if self._inputs.get(uid) != inputs]
        if stale:
            batch = _Batch(Compiler(identities), policies, self.rules)
            for uid in stale:
                self.compiled[uid] = batch.compile(pods[uid].workload)
                self._inputs[uid] = wanted[uid]
        return len(stale)


@dataclass(slots=True)
class _Batch:
    """What endpoints compiled in one go share: the compiler's layers, and the packed form of equal maps."""

    compiler: Compiler
    policies: PolicySet
    rules: RuleIds
    _packed: dict[int, tuple[PolicyMap, PackedSet]] = field(default_factory=dict)
    _by_content: dict[PackedSet, PackedSet] = field(default_factory=dict)

    def compile(self, workload: Workload) -> Compiled:
        try:
            policy = self.compiler.endpoint(workload, self.policies, capture_of(workload))
            return Compiled(self._pack(policy), {d: _isolating(policy, d) for d in Direction})
        except Exception as error:  # whatever it is: this pod closes, the others go on, and it is said why
            log.exception("endpoint.not_compiled", pod=workload.key)
            return Compiled(None, fault=f"its policy cannot be compiled, so all its packets are dropped: {error}")

    def _pack(self, policy: EndpointPolicy) -> tuple[PackedSet, ...]:
        return tuple(self._pack_map(policy.map(direction, family)) for direction in Direction for family in IpFamily)

    def _pack_map(self, policy: PolicyMap) -> PackedSet:
        known = self._packed.get(id(policy))
        if known is None:
            packed = pack_map(policy, self.rules)
            known = self._packed[id(policy)] = (policy, self._by_content.setdefault(packed, packed))
        return known[1]


def capture_of(workload: Workload) -> Capture:
    """How the pod's TCP reaches Envoy, as its specification says it will; who judges there."""
    if workload.proxy is not ProxyClass.SIDECAR:
        return Capture.none()
    return Capture(inbound=capture_state(workload).inbound(intended=True), judges=_JUDGES)


def _inputs(workload: Workload, policies: PolicySet) -> tuple[object, ...]:
    """Everything the compiled policy of one pod depends on, besides the identities."""
    selecting = policies.selecting(workload)
    return (
        selecting.network,
        selecting.authorization,
        selecting.peer_authentication,
        selecting.request_authentication,
        selecting.refusals,
        selecting.mesh,
        workload,
        dict(workload.labels),
        dict(workload.namespace_labels),
        dict(workload.annotations),
        workload.ports,
    )


def _isolating(policy: EndpointPolicy, direction: Direction) -> tuple[Origin, ...]:
    """The policies that isolate the pod in a direction, of both families."""
    found: set[Origin] = set()
    for family in IpFamily:
        for layer in Layer:
            found.update(policy.map(direction, family).default(layer).origins)
    return tuple(sorted(found))
