"""A thousand random changes of a cluster end in the maps of a fresh start, and no packet is misjudged on the way.

The real controller, the real agent's state and compiler, the real reconciler and maps; packets through the real
programs between any two writes. Only the hooks are played (a test run needs none), and what the kernel tells of links.

``MESHBRIDGE_SEED`` repeats a walk, ``MESHBRIDGE_CHANGES`` makes it longer or shorter.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
from harness import ACK, FROM_POD, PASSED, SYN, TO_POD, Harness, tcp
from policygen import NODE4, NODE6, PORTS
from random_cluster import NODE, OUTSIDERS, POD_ADDRESSES, Pod, RandomCluster
from structlog.testing import capture_logs

from meshbridge import abi
from meshbridge.agent import enforcer as enforcer_module
from meshbridge.agent import node as node_module
from meshbridge.agent.enforcer import Enforcer
from meshbridge.agent.names import Names
from meshbridge.agent.node import Node
from meshbridge.agent.redirects import Seen
from meshbridge.controller.controller import Controller
from meshbridge.datapath.attach import AttachMode
from meshbridge.datapath.ipcache import Identities
from meshbridge.datapath.policysets import PackedSet, unpack_entries
from meshbridge.datapath.rawtables import Item
from meshbridge.datapath.reconcile import ObservedState, observe
from meshbridge.datapath.tables import Table, TableName, kernel_tables
from meshbridge.identity.model import IpFamily
from meshbridge.policy.model import Origin
from meshbridge.xds.auth import node_caller
from meshbridge.xds.client import MESSAGES, Update
from meshbridge.xds.secrets import SecretStore, load_or_create_authority

CHANGES = int(os.environ.get("MESHBRIDGE_CHANGES", "1000"))
SEED = int(os.environ.get("MESHBRIDGE_SEED", str(random.SystemRandom().randrange(10**6))))
CHECKED_EVERY = 100
FLOWS, OPEN_FLOWS = 50, 6
INTERFACES = 6
OWN_ADDRESSES = (NODE4, NODE6)
PODS = [[addresses[family] for addresses in POD_ADDRESSES] for family in IpFamily]
STRANGERS = [[address for address in OUTSIDERS if (":" in address) == bool(family)] for family in IpFamily]
ANOTHER_INTERFACE = 9999


# --- the kernel's state, whatever numbers were used ----------------------------------------------------------------


def canonical(state: ObservedState, origins: Callable[[int], tuple[Origin, ...]]) -> dict[str, Any]:
    """The maps without what is only numbering: identities are who holds them, sets and rules what they say.

    Entries for identities that nobody holds any more are left out: no packet can meet them.
    """
    holders: dict[int, set[tuple[object, ...]]] = {}
    for table in (state.ipcache.exact, state.ipcache.prefixes):
        for key, value in table.items():
            holders.setdefault(value.identity, set()).add(("direct", key))
            holders.setdefault(value.forwarded, set()).add(("forwarded", key))

    def who(identity: int) -> object:
        reserved = identity < abi.ReservedIdentity.IDENTITY_FIRST_LOCAL
        return identity if reserved else frozenset(holders.get(identity, ()))

    def held(value: Identities) -> tuple[object, object]:
        return who(value.identity), who(value.forwarded)

    def meaning(packed: PackedSet) -> object:
        used = [[0, 0], [0, 0]]
        entries = set()
        for key, value in unpack_entries(packed.entries):
            used[key.layer][key.identity == 0] |= 1 << key.prefix
            if who(key.identity) != frozenset():
                said = value._replace(rule_id=0)
                entries.add((who(key.identity), key._replace(identity=0), said, origins(value.rule_id)))
        bits = [[layer.prefixes, layer.any_prefixes] for layer in packed.layers()]
        assert bits == used, "the bitmaps say where entries are"
        defaults = [
            (layer._replace(prefixes=0, any_prefixes=0, rule_id=0), origins(layer.rule_id)) for layer in packed.layers()
        ]
        return tuple(defaults), frozenset(entries)

    sets = {set_id: meaning(packed) for set_id, packed in state.sets.items()}
    used = {set_id for record in state.endpoints.values() for set_id in record.sets if set_id}
    assert used == sets.keys(), "every set is some endpoint's, and every endpoint's set is there"
    endpoints = {
        ifindex: (who(record.identity), record.flags, record.mac, [sets.get(set_id) for set_id in record.sets])
        for ifindex, record in state.endpoints.items()
    }
    addresses = set()
    for raw, incarnation in state.addresses.items():
        key = abi.EndpointAddressKey.from_buffer_copy(raw)
        assert incarnation == state.endpoints[key.ifindex].incarnation, "an address is its present pod's"
        addresses.add(raw)
    return {
        "endpoints": endpoints,
        "addresses": addresses,
        "ipcache": {key: held(value) for key, value in state.ipcache.exact.items()},
        "prefixes": {key: held(value) for key, value in state.ipcache.prefixes.items()},
    }


def difference(here: Any, there: Any) -> str:
    """The first thing that is not the same, as near to the leaves as it can be named."""
    if isinstance(here, Mapping) and isinstance(there, Mapping) and here.keys() == there.keys():
        return next(f"{key}: {difference(here[key], there[key])}" for key in here if here[key] != there[key])
    if isinstance(here, set | frozenset | Mapping):
        return f"only after the walk: {set(here) - set(there)}; only after the fresh start: {set(there) - set(here)}"
    if isinstance(here, tuple | list) and isinstance(there, tuple | list):
        return next(
            f"[{n}] {difference(*both)}" for n, both in enumerate(zip(here, there, strict=True)) if both[0] != both[1]
        )
    return f"{here} after the walk, {there} after the fresh start"


# --- the agent, with its hooks played ------------------------------------------------------------------------------


@dataclass
class Hooks:
    """Which interfaces run the programs; they survive the agent, and go with their device."""

    mode = AttachMode.TCX
    hooked: set[int] = field(default_factory=set)

    def attached(self) -> set[int]:
        return set(self.hooked)

    def update_all(self) -> set[int]:
        return set(self.hooked)

    def attach(self, ifindex: int) -> None:
        self.hooked.add(ifindex)

    def sweep(self) -> set[int]:
        return set()


class Hands(Enforcer):
    """The agent's enforcer on maps of the harness."""

    def __init__(self, harness: Harness, tables: Mapping[TableName, Table], hooks: Hooks) -> None:
        self._maps = harness.maps
        self._tables = dict(tables)  # type: ignore[arg-type]
        self._attacher = hooks  # type: ignore[assignment]
        self.observed = observe(kernel_tables(harness.maps))
        self.resumed = frozenset(hooks.update_all())
        self._succeeds = False
        self._in_doubt = False
        self._flow_tables = harness.maps.conntrack.tables()


