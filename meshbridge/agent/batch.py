"""Endpoints compiled into packed sets in one go: as a whole, or towards a few peers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from meshbridge.datapath.policysets import PackedSet, RuleIds, pack_map, with_peers
from meshbridge.identity.model import IpFamily, Workload
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import Compiler
from meshbridge.policy.frontends import FrontendPort, restricts, with_frontends
from meshbridge.policy.model import Direction, EndpointPolicy, Layer, Origin, PolicyMap, Verdict
from meshbridge.policy.policyset import PolicySet

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


@dataclass(slots=True)
class Batch:
    """What endpoints compiled in one go share: the compiler's layers, and the packed form of equal maps."""

    compiler: Compiler
    policies: PolicySet
    frontends: Frontends
    rules: RuleIds
    _answering: dict[int, tuple[PolicyMap, PolicyMap]] = field(default_factory=dict)
    _packed: dict[int, tuple[PolicyMap, PackedSet]] = field(default_factory=dict)
    _by_content: dict[PackedSet, PackedSet] = field(default_factory=dict)

    def compile(self, workload: Workload, selected: PolicySet, capture: Capture) -> Compiled:
        policy = self.compiler.endpoint(workload, self.policies, capture, selected)
        isolating = {direction: _isolating(policy, direction) for direction in Direction}
        return Compiled(self.pack(policy), isolating, judges_services=judges_services(policy))

    def pack(self, policy: EndpointPolicy) -> tuple[PackedSet, ...]:
        """The four sets of an endpoint, with what they say of Services."""
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


@dataclass(slots=True)
class Growth:
    """Endpoints compiled again towards a few peers: what is said of one peer depends on the rules and on that peer.

    ``added`` are new; of ``moved``, Services' addresses, it changed who is behind them. ``batch`` compiles against both
    and against those behind, and knows of no other Services; ``services`` says whether there are any.
    """

    batch: Batch
    added: frozenset[int]
    moved: frozenset[int]
    services: bool
    _grown: dict[tuple[int, int], tuple[PackedSet, PackedSet, PackedSet]] = field(default_factory=dict)

    def of(self, compiled: Compiled, workload: Workload, selected: PolicySet, capture: Capture) -> Compiled | None:
        """What compiling the whole endpoint would give; None: that has to be done.

        Whether a Service without backends can be reached follows from everybody who is denied.
        """
        if compiled.sets is None:
            return None
        policy = self.batch.compiler.endpoint(workload, self.batch.policies, capture, selected)
        judges = compiled.judges_services or judges_services(policy)
        if judges and (self._denies(policy) or self._nobody_behind()):
            return None
        sets = tuple(map(self._with, compiled.sets, self.batch.pack(policy)))
        return replace(compiled, sets=sets, judges_services=judges)

    def _with(self, base: PackedSet, towards: PackedSet) -> PackedSet:
        key = (id(base), id(towards))
        known = self._grown.get(key)
        if known is None:
            grown = with_peers(base, towards, self.added, self.moved)
            known = self._grown[key] = (base, towards, grown)  # with both: an id is a key only while they live
        return known[2]

    def _denies(self, policy: EndpointPolicy) -> bool:
        return self.services and any(
            key.identity in self.added and entry.verdict is not Verdict.ALLOW
            for family in IpFamily
            for key, entry in policy.map(Direction.EGRESS, family).entries.items()
        )

    def _nobody_behind(self) -> bool:
        return any(not port.backends for ports in self.batch.frontends.values() for port in ports)


def judges_services(policy: EndpointPolicy) -> bool:
    """Whether an endpoint's egress is restricted."""
    return any(restricts(policy.map(Direction.EGRESS, family)) for family in IpFamily)


def _isolating(policy: EndpointPolicy, direction: Direction) -> tuple[Origin, ...]:
    """The policies that isolate the pod in a direction, of both families."""
    found: set[Origin] = set()
    for family in IpFamily:
        for layer in Layer:
            found.update(policy.map(direction, family).default(layer).origins)
    return tuple(sorted(found))
