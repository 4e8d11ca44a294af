"""The agent's hands: hooks on interfaces, and the kernel's tables as the desired state says.

Everything here blocks and belongs to one worker thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog

from meshbridge import abi
from meshbridge.agent.endpoints import Hooked
from meshbridge.datapath.attach import Attacher, AttachMode
from meshbridge.datapath.events import EventReader
from meshbridge.datapath.ipcache import Identities
from meshbridge.datapath.loader import Datapath, open_datapath
from meshbridge.datapath.maps import MapSizes, has_other_versions, remove_other_versions
from meshbridge.datapath.probes import ProbeFlow, Sender, Sent, forget_flow, frame, is_open, unused_flow
from meshbridge.datapath.reconcile import (
    FIRST_ALIAS,
    Delete,
    DesiredState,
    ObservedState,
    Plan,
    Put,
    observe,
    plan,
)
from meshbridge.datapath.syscall import BpfError, BpfFullError
from meshbridge.datapath.tables import kernel_tables, wait_for_packets
from meshbridge.identity.model import IpAddress
from meshbridge.identity.numbering import Held

log = structlog.get_logger()

SIZES: Final = MapSizes(events=1 << 19)
"""Of maps this agent makes. The ring counts twice in its memory; three thousand events are a second of many drops."""

_ADDRESS_OFFSET: Final = abi.EndpointAddressKey.address.offset  # type: ignore[attr-defined]  # a ctypes field


@dataclass(frozen=True, slots=True)
class Applied:
    """What one reconciliation did."""

    writes: int
    enforced_s: float
    duration_s: float


class Enforcer:
    """The datapath of one node, taken over from whoever ran it before, without a packet lost or let through."""

    def __init__(self, pin_dir: Path, mode: AttachMode | None, sizes: MapSizes | None = None) -> None:
        self._datapath: Datapath = open_datapath(pin_dir, sizes=sizes or SIZES)
        self._maps = self._datapath.maps
        self._tables = kernel_tables(self._maps)
        self._attacher = Attacher(pin_dir, from_pod=self._datapath.from_pod, to_pod=self._datapath.to_pod, mode=mode)
        self.observed = observe(self._tables)
        self._attacher.sweep()
        self._pin_dir = pin_dir
        # Maps of another ABI belong to programs in force, which go on until ours are filled (docs/adr/0001).
        self._succeeds = has_other_versions(pin_dir)
        self.resumed = frozenset() if self._succeeds else frozenset(self._attacher.update_all())
        self._in_doubt = False
        self._flow_tables = self._maps.conntrack.tables()

    @property
    def mode(self) -> AttachMode:
        return self._attacher.mode

    def reader(self) -> EventReader:
        """The events from where the reader before left off; only one may exist."""
        return EventReader(self._maps.events_fd)

    def counters(self) -> dict[tuple[int, int], tuple[int, int]]:
        return self._maps.counters()

    def lost_events(self) -> int:
        """Losses that no event has told yet."""
        return self._maps.lost_events()

    def probe(
        self,
        hooked: Hooked,
        flows: Iterable[tuple[IpAddress, IpAddress, int]],
        magic: bytes,
        announce: Callable[[int, ProbeFlow], None],
    ) -> list[Sent]:
        """Send a probe for each (source, destination, port) to the pod behind an interface; none leaves an open flow.

        Args:
            announce: called with interface and flow of each before it is sent.

        Raises:
            ProbeError: the interface is gone or down, or too many of the source's flows are open.
            BpfNotFoundError: the pod has no flow table.
        """
        mac = hooked.mac or bytes(6)  # a pod that does not take it for its own shows it all the same
        sent = []
        with (
            Sender(hooked.ifindex) as sender,
            self._maps.conntrack.flows_at(self._flow_table(hooked.incarnation)) as held,
        ):
            for source, destination, port in flows:
                flow = unused_flow(held, source, destination, port)
                data = frame(flow, magic, source_mac=sender.mac, destination_mac=mac)
                announce(hooked.ifindex, flow)
                taken = sender.send(data)
                opened = forget_flow(held, flow)
                sent.append(Sent(flow, data, taken, opened, left=is_open(held, flow)))
        return sent

    def attached(self) -> frozenset[int]:
        """Interfaces that exist and run both programs."""
        return frozenset(self._attacher.attached())

    def attach(self, ifindex: int, incarnation: int) -> None:
        """The interface is under our programs, with a flow table for this incarnation."""
        self._flow_table(incarnation)
        self._attacher.attach(ifindex)

    def sweep(self) -> None:
        """Forget hooks whose interface is gone, flow tables that no endpoint uses, and programs of another ABI.

        To be called when the maps hold what is desired, and its interfaces are attached.
        """
        self._attacher.sweep()
        if self._succeeds:
            self._attacher.update_all()
            remove_other_versions(self._pin_dir)
            self._succeeds = False
        used = {record.incarnation for record in self.observed.endpoints.values()}
        unused = self._flow_tables.keys() - used
        if unused:
            wait_for_packets()  # that still have an entry which names one of them
        for incarnation in unused:
            self._maps.conntrack.remove(incarnation)
            del self._flow_tables[incarnation]

    def apply(self, desired: DesiredState) -> Applied:
        """Bring the kernel to the desired state.

        When the tables cannot take all of it, the endpoints whose policy is new are closed: what is written of them is
        older than what was asked for, and may pass what is denied now.

        Raises:
            BpfError: the kernel refuses a write; what it holds is read back at the next call.
        """
        started = time.perf_counter()
        if self._in_doubt:
            self.observed = observe(self._tables)
            self._in_doubt = False
        endpoints = {
            ifindex: replace(endpoint, flow_table=self._flow_table(endpoint.incarnation))
            for ifindex, endpoint in desired.endpoints.items()
        }
        desired = replace(desired, endpoints=endpoints)
        try:
            result, enforced_s = self._run(desired, started)
        except BpfFullError:
            self.observed = observe(self._tables)
            self._run(_without_new_policies(desired, self.observed), started)
            raise
        self.observed = result.after
        return Applied(result.writes, enforced_s, time.perf_counter() - started)

    def distrust(self) -> None:
        """What the kernel holds is read back at the next ``apply``, and mended: it is not what was written."""
        self._in_doubt = True

    def _run(self, desired: DesiredState, started: float) -> tuple[Plan, float]:
        result = plan(self.observed, desired)
        self._in_doubt = True
        enforced_s = 0.0
        for position, step in enumerate(result.steps):
            if position == result.enforced_after:
                enforced_s = time.perf_counter() - started
            if isinstance(step, Put):
                self._tables[step.table].put(step.items)
            elif isinstance(step, Delete):
                self._tables[step.table].delete(step.keys)
            else:
                wait_for_packets()
        self._in_doubt = False
        self.observed = result.after
        return result, enforced_s or time.perf_counter() - started

    def _flow_table(self, incarnation: int) -> int:
        """The index of the incarnation's flow table, made where it has none."""
        if incarnation not in self._flow_tables:
            self._flow_tables[incarnation] = self._maps.conntrack.create(incarnation)
        return self._flow_tables[incarnation]

    def addresses_of_interfaces(self) -> dict[int, frozenset[IpAddress]]:
        """The source addresses each interface was allowed by whoever ran before."""
        found: dict[int, set[IpAddress]] = {}
        for raw in self.observed.addresses:
            key = abi.EndpointAddressKey.from_buffer_copy(raw)
            found.setdefault(key.ifindex, set()).add(abi.parse_address(raw[_ADDRESS_OFFSET:]))
        return {ifindex: frozenset(addresses) for ifindex, addresses in found.items()}

    def identities_of_addresses(self) -> dict[bytes, Held]:
        """The numbers addresses have in the kernel, without those that only stood in during a transition."""
        shared: dict[Identities, Held] = {}  # few values for many addresses
        return {
            raw: shared.get(value) or shared.setdefault(value, Held(value.identity, value.forwarded_identity))
            for raw, value in self.observed.ipcache.exact.items()
            if max(value) < FIRST_ALIAS
        }

    def highest_identity(self) -> int:
        """The highest number that anything in the kernel still speaks of."""
        ipcache = self.observed.ipcache
        held: Iterable[Identities] = (*ipcache.exact.values(), *ipcache.prefixes.values())
        written = (number for packed in self.observed.sets.values() for number in packed.by_identity())
        return max((n for n in (*(n for value in held for n in value), *written) if n < FIRST_ALIAS), default=0)

    def highest_incarnation(self) -> int:
        return max(self.observed.highest_incarnation(), *self._flow_tables, 0)

    def close(self) -> None:
        """Give the descriptors back; what is pinned stays in force."""
        self._datapath.close()


