"""What a proof of a compensation asks, and what its answers prove: values and decisions, nothing is sent here.

A probe is the first packet of a TCP connection to a bypassed port, with the address of a source that the compiled
policy lets in, or of one that it drops. What the policy says is compared with three things seen: whether the packet
arrived in the pod, byte for byte; what the datapath told of this very packet; whether the counters grew by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from meshbridge.bypass.audit import told_apart
from meshbridge.bypass.bypasspolicy import BypassPolicies, Mode
from meshbridge.bypass.sets import IntSet
from meshbridge.bypass.state import INTERFACE, CaptureState
from meshbridge.identity.model import IpAddress, IpFamily, Peer
from meshbridge.policy.capture import PortClass
from meshbridge.policy.model import Direction
from meshbridge.policy.precedence import DropReason

CONDITION: Final = "Enforced"
GATE: Final = "meshbridge.io/compensated"
"""A readiness gate of pods: they are not ready before what stands in for Envoy on their bypassed ports is proved."""
PENDING, AUDITED = "Pending", "Audited"
MAX_PORTS: Final = 8
"""Of one family in one proof; where there are more, the next proof takes the next."""

_TCP: Final = 6
_NAMES: Final = {IpFamily.IPV4: "IPv4", IpFamily.IPV6: "IPv6"}
_SHOWN: Final = 3
_NOT_ARRIVED: Final = "let in by the datapath, but it did not arrive in the pod"
_OUTBOUND: Final = "what it sends past its Envoy is not probed"


class Status(StrEnum):
    """As Kubernetes has it. ``UNKNOWN``: neither is proved, which nobody may take for ``TRUE``."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True)
class Demand:
    """The bypassed inbound ports of a pod on which policies ask for a proof; ``audited`` are those without effect.

    ``outbound``: such policies allow outbound bypasses of the pod as well, which are not probed.
    """

    ports: Mapping[IpFamily, IntSet] = field(default_factory=dict)
    audited: Mapping[IpFamily, IntSet] = field(default_factory=dict)
    outbound: bool = False

    def of(self, families: frozenset[IpFamily]) -> Demand:
        """The part of these families; a pod without an address of one cannot be reached by it."""
        return replace(
            self,
            ports={family: found for family, found in self.ports.items() if family in families},
            audited={family: found for family, found in self.audited.items() if family in families},
        )


def demand_of(state: CaptureState | None, peer: Peer, policies: BypassPolicies) -> Demand | None:
    """What is to be proved of a pod; None: nobody asks for it.

    Args:
        state: None where the pod has no sidecar, and so no bypass.
    """
    selecting = policies.selecting(peer)
    if not any(policy.proof for policy in selecting):
        return None
    of_pod = BypassPolicies(selecting, policies.now)
    ports, audited = (dict.fromkeys(IpFamily, IntSet()) for _ in range(2))
    outbound = False
    for span in state.spans if state is not None else ():
        if span.port_class is not PortClass.EXCLUDED or _TCP not in span.box.protocol:
            continue
        for part in told_apart(span.box.port, selecting):
            ruling = of_pod.ruling(peer, span, part, ())
            if not ruling.proof:
                continue
            if span.direction is Direction.EGRESS:
                outbound = True
            elif INTERFACE in span.box.input:
                ports[span.family] |= part
                if ruling.mode is Mode.AUDIT:
                    audited[span.family] |= part
    return Demand(_present(ports), _present(audited), outbound)


def _present(ports: Mapping[IpFamily, IntSet]) -> dict[IpFamily, IntSet]:
    return {family: found for family, found in ports.items() if found}


@dataclass(frozen=True, slots=True)
class Source:
    """Whom a probe claims to come from. ``identity`` is what the kernel is to take the address for."""

    name: str
    address: IpAddress
    identity: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What the compiled policy says of a new flow; ``reason`` is the drop's, 0 of one that passes."""

    reason: int = 0

    @property
    def passes(self) -> bool:
        return not self.reason


