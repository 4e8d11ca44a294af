"""``meshbridge export``: the compensation of bypassed ports as policies for another enforcer."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime

import click
import yaml

from meshbridge.bypass.export import Dialect, export
from meshbridge.bypass.inventory import inventory
from meshbridge.cli.documents import DocumentSource, document_options
from meshbridge.cli.observe import print_lines
from meshbridge.observe.text import printable

SOMETHING_MISSING = 3


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--as", "dialect", type=click.Choice([dialect.value for dialect in Dialect]), default=Dialect.CILIUM.value,
    show_default=True, help="What the policies are written as.",
)  # fmt: skip
@click.option("--partial", is_flag=True, help="Write what can be said, even where something cannot.")
@click.option("-o", "--output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
@document_options
def command(dialect: str, partial: bool, output: str, documents: DocumentSource) -> None:
    """Write the compensation of bypassed inbound ports as policies that the cluster's CNI enforces.

    They only subtract: they deny what MeshBridge's kernel programs would drop, and isolate nobody. cilium writes
    CiliumClusterwideNetworkPolicies of denials, clusternetworkpolicy Pass and Deny rules in the Admin tier, calico
    GlobalNetworkPolicies in a tier of their own. What a dialect cannot say is named on stderr.

    \b
    Examples:
      meshbridge export | kubectl apply -f -
      meshbridge export --as calico -f manifests/ > compensation.yaml
      meshbridge export --as clusternetworkpolicy --partial -o json | jq '.items[].metadata.name'
    \b
    Exit codes: 0 all of it is written, 3 something cannot be said (without --partial nothing is written then), 1 the
    objects cannot be read.
    """
    objects, omissions = export(inventory(documents.read(), now=datetime.now(UTC)), Dialect(dialect))
    for omission in omissions:
        click.echo(f"Not said: {printable(str(omission))}", err=True)
    if omissions and not partial:
        click.echo("Nothing is written; --partial writes the rest.", err=True)
        sys.exit(SOMETHING_MISSING)
    if output == "json":
        print_lines([json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2)])
    elif objects:
        print_lines([yaml.safe_dump_all(objects, sort_keys=False, explicit_start=True).rstrip("\n")])
    else:
        click.echo("No bypassed port has anything to compensate.", err=True)
    if omissions:
        sys.exit(SOMETHING_MISSING)