def remove_everything(pin_dir: Path, mode: AttachMode | None) -> int:
    """Take the programs off every interface and unpin all of the node's maps; how many interfaces there were.

    Nothing of the node is enforced from now on.
    """
    with open_datapath(pin_dir) as datapath:
        attacher = Attacher(pin_dir, from_pod=datapath.from_pod, to_pod=datapath.to_pod, mode=mode)
        ifindexes = set(observe(kernel_tables(datapath.maps)).endpoints) | attacher.attached()
        for ifindex in sorted(ifindexes):
            attacher.detach(ifindex)
        attacher.sweep()
    for directory in sorted(pin_dir.rglob("*"), reverse=True):
        directory.rmdir() if directory.is_dir() else directory.unlink()
    pin_dir.rmdir()
    return len(ifindexes)


def _without_new_policies(desired: DesiredState, observed: ObservedState) -> DesiredState:
    def is_written(ifindex: int) -> bool:
        record, sets = observed.endpoints.get(ifindex), desired.endpoints[ifindex].sets
        return record is not None and sets is not None and tuple(map(observed.sets.get, record.sets)) == sets

    endpoints = {
        ifindex: endpoint if is_written(ifindex) else replace(endpoint, sets=None)
        for ifindex, endpoint in desired.endpoints.items()
    }
    return DesiredState(endpoints, desired.ipcache)


__all__ = ["Applied", "BpfError", "Enforcer", "remove_everything"]