@dataclass(frozen=True, slots=True)
class Probe:
    """One packet to send, and what has to become of it."""

    family: IpFamily
    port: int
    source: Source
    answer: Answer

    def __str__(self) -> str:
        return f"{self.source.name} ({self.source.address}) to TCP {self.port}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The probes of one proof. ``lacking`` says on which ports there is no source of one kind, and so no probe;
    ``unasked`` what is not probed at all."""

    probes: tuple[Probe, ...] = ()
    lacking: tuple[str, ...] = ()
    unasked: tuple[str, ...] = ()


Answers = Callable[[IpFamily, int, int], Answer]
"""What the compiled policy says, by family, port and the identity of the source."""


def plan_probes(
    demand: Demand,
    declared: Iterable[int],
    sources: Mapping[IpFamily, Sequence[Source]],
    answers: Answers,
    turn: int,
) -> Plan:
    """The probes of one proof: of each port one source that is let in, and two that are not, where there are such.

    Of those kept out, sources that only the compensation keeps out come first, and two that are told apart. Another
    ``turn`` takes other sources, and other ports where there are many, so in time every one has its turn.

    Args:
        declared: ports the pod declares; they are probed before others.
        sources: one of each identity is enough.
    """
    probes: list[Probe] = []
    lacking: list[str] = []
    for family, ports in sorted(demand.ports.items()):
        enforced = ports - demand.audited.get(family, IntSet())
        for port in chosen_ports(enforced, declared, turn):
            found = list(_probes(family, port, sources.get(family, ()), answers, turn))
            probes += found
            for passes, missing in ((True, "lets nobody in"), (False, "keeps nobody out")):
                if all(probe.answer.passes is not passes for probe in found):
                    lacking.append(f"{_NAMES[family]} TCP {port} {missing} of whom this node knows")
    return Plan(tuple(probes), tuple(lacking), (_OUTBOUND,) if demand.outbound else ())


def chosen_ports(ports: IntSet, declared: Iterable[int], turn: int) -> list[int]:
    """Declared ports and the ends of each range, at most ``MAX_PORTS`` of them."""
    known = [port for port in sorted(set(declared)) if port in ports]
    candidates = list(dict.fromkeys([*known, *(end for span in ports for end in span)]))
    if len(candidates) <= MAX_PORTS:
        return candidates
    start = turn * MAX_PORTS % len(candidates)
    return (candidates + candidates)[start : start + MAX_PORTS]


def _probes(family: IpFamily, port: int, sources: Sequence[Source], answers: Answers, turn: int) -> Iterator[Probe]:
    """In the order of a circle that starts somewhere else at each turn."""
    start = turn % len(sources) if sources else 0
    admitted: Probe | None = None
    compensated: list[Probe] = []
    dropped: list[Probe] = []
    for source in (*sources[start:], *sources[:start]):
        probe = Probe(family, port, source, answers(family, port, source.identity))
        if probe.answer.passes:
            admitted = admitted or probe
        elif probe.answer.reason == DropReason.COMPENSATION:
            compensated.append(probe)
        else:
            dropped.append(probe)
        if admitted is not None and len(compensated) >= 2:
            break
    yield from (compensated + dropped)[:2]  # before the one that passes: once that was seen, these would have been
    if admitted is not None:
        yield admitted


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a probe. ``told`` is what the datapath said of it.

    ``taken``: the interface took it. ``arrived``: it was seen in the pod. ``left``: it opened a flow that it should not
    have, or that is still open. ``endpoint``: the number of the one it was sent to.
    """

    taken: bool
    arrived: bool
    told: Told | None = None
    left: bool = False
    endpoint: int = 0


@dataclass(frozen=True, slots=True)
class Told:
    """An event of the datapath: ``reason`` of a drop, 0 of a packet that passed; ``identity`` of its source."""

    reason: int
    identity: int
    audit: bool = False
    endpoint: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """A probe that became something else than it should.

    ``conclusive`` False: it may be that nobody could tell. ``datapath`` False: it was lost behind our programs, which
    whoever rules in the pod's namespace can bring about.
    """

    probe: Probe
    what: str
    conclusive: bool = True
    datapath: bool = True

    def __str__(self) -> str:
        expected = "let in" if self.probe.answer.passes else f"dropped ({reason_name(self.probe.answer.reason)})"
        return f"{self.probe}: expected to be {expected}, seen: {self.what}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a proof came to. ``status`` TRUE: every probe became what it should."""

    status: Status
    reason: str
    message: str
    findings: tuple[Finding, ...] = ()

    @property
    def says(self) -> tuple[Status, str]:
        return self.status, self.reason

    @property
    def refutes(self) -> bool:
        """Whether the datapath does something else than what was programmed."""
        return any(finding.conclusive and finding.datapath for finding in self.findings)


NOTHING_TO_PROVE: Final = Outcome(Status.TRUE, "NothingToProve", "nothing of it bypasses an Envoy")
ONLY_OUTBOUND: Final = Outcome(Status.UNKNOWN, "NotProbed", f"nothing is proved: {_OUTBOUND}")


