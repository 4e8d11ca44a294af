"""``meshbridge check``: what may stand in the way of an installation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from meshbridge.cli.documents import context_option, istio_namespace_option, kubeconfig_option
from meshbridge.cli.observe import print_lines
from meshbridge.install.cluster import Cluster
from meshbridge.install.facts import cluster_facts, node_facts
from meshbridge.install.preflight import Outcome, cluster_findings, failed, node_findings
from meshbridge.kube.api import Api
from meshbridge.kube.cluster import connect
from meshbridge.observe.text import printable

EXIT_FAILED = 3
_COLOURS = {Outcome.OK: "green", Outcome.WARN: "yellow", Outcome.FAIL: "red"}


@click.command(name="check", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--this-node", is_flag=True, help="The machine this runs on in place of a cluster; as root.")
@click.option(
    "--cni-conf-dir", type=click.Path(path_type=Path), default=Path("/etc/cni/net.d"), show_default=True,
    help="For --this-node: where its container runtime has CNI's configuration.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@kubeconfig_option
@context_option
@istio_namespace_option
def command(
    this_node: bool,
    cni_conf_dir: Path,
    output: str,
    kubeconfig: Path | None,
    context: str | None,
    istio_namespace: str,
) -> None:
    """Look at a cluster before MeshBridge is installed: versions, rights, Istio, Cilium, other webhooks and providers.

    With --this-node at the machine itself: kernel, bpf, bpffs, cgroups, CNI. On a node with an agent:
    kubectl -n meshbridge-system exec POD -- meshbridge check --this-node

    \b
    Examples:
      meshbridge check
      meshbridge check -o json | jq '.[] | select(.outcome != "ok")'
      meshbridge check --this-node
    \b
    Exit codes: 0 nothing stands in the way, whatever is warned of, 1 it cannot be looked at, 2 an option cannot be
    used, 3 something does.
    """
    if this_node:
        findings = node_findings(node_facts(cni_conf_dir))
    else:
        cluster = Cluster(Api(connect(kubeconfig, context)), lambda _: None)
        findings = cluster_findings(cluster_facts(cluster, istio_namespace))
    if output == "json":
        records = [{"what": f.what, "outcome": f.outcome.value, "text": f.text, "fix": f.fix} for f in findings]
        print_lines([json.dumps(records, indent=2)])
    else:
        for each in findings:
            mark = click.style(f"{each.outcome.value:<4}", fg=_COLOURS[each.outcome])
            click.echo(f"{mark}  {printable(each.what)}: {printable(each.text)}")
            if each.fix:
                click.echo(f"      {printable(each.fix)}")
    sys.exit(EXIT_FAILED if failed(findings) else 0)
