"""Which compensations of this node's pods are to be proved, what became of it, and when each is proved again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from meshbridge.agent.endpoints import Hooked
from meshbridge.bypass.proof import (
    CONDITION,
    NOTHING_TO_PROVE,
    ONLY_OUTBOUND,
    PENDING,
    Demand,
    Outcome,
    Status,
    only_audited,
)
from meshbridge.datapath.policysets import PackedSet
from meshbridge.identity.model import Workload
from meshbridge.observe.flow import AgentEvent, Flow, FlowKind, FlowPeer, FlowVerdict
from meshbridge.policy.model import Direction
from meshbridge.protos import observer_pb2 as pb

log = structlog.get_logger()

PROVED, NOT_PROVED = "compensation-proved", "compensation-not-proved"
REPEAT_S: Final = 10.0
"""A proof holds for what was programmed; whoever changes the kernel's tables behind our back is found by the next."""
RETRY_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
_PENDING: Final = Outcome(Status.UNKNOWN, PENDING, "it is programmed, and not proved yet")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A proof that somebody asks for, equal as long as nothing was programmed that it would have to be repeated for.

    ``fault``: why there is nothing to prove, as nothing is in force as it should be.
    """

    workload: Workload
    demand: Demand
    hooked: tuple[Hooked, ...] = ()
    sets: tuple[PackedSet, ...] | None = None
    fault: str = ""

    @property
    def settled(self) -> Outcome | None:
        """The outcome where no probe is needed for it."""
        if self.sets is None or self.fault:
            return Outcome(Status.FALSE, "NotProgrammed", self.fault or "its policy is not in force")
        if not self.hooked:
            return Outcome(Status.FALSE, "NotHooked", "no interface of it was found, so nothing is enforced on it")
        if not self.demand.ports:
            return ONLY_OUTBOUND if self.demand.outbound else NOTHING_TO_PROVE
        return only_audited(self.demand)


@dataclass(slots=True)
class _Known:
    wanted: Wanted
    outcome: Outcome
    since_ns: int
    told: Status | None = None


@dataclass(slots=True)
class Proofs:
    """By pod UID; belongs to the worker thread. ``failed`` counts how often a pod stopped being proved."""

    node: str
    failed: int = 0
    _known: dict[str, _Known] = field(default_factory=dict)

    def update(self, wanted: Mapping[str, Wanted], time_ns: int) -> list[Flow]:
        """These proofs are asked for now; what was proved of anything else is proved no longer."""
        for uid in self._known.keys() - wanted.keys():
            del self._known[uid]
        events: list[Flow] = []
        for uid, asked in wanted.items():
            known = self._known.get(uid)
            if known is None or known.wanted != asked:
                outcome = asked.settled or _PENDING
                if known is None:
                    known = self._known[uid] = _Known(asked, outcome, time_ns)
                known.wanted = asked
                events += self._set(known, outcome, time_ns)
        return events

    def take(self, uid: str, wanted: Wanted, outcome: Outcome, time_ns: int) -> tuple[bool, list[Flow]]:
        """A proof came to this: whether that changes what is said of the pod, and what is to be told of it.

        Which sources had their turn changes nothing: whoever is told would be told every time.
        """
        known = self._known.get(uid)
        if known is None or known.wanted != wanted or known.outcome.says == outcome.says:
            return False, []
        return True, self._set(known, outcome, time_ns)

    def condition(self, uid: str) -> pb.Condition | None:
        """What is said of a pod whose policies ask for a proof."""
        known = self._known.get(uid)
        if known is None:
            return None
        outcome = known.outcome
        return pb.Condition(
            type=CONDITION, status=outcome.status is Status.TRUE, unknown=outcome.status is Status.UNKNOWN,
            reason=outcome.reason, message=outcome.message, since_unix_ns=known.since_ns,
        )  # fmt: skip

    def records(self) -> list[dict[str, Any]]:
        """As JSON has them, by pod."""
        return [
            {
                "pod": known.wanted.workload.key,
                "status": known.outcome.status.value,
                "reason": known.outcome.reason,
                "message": known.outcome.message,
                "since_unix_ns": known.since_ns,
            }
            for known in sorted(self._known.values(), key=lambda known: known.wanted.workload.key)
        ]

    def problems(self) -> list[str]:
        """A sentence for each pod that is not proved."""
        return sorted(
            f"pod {known.wanted.workload.key}: its compensation is not proved ({known.outcome.reason}): "
            f"{known.outcome.message}"
            for known in self._known.values()
            if known.outcome.status is not Status.TRUE and known.outcome != _PENDING
        )

    def pods(self) -> dict[Status, int]:
        found = dict.fromkeys(Status, 0)
        for known in self._known.values():
            found[known.outcome.status] += 1
        return found

    def _set(self, known: _Known, outcome: Outcome, time_ns: int) -> list[Flow]:
        if known.outcome.status is not outcome.status:
            known.since_ns = time_ns
        known.outcome = outcome
        first = known.told is None and outcome == known.wanted.settled  # nobody was told that it is otherwise
        if first or outcome == _PENDING or outcome.status is known.told:
            return []
        known.told = outcome.status
        workload = known.wanted.workload
        details = {"status": outcome.status.value, "reason": outcome.reason, "message": outcome.message}
        if outcome.status is Status.TRUE:
            log.info("compensation.proved", pod=workload.key, **details)
        else:
            self.failed += 1
            log.warning("compensation.not_proved", pod=workload.key, **details)
        return [
            Flow(
                time_ns, self.node, FlowKind.AGENT, FlowVerdict.NONE, direction=Direction.INGRESS,
                destination=FlowPeer(namespace=workload.namespace, pod=workload.name),
                agent=AgentEvent(PROVED if outcome.status is Status.TRUE else NOT_PROVED, tuple(details.items())),
            )
        ]  # fmt: skip


@dataclass(slots=True)
class Due:
    """The proof of one pod that is to be tried at a time; ``turn`` counts how often it was."""

    uid: str
    wanted: Wanted
    at_s: float
    failures: int = 0
    turn: int = 0
    proved: bool = False

    def rank(self, now_s: float) -> tuple[bool, bool, float]:
        later = self.at_s > now_s
        return later, self.proved and not later, self.at_s


@dataclass(slots=True)
class Schedule:
    """When which proof is due; belongs to the event loop's thread. Times are those of one monotonic clock."""

    _due: dict[str, Due] = field(default_factory=dict)

    def update(self, wanted: Mapping[str, Wanted], now_s: float) -> None:
        """These proofs are asked for: what is new, or was programmed anew, is due at once."""
        for uid in self._due.keys() - wanted.keys():
            del self._due[uid]
        for uid, asked in wanted.items():
            known = self._due.get(uid)
            if asked.settled is not None:
                self._due.pop(uid, None)
            elif known is None or known.wanted != asked:
                self._due[uid] = Due(uid, asked, now_s, turn=known.turn if known else 0)

    def first(self, now_s: float) -> Due | None:
        """The proof to be tried next, now or later; of those that are due a first one goes before a repeated one."""
        return min(self._due.values(), key=lambda due: due.rank(now_s), default=None)

    def done(self, uid: str, wanted: Wanted, *, proved: bool, now_s: float) -> None:
        """A proof was tried: it is repeated after a while, sooner where it failed."""
        due = self._due.get(uid)
        if due is None or due.wanted != wanted:
            return
        due.turn, due.proved = due.turn + 1, proved
        due.failures = 0 if proved else due.failures + 1
        due.at_s = now_s + (REPEAT_S if proved else RETRY_S[min(due.failures, len(RETRY_S)) - 1])
