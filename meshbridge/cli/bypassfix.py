"""``meshbridge bypass fix``: what mends the half bypasses that break."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime

import click
import yaml

from meshbridge.bypass.fixes import Advice, Fix, advice, fixes
from meshbridge.bypass.inventory import inventory
from meshbridge.cli.documents import DocumentSource, document_options, mesh_settings
from meshbridge.cli.observe import print_lines
from meshbridge.observe.text import printable

LEFT_TO_DO = 3


@click.command(name="fix", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
@document_options
def command(output: str, documents: DocumentSource) -> None:
    """Print what mends connections that break because one side bypasses its sidecar and the other does not.

    The objects are DestinationRules and PeerAuthentications that let clients send plaintext to a port the server's
    Envoy does not see. What no object can mend, and what makes a bypass unnecessary, stands in comments.

    \b
    Examples:
      meshbridge bypass fix
      meshbridge bypass fix -f manifests/ | kubectl apply -f -
    \b
    Exit codes: 0 nothing breaks or the objects mend it, 3 something is left for a person to do, 1 the objects cannot
    be read.
    """
    given = documents.read()
    found = inventory(given, mesh=mesh_settings(given), now=datetime.now(UTC))
    unnecessary, ways = advice(found), fixes(found, given)
    if output == "json":
        items = [_record(fix) for fix in ways]
        print_lines([json.dumps({"advice": [_advice_record(a) for a in unnecessary], "fixes": items}, indent=2)])
    else:
        lines = [f"# first: pod {a.pod}, port {a.port}: {a.text}" for a in unnecessary]
        for fix in ways:
            lines += _lines(fix)
        print_lines(lines or ["# No half bypass breaks anything."])
    if any(fix.todo for fix in ways):
        sys.exit(LEFT_TO_DO)


def _lines(fix: Fix) -> list[str]:
    lines = ["---", f"# {printable(fix.about)}: {printable(fix.why)}"]
    if fix.apply is None:
        return [*lines, f"# to do: {printable(fix.todo)}"]
    return [*lines, *yaml.safe_dump(fix.apply, sort_keys=False).splitlines()]


def _record(fix: Fix) -> dict[str, object]:
    return {"about": fix.about, "why": fix.why, "apply": fix.apply, "todo": fix.todo or None}


def _advice_record(item: Advice) -> dict[str, object]:
    return {"pod": item.pod, "port": item.port, "text": item.text}