def judge(plan: Plan, seen: Mapping[Probe, Seen], counted: Mapping[int, int], *, lost: bool) -> Outcome:
    """What the probes of a plan prove.

    Args:
        counted: by how much the datapath's counters grew: by reason, 0 is what passed.
        lost: events of the datapath were lost meanwhile, so one that is missing says nothing.
    """
    if not plan.probes:
        return Outcome(Status.UNKNOWN, "NotProbed", "nobody is known of whom a probe could claim to come")
    findings = []
    for probe in plan.probes:
        if wrong := list(_wrong(probe, seen[probe], lost=lost)):
            what = ", ".join(what for what, _ in wrong)
            conclusive = any(certain for _, certain in wrong)
            findings.append(Finding(probe, what, conclusive, datapath=[what for what, _ in wrong] != [_NOT_ARRIVED]))
    for reason, probes in _by_reason(plan.probes).items():
        if counted.get(reason, 0) < len(probes) and not findings:
            findings.append(Finding(probes[0], f"a counter that grew by {counted.get(reason, 0)}, not {len(probes)}"))
    if findings:
        conclusive = any(finding.conclusive for finding in findings)
        status, reason_text = (Status.FALSE, "ProbeContradicts") if conclusive else (Status.UNKNOWN, "EventsLost")
        findings.sort(key=lambda finding: not finding.conclusive)
        more = f"; and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
        return Outcome(status, reason_text, "; ".join(map(str, findings[:_SHOWN])) + more, tuple(findings))
    return Outcome(Status.TRUE, "Proved" if not plan.lacking else "ProvedInPart", _proved(plan))


def _wrong(probe: Probe, seen: Seen, *, lost: bool) -> Iterator[tuple[str, bool]]:
    """Everything about one probe that is not as it should be, and whether that is certain."""
    told = seen.told
    passes = probe.answer.passes
    if not passes and seen.arrived:
        yield "it reached the pod", True
    if told is None:
        yield (
            ("the datapath told nothing of it, and events were lost" if lost else "the datapath never saw it"),
            not lost,
        )
    elif told.reason and told.reason != probe.answer.reason:
        yield f"dropped ({reason_name(told.reason)})", True
    elif not told.reason and not passes:
        yield "audited only" if told.audit else "let in", True
    elif told.identity != probe.source.identity:
        yield f"taken for identity {told.identity} in place of {probe.source.identity}", True
    elif told.endpoint != seen.endpoint:
        yield f"judged as endpoint {told.endpoint} in place of {seen.endpoint}", True
    elif passes and (not seen.arrived or not seen.taken):
        yield _NOT_ARRIVED, True
    if seen.left:
        yield ("its flow stays open" if passes else "it opened a flow"), True


def _by_reason(probes: Iterable[Probe]) -> dict[int, list[Probe]]:
    found: dict[int, list[Probe]] = {}
    for probe in probes:
        found.setdefault(probe.answer.reason, []).append(probe)
    return found


def _proved(plan: Plan) -> str:
    """``3 probes: TCP 9090 lets in monitoring/prometheus, keeps out shop/web and world; …``."""
    text = f"{len(plan.probes)} probes became what policy says"
    for passes, words in ((True, "let in"), (False, "kept out")):
        names = dict.fromkeys(probe.source.name for probe in plan.probes if probe.answer.passes is passes)
        if names:
            text += f"; {words}: {_listed(names)}"
    ports = dict.fromkeys(f"{_NAMES[probe.family]} TCP {probe.port}" for probe in plan.probes)
    lacking = (f"not proved: {lack}" for lack in plan.lacking[:_SHOWN])
    return "; ".join([text, f"on {_listed(ports)}", *lacking, *plan.unasked])


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    shown = ", ".join(every[:_SHOWN])
    return f"{shown} and {len(every) - _SHOWN} more" if len(every) > _SHOWN else shown


def reason_name(reason: int) -> str:
    return DropReason(reason).name if reason in frozenset(DropReason) else f"reason {reason}"


def only_audited(demand: Demand) -> Outcome | None:
    """The outcome where an audit takes the effect of a compensation away; None: none does."""
    if not demand.audited:
        return None
    ports = ", ".join(f"{_NAMES[family]} TCP {ports}" for family, ports in sorted(demand.audited.items()))
    return Outcome(Status.FALSE, AUDITED, f"{ports}: a BypassPolicy in mode audit lets pass what would be dropped")
