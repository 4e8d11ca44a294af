"""HTTP between two pods: directly, and through two Envoys with mTLS and no filter, native RBAC, or our ext_authz."""

from __future__ import annotations

from collections.abc import Mapping

from meshbridge.bench import envoys
from meshbridge.bench.figures import Section
from meshbridge.bench.lanes import COLUMNS, PORT, Lane, rows, run_client, start_server
from meshbridge.bench.network import create_node
from meshbridge.bench.samples import Sample, collect
from meshbridge.bench.workbench import Workbench

BASELINE = "no Envoy"
AGAIN = "no Envoy, again (A/A)"
MTLS = "two Envoys, mTLS"
RBAC = "two Envoys, mTLS + native RBAC"
EXT_AUTHZ = "two Envoys, mTLS + our ext_authz"
_TITLES = {
    "http": "GET over one open connection",
    "http-connect": "GET on a new connection each, one after another (TLS between Envoys is then new as well)",
}


def measure(bench: Workbench) -> list[Section]:
    lanes = _build(bench)
    return [_section(bench, lanes, client, title) for client, title in _TITLES.items()]


def _build(bench: Workbench) -> dict[str, Lane]:
    lanes = {}
    for number, variant in enumerate((BASELINE, AGAIN)):
        node = create_node(bench.stack, f"http{number}", number)
        address = node.server.address
        lanes[variant] = Lane(node, address, PORT, start_server(bench, node, address))
    certificates = envoys.issue((envoys.CLIENT_PRINCIPAL, envoys.SERVER_PRINCIPAL))
    filters = {
        MTLS: envoys.inbound_filters(None, judged=False),
        RBAC: envoys.inbound_filters(envoys.native_rbac(), judged=True),
    }
    for number, (variant, inbound) in enumerate(filters.items(), len(lanes)):
        node = create_node(bench.stack, f"http{number}", number)
        address = node.server.address
        server = start_server(bench, node, "127.0.0.1")
        inbound_config = envoys.server_config(inbound, certificates, PORT, "")
        outbound_config = envoys.client_config(address, PORT, certificates)
        sidecars = (
            envoys.start_envoy(bench, node.server, "server", inbound_config, envoys.INBOUND_PORT),
            envoys.start_envoy(bench, node.client, "client", outbound_config, envoys.OUTBOUND_PORT),
        )
        envoys.redirect(node, PORT)
        lanes[variant] = Lane(node, address, PORT, server, sidecars)
    return lanes


def _section(bench: Workbench, lanes: Mapping[str, Lane], client: str, title: str) -> Section:
    def measure_once(variant: str) -> Sample:
        bench.tell(f"{client}: {variant}")
        return run_client(bench, lanes[variant], client)

    samples = collect(list(lanes), bench.repeats, measure_once)
    return Section(client, title, COLUMNS, rows(samples, BASELINE))
