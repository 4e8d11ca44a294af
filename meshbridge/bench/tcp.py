"""Round trip and connection rate of plain TCP between two pods of one node: no policy, ours, iptables."""

from __future__ import annotations

from collections.abc import Mapping

from meshbridge.bench import iptables
from meshbridge.bench.figures import Section
from meshbridge.bench.iptables import Backend, RuleList
from meshbridge.bench.lanes import COLUMNS, PORT, Lane, rows, run_client, start_server
from meshbridge.bench.network import create_node
from meshbridge.bench.samples import Sample, collect
from meshbridge.bench.workbench import Workbench

BASELINE = "no policy"
AGAIN = "no policy, again (A/A)"
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
    return [_section(bench, lanes, client, title) for client, title in _TITLES.items()]


def _build(bench: Workbench) -> dict[str, Lane]:
    lanes = {}
    for number, variant in enumerate((BASELINE, AGAIN, *RULE_LISTS)):
        node = create_node(bench.stack, f"tcp{number}", number)
        address = node.server.address
        if variant in RULE_LISTS:
            iptables.apply(node.netns, RULE_LISTS[variant], node.client.address, address)
        lanes[variant] = Lane(node, address, PORT, start_server(bench, node, address))
    return lanes


def _section(bench: Workbench, lanes: Mapping[str, Lane], client: str, title: str) -> Section:
    def measure_once(variant: str) -> Sample:
        bench.tell(f"tcp {client}: {variant}")
        return run_client(bench, lanes[variant], client)

    samples = collect(list(lanes), bench.repeats, measure_once)
    return Section(f"tcp-{client}", title, COLUMNS, rows(samples, BASELINE))
