"""``meshbridge status``: what this machine's agents have programmed, and what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from meshbridge.cli.agents import answering
from meshbridge.cli.observe import print_lines
from meshbridge.observe.client import find_agents
from meshbridge.observe.tables import is_degraded, status_lines, status_record

EXIT_DEGRADED = 3


@click.command(name="status", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--node", metavar="NAME", help="Only this node's agent.")
@click.option(
    "--socket", type=click.Path(path_type=Path), help="Socket of one agent, in place of all under /run/meshbridge."
)
def command(output: str, node: str | None, socket: Path | None) -> None:
    """Show each agent's state: revision, endpoints, identities, losses, and every refused object or other problem.

    \b
    Examples:
      meshbridge status
      meshbridge status -o json | jq '.[].problems'
    \b
    Exit codes: 0 all is well, 1 no agent answers, 2 an option cannot be used, 3 degraded.
    """
    agents = find_agents(socket, node)
    statuses = [agent.status() for agent in answering(agents)]
    if output == "json":
        print_lines([json.dumps([status_record(status) for status in statuses], indent=2)])
    else:
        for number, status in enumerate(statuses):
            print_lines([*([""] if number else []), *status_lines(status)])
    degraded = len(statuses) < len(agents) or any(map(is_degraded, statuses))
    sys.exit(EXIT_DEGRADED if degraded else 0)
