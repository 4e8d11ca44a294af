"""The reconciler's writes one by one into real maps, and packets through the real programs between any two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address

from harness import ACK, FROM_POD, PASSED, SYN, TO_POD, Harness, tcp
from hypothesis import HealthCheck, given, settings
from reconcile_cases import PEERS, PORTS, TRANSITIONS

from meshbridge.datapath.ipcache import Identities, Ipcache, ipcache_key, ipcache_prefix
from meshbridge.datapath.policysets import RuleIds, pack_map
from meshbridge.datapath.reconcile import (
    DesiredEndpoint,
    DesiredState,
    ObservedState,
    Plan,
    Put,
    Wait,
    observe,
    plan,
)
from meshbridge.datapath.tables import Table, TableName, kernel_tables, wait_for_packets
from meshbridge.policy.model import Layer, Origin, PolicyEntry, PolicyKey, PolicyMap, Verdict

POD = {4: "10.0.0.5", 6: "fd00::5"}
CLIENT = 40_000


@dataclass(frozen=True)
class Probe:
    """A packet of a new flow, or of one that was open before."""

    interface: int
    hook: str
    peer: IPv4Address | IPv6Address
    forwarded: bool
    port: int
    open: bool = False

    def passes(self, kernel: Harness) -> bool:
        flags = ACK if self.open else SYN
        # Flows are told apart by the client's port, so that none of the probes vouches for another.
        client = CLIENT + PORTS.index(self.port) * 4 + self.forwarded * 2 + self.open
        pod = POD[self.peer.version]
        source, destination = (str(self.peer), pod) if self.hook == TO_POD else (pod, str(self.peer))
        packet = tcp(source, destination, client, self.port, flags)
        came_in_by = None if self.forwarded or self.hook == FROM_POD else 0
        return kernel.verdict(self.interface, self.hook, packet, ingress_ifindex=came_in_by) == PASSED


def probes(kernel: Harness) -> list[Probe]:
    return [
        Probe(kernel.interfaces[interface], hook, peer, forwarded, port)
        for interface in (0, 1)
        for hook, forwarded in ((TO_POD, False), (TO_POD, True), (FROM_POD, False))
        for peer in PEERS
        for port in PORTS
    ]


def placed(state: DesiredState, kernel: Harness) -> DesiredState:
    """The state on the interfaces there are, with the address the probes are for."""
    interfaces = dict(zip((7, 8), kernel.interfaces, strict=True))
    endpoints = {
        interfaces[ifindex]: replace(
            endpoint, ifindex=interfaces[ifindex], incarnation=endpoint.incarnation * 10 + ifindex,
            addresses=frozenset(map(ip_address, POD.values())),
        )
        for ifindex, endpoint in state.endpoints.items()
    }  # fmt: skip
    return DesiredState(endpoints, state.ipcache)


def write(tables: Mapping[TableName, Table], result: Plan) -> None:
    for step in result.steps:
        if isinstance(step, Wait):
            continue
        if isinstance(step, Put):
            tables[step.table].put(step.items)
        else:
            tables[step.table].delete(step.keys)


def with_flow_tables(kernel: Harness, state: DesiredState) -> DesiredState:
    endpoints = {
        ifindex: replace(endpoint, flow_table=kernel.maps.conntrack.create(endpoint.incarnation))
        for ifindex, endpoint in state.endpoints.items()
    }
    return replace(state, endpoints=endpoints)


def settle(kernel: Harness, state: DesiredState) -> None:
    kernel.clear()
    write(kernel_tables(kernel.maps), plan(ObservedState(), with_flow_tables(kernel, state)))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(transition=TRANSITIONS)
def test_no_packet_is_misjudged_between_two_writes(
    loaded: Harness, transition: tuple[DesiredState, DesiredState]
) -> None:
    before, after = (placed(state, loaded) for state in transition)
    same_pod = {
        ifindex
        for ifindex in before.endpoints.keys() & after.endpoints.keys()
        if before.endpoints[ifindex].incarnation == after.endpoints[ifindex].incarnation
    }
    settle(loaded, after)
    new = {probe: probe.passes(loaded) for probe in probes(loaded)}
    settle(loaded, before)
    old = {probe: probe.passes(loaded) for probe in probes(loaded)}
    always = {p: old[p] for p in old if old[p] == new[p] and (p.interface in same_pod or not old[p])}
    # Each of those that passed has opened a flow just now; it has to stay open, or shut, in the same way.
    always |= {replace(probe, open=True): True for probe, passes in always.items() if passes and opened(loaded, probe)}
    tables = kernel_tables(loaded.maps)
    after = with_flow_tables(loaded, after)
    for step in plan(observe(tables), after).steps:
        if isinstance(step, Wait):
            continue
        for item in step.items if isinstance(step, Put) else step.keys:
            if isinstance(item, tuple):
                tables[step.table].put([item])
            else:
                tables[step.table].delete([item])
            for probe, passes in always.items():
                assert probe.passes(loaded) is passes, (probe, step.table)
    assert {probe: probe.passes(loaded) for probe in probes(loaded)} == new
    assert plan(observe(tables), after).steps == ()


def opened(kernel: Harness, probe: Probe) -> bool:
    """Open the flow that the probe of an open one belongs to."""
    opener = replace(probe, open=True)
    client = CLIENT + PORTS.index(probe.port) * 4 + probe.forwarded * 2 + 1
    pod = POD[probe.peer.version]
    source, destination = (str(probe.peer), pod) if probe.hook == TO_POD else (pod, str(probe.peer))
    came_in_by = None if probe.forwarded or probe.hook == FROM_POD else 0
    packet = tcp(source, destination, client, probe.port, SYN)
    first = kernel.verdict(probe.interface, probe.hook, packet, ingress_ifindex=came_in_by) == PASSED
    return first and opener.passes(kernel)


def test_what_is_written_is_read_back(kernel: Harness) -> None:
    entries = {
        PolicyKey(300 + n, Layer.NETWORK, 6, n, 16): PolicyEntry(Verdict.ALLOW, n, (Origin("CNP", "s", str(n)),))
        for n in range(5000)
    }
    packed = (pack_map(PolicyMap(entries), RuleIds()), *(pack_map(PolicyMap(), RuleIds()),) * 3)
    exact = {ipcache_key(IPv6Address(n)): Identities(n + 1, n % 3) for n in range(6000)}
    prefixes = {ipcache_prefix(IPv4Network((n << 8, 24))): Identities(n + 1) for n in range(300)}
    ifindex = kernel.interfaces[0]
    endpoint = DesiredEndpoint(
        ifindex, 5, 7, 300, packed, frozenset(map(ip_address, POD.values())), 4, b"\x0a\0\0\0\0\1", 3
    )
    state = DesiredState({ifindex: endpoint}, Ipcache(exact, prefixes))
    tables = kernel_tables(kernel.maps)
    result = plan(ObservedState(), state)
    write(tables, result)
    seen = observe(tables)
    assert (seen.endpoints, seen.addresses, seen.sets) == (
        result.after.endpoints, result.after.addresses, result.after.sets,
    )  # fmt: skip
    assert (seen.ipcache.exact, seen.ipcache.prefixes) == (exact, prefixes)
    write(tables, plan(seen, DesiredState({}, Ipcache({}, {}))))
    assert not any(list(table.read()) for table in tables.values())


def test_waiting_for_packets_ends() -> None:
    wait_for_packets()
