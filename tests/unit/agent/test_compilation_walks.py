"""The agent's state after a walk of single changes is the state of a fresh start: policies, numbers, packed sets.

Policies of every kind with CIDRs and tiers, pods that come, go and are relabelled, Services, redirect rules.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policygen import NAMESPACES, PORTS, cluster_policy, outsiders, random_pods, random_policies
from test_outbound_destinations import rules

from meshbridge.abi import address_bytes
from meshbridge.agent.compilation import Compilation
from meshbridge.agent.identities import PeerNumbers
from meshbridge.agent.services import Services
from meshbridge.agent.view import LocalPod
from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.rules import SeenRules
from meshbridge.datapath.policysets import PackedSet, RuleIds, unpack_entries
from meshbridge.identity.model import ContainerPort, Entity, Peer, ProxyClass, Workload
from meshbridge.identity.numbering import class_of
from meshbridge.policy.model import Document
from meshbridge.policy.parse import Parsed, parse
from meshbridge.policy.policybook import PolicyBook
from meshbridge.policy.precedence import DropReason
from meshbridge.xds.messages import ServiceFrontends, ServicePort

ADDRESSES = [ip_address(f"10.{1 + n % 2}.0.{n}") for n in range(1, 12)]
SERVICE_ADDRESSES = [ip_address("10.96.0.1"), ip_address("10.96.0.2"), ip_address("198.51.100.9")]
EXCLUSIONS = (
    {}, {"excludeInboundPorts": "8080"}, {"excludeOutboundPorts": "80,1000"}, {"excludeOutboundIPRanges": "10.1.0.0/16"}
)  # fmt: skip
CAPTURED_UIDS = ("captured 0", "captured 1")


def parsed_of(data: dict[str, Any]) -> Parsed:
    metadata = data["metadata"]
    namespace = metadata.get("namespace", "")
    return parse(Document(data["kind"], data["apiVersion"], namespace, metadata["name"], data))


def peer(rng: random.Random) -> Peer:
    (holder, _), namespace = random_pods(rng, 1), rng.choice(list(NAMESPACES))
    if rng.random() < 0.15:
        entity = rng.choice((Entity.HOST, Entity.REMOTE_NODE, Entity.UNMANAGED))
        return Peer(labels=rng.choice(({}, {"zone": "a"})), entities=frozenset({entity}))
    return Peer(
        namespace, holder.labels, NAMESPACES[namespace], rng.choice(("default", "robot")),
        proxy=rng.choice((ProxyClass.NONE, ProxyClass.SIDECAR)),
        ports=frozenset(ContainerPort(*port) for port in holder.ports),
    )  # fmt: skip


def endpoint(rng: random.Random, uid: str) -> tuple[LocalPod, SeenRules | None]:
    namespace = rng.choice(list(NAMESPACES))
    (holder, _) = random_pods(rng, 1)
    given = {a.TRAFFIC + key: value for key, value in rng.choice(EXCLUSIONS).items()}
    workload = Workload(
        namespace, uid, uid, "n", (ip_address("10.1.0.200"), ip_address("fd00:1::200")), holder.labels,
        NAMESPACES[namespace], given, ports=tuple(ContainerPort(*port) for port in holder.ports),
        proxy=ProxyClass.SIDECAR if uid in CAPTURED_UIDS else ProxyClass.NONE,
        init_env={"ISTIO_DUAL_STACK": "true"}, init_args=a.render_init_args(given, MeshDefaults()),
    )  # fmt: skip
    pod = LocalPod(workload)
    return pod, rules(pod) if uid in CAPTURED_UIDS and rng.random() < 0.7 else None


def service(rng: random.Random, name: str) -> ServiceFrontends:
    address = rng.choice(SERVICE_ADDRESSES)
    ports = tuple(
        ServicePort(6, port, tuple((a, rng.choice(PORTS)) for a in rng.sample(ADDRESSES, rng.randint(0, 2))))
        for port in rng.sample(PORTS, rng.randint(1, 2))
    )
    outside = (SERVICE_ADDRESSES[2],) if rng.random() < 0.2 else ()
    return ServiceFrontends(name, (address,), ports, outside)


@dataclass(slots=True)
class State:
    """What the agent keeps from one update to the next."""

    book: PolicyBook = field(default_factory=PolicyBook)
    numbers: PeerNumbers = field(default_factory=PeerNumbers)
    compilation: Compilation = field(default_factory=lambda: Compilation(RuleIds(), knows_destinations=True))


@dataclass(slots=True)
class Walk:
    """A cluster, and an agent that follows its changes."""

    rng: random.Random
    parsed: dict[str, Parsed] = field(default_factory=dict)
    holders: dict[bytes, Peer] = field(default_factory=dict)
    pods: dict[str, LocalPod] = field(default_factory=dict)
    seen: dict[str, SeenRules] = field(default_factory=dict)
    services: Services = field(default_factory=Services)
    agent: State = field(default_factory=State)
    changed_policies: list[Parsed] = field(default_factory=list)
    changed_addresses: set[bytes] = field(default_factory=set)

    def put_policy(self, name: str, parsed: Parsed | None) -> None:
        self.changed_policies += [p for p in (self.parsed.pop(name, None), parsed) if p is not None]
        self.agent.book.put(name, parsed)
        if parsed is not None:
            self.parsed[name] = parsed

    def put_holder(self, address: bytes, held: Peer | None) -> None:
        self.changed_addresses.add(address)
        self.holders.pop(address, None)
        if held is not None:
            self.holders[address] = held

    def put_pod(self, uid: str) -> None:
        self.pods[uid], seen = endpoint(self.rng, uid)
        self.seen.pop(uid, None)
        if seen is not None:
            self.seen[uid] = seen

    def put_service(self, name: str, put: ServiceFrontends | None) -> None:
        self.changed_addresses |= set(self.services.addresses([name]))
        self.services.put(name, put)
        self.changed_addresses |= set(self.services.addresses([name]))

    def start(self) -> None:
        for number, data in enumerate(random_policies(self.rng, network=6, mesh=5)):
            self.put_policy(f"p{number}", parsed_of(data))
        for holder in outsiders():
            self.put_holder(address_bytes(holder.address), Peer(entities=frozenset(map(Entity, holder.entities))))
        for address in self.rng.sample(ADDRESSES, 7):
            self.put_holder(address_bytes(address), peer(self.rng))
        for uid in (*CAPTURED_UIDS, "plain 0", "plain 1"):
            self.put_pod(uid)
        self.put_service("shop/s", service(self.rng, "shop/s"))

    def change(self) -> None:
        rng = self.rng
        match rng.choice(("holder", "holder", "holder", "policy", "policy", "pod", "service", "nothing")):
            case "holder":
                self.put_holder(address_bytes(rng.choice(ADDRESSES)), peer(rng) if rng.random() < 0.8 else None)
            case "policy":
                name = f"p{rng.randrange(12)}"
                data: Any = rng.choice(random_policies(rng, network=4, mesh=4) or [cluster_policy(rng, "c")])
                self.put_policy(name, parsed_of(data) if rng.random() < 0.8 else None)
            case "pod":
                self.put_pod(rng.choice((*CAPTURED_UIDS, "plain 0", "plain 1")))
            case "service":
                name = rng.choice(("shop/s", "pay/s"))
                self.put_service(name, service(rng, name) if rng.random() < 0.8 else None)

    def holder(self, address: bytes) -> Peer | None:
        return self.services.peer(address, self.holders.get(address))

    def bring(self, state: State, *, anew: bool) -> None:
        """The step of the node: policies, then identities, then the pods' sets."""
        policies = state.book.policies()
        networks = policies.referenced_networks() | state.compilation.outbound_networks(self.pods, self.seen)
        changed = {address: self.holder(address) for address in self.changed_addresses}
        same = networks == state.numbers.networks
        if anew or not (same or state.numbers.tell_apart(networks)) or not state.numbers.change(changed):
            every = {address: self.holder(address) for address in {*self.holders, *self.services.addresses()}}
            state.numbers.renumber({address: held for address, held in every.items() if held is not None}, networks)
        touched = None if anew else state.book.among(self.changed_policies)
        frontends = self.services.frontends(state.numbers.number)
        state.compilation.update(self.pods, policies, state.numbers.identities, touched, self.seen, frontends)

    def follow(self, *, first: bool = False) -> None:
        self.bring(self.agent, anew=first)
        self.changed_policies.clear()
        self.changed_addresses.clear()

    def fresh(self) -> State:
        state = State()
        for name, parsed in self.parsed.items():
            state.book.put(name, parsed)
        self.bring(state, anew=True)
        return state