def new_node(hands: Enforcer, cluster: RandomCluster) -> Node:
    node = Node(NODE, hands, Names(NODE), publish=lambda _: None, first_look=lambda _: Seen(dict(cluster.seen)))
    node.start()
    return node


@dataclass
class Source:
    """The controller's view of the node as updates: what differs from what was taken before."""

    controller: Controller
    held: dict[str, dict[str, str]] = field(default_factory=dict)
    _revisions: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self._feed = self.controller.open(node_caller(NODE), lambda: None)

    def update(self) -> Update:
        snapshot = self._feed.snapshot
        assert snapshot is not None
        changed: dict[str, dict[str, Any]] = {}
        removed: dict[str, frozenset[str]] = {}
        for type_url, message in MESSAGES.items():
            resources, before = snapshot.of(type_url), self.held.get(type_url, {})
            changed[type_url] = {
                name: message.FromString(resource.body)
                for name, resource in resources.items()
                if before.get(name) != resource.version
            }
            removed[type_url] = frozenset(before.keys() - resources.keys())
            self.held[type_url] = {name: resource.version for name, resource in resources.items()}
        return Update(next(self._revisions), changed, removed)


# --- packets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """New connections between an address of an interface and a peer, seen at one hook."""

    ifindex: int
    hook: str
    own: str
    peer: str
    port: int
    forwarded: bool = True


