"""Round trip and connection rate of plain TCP between two pods of one node: no policy, ours, iptables."""

from __future__ import annotations

from collections.abc import Mapping

from meshbridge.bench import cluster, iptables
from meshbridge.bench.change import CLIENT_LABELS, SERVER_LABELS, add_probes, probe_places
from meshbridge.bench.cluster import Place
from meshbridge.bench.errors import BenchError
from meshbridge.bench.figures import Section, Target
from meshbridge.bench.iptables import Backend, RuleList
from meshbridge.bench.lanes import (
    COLUMNS,
    PORT,
    Lane,
    compare,
    cpu_section,
    rows,
    run_client,
    start_server,
    without_generator,
)
from meshbridge.bench.network import Node, create_node
from meshbridge.bench.processes import Process
from meshbridge.bench.samples import Sample, collect
from meshbridge.bench.system import start_system
from meshbridge.bench.workbench import Workbench

BASELINE = "no policy"
AGAIN = "no policy, again (A/A)"
OURS = "MeshBridge, 1,000 policy entries at each end"
P50_LIMIT = 1.05
PEERS, PORTS = 100, 10
RULE_LISTS = {
    "iptables, 10 rules": RuleList(10, Backend.NFT),
    "iptables, 1,000 rules": RuleList(1000, Backend.NFT),
    "iptables-legacy, 1,000 rules": RuleList(1000, Backend.LEGACY),
    "iptables-legacy, 1,000, ESTABLISHED first": RuleList(1000, Backend.LEGACY, established_first=True),
}
_TITLES = {
    "pingpong": "One byte there and back on an open TCP connection",
    "connect": "A new TCP connection with one byte there and back, one after another",
}


def measure(bench: Workbench) -> list[Section]:
    lanes = _build(bench)
    return [section for client, title in _TITLES.items() for section in _sections(bench, lanes, client, title)]


def _build(bench: Workbench) -> dict[str, Lane]:
    lanes = {}
    for number, variant in enumerate((BASELINE, AGAIN, *RULE_LISTS)):
        node = create_node(bench.stack, f"tcp{number}", number)
        address = node.server.address
        if variant in RULE_LISTS:
            iptables.apply(node.netns, RULE_LISTS[variant], node.client.address, address)
        lanes[variant] = Lane(node, address, start_server(bench, node, address))
    node = create_node(bench.stack, f"tcp{len(lanes)}", len(lanes))
    agent = enforce(bench, node)
    lanes[OURS] = Lane(node, node.server.address, start_server(bench, node, node.server.address), {"agent": (agent,)})
    return lanes


def enforce(bench: Workbench, node: Node) -> Process:
    """A real agent enforces a policy of a thousand entries at the client and at the server; they may talk."""
    places = probe_places(node)
    peers = [CLIENT_LABELS, SERVER_LABELS, *({"peer": f"p{number}"} for number in range(PEERS - 2))]
    ports = range(PORT, PORT + PORTS)
    strangers = [Place(f"peer-{i}", node.name, f"10.100.0.{i + 1}", peer) for i, peer in enumerate(peers[2:])]
    objects = [
        *(cluster.pod(place, node.address) for place in (*places, *strangers)),
        cluster.allow("to-server", SERVER_LABELS, peers, ports),
        cluster.allow("from-client", CLIENT_LABELS, peers, ports, egress=True),
    ]
    system = start_system(bench, node, objects)
    add_probes(system, node, places)
    entries = system.policy_entries()
    if entries < 2 * PEERS * PORTS:
        raise BenchError(f"the kernel has {entries} policy entries instead of {2 * PEERS * PORTS}", where=OURS)
    return system.agent


def _sections(bench: Workbench, lanes: Mapping[str, Lane], client: str, title: str) -> list[Section]:
    def measure_once(variant: str) -> Sample:
        bench.tell(f"tcp {client}: {variant}")
        return run_client(bench, lanes[variant], client)

    samples = collect(list(lanes), bench.repeats, measure_once)
    own_us, bare = without_generator(samples, OURS, BASELINE)
    notes = [
        f"The generator's own share of one operation is {own_us:.1f} µs; without it ours would be × {bare:.3f}.",
        "CPU: client, server, deferred softirqs and, for ours, the agent; all but the agent on the measured core.",
        "iptables: the rule that matches is the last; nft is what Debian's iptables is.",
    ]
    ours = compare(samples, OURS, BASELINE, lambda sample: sample.p50_ns).median
    target = Target(f"our p50, {client}", ours, P50_LIMIT)
    return [
        Section(f"tcp-{client}", title, COLUMNS, rows(samples, BASELINE), [target], notes),
        cpu_section(f"tcp-{client}-cpu", f"CPU time of one: {title[0].lower()}{title[1:]}", samples, ()),
    ]
