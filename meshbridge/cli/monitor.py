"""``meshbridge monitor``: the kernel's events as they come, and with ``-v`` the rule behind each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from meshbridge.cli.agents import answering
from meshbridge.cli.observe import follow_flows, newest, print_lines
from meshbridge.observe.client import Follower, find_agents, merged_history
from meshbridge.observe.filters import FilterError, FlowFilter, PodFilter
from meshbridge.observe.flow import Flow, FlowKind
from meshbridge.observe.monitor import monitor_lines
from meshbridge.observe.printers import json_line

_KINDS = {"drop": FlowKind.DROP, "policy-verdict": FlowKind.VERDICT, "trace": FlowKind.TRACE, "agent": FlowKind.AGENT}


@click.command(name="monitor", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-t", "--type", "kinds", multiple=True, type=click.Choice(list(_KINDS)), help="Only these kinds of event."
)
@click.option(
    "-v", "--verbose", is_flag=True, help="Below each event: reason, object, rule, file and line, what to do."
)
@click.option("-n", "--namespace", "namespaces", multiple=True, metavar="NS", help="Either end is in this namespace.")
@click.option(
    "--related-to",
    "related",
    multiple=True,
    metavar="ID|NS/POD",
    help="Only events of this endpoint, by number or pod.",
)
@click.option(
    "--last", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help="Begin with N past events."
)
@click.option("--no-follow", is_flag=True, help="Show what is past (all of it without --last) and end.")
@click.option("-j", "--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--node", metavar="NAME", help="Only this node's agent.")
@click.option(
    "--socket", type=click.Path(path_type=Path), help="Socket of one agent, in place of all under /run/meshbridge."
)
def command(
    kinds: tuple[str, ...],
    verbose: bool,
    namespaces: tuple[str, ...],
    related: tuple[str, ...],
    last: int,
    no_follow: bool,
    as_json: bool,
    node: str | None,
    socket: Path | None,
) -> None:
    """Follow the kernel's events. For a default-deny drop, -v names the policies that isolated the endpoint.

    \b
    Examples:
      meshbridge monitor --type drop -v
      meshbridge monitor --related-to 512 --last 10
      meshbridge monitor --type drop -v --related-to finance/transaction-service --no-follow
    \b
    Exit codes: 0 shown, 1 no agent answers, 2 an option cannot be used.
    """
    numbers = frozenset(int(text) for text in related if text.isdecimal())
    pods = tuple(PodFilter.parse(text) for text in related if not text.isdecimal())
    if numbers and pods:
        raise FilterError("--related-to mixes endpoint numbers and pods", fix="use one of the two spellings")
    wanted = FlowFilter(
        kinds=frozenset(_KINDS[kind] for kind in kinds),
        namespaces=frozenset(namespaces),
        endpoint_ids=numbers,
        pods=pods,
    )
    agents = find_agents(socket, node)

    def show(flows: Iterable[Flow]) -> None:
        for flow in flows:
            print_lines([json_line(flow)] if as_json else monitor_lines(flow, verbose=verbose))

    if no_follow:
        show(newest([flow for flow in merged_history(answering(agents)) if wanted.matches(flow)], last or None))
    else:
        click.echo("Press Ctrl-C to quit", err=True)
        follow_flows(Follower(agents), wanted, last, show)