@lru_cache(maxsize=1 << 14)
def template(flow: Flow, flags: int) -> tuple[bytes, bytes]:
    """A packet of the client's, without its port: before and after it."""
    source, destination = (flow.peer, flow.own) if flow.hook == TO_POD else (flow.own, flow.peer)
    packet = tcp(source, destination, 0, flow.port, flags)
    start = len(packet) - 20
    return packet[:start], packet[start + 2 :]


@dataclass
class Packets:
    """Sends packets, one flow after another with a client port of its own, so that none vouches for another."""

    harness: Harness
    sent: int = 0
    _client: Iterator[int] = field(default_factory=lambda: itertools.cycle(range(1024, 61024)))

    def opens(self, flow: Flow) -> int:
        """The client's port of a connection that was let through, or 0."""
        client = next(self._client)
        return client if self._passes(flow, client, SYN) else 0

    def goes_on(self, flow: Flow, client: int) -> bool:
        return self._passes(flow, client, ACK)

    def _passes(self, flow: Flow, client: int, flags: int) -> bool:
        self.sent += 1
        head, tail = template(flow, flags)
        packet = head + client.to_bytes(2, "big") + tail
        came_in_by = None if flow.hook == FROM_POD else ANOTHER_INTERFACE if flow.forwarded else 0
        return self.harness.verdict(flow.ifindex, flow.hook, packet, ingress_ifindex=came_in_by) == PASSED


@dataclass
class Witness:
    """What packets met between the writes of one transition."""

    packets: Packets
    rng: random.Random
    flows: Sequence[Flow] = ()
    open: Mapping[Flow, int] = field(default_factory=dict)
    log: list[tuple[Flow, bool, str]] = field(default_factory=list)
    open_log: list[tuple[Flow, bool, str]] = field(default_factory=list)
    writes: int = 0
    looks: int = 0
    _turn: Iterator[Flow] = field(default_factory=lambda: iter(()))

    def start(self, flows: Sequence[Flow], open_flows: Mapping[Flow, int]) -> None:
        self.flows, self.open = flows, open_flows
        self.log, self.open_log = [], []
        self._turn = itertools.cycle(flows) if flows else iter(())

    def stop(self) -> None:
        self.start((), {})

    def look(self, where: TableName, writes: int) -> None:
        """A few packets now; more where a write may change what the next packet meets."""
        self.writes += writes
        self.looks += 1
        for flow in itertools.islice(self._turn, 6):
            self.log.append((flow, bool(self.packets.opens(flow)), where))
        for flow, client in self.open.items():
            self.open_log.append((flow, self.packets.goes_on(flow, client), where))


