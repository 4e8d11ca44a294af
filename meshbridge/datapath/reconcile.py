"""From what the kernel holds to what it should hold, in an order in which no packet is misjudged on the way.

Between any two writes a packet gets the verdict of the state before or of the state after, judged by one endpoint's
policy: what both deny never passes, what both allow is never dropped. The order, and why it needs more than one flip
when addresses change their identity together with the policy, is docs/adr/0040.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from meshbridge import abi
from meshbridge.datapath.ipcache import (
    EVERY_ADDRESS,
    EVERY_IPV4,
    WORLD_IPV4,
    WORLD_IPV6,
    Identities,
    Ipcache,
    moves,
)
from meshbridge.datapath.policysets import SET_ID, PackedSet, differing, layout, overlay, read_sets
from meshbridge.datapath.rawtables import Item
from meshbridge.datapath.tables import Table, TableName
from meshbridge.identity.model import IpAddress, IpFamily

READY: Final = int(abi.EndpointFlags.ENDPOINT_F_READY)
NO_SETS: Final = (0, 0, 0, 0)
FIRST_ALIAS: Final = 1 << 31
"""Identity numbers from here up are the reconciler's own, in use only while a transition lasts."""

_ENDPOINT: Final = layout(abi.EndpointValue)
_U32: Final = SET_ID
_ADDRESS: Final = layout(abi.EndpointAddressKey)
_IDENTITIES: Final = layout(abi.IpcacheValue)
_PREFIX: Final = layout(abi.IpcacheCidrKey)


@dataclass(frozen=True, slots=True)
class DesiredEndpoint:
    """One hooked interface. ``sets`` None: its policy is not known or could not be compiled, everything is dropped.

    ``flow_table`` is the index of the incarnation's flows; without one (0) everything is dropped as well.
    """

    ifindex: int
    id: int
    incarnation: int
    identity: int
    sets: tuple[PackedSet, ...] | None = None
    addresses: frozenset[IpAddress] = frozenset()
    flags: int = 0
    mac: bytes = bytes(6)
    flow_table: int = 0


@dataclass(frozen=True, slots=True)
class DesiredState:
    """All of a node: endpoints by ifindex, holders of addresses and prefixes in the kernel's form."""

    endpoints: Mapping[int, DesiredEndpoint]
    ipcache: Ipcache


@dataclass(frozen=True, slots=True)
class EndpointRecord:
    """An endpoint's value in the kernel."""

    id: int
    incarnation: int
    identity: int
    revision: int
    flags: int
    sets: tuple[int, ...]
    mac: bytes
    flow_table: int

    @property
    def ready(self) -> bool:
        return bool(self.flags & READY)

    def pack(self, ifindex: int) -> bytes:
        sets = b"".join(map(_U32.pack, self.sets))
        fields = (self.id, self.incarnation, self.identity, self.revision, self.flags, sets, self.mac, self.flow_table)
        return _ENDPOINT.pack(ifindex, *fields, ifindex)

    @classmethod
    def unpack(cls, raw: bytes) -> EndpointRecord:
        _, number, incarnation, identity, revision, flags, packed, mac, flow_table, _ = _ENDPOINT.unpack(raw)
        sets = tuple(set_id for (set_id,) in _U32.iter_unpack(packed))
        return cls(number, incarnation, identity, revision, flags, sets, mac, flow_table)


@dataclass(slots=True)
class ObservedState:
    """What the maps hold."""

    endpoints: dict[int, EndpointRecord] = field(default_factory=dict)
    addresses: dict[bytes, int] = field(default_factory=dict)
    ipcache: Ipcache = field(default_factory=lambda: Ipcache({}, {}))
    sets: dict[int, PackedSet] = field(default_factory=dict)

    def highest_rule_id(self) -> int:
        return max((rule for packed in self.sets.values() for rule in packed.rule_ids()), default=0)

    def highest_incarnation(self) -> int:
        return max((record.incarnation for record in self.endpoints.values()), default=0)


