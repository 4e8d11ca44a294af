"""Random policies × random packets through the real kernel programs, against the literal evaluator of tests/oracle.py.

Two pods of a random cluster are on this node, so that packets between them meet both hooks with one tuple. The model of
connection tracking is a set of open flows per pod; every now and then all policies change, and open flows are judged
again. Whatever a packet is, the expectation is computed from raw policies and the packets before it, never from
anything compiled.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

import pytest
from harness import (
    ACK,
    FROM_POD,
    SYN,
    TO_POD,
    UDP,
    Harness,
    Layer,
    Outcome,
    ethernet,
    fragment_header,
    icmp_error,
    ipv4,
    ipv6,
    ping,
    sctp,
    tcp,
    udp,
    udp_header,
)
from oracle import ASKED, EGRESS, INGRESS, Asked, Flow, Holder, mesh_allows, network_allows
from policygen import PORTS, outsiders, random_pods, random_policies

from meshbridge import abi
from meshbridge.datapath.policysets import RuleIds, pack_policy, unpack_entries
from meshbridge.identity.model import ContainerPort, Entity, IpAddress, Peer, ProxyClass, Workload
from meshbridge.identity.numbering import number_peers
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import compile_endpoint
from meshbridge.policy.model import Document
from meshbridge.policy.policyset import PolicySet

PACKETS = 20_000
PER_ROUND = 100
ROUTER = {4: "203.0.113.1", 6: "2001:db9::1"}
MESH_REASONS = {abi.DropReason.DROP_MESH_POLICY, abi.DropReason.DROP_MESH_POLICY_DENY}

Tuple = tuple[str, str, str, int, int, int]
"""direction, source, destination, protocol, source port (or echo identifier), destination port."""


def documents_of(objects: list[dict[str, Any]]) -> list[Document]:
    return [
        Document(
            each["kind"], each["apiVersion"], each["metadata"].get("namespace", ""), each["metadata"]["name"], each
        )
        for each in objects
    ]


def workload_of(holders: list[Holder]) -> Workload:
    first = holders[0]
    return Workload(
        first.namespace, f"pod-{first.address}", str(first.address), "one", tuple(h.address for h in holders),
        first.labels, first.namespace_labels, {}, first.service_account,
        tuple(ContainerPort(*port) for port in first.ports), proxy=ProxyClass.SIDECAR,
    )  # fmt: skip


@dataclass(frozen=True)
class OpenFlow:
    """When a flow was last judged, and whether a process of the pod's own node had opened it."""

    revision: int
    local: bool


@dataclass
class Endpoint:
    """A pod on the node: its interface, an address of each family, and the flows the model takes for open."""

    ifindex: int
    holders: dict[int, Holder]
    revision: int = 1
    open: dict[Tuple, OpenFlow] = field(default_factory=dict)

    def opened(self, way: Tuple, *, local: bool = False) -> None:
        self.open[way] = OpenFlow(self.revision, local)


