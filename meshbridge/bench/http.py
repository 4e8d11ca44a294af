"""HTTP between two pods: directly, and through two Envoys with mTLS and no filter, native RBAC, or our ext_authz."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from meshbridge.bench import cluster, envoys
from meshbridge.bench.cluster import Place
from meshbridge.bench.envoys import Certificates
from meshbridge.bench.figures import Section
from meshbridge.bench.lanes import COLUMNS, PORT, Lane, cpu_section, rows, run_client, start_server
from meshbridge.bench.network import Node, create_node
from meshbridge.bench.samples import Sample, collect
from meshbridge.bench.system import start_system
from meshbridge.bench.workbench import Workbench
from meshbridge.bench.wrk import CONNECTIONS, run_wrk

BASELINE = "no Envoy"
AGAIN = "no Envoy, again (A/A)"
MTLS = "two Envoys, mTLS"
RBAC = "two Envoys, mTLS + native RBAC"
EXT_AUTHZ = "two Envoys, mTLS + our ext_authz"
_LOADED = "http-loaded"
_TITLES = {
    "http": "GET over one open connection",
    "http-connect": "GET on a new connection each, one after another (the Envoys keep theirs)",
    _LOADED: f"GET over {CONNECTIONS} connections at once (wrk)",
}
_CPU_NOTES = (
    "User and system time by the scheduler's clock, softirqs included: packets over a veth are carried in the sender's "
    "time. All on the measured core but the agent.",
)


def measure(bench: Workbench) -> list[Section]:
    lanes = _build(bench)
    return [section for client, title in _TITLES.items() for section in _sections(bench, lanes, client, title)]


def _build(bench: Workbench) -> dict[str, Lane]:
    lanes = {}
    for number, variant in enumerate((BASELINE, AGAIN)):
        node = create_node(bench.stack, f"http{number}", number)
        address = node.server.address
        lanes[variant] = Lane(node, address, start_server(bench, node, address))
    certificates = envoys.issue((envoys.CLIENT_PRINCIPAL, envoys.SERVER_PRINCIPAL))
    filters = {
        MTLS: envoys.inbound_filters(None, judged=False),
        RBAC: envoys.inbound_filters(envoys.native_rbac(), judged=True),
    }
    for variant, inbound in filters.items():
        node = create_node(bench.stack, f"http{len(lanes)}", len(lanes))
        lanes[variant] = _behind_envoys(bench, node, inbound, certificates)
    node = create_node(bench.stack, f"http{len(lanes)}", len(lanes))
    lanes[EXT_AUTHZ] = _with_product(bench, node, certificates)
    return lanes


def _with_product(bench: Workbench, node: Node, certificates: Certificates) -> Lane:
    """Agent and authz server of the product for both pods; the policy says what the native RBAC filter says."""
    for pod in node.pods:
        envoys.redirect(pod)
    places = [
        Place(kind, node.name, pod.address, {"app": kind}, kind, envoys.INIT_ARGUMENTS)
        for kind, pod in zip(("client", "server"), node.pods, strict=True)
    ]
    principal = envoys.CLIENT_PRINCIPAL.removeprefix("spiffe://")
    objects = [
        *(cluster.pod(place, node.address) for place in places),
        cluster.authorize("pay", {"app": "server"}, principal, "GET", "/pay"),
    ]
    system = start_system(bench, node, objects)
    authz = system.start_authz()
    for place, pod in zip(places, node.pods, strict=True):
        system.add_endpoint(place, pod.interface, pod.netns)
    inbound = envoys.inbound_filters(None, judged=True)
    lane = _behind_envoys(bench, node, inbound, certificates, str(system.authz_socket))
    return replace(lane, others={**lane.others, "authz": (authz,), "agent": (system.agent,)})


def _behind_envoys(
    bench: Workbench, node: Node, inbound: list[envoys.Json], certificates: Certificates, authz_socket: str = ""
) -> Lane:
    address = node.server.address
    server = start_server(bench, node, "127.0.0.1")
    inbound_config = envoys.server_config(inbound, certificates, PORT, authz_socket)
    outbound_config = envoys.client_config(address, PORT, certificates)
    sidecars = (
        envoys.start_envoy(bench, node.server, "server", inbound_config, envoys.INBOUND_PORT),
        envoys.start_envoy(bench, node.client, "client", outbound_config, envoys.OUTBOUND_PORT),
    )
    if not authz_socket:  # with the product, the rules have to be there before its agent looks
        for pod in node.pods:
            envoys.redirect(pod)
    return Lane(node, address, server, {"Envoys": sidecars})


def _sections(bench: Workbench, lanes: Mapping[str, Lane], client: str, title: str) -> list[Section]:
    def measure_once(variant: str) -> Sample:
        bench.tell(f"{client}: {variant}")
        return run_wrk(bench, lanes[variant]) if client == _LOADED else run_client(bench, lanes[variant], client)

    samples = collect(list(lanes), bench.pick(9, 2) if client == _LOADED else bench.repeats, measure_once)
    return [
        Section(client, title, COLUMNS, rows(samples, BASELINE)),
        cpu_section(f"{client}-cpu", f"CPU time of one: {title}", samples, _CPU_NOTES),
    ]
