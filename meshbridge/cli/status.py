"""``meshbridge status``: what this machine's agents have programmed, or how a cluster's components are."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from meshbridge.cli.agents import answering
from meshbridge.cli.documents import context_option, kubeconfig_option
from meshbridge.cli.observe import print_lines
from meshbridge.observe.client import find_agents
from meshbridge.observe.tables import aligned, is_degraded, status_lines, status_record
from meshbridge.observe.text import printable

EXIT_DEGRADED = 3
POLL_S = 1.0


@click.command(name="status", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--node", metavar="NAME", help="Only this node's agent.")
@click.option(
    "--socket", type=click.Path(path_type=Path), help="Socket of one agent, in place of all under /run/meshbridge."
)
@click.option("--cluster", is_flag=True, help="A cluster's components in place of this machine's agents.")
@click.option("--wait", is_flag=True, help="With --cluster: until every component serves.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(1), default=300.0, show_default=True, metavar="SECONDS")
@kubeconfig_option
@context_option
def command(
    output: str,
    node: str | None,
    socket: Path | None,
    cluster: bool,
    wait: bool,
    timeout_s: float,
    kubeconfig: Path | None,
    context: str | None,
) -> None:
    """Show each agent's state: revision, endpoints, identities, losses, and every refused object or other problem.

    With --cluster: of each component of the cluster how many pods serve, of which image, and what the others wait for;
    and what keeps the webhook or the controller from working although they run.

    \b
    Examples:
      meshbridge status
      meshbridge status -o json | jq '.[].problems'
      meshbridge status --cluster --wait
    \b
    Exit codes: 0 all is well, 1 no agent answers or nothing is installed, 2 an option cannot be used, 3 degraded.
    """
    if cluster or wait:
        if node or socket:
            raise click.UsageError("--cluster is about all nodes: leave out --node and --socket")
        _cluster(output, kubeconfig, context, timeout_s if wait else 0)
        return
    if kubeconfig or context:
        raise click.UsageError("--kubeconfig and --context go with --cluster")
    agents = find_agents(socket, node)
    statuses = [agent.status() for agent in answering(agents)]
    if output == "json":
        print_lines([json.dumps([status_record(status) for status in statuses], indent=2)])
    else:
        for number, status in enumerate(statuses):
            print_lines([*([""] if number else []), *status_lines(status)])
    degraded = len(statuses) < len(agents) or any(map(is_degraded, statuses))
    sys.exit(EXIT_DEGRADED if degraded else 0)


def _cluster(output: str, kubeconfig: Path | None, context: str | None, timeout_s: float) -> None:
    from meshbridge.install.cluster import Cluster, InstallError
    from meshbridge.install.manifests import Enforcer
    from meshbridge.install.overview import overview, overview_record
    from meshbridge.kube.api import Api
    from meshbridge.kube.cluster import connect

    cluster = Cluster(Api(connect(kubeconfig, context)), lambda _: None)
    until = time.monotonic() + timeout_s
    found = overview(cluster)
    while not found.well and time.monotonic() < until:
        time.sleep(POLL_S)
        found = overview(cluster)
    if not found.rollouts:
        raise InstallError("MeshBridge is not installed", where=cluster.api.where, fix="'meshbridge install' does that")
    if output == "json":
        print_lines([json.dumps(overview_record(found), indent=2)])
    else:
        rows = [("COMPONENT", "KIND", "READY", "IMAGE")]
        rows += [(each.component, each.kind, f"{each.ready}/{each.wanted}", each.image) for each in found.rollouts]
        print_lines(aligned([tuple(map(printable, row)) for row in rows]))
        if found.enforcer is Enforcer.CILIUM:
            print_lines(
                ["enforcer: cilium: no agents; 'meshbridge export --as cilium' writes what Cilium has to enforce"]
            )
        print_lines(f"  ! {printable(text)}" for text in found.problems)
    sys.exit(0 if found.well else EXIT_DEGRADED)
