"""What a refused caller costs: a connection dropped in the kernel, beside one that Envoy takes and answers with 403."""

from __future__ import annotations

from collections.abc import Mapping

from meshbridge.bench import cluster, envoys, iptables
from meshbridge.bench.change import CLIENT_LABELS, SERVER_LABELS, add_probes, probe_places
from meshbridge.bench.figures import Section
from meshbridge.bench.iptables import Backend, RuleList
from meshbridge.bench.lanes import PORT, Lane, cpu_section, run_client, start_server
from meshbridge.bench.network import Node, create_node
from meshbridge.bench.samples import Sample, collect
from meshbridge.bench.system import start_system
from meshbridge.bench.workbench import Workbench

OURS = "MeshBridge drops the SYN, event included"
OURS_AGAIN = "the same, again (A/A)"
IPTABLES = "iptables-legacy drops it after 1,000 rules"
RBAC = "the server's Envoy answers 403, native RBAC"
_CLIENTS = {OURS: "syn", OURS_AGAIN: "syn", IPTABLES: "syn", RBAC: "refused"}
_NOTES = (
    "The client has no sidecar and speaks plaintext. It gives a dropped attempt up at once; one that waits sends its "
    "SYN again some times. The kernel's part is in the client's time: a veth carries a packet in the sender's.",
)


def measure(bench: Workbench) -> list[Section]:
    lanes = _build(bench)

    def measure_once(variant: str) -> Sample:
        bench.tell(f"denied: {variant}")
        return run_client(bench, lanes[variant], _CLIENTS[variant])

    samples = collect(list(lanes), bench.repeats, measure_once)
    return [cpu_section("denied", "CPU time of one refused attempt to connect", samples, _NOTES)]


def _build(bench: Workbench) -> Mapping[str, Lane]:
    nodes = {variant: create_node(bench.stack, f"denied{i}", i) for i, variant in enumerate(_CLIENTS)}
    lanes = {variant: _enforced(bench, nodes[variant]) for variant in (OURS, OURS_AGAIN)}
    node = nodes[IPTABLES]
    # The pair that the list allows are the server and a pod that is not there.
    iptables.apply(node.netns, RuleList(1000, Backend.LEGACY), "10.88.255.254", node.server.address)
    lanes[IPTABLES] = Lane(node, node.server.address, start_server(bench, node, node.server.address))
    node = nodes[RBAC]
    server = start_server(bench, node, "127.0.0.1")
    filters = envoys.inbound_filters(envoys.native_rbac(), judged=True)
    config = envoys.server_config(filters, None, PORT, "")
    envoy = envoys.start_envoy(bench, node.server, "server", config, envoys.INBOUND_PORT)
    envoys.redirect(node.server)
    lanes[RBAC] = Lane(node, node.server.address, server, {"Envoys": (envoy,)})
    return lanes


def _enforced(bench: Workbench, node: Node) -> Lane:
    """The client may reach another port of the server, not this one."""
    places = probe_places(node)
    objects = [
        *(cluster.pod(place, node.address) for place in places),
        cluster.allow("elsewhere", SERVER_LABELS, [CLIENT_LABELS], [PORT + 1]),
    ]
    system = start_system(bench, node, objects)
    server = start_server(bench, node, node.server.address)
    add_probes(system, node, places)
    return Lane(node, node.server.address, server, {"agent": (system.agent,)})