@dataclass(frozen=True, slots=True)
class Put:
    """Write entries in this order."""

    table: TableName
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove entries in this order."""

    table: TableName
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Let packets that are being judged finish before the next step."""


Step = Put | Delete | Wait


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps to ``after``; with the first ``enforced_after`` of them the new state is in force, the rest tidies up."""

    steps: tuple[Step, ...]
    enforced_after: int
    after: ObservedState

    @property
    def writes(self) -> int:
        return sum(
            len(step.items if isinstance(step, Put) else step.keys) for step in self.steps if not isinstance(step, Wait)
        )


def observe(tables: Mapping[TableName, Table]) -> ObservedState:
    """Read back what is in force."""
    shared: dict[bytes, Identities] = {}  # few values for many addresses
    exact = {
        key: shared.get(value) or shared.setdefault(value, Identities(*_IDENTITIES.unpack(value)))
        for key, value in tables[TableName.IPCACHE].read()
    }
    prefixes = {
        _PREFIX.unpack(key): Identities(*_IDENTITIES.unpack(value))
        for key, value in tables[TableName.IPCACHE_CIDR].read()
    }
    return ObservedState(
        endpoints={
            _U32.unpack(key)[0]: EndpointRecord.unpack(value) for key, value in tables[TableName.ENDPOINTS].read()
        },
        addresses={key: _U32.unpack(value)[0] for key, value in tables[TableName.ADDRESSES].read()},
        ipcache=Ipcache(exact, prefixes),
        sets=read_sets(tables[TableName.POLICY_SETS].read()),
    )


def plan(observed: ObservedState, desired: DesiredState) -> Plan:
    """The writes that lead from ``observed`` to ``desired``; none when they agree. A function of its arguments."""
    return _Planner(observed, desired).run()


def _with_aliases(ipcache: Ipcache, aliases: Mapping[int, int]) -> Ipcache:
    """The same holders under their aliases; what nobody holds gets the alias of its world from a prefix over all."""
    if not aliases:
        return ipcache

    def renamed(value: Identities) -> Identities:
        return Identities(*(aliases.get(number, number) for number in value))

    prefixes = {key: renamed(value) for key, value in ipcache.prefixes.items()}
    if not aliases.keys().isdisjoint((WORLD_IPV4, WORLD_IPV6)):
        # First IPv4, unless something answers for all of it: the prefix of IPv6 would otherwise.
        if ipcache.covering(EVERY_IPV4) is None:
            prefixes[EVERY_IPV4] = renamed(Identities(WORLD_IPV4))
        prefixes.setdefault(EVERY_ADDRESS, renamed(Identities(WORLD_IPV6)))
    return Ipcache({key: renamed(value) for key, value in ipcache.exact.items()}, prefixes)


def _record(wanted: DesiredEndpoint, revision: int, flags: int, sets: tuple[int, ...]) -> EndpointRecord:
    return EndpointRecord(
        wanted.id, wanted.incarnation, wanted.identity, revision, flags, sets, wanted.mac, wanted.flow_table
    )


class _Change(NamedTuple):
    """One set of an endpoint, before and after; ``admits_host`` as in ``overlay``."""

    before: int
    after: int
    admits_host: bool


def _admits_host(record: EndpointRecord, slot: int) -> bool:
    return slot < len(IpFamily) and not record.flags & abi.EndpointFlags.ENDPOINT_F_NO_LOCALHOST


class _Planner:
    """One plan in the making: the records as they will be so far, and the steps that got them there."""

    def __init__(self, observed: ObservedState, desired: DesiredState) -> None:
        self._observed, self._desired = observed, desired
        self._endpoints = dict(observed.endpoints)
        self._sets = dict(observed.sets)
        self._by_content = {packed: set_id for set_id, packed in sorted(observed.sets.items(), reverse=True)}
        self._new_sets: list[int] = []
        self._last_set = max((*observed.sets, *self._referenced(), 0))
        self._steps: list[Step] = []
        self._moves = moves(observed.ipcache, desired.ipcache)

    def run(self) -> Plan:
        target = {ifindex: self._target(endpoint) for ifindex, endpoint in self._desired.endpoints.items()}
        staying = [ifindex for ifindex in target if self._stays(ifindex)]
        bridges, aliases = self._bridges({ifindex: target[ifindex] for ifindex in staying})
        self._write_new_sets()
        closed = self._close(target.keys() - set(staying))
        self._write_addresses()
        bridged = self._flip(bridges)
        self._move_addresses(aliases, flipped=bridged or closed)
        withdrawn = self._withdraw_addresses()
        self._flip({ifindex: target[ifindex] for ifindex in staying}, rejudge=bool(self._moves) or withdrawn)
        self._open({ifindex: target[ifindex] for ifindex in target.keys() - set(staying)})
        enforced = len(self._steps)
        self._tidy()
        after = ObservedState(self._endpoints, self._wanted_addresses(), self._desired.ipcache, self._sets)
        return Plan(tuple(self._steps), enforced, after)

    # What is wanted

    def _target(self, endpoint: DesiredEndpoint) -> EndpointRecord:
        """The endpoint's record when all is done, but for its revision."""
        sets = NO_SETS if endpoint.sets is None else tuple(map(self._set_id, endpoint.sets))
        flags = endpoint.flags & ~READY if endpoint.sets is None else endpoint.flags | READY
        before = self._observed.endpoints.get(endpoint.ifindex)
        revision = before.revision if before else 0
        return _record(endpoint, revision, flags, sets)

    def _stays(self, ifindex: int) -> bool:
        """Whether the endpoint is judged by policy before and after, as the same pod."""
        before, wanted = self._observed.endpoints.get(ifindex), self._desired.endpoints[ifindex]
        return (
            before is not None
            and before.ready
            and wanted.sets is not None
            and before.incarnation == wanted.incarnation
            and all(set_id in self._observed.sets for set_id in before.sets)
        )

    def _set_id(self, packed: PackedSet) -> int:
        """The number under which this content is or will be written."""
        known = self._by_content.get(packed)
        if known is None:
            self._last_set = self._free_set_id()
            known = self._by_content[packed] = self._last_set
            self._sets[known] = packed
            self._new_sets.append(known)
        return known

    def _free_set_id(self) -> int:
        taken = {*self._sets, *self._referenced()} if self._last_set >= 0xFFFFFFFF else set()
        candidate = self._last_set % 0xFFFFFFFF + 1
        while candidate in taken:
            candidate = candidate % 0xFFFFFFFF + 1
        return candidate

    def _referenced(self) -> set[int]:
        return {set_id for record in self._observed.endpoints.values() for set_id in record.sets}

    # How to get there

    def _bridges(self, target: Mapping[int, EndpointRecord]) -> tuple[dict[int, EndpointRecord], dict[int, int]]:
        """The record of each endpoint while addresses move, and numbers that stand in for identities meanwhile.

        While addresses move, a peer must be answered as before under its old identity and as afterwards under its new
        one. Where old and new set differ on an identity that addresses leave, the bridge answers it as the old set;
        where such an identity is also one that addresses take, those take an alias first, answered as new.
        """
        leaving = {before for before, _ in self._moves}
        taken = {after for _, after in self._moves}
        stale: dict[_Change, set[int]] = {}
        for ifindex, record in target.items():
            for change in self._changes(ifindex, record):
                if change not in stale:
                    stale[change] = differing(self._sets[change.before], self._sets[change.after], leaving)
        conflicts = sorted(set[int]().union(*stale.values()) & taken)
        aliases = dict(zip(conflicts, self._free_aliases(), strict=False))
        bridges: dict[_Change, int] = {}
        for change, identities in stale.items():
            old, new = self._sets[change.before], self._sets[change.after]
            answers = {identity: (old, identity) for identity in identities}
            answers |= {alias: (new, identity) for identity, alias in aliases.items()}
            bridge = overlay(new, answers, admits_host=change.admits_host) if answers else new
            bridges[change] = self._set_id(bridge)
        return {
            ifindex: replace(record, sets=tuple(bridges[change] for change in self._changes(ifindex, record)))
            for ifindex, record in target.items()
        }, aliases

    def _changes(self, ifindex: int, record: EndpointRecord) -> list[_Change]:
        """What becomes of each of a staying endpoint's sets."""
        before = self._observed.endpoints[ifindex].sets
        return [
            _Change(old, new, _admits_host(record, slot))
            for slot, (old, new) in enumerate(zip(before, record.sets, strict=True))
        ]

    def _free_aliases(self) -> Iterator[int]:
        ipcache = self._observed.ipcache
        used = {number for v in (*ipcache.exact.values(), *ipcache.prefixes.values()) for number in v}
        return (number for number in range(FIRST_ALIAS, 1 << 32) if number not in used)

    def _write_new_sets(self) -> None:
        self._put(TableName.POLICY_SETS, [(_U32.pack(s), self._sets[s].content) for s in self._new_sets])
        self._new_sets.clear()

    def _close(self, not_staying: Iterable[int]) -> bool:
        """Drop everything of endpoints that go or that another pod takes over, before anything they saw changes.

        Returns whether any had been judged by policy.
        """
        ready = {ifindex for ifindex, record in self._endpoints.items() if record.ready}
        gone = self._endpoints.keys() - self._desired.endpoints.keys()
        self._delete(TableName.ENDPOINTS, [_U32.pack(ifindex) for ifindex in sorted(gone)])
        for ifindex in gone:
            del self._endpoints[ifindex]
        closing: dict[int, EndpointRecord] = {}
        for ifindex in sorted(not_staying):
            wanted = self._desired.endpoints[ifindex]
            before = self._endpoints.get(ifindex)
            revision = before.revision if before else 0
            flags = wanted.flags & ~READY
            closing[ifindex] = _record(wanted, revision, flags, NO_SETS)
        self._write_endpoints(closing)
        return bool(ready & (gone | closing.keys()))

    def _write_addresses(self) -> None:
        wanted = self._wanted_addresses()
        before = self._observed.addresses
        self._put(TableName.ADDRESSES, [(key, _U32.pack(inc)) for key, inc in wanted.items() if before.get(key) != inc])

    def _withdraw_addresses(self) -> bool:
        """Take away addresses nobody may use any more; open flows are asked for theirs only under a new revision."""
        gone = sorted(self._observed.addresses.keys() - self._wanted_addresses().keys())
        self._delete(TableName.ADDRESSES, gone)
        return bool(gone)

    def _wanted_addresses(self) -> dict[bytes, int]:
        return {
            _ADDRESS.pack(ifindex, abi.address_bytes(address)): endpoint.incarnation
            for ifindex, endpoint in self._desired.endpoints.items()
            for address in endpoint.addresses
        }

    def _flip(self, records: Mapping[int, EndpointRecord], *, rejudge: bool = False) -> bool:
        """Write records that differ, each under a new revision, so that open flows are judged again.

        Returns whether any did.
        """
        flipped: dict[int, EndpointRecord] = {}
        for ifindex, record in sorted(records.items()):
            now = self._endpoints[ifindex]
            if rejudge or replace(record, revision=now.revision) != now:
                flipped[ifindex] = replace(record, revision=(now.revision + 1) & 0xFFFFFFFF)
        if flipped:
            self._write_new_sets()
            self._write_endpoints(flipped)
        return bool(flipped)

    def _open(self, records: Mapping[int, EndpointRecord]) -> None:
        """Let policy judge endpoints that dropped everything so far."""
        ready = {ifindex: record for ifindex, record in sorted(records.items()) if record.ready}
        self._write_endpoints({i: replace(r, revision=(r.revision + 1) & 0xFFFFFFFF) for i, r in ready.items()})

    def _move_addresses(self, aliases: Mapping[int, int], *, flipped: bool) -> None:
        """Bring the ipcache to what is wanted, in an order in which every lookup is the old or the new one.

        Exact addresses hide prefixes and long prefixes hide short ones: what hides is written first and removed last.

        Args:
            flipped: sets were flipped just now; a packet that read the old one must not meet a new identity. (The other
                way round needs no wait: a packet reads its endpoint first.)
        """
        before = self._observed.ipcache
        after = _with_aliases(self._desired.ipcache, aliases)
        if flipped and self._moves:
            self._steps.append(Wait())
        self._write_ipcache(before, after)
        if aliases:
            self._flip_to_aliased(aliases)
            self._steps.append(Wait())
            self._write_ipcache(after, self._desired.ipcache)

    def _write_ipcache(self, before: Ipcache, after: Ipcache) -> None:
        if before.exact is not after.exact:
            exact = {key: value for key, value in after.exact.items() if before.exact.get(key) != value}
            self._put(TableName.IPCACHE, [(key, _IDENTITIES.pack(*exact[key])) for key in sorted(exact)])
        prefixes = {key: value for key, value in after.prefixes.items() if before.prefixes.get(key) != value}
        longest_first = sorted(prefixes, key=lambda prefix: (-prefix[0], prefix[1]))
        self._put(
            TableName.IPCACHE_CIDR, [(_PREFIX.pack(*key), _IDENTITIES.pack(*prefixes[key])) for key in longest_first]
        )
        gone = sorted(before.prefixes.keys() - after.prefixes.keys(), key=lambda prefix: prefix[0])
        self._delete(TableName.IPCACHE_CIDR, [_PREFIX.pack(*prefix) for prefix in gone])
        if before.exact is not after.exact:
            self._delete(TableName.IPCACHE, sorted(before.exact.keys() - after.exact.keys()))

    def _flip_to_aliased(self, aliases: Mapping[int, int]) -> None:
        """Answer every identity as wanted, and its alias as the identity: no old answer is left."""
        records: dict[int, EndpointRecord] = {}
        for ifindex, endpoint in self._desired.endpoints.items():
            record = self._endpoints.get(ifindex)
            if record is not None and record.ready and endpoint.sets is not None:
                sets = tuple(
                    self._set_id(
                        overlay(
                            packed,
                            {alias: (packed, identity) for identity, alias in aliases.items()},
                            admits_host=_admits_host(record, slot),
                        )
                    )
                    for slot, packed in enumerate(endpoint.sets)
                )
                records[ifindex] = replace(record, sets=sets)
        self._flip(records)

    def _tidy(self) -> None:
        """Remove what nothing refers to any more, once no packet can be using it."""
        used = {set_id for record in self._endpoints.values() for set_id in record.sets}
        stale = sorted(self._sets.keys() - used)
        if not stale:
            return
        self._steps.append(Wait())
        self._delete(TableName.POLICY_SETS, [_U32.pack(set_id) for set_id in stale])
        for set_id in stale:
            del self._sets[set_id]

    # The steps themselves

    def _write_endpoints(self, records: Mapping[int, EndpointRecord]) -> None:
        changed = {ifindex: record for ifindex, record in records.items() if self._endpoints.get(ifindex) != record}
        self._endpoints |= changed
        self._put(
            TableName.ENDPOINTS, [(_U32.pack(ifindex), record.pack(ifindex)) for ifindex, record in changed.items()]
        )

    def _put(self, table: TableName, items: Iterable[Item]) -> None:
        if found := tuple(items):
            self._steps.append(Put(table, found))

    def _delete(self, table: TableName, keys: Iterable[bytes]) -> None:
        if found := tuple(keys):
            self._steps.append(Delete(table, found))
