"""``meshbridge endpoint list``: the pod interfaces of this machine's agents, in ``cilium endpoint list``'s columns."""

from __future__ import annotations

import json
from pathlib import Path

import click

from meshbridge.cli.agents import answering
from meshbridge.cli.observe import print_lines
from meshbridge.observe.client import find_agents
from meshbridge.observe.tables import endpoint_lines, endpoint_record
from meshbridge.observe.text import printable


@click.group(name="endpoint", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Pod interfaces that this node enforces."""


@command.command(name="list")
@click.option("-n", "--namespace", "namespaces", multiple=True, metavar="NS", help="Only pods of this namespace.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--node", metavar="NAME", help="Only this node's agent.")
@click.option(
    "--socket", type=click.Path(path_type=Path), help="Socket of one agent, in place of all under /run/meshbridge."
)
def list_endpoints(namespaces: tuple[str, ...], output: str, node: str | None, socket: Path | None) -> None:
    """List endpoints: number, enforcement, identity, labels, addresses, state; below, what those not ready wait for.

    \b
    Examples:
      meshbridge endpoint list
      meshbridge endpoint list -o json | jq '.[] | select(.state != "ready")'
    \b
    Exit codes: 0 shown, 1 no agent answers.
    """
    found = [
        (agent.name, [each for each in agent.endpoints() if not namespaces or each.namespace in namespaces])
        for agent in answering(find_agents(socket, node))
    ]
    if output == "json":
        records = [endpoint_record(name, endpoint) for name, endpoints in found for endpoint in endpoints]
        print_lines([json.dumps(records, indent=2)])
        return
    for number, (name, endpoints) in enumerate(found):
        if len(found) > 1:
            print_lines([*([""] if number else []), f"Node {printable(name)}"])
        print_lines(endpoint_lines(endpoints))