@dataclass
class Cluster:
    """One round: random pods and policies, compiled and written as the agent would."""

    kernel: Harness
    rng: random.Random
    exact: bool
    seen: Counter[str]
    endpoints: list[Endpoint] = field(default_factory=list)
    everybody: list[Holder] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)
    fresh_port: int = 33_000
    fragment_id: int = 1
    set_id: int = 0
    identities: dict[int, Peer] = field(default_factory=dict)
    highest: int = 0

    def load(self) -> None:
        """Pods, their policies, and two of the pods on this node."""
        pods = random_pods(self.rng, 6)
        self.everybody = pods + outsiders()
        for position, ifindex in enumerate(self.kernel.interfaces[:2]):
            both = pods[2 * position : 2 * position + 2]
            self.endpoints.append(Endpoint(ifindex, {h.address.version: h for h in both}))
            self.kernel.endpoint(ifindex, [h.address for h in both], sets=(0, 0, 0, 0))
        self.change_policies()

    def change_policies(self, _: Endpoint | None = None) -> None:
        """Other policies for everybody: fresh sets, then the endpoints flip to them with a new revision."""
        self.objects = random_policies(self.rng, network=4, mesh=3, l4_only=self.exact)
        policies = PolicySet.of(documents_of(self.objects))
        names = policies.referenced_port_names()
        holders: dict[IpAddress, Peer] = {}
        for holder in self.everybody:
            if holder.is_pod:
                ports = frozenset(ContainerPort(*port) for port in holder.ports if port[0] in names)
                holders[holder.address] = replace(workload_of([holder]).peer(), ports=ports)
            elif "world" not in holder.entities:
                entities = frozenset(Entity(each) for each in holder.entities)
                holders[holder.address] = Peer(labels=holder.labels, entities=entities)
        numbering = number_peers(holders, policies.referenced_networks(), known=self.identities, highest=self.highest)
        self.identities, self.highest = dict(numbering.identities), numbering.highest
        self.kernel.maps.ipcache_cidr.clear()
        for address, held in numbering.addresses.items():
            self.kernel.peer(address, held.identity, forwarded=held.forwarded)
        for network, number in numbering.networks.items():
            self.kernel.peer(str(network), number)
        rules = RuleIds()
        for endpoint in self.endpoints:
            workload = workload_of(list(endpoint.holders.values()))
            policy = compile_endpoint(workload, policies, numbering.identities, Capture.sidecar())
            sets = []
            for packed in pack_policy(policy, rules):
                self.set_id += 1
                sets.append(self.set_id)
                self._write(self.set_id, packed)
            endpoint.revision += 1
            self.kernel.change(endpoint.ifindex, sets=tuple(sets), revision=endpoint.revision)

    def _write(self, set_id: int, packed: Any) -> None:
        entries: tuple[dict[tuple[int, int, int, int], abi.PolicyValue], ...] = ({}, {})
        for key, value in unpack_entries(packed.entries):
            entries[key.layer][key.identity, key.protocol, key.port, key.prefix] = abi.PolicyValue(**value._asdict())
        layers = [
            Layer(found, default.verdict, default.rule_id, default.deny_reason, default.flags)
            for found, default in zip(entries, packed.layers(), strict=True)
        ]
        self.kernel.policy_set(set_id, *layers)

    # What has to be expected

    def judge(self, endpoint: Endpoint, way: Tuple, *, localhost: bool, icmp_type: int | None = None) -> bool | None:
        """Whether the kernel has to let a new flow pass; None when it may drop it or leave the refusal to Envoy."""
        direction, source, destination, protocol, _, port = way
        mine, other = (destination, source) if direction == INGRESS else (source, destination)
        holder = endpoint.holders[ip_address(mine).version]
        peer = next(each for each in self.everybody if str(each.address) == other)
        port = port if icmp_type is None else icmp_type
        flow = Flow(holder, peer, direction, protocol, port, localhost and "host" in peer.entities)
        if not network_allows(self.objects, flow):
            return False
        if direction == EGRESS or protocol != 6:
            return True
        if self.exact:
            return mesh_allows(self.objects, flow, Asked(), (holder.address,))
        # What Envoy would forward for something this source may ask, the kernel must not drop.
        return True if any(mesh_allows(self.objects, flow, asked, (holder.address,)) for asked in ASKED) else None

    def rejudge(self, endpoint: Endpoint, way: Tuple) -> bool | None:
        """What holds for an open flow: under the revision it was judged by it passes, else policy is asked again."""
        flow = endpoint.open[way]
        if flow.revision == endpoint.revision:
            return True
        return self.judge(endpoint, way, localhost=flow.local, icmp_type={1: 8, 58: 128}.get(way[3]))

    def check_open(self, endpoint: Endpoint, way: Tuple, outcome: Outcome, what: str) -> None:
        flow = endpoint.open[way]
        again = "" if flow.revision == endpoint.revision else ", judged again"
        self.check(outcome, self.rejudge(endpoint, way), f"{what}{again}", way)
        if outcome.passed:
            endpoint.opened(way, local=flow.local)

    def check(
        self, outcome: Outcome, expected: bool | None, what: str, way: object, *, reason: abi.DropReason | None = None
    ) -> None:
        if expected is None:
            if not outcome.passed:
                assert outcome.reason in ({reason} if reason else MESH_REASONS), (what, way, outcome, self.objects)
            self.seen[f"{what}: left to Envoy" if outcome.passed else f"{what}: dropped early"] += 1
            return
        assert outcome.passed is expected, (what, way, outcome, self.objects)
        self.seen[f"{what}: {'passed' if expected else 'dropped'}"] += 1

    # Packets

    def run(self, endpoint: Endpoint, direction: str, packet: bytes, *, local: bool = False) -> Outcome:
        hook = TO_POD if direction == INGRESS else FROM_POD
        return self.kernel.run(endpoint.ifindex, hook, packet, ingress_ifindex=0 if local else None)

    def new_flow(self, endpoint: Endpoint, what: str = "new flow") -> None:
        """A SYN, a datagram, an SCTP packet or a ping, to or from the pod."""
        rng = self.rng
        version = rng.choice((4, 6))
        holder = endpoint.holders[version]
        peer = rng.choice([h for h in self.everybody if h.address.version == version and h.address != holder.address])
        direction = rng.choice((INGRESS, EGRESS))
        source, destination = (str(peer.address), str(holder.address))
        if direction == EGRESS:
            source, destination = destination, source
        protocol = rng.choice((6, 6, 17, 132, 1 if version == 4 else 58))
        self.fresh_port += 1
        port = 0 if protocol in (1, 58) else rng.choice(PORTS) + rng.choice((0, 0, 0, 1, 3, 500))
        way = (direction, source, destination, protocol, self.fresh_port, port)
        local = "host" in peer.entities and rng.random() < 0.5
        self.send(endpoint, way, local=local, what=what)
        other = next((each for each in self.endpoints if each.holders.get(version) == peer), None)
        if other is not None:  # the same tuple at the other end's hook
            across = (INGRESS if direction == EGRESS else EGRESS, *way[1:])
            self.send(other, across, local=False, what="both ends on one node")

    def send(self, endpoint: Endpoint, way: Tuple, *, local: bool, what: str) -> None:
        direction, source, destination, protocol, source_port, port = way
        icmp_type = {1: 8, 58: 128}.get(protocol)
        if protocol == 6:
            packet = tcp(source, destination, source_port, port, SYN)
        elif protocol == 17:
            packet = udp(source, destination, source_port, port)
        elif protocol == 132:
            packet = sctp(source, destination, source_port, port)
        else:
            packet = ping(source, destination, source_port)
        outcome = self.run(endpoint, direction, packet, local=local)
        expected = self.judge(endpoint, way, localhost=direction == INGRESS and local, icmp_type=icmp_type)
        self.check(outcome, expected, what, way)
        if outcome.passed:
            endpoint.opened(way, local=local)

    def reply(self, endpoint: Endpoint) -> None:
        """What answers an open flow passes; what answers none is judged as if it opened one."""
        rng = self.rng
        known = bool(endpoint.open) and rng.random() < 0.7
        way = rng.choice(sorted(endpoint.open)) if known else self._flow_nobody_opened(endpoint)
        direction, source, destination, protocol, source_port, port = way
        back = EGRESS if direction == INGRESS else INGRESS
        if protocol == 6:
            packet = tcp(destination, source, port, source_port, SYN | ACK)
        elif protocol == 17:
            packet = udp(destination, source, port, source_port)
        elif protocol == 132:
            packet = sctp(destination, source, port, source_port)
        else:
            packet = ping(destination, source, source_port, reply=True)
        outcome = self.run(endpoint, back, packet)
        answer = (back, destination, source, protocol, port, source_port)
        answer_type = {1: 0, 58: 129}.get(protocol)
        if known and (protocol == 6 or self.rejudge(endpoint, way)):
            self.check_open(endpoint, way, outcome, "reply")
        elif known:
            # The flow is denied by now; but what is no connection may leave as a packet of its own.
            judged = self.judge(endpoint, answer, localhost=False, icmp_type=answer_type)
            self.check(outcome, judged, "reply to a denied flow", way)
        elif protocol == 6:
            # Nobody knows of the connection: it passes only if whoever is asked for may have opened it.
            if outcome.passed:
                assert self.judge(endpoint, way, localhost=False) is not False, (way, outcome, self.objects)
            self.seen["reply to nothing, TCP"] += 1
        else:
            judged = self.judge(endpoint, answer, localhost=False, icmp_type=answer_type)
            self.check(outcome, judged, "reply to nothing", answer)
            if outcome.passed and protocol in (17, 132):
                endpoint.opened(answer)

    def _flow_nobody_opened(self, endpoint: Endpoint) -> Tuple:
        rng = self.rng
        holder = endpoint.holders[rng.choice((4, 6))]
        version = holder.address.version
        peer = rng.choice([h for h in self.everybody if h.address.version == version and h.address != holder.address])
        self.fresh_port += 1
        protocol = rng.choice((6, 17, 132, 1 if version == 4 else 58))
        ends = [str(peer.address), str(holder.address)]
        direction = rng.choice((INGRESS, EGRESS))
        if direction == EGRESS:
            ends.reverse()
        return (direction, *ends, protocol, self.fresh_port, 0 if protocol in (1, 58) else rng.choice(PORTS))  # type: ignore[return-value]

    def more_of_a_flow(self, endpoint: Endpoint) -> None:
        """A packet of an open flow passes; a segment of no connection only if policy allows one of its directions."""
        if endpoint.open and self.rng.random() < 0.7:
            way = self.rng.choice(sorted(endpoint.open))
            if way[3] == 6:
                packet = tcp(way[1], way[2], way[4], way[5], ACK, b"data")
            elif way[3] in (17, 132):
                packet = (udp if way[3] == 17 else sctp)(way[1], way[2], way[4], way[5])
            else:
                packet = ping(way[1], way[2], way[4])
            outcome = self.run(endpoint, way[0], packet, local=endpoint.open[way].local)
            self.check_open(endpoint, way, outcome, "more of a flow")
            return
        way = self._flow_nobody_opened(endpoint)
        direction, source, destination, _, source_port, port = way
        way = (direction, source, destination, 6, source_port, port or 80)
        outcome = self.run(endpoint, direction, tcp(source, destination, source_port, way[5], ACK, b"data"))
        back = (EGRESS if direction == INGRESS else INGRESS, destination, source, 6, way[5], source_port)
        forth, other = self.judge(endpoint, way, localhost=False), self.judge(endpoint, back, localhost=False)
        if forth is False and other is False:
            assert not outcome.passed, (way, outcome, self.objects)
        if forth and other:
            assert outcome.passed, (way, outcome, self.objects)
        self.seen["more of nothing"] += 1

    def fragmented(self, endpoint: Endpoint) -> None:
        """Later fragments follow their first; without one they are dropped."""
        rng = self.rng
        way = self._flow_nobody_opened(endpoint)
        direction, source, destination, _, source_port, port = way
        way = (direction, source, destination, UDP, source_port, port or 53)
        self.fragment_id += 1
        first = udp_header(source_port, way[5], 64) + bytes(56)
        whole = rng.random() < 0.8
        if whole:
            outcome = self.run(endpoint, direction, self._fragment(way, first, 0, more=True))
            expected = self.judge(endpoint, way, localhost=False)
            self.check(outcome, expected, "first fragment", way)
            if outcome.passed:
                endpoint.opened(way)
        later = self.run(endpoint, direction, self._fragment(way, bytes(16), 64, more=False))
        self.check(later, whole and outcome.passed, "later fragment", way)

    def _fragment(self, way: Tuple, payload: bytes, offset: int, *, more: bool) -> bytes:
        _, source, destination, protocol, _, _ = way
        if ":" not in source:
            packet = ipv4(
                source, destination, protocol, payload, identification=self.fragment_id, offset=offset, more=more
            )
            return ethernet(packet, 0x0800)
        header = fragment_header(protocol, offset, more, self.fragment_id)
        return ethernet(ipv6(source, destination, 44, header + payload), 0x86DD)

    def error(self, endpoint: Endpoint) -> None:
        """An ICMP error passes when it quotes a packet of an open flow that its receiver sent, and only then."""
        rng = self.rng
        usable = sorted(way for way in endpoint.open if way[3] in (6, 17))
        known = bool(usable) and rng.random() < 0.6
        way = rng.choice(usable) if known else self._flow_nobody_opened(endpoint)
        _, source, destination, protocol, source_port, port = way
        if protocol not in (6, 17):
            return
        make = tcp if protocol == 6 else udp
        version = ip_address(source).version
        mine = str(endpoint.holders[version].address)
        quote = make(source, destination, source_port, port)
        if rng.random() < 0.5:
            quote = make(destination, source, port, source_port)
            sender = destination
        else:
            sender = source
        if sender == mine:  # the pod sent it: the error comes in from a router
            packet, back = icmp_error(ROUTER[version], mine, quote), INGRESS
        else:  # the pod was sent it: the error is the pod's own
            packet, back = icmp_error(mine, sender, quote), EGRESS
        outcome = self.run(endpoint, back, packet)
        expected = self.rejudge(endpoint, way) if known else False
        self.check(outcome, expected, "ICMP error", way, reason=abi.DropReason.DROP_ICMP_ERROR_UNRELATED)

    def masqueraded(self, endpoint: Endpoint) -> None:
        """A forwarded packet with the node's address is nobody's localhost."""
        version = self.rng.choice((4, 6))
        holder = endpoint.holders[version]
        host = next(h for h in self.everybody if "host" in h.entities and h.address.version == version)
        self.fresh_port += 1
        way = (INGRESS, str(host.address), str(holder.address), 6, self.fresh_port, self.rng.choice(PORTS))
        self.send(endpoint, way, local=False, what="masqueraded")
        self.fresh_port += 1
        way = (*way[:4], self.fresh_port, way[5])
        self.send(endpoint, way, local=True, what="own node")


