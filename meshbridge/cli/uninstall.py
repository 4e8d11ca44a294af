"""``meshbridge uninstall``: MeshBridge out of a cluster."""

from __future__ import annotations

from pathlib import Path

import click

from meshbridge.cli.documents import context_option, kubeconfig_option
from meshbridge.cli.install import tell
from meshbridge.install.cluster import Cluster
from meshbridge.install.manifests import is_definition, name_of
from meshbridge.install.removal import Remover, plan_removal
from meshbridge.kube.api import Api
from meshbridge.kube.cluster import connect


@click.command(name="uninstall", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would go and what would stay.")
@click.option(
    "--keep-crds", is_flag=True, help="Keep the definitions of our kinds, and with them everybody's BypassPolicies."
)
@click.option(
    "--generated", is_flag=True,
    help="Also delete what was made for sidecars; calls to bypassed ports may break without it.",
)  # fmt: skip
@click.option(
    "--without-nodes", is_flag=True,
    help="Go on when a node cannot be cleaned up; what is programmed there stays in force until it boots.",
)  # fmt: skip
@click.option("--timeout", "timeout_s", type=click.FloatRange(1), default=300.0, show_default=True, metavar="SECONDS")
@kubeconfig_option
@context_option
def command(
    yes: bool,
    dry_run: bool,
    keep_crds: bool,
    generated: bool,
    without_nodes: bool,
    timeout_s: float,
    kubeconfig: Path | None,
    context: str | None,
) -> None:
    """Remove MeshBridge, however it was installed: webhooks first, then what is on the nodes, then the rest.

    On every node a pod takes the programs off the interfaces, unpins the maps and removes the CNI plugin. From then on
    the kernel enforces nothing of MeshBridge. It may be repeated until it has succeeded.

    \b
    Examples:
      meshbridge uninstall --dry-run
      meshbridge uninstall --yes
    \b
    Exit codes: 0 nothing of it is left but what is named, 1 a step did not succeed, 2 an option cannot be used.
    """
    cluster = Cluster(Api(connect(kubeconfig, context)), tell)
    removal = plan_removal(cluster, keep_definitions=keep_crds)
    if not removal.installed:
        tell("nothing of MeshBridge is installed")
        return
    counts = [each for each in removal.installed if is_definition(each)]
    tell(f"{len(removal.installed)} objects go, {len(counts)} of them definitions of kinds")
    if removal.lost:
        names = ", ".join(map(name_of, removal.lost[:5]))
        more = f" and {len(removal.lost) - 5} more" if len(removal.lost) > 5 else ""
        tell(f"with their definitions go {names}{more}; --keep-crds keeps them")
    for text in removal.kept:
        tell(text)
    if removal.generated and not generated:
        tell(
            f"{len(removal.generated)} objects made for sidecars stay, since calls to bypassed ports may need them: "
            f"{', '.join(map(name_of, removal.generated[:5]))}; --generated deletes them"
        )
    if dry_run:
        return
    if not yes:
        click.confirm("Remove MeshBridge from this cluster?", abort=True, err=True)
    Remover(cluster, timeout_s).remove(removal, without_nodes=without_nodes, generated=generated)
    tell("uninstalled")
