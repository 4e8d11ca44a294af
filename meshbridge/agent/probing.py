"""The node's part of a proof: what is known for its probes to be chosen, and the moment in which they are sent.

They are sent by the thread that writes the kernel's tables, so that what they are judged by is what was planned for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from meshbridge.abi import parse_address
from meshbridge.agent.endpoints import Hooked
from meshbridge.agent.enforcer import Enforcer
from meshbridge.agent.proofs import Wanted
from meshbridge.agent.view import Holder
from meshbridge.bypass.proof import Answer, Plan, Probe, Source, plan_probes
from meshbridge.datapath.answers import SetAnswers
from meshbridge.datapath.ipcache import Ipcache, ipcache_key
from meshbridge.datapath.links import Link
from meshbridge.datapath.probes import PROTOCOL, ProbeFlow, Sent
from meshbridge.identity.model import IpAddress, IpFamily
from meshbridge.policy.model import Direction

STRANGERS: Final[Mapping[IpFamily, IpAddress]] = {
    IpFamily.IPV4: IPv4Address("192.0.2.1"),
    IpFamily.IPV6: IPv6Address("2001:db8::1"),
}
"""Addresses that nobody has, reserved for documentation: whoever is none of the cluster."""

Sources = Mapping[IpFamily, tuple[Source, ...]]
Counters = Mapping[tuple[int, int], tuple[int, int]]
"""Packets and bytes by reason and direction."""
Announce = Callable[[int, ProbeFlow], None]
"""Called with interface and flow of each probe before it is sent."""


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface of a pod from both sides: the node's end is hooked, the other is in ``netns``."""

    hooked: Hooked
    link: Link
    netns: str


@dataclass(frozen=True, slots=True)
class Question:
    """What a proof of one pod starts from."""

    wanted: Wanted
    interfaces: tuple[Interface, ...]
    sources: Sources

    def plan(self, turn: int) -> Plan:
        """The probes, each of which is sent on every interface."""
        sets = self.wanted.sets
        assert sets is not None, "a proof is due only where there are sets"
        answers = {family: SetAnswers(sets[Direction.INGRESS * len(IpFamily) + family]) for family in IpFamily}
        own = frozenset(self.wanted.workload.addresses)
        families = frozenset(map(IpFamily.of, own))
        return plan_probes(
            self.wanted.demand.of(families),
            [port.port for port in self.wanted.workload.ports],
            {family: [s for s in found if s.address not in own] for family, found in self.sources.items()},
            lambda family, port, identity: Answer(answers[family].drop_reason(identity, PROTOCOL, port)),
            turn,
        )

    def destination(self, family: IpFamily) -> IpAddress:
        return next(address for address in self.wanted.workload.addresses if IpFamily.of(address) is family)


@dataclass(frozen=True, slots=True)
class Volley:
    """The probes of one proof on one interface as they were sent, and by how much the datapath's counters grew, by
    reason."""

    interface: Interface
    sent: tuple[tuple[Probe, Sent], ...]
    counted: Mapping[int, int]


Volleys = tuple[Volley, ...]


@dataclass(slots=True)
class Prober:
    """Belongs to the worker thread."""

    enforcer: Enforcer
    _sources: tuple[Ipcache, Sources] | None = None

    def question(
        self, wanted: Wanted, links: Mapping[int, Link], netns: str, holders: Mapping[bytes, Holder], ipcache: Ipcache
    ) -> Question | None:
        """What a proof starts from; None: the pod has no interface any more."""
        if self._sources is None or self._sources[0] is not ipcache:
            self._sources = (ipcache, known_sources(holders, ipcache))
        interfaces = tuple(
            Interface(hooked, links[hooked.ifindex], netns) for hooked in wanted.hooked if hooked.ifindex in links
        )
        return Question(wanted, interfaces, self._sources[1]) if interfaces else None

    def fire(
        self, question: Question, plan: Plan, magics: Sequence[bytes], announce: Announce, ipcache: Ipcache
    ) -> Volleys | None:
        """Send the probes on every interface; None: a source is somebody else than it was."""
        sources = {probe.source for probe in plan.probes}
        if any(ipcache.lookup(ipcache_key(source.address)).identity != source.identity for source in sources):
            return None
        flows = [(p.source.address, question.destination(p.family), p.port) for p in plan.probes]
        volleys = []
        for interface, magic in zip(question.interfaces, magics, strict=True):
            before = self.enforcer.counters()
            sent = self.enforcer.probe(interface.hooked, flows, magic, announce)
            counted = _grown(before, self.enforcer.counters())
            volleys.append(Volley(interface, tuple(zip(plan.probes, sent, strict=True)), counted))
        return tuple(volleys)


def known_sources(holders: Mapping[bytes, Holder], ipcache: Ipcache) -> Sources:
    """Pods that a probe may claim to come from, two of each identity at most, and last one that is nobody.

    Nodes are left out: who comes from one is told by more than its address.
    """
    found: dict[IpFamily, dict[int, list[Source]]] = {family: {} for family in IpFamily}
    for raw, holder in holders.items():
        held = ipcache.exact.get(raw)
        if held is None or not holder.name or not holder.peer.is_pod or holder.peer.entities:
            continue
        address = parse_address(raw)
        alike = found[IpFamily.of(address)].setdefault(held.identity, [])
        if len(alike) < 2:
            alike.append(Source(f"{holder.peer.namespace}/{holder.name}", address, held.identity))
    sources = {}
    for family, by_identity in found.items():
        stranger = STRANGERS[family]
        world = Source("world", stranger, ipcache.lookup(ipcache_key(stranger)).identity)
        pods = (source for number in sorted(by_identity) for source in by_identity[number])
        sources[family] = (*pods, *(() if ipcache_key(stranger) in ipcache.exact else (world,)))
    return sources


def _grown(before: Counters, after: Counters) -> dict[int, int]:
    """By how many packets to pods each counter grew, by reason; 0 is what passed."""
    return {
        reason: packets - before.get((reason, direction), (0, 0))[0]
        for (reason, direction), (packets, _) in after.items()
        if direction == Direction.INGRESS
    }
