"""Proofs on the node: probes are sent, what becomes of them is watched on three sides, and that is judged.

Belongs to the event loop. What blocks runs elsewhere: entering a pod's namespace in a thread of the prover's own, so
that a pod can make nothing else slow; sending in the node's worker thread, see ``probing``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, TypeVar

import structlog

from meshbridge import abi
from meshbridge.abi import address_bytes
from meshbridge.agent.probing import Announce, Question, Volley, Volleys
from meshbridge.agent.proofs import Wanted
from meshbridge.bypass.proof import Outcome, Plan, Probe, Seen, Status, Told, judge
from meshbridge.datapath.probes import PROTOCOL, ProbeFlow, Tap
from meshbridge.datapath.redirect import namespace_number
from meshbridge.errors import MeshBridgeError

log = structlog.get_logger()
T = TypeVar("T")

ATTEMPTS: Final = 3
ARRIVE_S: Final = 1.0
LATE_S: Final = 0.02
"""How long a probe is looked out for that should not arrive, after those that should have."""
TELL_S: Final = 0.5
PAUSE_S: Final = 0.02
"""Between two proofs: what is told of their packets must leave room for what is told of others."""
_STEP_S: Final = 0.005
_Key = tuple[int, bytes, bytes, int, int]


class ProvedNode(Protocol):
    """What a proof needs of its node; both run in the worker thread."""

    def question(self, uid: str, wanted: Wanted) -> Question | None:
        """None: that is not what is wanted any more."""

    def fire(self, question: Question, plan: Plan, magics: Sequence[bytes], announce: Announce) -> Volleys | None:
        """None: something has changed, and the plan with it."""


@dataclass(slots=True)
class Expected:
    """The probes that are on their way, so that an event of one is told from a packet of anybody else.

    Whoever sends a packet that looks like a probe is not served by that: a probe takes one event only, and the datapath
    treats it as every other packet.
    """

    probes: int = 0
    _told: dict[_Key, Told | None] = field(default_factory=dict)

    def announce(self, ifindex: int, flow: ProbeFlow) -> None:
        """A probe is about to be sent; may be called from any thread."""
        self.probes += 1
        self._told[_key(ifindex, flow)] = None

    def take(self, event: abi.FlowEvent) -> bool:
        """Whether an event is a probe's, and the first of it."""
        if not self._told or event.protocol != PROTOCOL or event.direction != abi.Direction.DIR_INGRESS:
            return False
        key = (event.ifindex, bytes(event.source), bytes(event.destination), event.source_port, event.destination_port)
        if key not in self._told or self._told[key] is not None:
            return False
        dropped = event.type == abi.EventType.EVENT_DROP
        self._told[key] = Told(
            event.reason if dropped else 0, event.source_identity, bool(event.audit), event.endpoint_id
        )
        return True

    def told(self, ifindex: int, flow: ProbeFlow) -> Told | None:
        return self._told.get(_key(ifindex, flow))

    def clear(self) -> None:
        self._told.clear()


def _key(ifindex: int, flow: ProbeFlow) -> _Key:
    source, destination = address_bytes(flow.source), address_bytes(flow.destination)
    return ifindex, source, destination, flow.source_port, flow.destination_port