def meaning(state: State) -> Mapping[str, object]:
    """What the sets say of peers that hold an address, with classes in place of numbers.

    Not of Services nobody is behind: those are closed as long as somebody is denied who may be gone since.
    """
    ipcache = state.numbers.ipcache
    said_of = [*ipcache.exact.values(), *ipcache.prefixes.values()]
    held = {number for value in said_of for number in (value.identity, value.forwarded_identity)}
    name = {n: class_of(state.numbers.identities[n]) for n in held if n}
    origins = state.compilation.rules.origins

    def of_set(packed: PackedSet) -> object:
        said = {
            (name.get(key.identity), key._replace(identity=0), value._replace(rule_id=0), origins(value.rule_id))
            for key, value in unpack_entries(packed.entries)
            if (key.identity == 0 or key.identity in name)
            and (
                value.precedence != 0xFFFFFFFF
                or (value.deny_reason != DropReason.NO_SERVICE_BACKENDS and origins(value.rule_id))
            )
        }
        defaults = [(layer[3:], origins(layer.rule_id)) for layer in packed.layers()]
        return defaults, said

    return {
        uid: (compiled.fault, compiled.notes, compiled.isolating, [of_set(packed) for packed in compiled.sets or ()])
        for uid, compiled in state.compilation.compiled.items()
    }


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**63 - 1))
def test_a_walk_of_single_changes_ends_where_a_fresh_start_ends(seed: int) -> None:
    walk = Walk(random.Random(seed))
    walk.start()
    walk.follow(first=True)
    for _ in range(15):
        walk.change()
        walk.follow()
        agent = walk.agent
        scratch = Compilation(agent.compilation.rules, knows_destinations=True)
        scratch.outbound_networks(walk.pods, walk.seen)
        frontends = walk.services.frontends(agent.numbers.number)
        scratch.update(walk.pods, agent.book.policies(), agent.numbers.identities, None, walk.seen, frontends)
        assert agent.compilation.compiled == scratch.compiled, "with the same numbers, to the byte"
    assert meaning(walk.agent) == meaning(walk.fresh())
