"""``meshbridge bypass fix``: what mends the half bypasses that break."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, BinaryIO

import click
import yaml

from meshbridge.bypass.export import MANAGED_BY
from meshbridge.bypass.fixes import Advice, Fix, advice, fixes
from meshbridge.bypass.inventory import inventory
from meshbridge.cli.documents import DocumentSource, document_options, mesh_settings
from meshbridge.cli.observe import print_lines
from meshbridge.cli.observedflows import observed_option, read_observed
from meshbridge.kube.api import CONFLICT, Api, ClusterError, RefusedError
from meshbridge.kube.cluster import connect
from meshbridge.observe.text import printable

LEFT_TO_DO = 3


@click.command(name="fix", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
@click.option(
    "--apply", "applying", is_flag=True,
    help="Apply the objects to the cluster that was read: server-side, without force, as field manager meshbridge.",
)  # fmt: skip
@click.option(
    "--dry-run", type=click.Choice(["server"]),
    help="With --apply: have the API server check the objects and keep none of them.",
)  # fmt: skip
@observed_option
@document_options
def command(
    output: str, applying: bool, dry_run: str | None, observed: BinaryIO | None, documents: DocumentSource
) -> None:
    """Print what mends connections that break because one side bypasses its sidecar and the other does not.

    The objects are DestinationRules and PeerAuthentications that let clients send plaintext to a port the server's
    Envoy does not see, and AuthorizationPolicies that keep strangers out there. What no object can mend, and what makes
    a bypass unnecessary, stands in comments.

    \b
    Examples:
      meshbridge bypass fix
      meshbridge bypass fix -f manifests/ | kubectl apply -f -
      meshbridge observe -o json | meshbridge bypass fix --observed -
      meshbridge bypass fix --apply --dry-run=server
      meshbridge bypass fix --apply
    \b
    Exit codes: 0 nothing breaks or the objects mend it, 3 something is left for a person to do, 1 the objects cannot
    be read, or one of them cannot be applied.
    """
    if applying and documents.files:
        raise click.UsageError("--apply changes the cluster that was read: leave out --filename")
    if dry_run and not applying:
        raise click.UsageError("--dry-run goes with --apply; without it nothing is applied")
    given = documents.read()
    found = inventory(given, mesh=mesh_settings(given), now=datetime.now(UTC))
    found = replace(found, observed=read_observed(observed))
    unnecessary, ways = advice(found), fixes(found, given)
    applied = _apply(documents, [fix.apply for fix in ways if fix.apply], dry_run=bool(dry_run)) if applying else []
    if output == "json":
        record = {"advice": [_advice_record(a) for a in unnecessary], "fixes": [_record(fix) for fix in ways]}
        print_lines([json.dumps({**record, "applied": applied} if applying else record, indent=2)])
    else:
        lines = [f"# first: pod {a.pod}, port {a.port}: {a.text}" for a in unnecessary]
        for fix in ways:
            lines += _lines(fix)
        how = "applied (server dry run)" if dry_run else "applied"
        lines += [f"# {how}: {printable(name)}" for name in applied]
        print_lines(lines or ["# No half bypass breaks anything."])
    if any(fix.todo for fix in ways):
        sys.exit(LEFT_TO_DO)


def _apply(documents: DocumentSource, objects: list[dict[str, Any]], *, dry_run: bool) -> list[str]:
    """The names of the objects, which are all in the cluster now.

    Raises:
        ClusterError: one of them is not: the server refuses it, or what is there under its name is not ours.
    """
    api = Api(connect(documents.kubeconfig, documents.context))
    known = {
        r.kind: r for r in api.discover({(each["apiVersion"].partition("/")[0], each["kind"]) for each in objects})
    }
    names = []
    for each in objects:
        namespace, name = each["metadata"]["namespace"], each["metadata"]["name"]
        where = f"{api.where}, {each['kind']} {namespace}/{name}"
        resource = known.get(each["kind"])
        if resource is None:
            raise ClusterError("the cluster does not know the kind", where=where, fix="install Istio's definitions")
        try:
            present = [d for page in api.pages(resource, namespace, name) for d in page.documents]
            if not all(MANAGED_BY.items() <= (d.data["metadata"].get("labels") or {}).items() for d in present):
                fix = "rename it, or write the fix into it yourself"
                raise ClusterError("is there already and is not MeshBridge's", where=where, fix=fix)
            api.apply(resource, each, dry_run=dry_run)
        except RefusedError as refused:
            fix = "have this permitted to you, or apply what is printed without --apply"
            if refused.code == CONFLICT:
                fix = "somebody changed what MeshBridge had written: undo that, or mend it by hand"
            raise ClusterError(f"answers {refused.code}: {refused.message}", where=where, fix=fix) from None
        names.append(f"{each['kind']} {namespace}/{name}")
    return names


def _lines(fix: Fix) -> list[str]:
    lines = ["---", f"# {printable(fix.about)}: {printable(fix.why)}"]
    if fix.apply is None:
        return [*lines, f"# to do: {printable(fix.todo)}"]
    return [*lines, *yaml.safe_dump(fix.apply, sort_keys=False).splitlines()]


def _record(fix: Fix) -> dict[str, object]:
    return {"about": fix.about, "why": fix.why, "apply": fix.apply, "todo": fix.todo or None}


def _advice_record(item: Advice) -> dict[str, object]:
    return {"pod": item.pod, "port": item.port, "text": item.text}
