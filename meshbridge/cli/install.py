"""``meshbridge install``: MeshBridge into a cluster, or an installed one to this version."""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml

from meshbridge.cli.documents import context_option, kubeconfig_option
from meshbridge.cli.observe import print_lines
from meshbridge.install.cluster import Cluster
from meshbridge.install.manifests import Enforcer, Options, packaged, render
from meshbridge.kube.api import Api
from meshbridge.kube.cluster import connect
from meshbridge.observe.text import printable


@click.command(name="install", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--image", default="", metavar="IMAGE", help="The image of all components.  [what 'make image' names]")
@click.option(
    "--replicas", type=click.IntRange(1, 99), metavar="N", help="Of controller and webhook. A cluster of one node: 1."
)
@click.option(
    "--enforcer", type=click.Choice([e.value for e in Enforcer]), default=Enforcer.EBPF.value, show_default=True,
    help="Who drops packets. cilium: no agents; 'meshbridge export --as cilium' says what Cilium has to enforce.",
)  # fmt: skip
@click.option(
    "--fixes/--no-fixes", default=True, show_default=True,
    help="Whether the controller may apply what sidecars need for calls to bypassed ports.",
)  # fmt: skip
@click.option(
    "--deny-refused", is_flag=True, help="Deny at admission policies of others' kinds that are not understood."
)
@click.option(
    "--with-crds", "groups", multiple=True, metavar="GROUP",
    help="Also the kinds of cilium.io or policy.networking.k8s.io, where the cluster has none. May be repeated.",
)  # fmt: skip
@click.option(
    "--dry-run", type=click.Choice(["client", "server"]), help="Change nothing: ask no server, or have it check all."
)
@click.option("-o", "--output", type=click.Choice(["yaml", "json"]), help="Print the objects.")
@click.option("--force-conflicts", is_flag=True, help="Take over fields that somebody else changed.")
@click.option("--wait", is_flag=True, help="Return when everything serves.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(1), default=300.0, show_default=True, metavar="SECONDS")
@kubeconfig_option
@context_option
def command(
    image: str,
    replicas: int | None,
    enforcer: str,
    fixes: bool,
    deny_refused: bool,
    groups: tuple[str, ...],
    dry_run: str | None,
    output: str | None,
    force_conflicts: bool,
    wait: bool,
    timeout_s: float,
    kubeconfig: Path | None,
    context: str | None,
) -> None:
    """Install MeshBridge, or bring an installed one to this version: forth and back, nothing of it is lost.

    Objects are applied server-side as field manager meshbridge-install; those that only another version has go.
    'meshbridge check' says beforehand what may stand in the way.

    \b
    Examples:
      meshbridge install --image registry.example/meshbridge:0.1.0 --wait
      meshbridge install --replicas 1 --with-crds cilium.io
      meshbridge install --dry-run client -o yaml > meshbridge.yaml
    \b
    Exit codes: 0 installed, 1 the cluster refuses something or it does not serve in time, 2 an option cannot be used.
    """
    options = Options(
        image=image,
        replicas=replicas or 0,
        enforcer=Enforcer(enforcer),
        fixes=fixes,
        deny_refused=deny_refused,
        definitions=frozenset(groups),
    )
    objects = render(packaged(), options)
    if output == "json":
        print_lines([json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2)])
    elif output == "yaml":
        print_lines([yaml.safe_dump_all(map(dict, objects), sort_keys=False).rstrip()])
    if dry_run == "client":
        if output is None:
            raise click.UsageError("--dry-run client changes and asks nothing: say with -o what to print")
        return
    cluster = Cluster(Api(connect(kubeconfig, context)), tell)
    cluster.apply(objects, dry_run=dry_run is not None, force=force_conflicts)
    if dry_run is not None:
        return
    cluster.prune(objects)
    if wait:
        cluster.wait(timeout_s, objects)
    tell("installed")


def tell(text: str) -> None:
    """Progress goes to stderr, so that -o may be piped."""
    click.echo(printable(text), err=True)