@dataclass
class WatchedTable:
    """A table of the kernel that is written one entry at a time, and the witness looks after each."""

    name: TableName
    table: Table
    witness: Witness

    def read(self) -> Iterable[Item]:
        return self.table.read()

    def put(self, items: Sequence[Item]) -> None:
        for item in items:
            self.table.put([item])
            self.witness.look(self.name, 1)

    def delete(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.table.delete([key])
            self.witness.look(self.name, 1)


# --- the walk -------------------------------------------------------------------------------------------------------


class Walk:
    """A cluster and the node's agent that follows it."""

    def __init__(self, harness: Harness, secrets: SecretStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(node_module, "read_network", lambda: self.network)
        monkeypatch.setattr(enforcer_module, "wait_for_packets", lambda: None)  # packets here never overlap a write
        self.rng = random.Random(SEED)
        self.harness, self.secrets = harness, secrets
        self.cluster = RandomCluster(self.rng, harness.interfaces)
        self.packets = Packets(harness)
        self.witness = Witness(self.packets, self.rng)
        self.tables = {
            name: WatchedTable(name, table, self.witness) for name, table in kernel_tables(harness.maps).items()
        }
        self.hooks = Hooks()
        self.controller = Controller(secrets)
        self.controller.apply(self.cluster.start(), frozenset())
        self.network = self.cluster.network()
        self.counts: Counter[str] = Counter()
        self.places: dict[int, set[str]] = {ifindex: set() for ifindex in harness.interfaces}
        self.start_agent()

    def start_agent(self) -> None:
        """Another agent takes over what the one before left, as after a crash."""
        self.node = new_node(Hands(self.harness, self.tables, self.hooks), self.cluster)
        self.source = Source(self.controller)
        self.incarnations = set(self.harness.maps.conntrack.tables())  # of others it cannot know
        self.transition("an agent starts", lambda: self.node.take(self.source.update()))

    def change(self) -> None:
        before = self.cluster.seen.copy()
        name, touched = self.cluster.change()
        self.counts[name] += 1
        for pod in self.cluster.local():
            self.places[pod.ifindex].update(pod.addresses)
        steps: list[Callable[[], None]] = []
        if touched:
            steps.append(lambda: self._revision_comes(touched))
        if self.cluster.network() != self.network:
            announced = [
                pod for pod in self.cluster.local()
                if self.network.links.get(pod.ifindex) != self.cluster.links[pod.ifindex] and self.rng.random() < 0.5
            ]  # fmt: skip
            steps.insert(self.rng.choice((0, len(steps))), self._network_changes)
            for pod in announced:  # by a CNI plugin, before the controller hears of the pod
                steps.insert(steps.index(self._network_changes) + 1, partial(self._announce, pod))
        for step in steps:
            self.transition(name, step)
        if self.cluster.seen != before:
            self.transition(name, lambda: self.node.take_seen(Seen(dict(self.cluster.seen))))
        for ifindex in self.places:
            self.places[ifindex] = {
                address for pod in self.cluster.local() if pod.ifindex == ifindex for address in pod.addresses
            } or set(sorted(self.places[ifindex])[:2])

    def _network_changes(self) -> None:
        """Devices come and go; with one that goes go its hooks, whoever gets its number then."""
        before, self.network = self.network, self.cluster.network()
        for ifindex, link in before.links.items():
            if self.network.links.get(ifindex) != link:
                self.hooks.hooked.discard(ifindex)
        self.node.look_at_network()

    def _announce(self, pod: Pod) -> None:
        self.node.add_endpoint(f"{pod.namespace}/{pod.name}", pod.uid, [self.cluster.links[pod.ifindex].name])

    def _revision_comes(self, touched: Any) -> None:
        self.controller.apply(touched, frozenset())
        self.node.take(self.source.update())

    def transition(self, name: str, step: Callable[[], None]) -> None:
        """Take a step; packets that were judged on the way must have met the state before or the one after."""
        flows = self.some_flows()
        before = {flow: bool(self.packets.opens(flow)) for flow in flows}
        records = dict(self.node.enforcer.observed.endpoints)
        open_flows: dict[Flow, int] = {}
        for flow in flows:
            if before[flow] and len(open_flows) < OPEN_FLOWS:
                open_flows[flow] = self.packets.opens(flow)
        self.witness.start(flows, open_flows)
        step()
        log, open_log = self.witness.log, self.witness.open_log
        self.witness.stop()
        assert not self.node.failed, self.node.published.problems
        after = {flow: bool(self.packets.opens(flow)) for flow in flows}
        now = self.node.enforcer.observed.endpoints
        same_pod = {
            ifindex
            for ifindex, record in now.items()
            if record.ready and ifindex in records and records[ifindex].ready
            and records[ifindex].incarnation == record.incarnation
        }  # fmt: skip
        self._check_incarnations(records, now)
        for flow, passed, where in log:
            if before[flow] == after[flow] and (flow.ifindex in same_pod or not before[flow]):
                self.counts["always passes" if before[flow] else "never passes"] += 1
                assert passed == before[flow], (name, where, flow)
        for flow, passed, where in open_log:
            if after[flow] and flow.ifindex in same_pod:
                self.counts["stays open"] += 1
                assert passed, ("an open flow was cut", name, where, flow)

    def _check_incarnations(self, before: Mapping[int, Any], now: Mapping[int, Any]) -> None:
        """Whoever comes to an interface has a number nobody had before, and flows of its own."""
        for ifindex, record in now.items():
            if ifindex not in before or before[ifindex].incarnation != record.incarnation:
                assert record.incarnation not in self.incarnations
                self.incarnations.add(record.incarnation)
        assert self.harness.maps.conntrack.tables() == {r.incarnation: r.flow_table for r in now.values()}

    def some_flows(self) -> list[Flow]:
        found = set()
        places = [(ifindex, own) for ifindex, addresses in self.places.items() for own in sorted(addresses)]
        while places and len(found) < FLOWS:
            ifindex, own = self.rng.choice(places)
            # mostly pods: outsiders' identities change seldom
            peer = self.rng.choice((PODS if self.rng.random() < 0.7 else STRANGERS)[":" in own])
            if peer == own:
                continue
            hook = self.rng.choice((TO_POD, FROM_POD))
            local = hook == TO_POD and peer in OWN_ADDRESSES and self.rng.random() < 0.5
            found.add(Flow(ifindex, hook, own, peer, self.rng.choice(PORTS), forwarded=not local))
        return sorted(found, key=repr)

    def in_kernel(self) -> ObservedState:
        return observe(kernel_tables(self.harness.maps))

    def compare_with_fresh_start(self, other: Harness) -> None:
        """The maps as they are now, and those of an agent and a controller that start now."""
        seen = self.in_kernel()
        believed = self.node.enforcer.observed
        assert (seen.endpoints, seen.addresses, seen.sets) == (believed.endpoints, believed.addresses, believed.sets)
        other.clear()
        controller = Controller(self.secrets)
        controller.apply({key: (made,) for key, made in self.cluster.documents.items()}, frozenset())
        fresh = new_node(Hands(other, kernel_tables(other.maps), Hooks()), self.cluster)
        fresh.take(Source(controller).update())
        assert not fresh.failed, fresh.published.problems
        here = canonical(seen, self.node.names.rules.origins)
        there = canonical(observe(kernel_tables(other.maps)), fresh.names.rules.origins)
        for part in here:
            assert here[part] == there[part], f"{part}: {difference(here[part], there[part])}"
        self.counts["compared"] += 1


@pytest.fixture
def secrets(tmp_path: Path) -> SecretStore:
    return SecretStore(load_or_create_authority(tmp_path, "cluster.local", datetime.now(UTC)))


@pytest.mark.timeout(300)
def test_a_thousand_changes_end_in_a_fresh_starts_maps_and_misjudge_no_packet(
    secrets: SecretStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"\nMESHBRIDGE_SEED={SEED}")
    started = time.monotonic()
    with Harness.open(interfaces=INTERFACES) as harness, Harness.open(interfaces=1) as other, capture_logs():
        walk = Walk(harness, secrets, monkeypatch)
        for number in range(1, CHANGES + 1):
            walk.change()
            if walk.rng.random() < 0.01:
                walk.start_agent()
                walk.counts["agents"] += 1
            if number % CHECKED_EVERY == 0 or number == CHANGES:
                walk.compare_with_fresh_start(other)
    print(
        f"{CHANGES} changes, {walk.witness.writes} writes, looked at {walk.witness.looks} times, {walk.packets.sent} "
        f"packets in {time.monotonic() - started:.0f} s: {dict(sorted(walk.counts.items()))}"
    )
    assert min(walk.counts[kind] for kind in ("always passes", "never passes", "stays open")) > CHANGES
