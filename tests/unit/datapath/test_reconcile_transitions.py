"""From any state to any other: no packet is misjudged between two writes, and the end does not depend on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reconcile_cases import (
    ADDRESSES,
    API,
    IDENTITIES,
    NODE,
    PEERS,
    PORTS,
    PREFIXES,
    RULES,
    SETS,
    TRANSITIONS,
    WEB,
)

from meshbridge import abi
from meshbridge.datapath.ipcache import WORLD_IPV4, WORLD_IPV6, Identities, Ipcache, ipcache_key, ipcache_prefix, masked
from meshbridge.datapath.policysets import (
    EntryKey,
    EntryValue,
    LayerValue,
    PackedSet,
    RuleIds,
    differing,
    overlay,
    pack_map,
    unpack_entries,
)
from meshbridge.datapath.rawtables import Item
from meshbridge.datapath.reconcile import (
    READY,
    Delete,
    DesiredEndpoint,
    DesiredState,
    ObservedState,
    Plan,
    Put,
    Wait,
    observe,
    plan,
)
from meshbridge.datapath.tables import TableName
from meshbridge.identity.model import IpFamily
from meshbridge.policy.model import Direction, Layer, LayerDefault, Origin, PolicyEntry, PolicyKey, PolicyMap, Verdict


@dataclass
class MemoryTable:
    """A Table in a dict."""

    content: dict[bytes, bytes] = field(default_factory=dict)

    def read(self) -> list[Item]:
        return list(self.content.items())

    def put(self, items: Sequence[Item]) -> None:
        self.content.update(items)

    def delete(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.content.pop(key, None)


Tables = dict[TableName, MemoryTable]


def new_tables() -> Tables:
    return {name: MemoryTable() for name in TableName}


def apply(tables: Tables, result: Plan, *, until: int | None = None) -> None:
    for step in result.steps[:until]:
        if isinstance(step, Put):
            tables[step.table].put(step.items)
        elif isinstance(step, Delete):
            tables[step.table].delete(step.keys)


# The kernel, as literally as abi.h describes it


@dataclass(frozen=True)
class Packet:
    ifindex: int
    slot: int
    peer: IPv4Address | IPv6Address
    forwarded: bool
    port: int


class Moment:
    """What the kernel holds at one moment, and the lookups it does on it."""

    def __init__(self, tables: Mapping[TableName, Mapping[bytes, bytes]]) -> None:
        self.tables = tables
        self._identities: dict[tuple[IPv4Address | IPv6Address, bool], int] = {}
        self._answers: dict[tuple[int, int, int, bool], bool] = {}
        self._endpoints = {
            abi.EndpointKey.from_buffer_copy(key).ifindex: abi.EndpointValue.from_buffer_copy(value)
            for key, value in tables[TableName.ENDPOINTS].items()
        }

    def set_of(self, packet: Packet) -> int | None:
        endpoint = self._endpoints.get(packet.ifindex)
        return endpoint.policy_set[packet.slot] if endpoint and endpoint.flags & READY else None

    def identity_of(self, packet: Packet) -> int:
        key = (packet.peer, packet.forwarded)
        if key not in self._identities:
            self._identities[key] = self._lookup(*key)
        return self._identities[key]

    def _lookup(self, peer: IPv4Address | IPv6Address, forwarded: bool) -> int:
        address = ipcache_key(peer)
        raw = self.tables[TableName.IPCACHE].get(address)
        if raw is None:
            best = -1
            for key, value in self.tables[TableName.IPCACHE_CIDR].items():
                prefix = abi.IpcacheCidrKey.from_buffer_copy(key)
                if prefix.prefix_bits > best and masked(address, prefix.prefix_bits) == bytes(prefix.address):
                    best, raw = prefix.prefix_bits, value
        if raw is None:
            return WORLD_IPV4 if peer.version == 4 else WORLD_IPV6
        value = abi.IpcacheValue.from_buffer_copy(raw)
        return int(value.forwarded_identity or value.identity) if forwarded else int(value.identity)

    def passes(self, set_id: int | None, identity: int, packet: Packet) -> bool:
        if set_id is None:
            return False
        admits_host = identity == NODE and packet.slot < 2 and not packet.forwarded
        key = (set_id, identity, packet.port, admits_host)
        if key not in self._answers:
            self._answers[key] = self._judge(*key)
        return self._answers[key]

    def _judge(self, set_id: int, identity: int, port: int, admits_host: bool) -> bool:
        content = self.tables[TableName.POLICY_SETS].get(bytes(abi.PolicySetKey(set_id=set_id)))
        if content is None:
            return False
        packed = PackedSet.of_content(content)
        network, mesh = answer(packed, identity, port, admits_host=admits_host)
        return network and mesh

    def verdict(self, packet: Packet) -> bool:
        return self.passes(self.set_of(packet), self.identity_of(packet), packet)


def layer_passes(
    layer: int,
    default: LayerValue,
    identity: int,
    port: int,
    policy: Mapping[EntryKey, EntryValue],
    *,
    admits_host: bool = False,
) -> bool:
    best: tuple[int, int, bool] | None = None
    verdict = default.verdict
    for who in (identity, 0):
        for prefix in (0, 16, 17):  # the lengths that policy_maps() writes
            if not (default.prefixes if who else default.any_prefixes) & (1 << prefix):
                continue
            key = EntryKey(who, port if prefix == 16 else 0, 0 if prefix == 17 else 6, prefix, layer)
            entry = policy.get(key)
            if entry is not None:
                rank = (entry.precedence, -1 if prefix == 17 else prefix, who != 0)
                if best is None or rank > best:
                    best, verdict = rank, entry.verdict
    if best is None and admits_host:
        return True
    return verdict in (abi.PolicyVerdict.POLICY_ALLOW, abi.PolicyVerdict.POLICY_NEEDS_L7)


PACKETS = [
    Packet(ifindex, direction * 2 + IpFamily.of(peer), peer, forwarded, port)
    for ifindex in (7, 8)
    for direction in Direction
    for peer in PEERS
    for forwarded in (False, True)
    for port in PORTS
]


def moments(tables: Tables, result: Plan) -> Iterator[list[Moment]]:
    """The state after each single write, in runs that no packet outlives."""
    current: dict[TableName, dict[bytes, bytes]] = {name: dict(table.content) for name, table in tables.items()}
    run = [Moment(dict(current))]
    for step in result.steps:
        if isinstance(step, Wait):
            yield run
            run = [Moment(dict(current))]
            continue
        for item in step.items if isinstance(step, Put) else step.keys:
            table = current[step.table] = dict(current[step.table])
            if isinstance(item, tuple):
                table[item[0]] = item[1]
            else:
                table.pop(item, None)
            run.append(Moment(dict(current)))
    yield run


def settled(state: DesiredState) -> Tables:
    tables = new_tables()
    apply(tables, plan(ObservedState(), state))
    return tables


def verdicts(tables: Tables) -> dict[Packet, bool]:
    moment = Moment({name: table.content for name, table in tables.items()})
    return {packet: moment.verdict(packet) for packet in PACKETS}


def unchanged(before: DesiredState, after: DesiredState) -> dict[Packet, bool]:
    """The packets that both states judge alike; those to an interface that changed hands may be dropped meanwhile."""
    old, new = verdicts(settled(before)), verdicts(settled(after))

    def same_pod(ifindex: int) -> bool:
        ends = before.endpoints.get(ifindex), after.endpoints.get(ifindex)
        return None not in ends and ends[0].incarnation == ends[1].incarnation

    return {p: new[p] for p in PACKETS if old[p] == new[p] and (same_pod(p.ifindex) or not new[p])}


def assert_no_packet_is_misjudged(tables: Tables, result: Plan, expected: Mapping[Packet, bool]) -> None:
    for run in moments(tables, result):
        for second, moment in enumerate(run):
            # A packet's lookups may meet different moments: the endpoint first, then ipcache, then policy.
            for first in {second, second // 2, max(0, second - 1), 0}:
                for third in {second, len(run) - 1}:
                    for packet, passes in expected.items():
                        seen = run[third].passes(run[first].set_of(packet), moment.identity_of(packet), packet)
                        assert seen is passes, (packet, first, second, third, len(run))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(TRANSITIONS)
def test_no_packet_is_misjudged_on_the_way(transition: tuple[DesiredState, DesiredState]) -> None:
    before, after = transition
    tables = settled(before)
    result = plan(observe(tables), after)
    assert_no_packet_is_misjudged(tables, result, unchanged(before, after))
    apply(tables, result)
    assert verdicts(tables) == verdicts(settled(after))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(TRANSITIONS, st.data())
def test_killed_anywhere_the_next_agent_converges(
    transition: tuple[DesiredState, DesiredState], data: st.DataObject
) -> None:
    before, after = transition
    tables = settled(before)
    first = plan(observe(tables), after)
    apply(tables, first, until=data.draw(st.integers(0, len(first.steps))))
    second = plan(observe(tables), after)
    assert_no_packet_is_misjudged(tables, second, unchanged(before, after))
    apply(tables, second)
    assert verdicts(tables) == verdicts(settled(after))
    assert plan(observe(tables), after).steps == ()
    assert tables_without_revisions(tables) == tables_without_revisions(settled_like(tables, after))


def settled_like(tables: Tables, after: DesiredState) -> Tables:
    """What a fresh start that happens to choose the same set numbers ends in."""
    fresh = new_tables()
    state = observe(tables)
    apply(fresh, plan(ObservedState(sets=state.sets), after))
    fresh[TableName.POLICY_SETS] = tables[TableName.POLICY_SETS]
    return fresh


def tables_without_revisions(tables: Tables) -> dict[TableName, dict[bytes, bytes]]:
    content = {name: dict(table.content) for name, table in tables.items()}
    for key, raw in content[TableName.ENDPOINTS].items():
        value = abi.EndpointValue.from_buffer_copy(raw)
        value.revision = 0
        content[TableName.ENDPOINTS][key] = bytes(value)
    return content


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(TRANSITIONS)
def test_what_was_read_back_is_what_the_plan_said(transition: tuple[DesiredState, DesiredState]) -> None:
    before, after = transition
    tables = settled(before)
    result = plan(observe(tables), after)
    apply(tables, result)
    seen = observe(tables)
    assert (seen.endpoints, seen.addresses, seen.sets) == (
        result.after.endpoints,
        result.after.addresses,
        result.after.sets,
    )
    assert (seen.ipcache.exact, seen.ipcache.prefixes) == (after.ipcache.exact, after.ipcache.prefixes)
    used = {set_id for record in seen.endpoints.values() for set_id in record.sets} - {0}
    assert set(seen.sets) == used


@settings(max_examples=300, deadline=None)
@given(SETS, SETS, st.sampled_from(IDENTITIES), st.sampled_from(IDENTITIES))
def test_overlay_answers_one_peer_as_another_set_does(
    base: PackedSet, source: PackedSet, identity: int, other: int
) -> None:
    combined = overlay(base, {identity: (source, other)})
    for who in IDENTITIES:
        for port in PORTS:
            wanted = answer(source, other, port) if who == identity else answer(base, who, port)
            assert answer(combined, who, port) == wanted


@settings(max_examples=300, deadline=None)
@given(SETS, SETS)
def test_identities_that_do_not_differ_are_answered_alike(one: PackedSet, two: PackedSet) -> None:
    for identity in set(IDENTITIES) - differing(one, two, IDENTITIES):
        for port in PORTS:
            assert answer(one, identity, port) == answer(two, identity, port)


def answer(packed: PackedSet, identity: int, port: int, *, admits_host: bool = False) -> tuple[bool, bool]:
    policy = dict(unpack_entries(packed.entries))
    network, mesh = (
        layer_passes(layer, default, identity, port, policy, admits_host=admits_host and layer == 0)
        for layer, default in enumerate(packed.layers())
    )
    return network, mesh


# Particular cases


ALLOW_WEB = PolicyMap(
    {PolicyKey(WEB, Layer.NETWORK, 6, 80, 16): PolicyEntry(Verdict.ALLOW, 1, (Origin("CNP", "s", "web"),))},
    LayerDefault(Verdict.DENY, (Origin("CNP", "s", "web"),), 133),
)
ALLOW_API = PolicyMap(
    {PolicyKey(API, Layer.NETWORK, 6, 80, 16): PolicyEntry(Verdict.ALLOW, 1, (Origin("CNP", "s", "api"),))},
    LayerDefault(Verdict.DENY, (Origin("CNP", "s", "api"),), 133),
)


def state(policy: PolicyMap, *, count: int = 1, **addresses: int) -> DesiredState:
    packed = (pack_map(policy, RULES),) * 4
    endpoints = {7 + n: DesiredEndpoint(7 + n, 512 + n, 1 + n, API, packed) for n in range(count)}
    exact = {ipcache_key(IPv4Address(f"10.0.0.{k[1:]}")): Identities(v) for k, v in addresses.items()}
    return DesiredState(endpoints, Ipcache(exact, {}))


def test_endpoints_with_equal_policies_share_their_sets() -> None:
    result = plan(ObservedState(), state(ALLOW_WEB, count=50))
    assert len(result.after.sets) == 1


def test_the_same_state_again_writes_nothing() -> None:
    wanted = state(ALLOW_WEB, a1=WEB)
    tables = settled(wanted)
    assert plan(observe(tables), wanted).steps == ()


def test_a_policy_change_is_one_flip_without_waiting() -> None:
    tables = settled(state(ALLOW_WEB, a1=WEB))
    result = plan(observe(tables), state(ALLOW_API, a1=WEB))
    written = [step.table for step in result.steps[: result.enforced_after] if isinstance(step, Put)]
    assert written == [TableName.POLICY_SETS, TableName.ENDPOINTS]
    assert not any(isinstance(step, Wait) for step in result.steps[: result.enforced_after])


def test_labels_and_policy_that_change_together_never_shut_out_who_was_always_allowed() -> None:
    tables = settled(state(ALLOW_WEB, a1=WEB, a2=API))
    result = plan(observe(tables), state(ALLOW_API, a1=API, a2=WEB))
    web = [p for p in PACKETS if p.ifindex == 7 and p.port == 80 and p.peer == ADDRESSES[0]]
    api = [p for p in PACKETS if p.ifindex == 7 and p.port == 80 and p.peer == ADDRESSES[1]]
    always = dict.fromkeys(web, True) | dict.fromkeys(api, False)
    assert_no_packet_is_misjudged(tables, result, always)


def test_nested_prefixes_appear_longest_first_and_go_shortest_first() -> None:
    both = {
        PolicyKey(who, Layer.NETWORK, 0, 0, 17): PolicyEntry(Verdict.ALLOW, 1, (Origin("CNP", "s", "p"),))
        for who in (WORLD_IPV4, API)
    }
    policy = PolicyMap(both, LayerDefault(Verdict.DENY, (Origin("CNP", "s", "p"),), 133))  # whoever is WEB is denied
    nested = {ipcache_prefix(PREFIXES[1]): Identities(WEB), ipcache_prefix(PREFIXES[2]): Identities(API)}
    plain = state(policy)
    with_nested = DesiredState(plain.endpoints, Ipcache({}, nested))
    always = {p: True for p in PACKETS if p.ifindex == 7 and p.peer in ADDRESSES[:4]}
    for before, after in ((plain, with_nested), (with_nested, plain)):
        tables = settled(before)
        assert_no_packet_is_misjudged(tables, plan(observe(tables), after), always)


def test_an_address_that_nobody_holds_any_more_is_answered_as_the_new_policy_says_of_the_world() -> None:
    def policy(world: Verdict, web: Verdict) -> PolicyMap:
        verdicts = {WORLD_IPV4: world, WEB: web, API: web}
        entries = {
            PolicyKey(who, Layer.NETWORK, 0, 0, 17): PolicyEntry(verdict, 1, (Origin("CNP", "s", "p"),))
            for who, verdict in verdicts.items()
        }
        return PolicyMap(entries)

    # 10.0.0.1 leaves (allowed as WEB, then as world) while 10.0.0.2 comes (denied as world, then as API).
    tables = settled(state(policy(Verdict.DENY, Verdict.ALLOW), a1=WEB))
    result = plan(observe(tables), state(policy(Verdict.ALLOW, Verdict.DENY), a2=API))
    always = {p: p.peer == ADDRESSES[0] for p in PACKETS if p.ifindex == 7 and p.peer in ADDRESSES[:2]}
    assert_no_packet_is_misjudged(tables, result, always)
    apply(tables, result)
    assert all(verdicts(tables)[packet] is passes for packet, passes in always.items())
    assert set(tables[TableName.IPCACHE_CIDR].content) == set()


def test_an_endpoint_without_policy_drops_everything() -> None:
    desired = DesiredState({7: DesiredEndpoint(7, 1, 1, API, None)}, Ipcache({}, {}))
    assert not any(verdicts(settled(desired)).values())


def test_set_numbers_wrap_around_what_is_in_use() -> None:
    packed = pack_map(ALLOW_WEB, RULES)
    observed = ObservedState(sets={0xFFFFFFFF: packed, 1: packed})
    result = plan(observed, state(ALLOW_API))
    assert set(result.after.sets) == {2}


@pytest.mark.parametrize("wanted", [PolicyMap(), ALLOW_WEB])
def test_a_packed_set_is_read_back_as_written(wanted: PolicyMap) -> None:
    packed = pack_map(wanted, RULES)
    assert PackedSet.of_content(packed.content) == packed
    for key, kernel in unpack_entries(packed.entries):
        entry = wanted.entries[PolicyKey(key.identity, Layer(key.layer), key.protocol, key.port, key.prefix)]
        assert (kernel.precedence, kernel.verdict) == (entry.precedence, abi.PolicyVerdict.POLICY_ALLOW)
        assert RULES.origins(kernel.rule_id) == entry.origins


def test_a_rule_number_is_never_given_to_other_origins() -> None:
    rules = RuleIds(highest_seen=100)
    one, two = (Origin("CNP", "s", "a"),), (Origin("CNP", "s", "b"),)
    assert rules.number(one) == rules.number(one) > 100
    assert rules.number(two) != rules.number(one)
    assert rules.origins(rules.number(two)) == two
    assert rules.origins(99) == ()
    assert rules.number(()) == 0


def test_open_flows_are_judged_again_when_an_address_changes_hands() -> None:
    tables = settled(state(ALLOW_WEB, count=2, a1=WEB))
    before = observe(tables)
    result = plan(before, state(ALLOW_WEB, count=2, a1=API))
    assert all(
        result.after.endpoints[ifindex].revision > record.revision for ifindex, record in before.endpoints.items()
    )
    moved = max(n for n, step in enumerate(result.steps) if getattr(step, "table", None) is TableName.IPCACHE)
    judged = max(n for n, step in enumerate(result.steps) if getattr(step, "table", None) is TableName.ENDPOINTS)
    assert judged > moved, "judged before it, they would have been found to be as they were"


def test_the_nodes_own_processes_stay_admitted_while_one_of_its_addresses_goes() -> None:
    def policy(world: Verdict, name: str) -> PolicyMap:
        origin = (Origin("CNP", "s", name),)
        entry = PolicyEntry(world, 1, origin)
        return PolicyMap(
            {PolicyKey(WORLD_IPV4, Layer.NETWORK, 0, 0, 17): entry}, LayerDefault(Verdict.DENY, origin, 133)
        )

    own = {ipcache_key(ADDRESSES[0]): Identities(NODE, WEB)}
    before = DesiredState(state(policy(Verdict.DENY, "old")).endpoints, Ipcache(own, {}))
    after = state(policy(Verdict.ALLOW, "new"))
    always = {p: True for p in PACKETS if (p.ifindex, p.slot, p.peer, p.forwarded) == (7, 0, ADDRESSES[0], False)}
    assert unchanged(before, after).items() >= always.items()
    tables = settled(before)
    assert_no_packet_is_misjudged(tables, plan(observe(tables), after), always)