@dataclass(slots=True)
class Proving:
    """Proves one compensation at a time.

    Args:
        in_worker: runs something in the node's worker thread.
        read_events: takes in what the datapath has told so far.
        events_lost: how many events were lost so far.
    """

    node: Callable[[], ProvedNode]
    in_worker: Callable[[Callable[[], T]], asyncio.Future[T]]
    read_events: Callable[[], None]
    events_lost: Callable[[], int]
    expected: Expected = field(default_factory=Expected)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="prover"))

    async def prove(self, uid: str, wanted: Wanted, turn: int) -> Outcome | None:
        """What a proof comes to; None: it is not wanted any more. It fails by what is seen twice in a row."""
        outcome: Outcome | None = None
        for _ in range(ATTEMPTS):
            before = outcome
            outcome = await self._try(uid, wanted, turn)
            if outcome is None or outcome.status is Status.TRUE:
                return outcome
            if before is not None and before.status is outcome.status is Status.FALSE:
                return outcome
            await asyncio.sleep(PAUSE_S * 3)  # a window of the datapath's event limiter
        return outcome

    async def _try(self, uid: str, wanted: Wanted, turn: int) -> Outcome | None:
        node = self.node()
        try:
            question = await self.in_worker(partial(node.question, uid, wanted))
            if question is None:
                return None
            plan, taps = await self._in_thread(partial(_prepare, question, turn))
            with contextlib.ExitStack() as stack:
                for tap in taps:
                    stack.callback(tap.close)
                return await self._fire(node, question, plan, taps)
        except MeshBridgeError as error:
            return Outcome(Status.UNKNOWN, "NotProbed", str(error))
        except Exception as error:  # whatever it is, it proves nothing, and must not end the agent
            log.exception("proof.failed", pod=wanted.workload.key)
            return Outcome(Status.UNKNOWN, "NotProbed", str(error))
        finally:
            self.expected.clear()

    async def _fire(self, node: ProvedNode, question: Question, plan: Plan, taps: tuple[Tap, ...]) -> Outcome | None:
        self.read_events()
        lost = self.events_lost()
        magics = tuple(tap.magic for tap in taps)
        volleys = await self.in_worker(partial(node.fire, question, plan, magics, self.expected.announce))
        if volleys is None:
            return None
        arrived = await self._in_thread(partial(_receive, taps, volleys))
        await self._told(volleys)
        any_lost = self.events_lost() != lost
        outcomes = [
            judge(plan, self._seen(volley, frames), volley.counted, lost=any_lost)
            for volley, frames in zip(volleys, arrived, strict=True)
        ]
        return min(outcomes, key=lambda outcome: (Status.FALSE, Status.UNKNOWN, Status.TRUE).index(outcome.status))

    async def _told(self, volleys: Iterable[Volley]) -> None:
        """Wait until the datapath has told of every probe: it has by now, but others may stand before it."""
        awaited = [(v.interface.hooked.ifindex, sent.flow) for v in volleys for _, sent in v.sent]
        for _ in range(round(TELL_S / _STEP_S)):
            self.read_events()
            if all(self.expected.told(*each) is not None for each in awaited):
                return
            await asyncio.sleep(_STEP_S)

    def _seen(self, volley: Volley, frames: set[bytes]) -> dict[Probe, Seen]:
        hooked = volley.interface.hooked
        return {
            probe: Seen(
                sent.taken,
                sent.frame in frames,
                self.expected.told(hooked.ifindex, sent.flow),
                left=sent.left or (sent.opened and not probe.answer.passes),
                endpoint=hooked.id,
            )
            for probe, sent in volley.sent
        }

    async def _in_thread(self, act: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, act)

    def close(self) -> None:
        self._thread.shutdown(wait=True)


def _prepare(question: Question, turn: int) -> tuple[Plan, tuple[Tap, ...]]:
    """The probes to send, and a look into the pod behind each of its interfaces.

    Raises:
        NamespaceError, ProbeError: the pod cannot be looked into.
    """
    plan = question.plan(turn)
    taps: list[Tap] = []
    try:
        for interface in question.interfaces:
            netns = interface.netns
            if not netns or namespace_number(netns) != interface.link.peer_netns:
                raise NotSeenError(
                    "its network namespace was not found, so nobody can see what arrives in it",
                    where=f"pod {question.wanted.workload.key}",
                )
            taps.append(Tap(netns, interface.link.peer_index))
    except BaseException:
        for tap in taps:
            tap.close()
        raise
    return plan, tuple(taps)


class NotSeenError(MeshBridgeError):
    """There is no way to look into a pod."""


def _receive(taps: Iterable[Tap], volleys: Iterable[Volley]) -> list[set[bytes]]:
    found = []
    for tap, volley in zip(taps, volleys, strict=True):
        awaited = [sent.frame for probe, sent in volley.sent if probe.answer.passes]
        arrived = tap.receive(awaited, ARRIVE_S) if awaited else set()
        found.append(arrived | tap.receive((), LATE_S))
    return found
