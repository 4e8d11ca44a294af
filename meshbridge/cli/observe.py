"""``meshbridge observe``: flows and verdicts of this machine's agents, like ``hubble observe``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import click

from meshbridge.cli.agents import answering
from meshbridge.observe.client import Follower, find_agents, merged_history
from meshbridge.observe.filters import (
    PROTOCOL_NAMES,
    VERDICT_NAMES,
    FlowFilter,
    PodFilter,
    parse_since,
    protocol_numbers,
)
from meshbridge.observe.flow import Flow, FlowKind
from meshbridge.observe.printers import Format, Paint, Table, compact_line, json_line, plain

_COLOURS = {
    "DROPPED": "red",
    "DENIED": "red",
    "AUDIT": "yellow",
    "AUDITED": "yellow",
    "FORWARDED": "green",
    "ALLOWED": "green",
}
_KINDS = {"drop": FlowKind.DROP, "policy-verdict": FlowKind.VERDICT, "trace": FlowKind.TRACE, "agent": FlowKind.AGENT}


@click.command(name="observe", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-n", "--namespace", "namespaces", multiple=True, metavar="NS", help="Either end is in this namespace.")
@click.option("-f", "--follow", is_flag=True, help="Go on with the flows to come.")
@click.option(
    "--last", type=click.IntRange(min=0), metavar="N", help="Only the last N of those that match.  [20 with --follow]"
)
@click.option(
    "--verdict", "verdicts", multiple=True, type=click.Choice(VERDICT_NAMES, case_sensitive=False),
    help="DROPPED includes DENIED, FORWARDED includes ALLOWED.",
)  # fmt: skip
@click.option("-t", "--type", "kinds", multiple=True, type=click.Choice(list(_KINDS)), help="Kind of event.")
@click.option("--from-pod", "from_pods", multiple=True, metavar="[NS/]POD", help="The sender; POD may be a prefix.")
@click.option("--to-pod", "to_pods", multiple=True, metavar="[NS/]POD", help="The receiver; POD may be a prefix.")
@click.option("--pod", "pods", multiple=True, metavar="[NS/]POD", help="Either end; POD may be a prefix.")
@click.option("--protocol", "protocols", multiple=True, type=click.Choice(PROTOCOL_NAMES, case_sensitive=False))
@click.option("--port", "ports", multiple=True, type=click.IntRange(0, 65535), metavar="PORT", help="Of either end.")
@click.option("--since", metavar="TIME", help="A duration before now (90s, 5m, 1h30m) or an RFC 3339 time.")
@click.option("-o", "--output", type=click.Choice([f.value for f in Format]), default="compact", show_default=True)
@click.option("--print-node-name", is_flag=True, help="Name the node in compact lines.")
@click.option("--node", metavar="NAME", help="Only this node's agent.")
@click.option(
    "--socket", type=click.Path(path_type=Path), help="Socket of one agent, in place of all under /run/meshbridge."
)
def command(
    namespaces: tuple[str, ...],
    follow: bool,
    last: int | None,
    verdicts: tuple[str, ...],
    kinds: tuple[str, ...],
    from_pods: tuple[str, ...],
    to_pods: tuple[str, ...],
    pods: tuple[str, ...],
    protocols: tuple[str, ...],
    ports: tuple[int, ...],
    since: str | None,
    output: str,
    print_node_name: bool,
    node: str | None,
    socket: Path | None,
) -> None:
    """Show flows and verdicts that the kernel reported, of every agent on this machine, by time.

    \b
    Examples:
      meshbridge observe -n finance --verdict DROPPED
      meshbridge observe --follow --to-pod finance/transaction-service --port 8080
      meshbridge observe --since 5m -o json | jq .flow.drop_reason_desc
    \b
    Exit codes: 0 shown, 1 no agent answers, 2 an option cannot be used.
    """
    wanted = FlowFilter(
        kinds=frozenset(_KINDS[kind] for kind in kinds),
        namespaces=frozenset(namespaces),
        verdicts=frozenset(verdict.upper() for verdict in verdicts),
        from_pods=tuple(map(PodFilter.parse, from_pods)),
        to_pods=tuple(map(PodFilter.parse, to_pods)),
        pods=tuple(map(PodFilter.parse, pods)),
        protocols=frozenset[int]().union(*map(protocol_numbers, protocols)),
        ports=frozenset(ports),
        since_ns=parse_since(since, datetime.now(UTC)) if since else 0,
    )
    agents = find_agents(socket, node)
    show = flow_printer(Format(output), with_node=print_node_name or len(agents) > 1)
    if follow:
        follow_flows(Follower(agents), wanted, 20 if last is None else last, show)
    else:
        show(newest([flow for flow in merged_history(answering(agents)) if wanted.matches(flow)], last))


def flow_printer(form: Format, *, with_node: bool) -> Callable[[Iterable[Flow]], None]:
    """A function that prints flows; colours only on a terminal, and never with NO_COLOR set."""
    paint = _coloured if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else plain
    table = Table(paint=paint)

    def show(flows: Iterable[Flow]) -> None:
        if form is Format.TABLE:
            print_lines(table.lines(flows))
        elif form is Format.JSON:
            print_lines(json_line(flow) for flow in flows)
        else:
            print_lines(compact_line(flow, with_node=with_node, paint=paint) for flow in flows)

    return show


def follow_flows(
    follower: Follower, wanted: FlowFilter, last: int | None, show: Callable[[Iterable[Flow]], None]
) -> None:
    """Show what is past, then what comes, until interrupted; broken streams are told on stderr."""
    follower.start()
    try:
        show(newest([flow for flow in follower.history() if wanted.matches(flow)], last))
        for flow in follower.live():
            while not follower.notices.empty():
                click.echo(follower.notices.get(), err=True)
            if flow is not None and wanted.matches(flow):
                show([flow])
    except KeyboardInterrupt:
        pass  # the way to end a follow; not a failure


def newest(flows: list[Flow], last: int | None) -> list[Flow]:
    return flows if last is None else flows[len(flows) - min(last, len(flows)) :]


def print_lines(lines: Iterable[str]) -> None:
    """Each line whole and at once; a reader that went away (``| head``) ends the command quietly."""
    try:
        for line in lines:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more on its way out; give it something that takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _coloured(text: str, verdict: str) -> str:
    return click.style(text, fg=_COLOURS.get(verdict.strip()))


__all__ = ["Paint", "command", "flow_printer", "follow_flows", "newest", "print_lines"]
