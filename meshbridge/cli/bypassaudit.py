"""``meshbridge bypass audit``: what would have been dropped if audited BypassPolicies enforced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from meshbridge.cli.agents import answering
from meshbridge.cli.observe import print_lines
from meshbridge.observe.client import find_agents
from meshbridge.observe.tables import aligned
from meshbridge.observe.text import printable


@click.command(name="audit", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-n", "--namespace", metavar="NS", help="Only pods of this namespace.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--node", metavar="NAME", help="Only this node's agent.")
@click.option("--socket", type=click.Path(path_type=Path), help="Socket of one agent.")
def command(namespace: str | None, output: str, node: str | None, socket: Path | None) -> None:
    """Count, by source, the connections that only 'mode: audit' of a BypassPolicy let through.

    Counted since each agent started. Events that were lost ('meshbridge status') are not in it, and a source that is
    missing here may still have none of its connections opened in that time.

    \b
    Examples:
      meshbridge bypass audit
      meshbridge bypass audit -n finance -o json | jq '.[] | select(.flows > 10)'
    \b
    Exit codes: 0 shown, 1 no agent answers.
    """
    found: list[dict[str, Any]] = []
    for agent in answering(find_agents(socket, node)):
        found += json.loads(agent.bypasses()).get("audited", [])
    rows = [row for row in found if namespace is None or row["pod"].partition("/")[0] == namespace]
    print_lines([json.dumps(rows, indent=2)] if output == "json" else _lines(rows))


def _lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["Nothing was let through by an audit alone."]
    table = [("POD", "DIRECTION", "PORT", "PEER", "CONNECTIONS", "LAST", "WOULD BE DROPPED BY")]
    for row in rows:
        last = datetime.fromtimestamp(row["last_unix_ns"] / 1e9, UTC)
        by = ", ".join(f"{o['kind']} {o['namespace']}/{o['name']}" for o in row["origins"]) or "mTLS of the mesh"
        table.append((
            printable(row["pod"]) or "(others)", row["direction"], str(row["port"] or "-"),
            printable(row["peer"]) or "-", str(row["flows"]), f"{last:%Y-%m-%dT%H:%M:%SZ}", printable(by),
        ))  # fmt: skip
    return aligned(table)