ACTIONS = (
    (Cluster.new_flow, 8), (Cluster.reply, 5), (Cluster.more_of_a_flow, 3), (Cluster.fragmented, 2), (Cluster.error, 3),
    (Cluster.change_policies, 0.5),
    (Cluster.masqueraded, 1),
)  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["addresses and ports only", "everything"])
def test_the_kernel_agrees_with_the_literal_evaluator(kernel: Harness, family: str) -> None:
    """With mesh policies of addresses and ports every verdict is compared; with all policies the kernel must not drop
    what Envoy might forward (property 1), and need not drop what Envoy refuses.

    A failure prints its seed; ``MESHBRIDGE_SEED`` runs it again.
    """
    seed = int(os.environ.get("MESHBRIDGE_SEED", random.SystemRandom().getrandbits(48)))
    print(f"seed {seed}")
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    actions, weights = zip(*ACTIONS, strict=True)
    while seen.total() < PACKETS // 2:
        kernel.clear()
        cluster = Cluster(kernel, rng, family != "everything", seen)
        cluster.load()
        for action in rng.choices(actions, weights, k=PER_ROUND):
            action(cluster, rng.choice(cluster.endpoints))
    for what, count in sorted(seen.items()):
        print(f"{count:6} {what}")
    for what in (
        "new flow",
        "both ends on one node",
        "reply to nothing",
        "first fragment",
        "later fragment",
        "ICMP error",
    ):
        assert seen[f"{what}: passed"] > 20, f"hardly any {what} passed"
        assert seen[f"{what}: dropped"] > 20, f"hardly any {what} was dropped"
