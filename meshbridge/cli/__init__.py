"""The ``meshbridge`` command: one module per verb, imported only when its verb is used."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from meshbridge import __version__
from meshbridge.errors import MeshBridgeError

# verb → its one-line help, so that ``--help`` imports none of them
VERBS = {
    "agent": "Enforce policy on this node (started by the DaemonSet or the demo).",
    "analyze": "Find what is wrong, risky or in vain in policies and pods, of files or the cluster.",
    "authz": "Answer Envoy's ext_authz checks for this node.",
    "bench": "Measure what MeshBridge costs on this machine, as ratios.",
    "bypass": "Show what bypasses the sidecar, what that loses, and what stands in for it.",
    "check": "Look for what may stand in the way of an installation, in a cluster or on a node.",
    "controller": "Read policies and workloads, serve them to agents and Envoys.",
    "demo": "A sample mesh on this machine, and the walk through it.",
    "endpoint": "List the pod interfaces this node enforces.",
    "evaluate": "Answer what policies make of flows, in bulk and with nothing running.",
    "export": "Write the compensation of bypassed ports as policies for Cilium, Calico or the CNI at hand.",
    "explain": "Explain one flow: who lets it pass or not, by which rule, and what came close.",
    "ext-authz": "Write what makes Istio's Envoys ask the ext_authz server.",
    "health": "Ask a component on this machine whether it serves: for probes.",
    "install": "Install MeshBridge in a cluster, or bring an installed one to this version.",
    "monitor": "Follow the kernel's events: drops with the rule that caused them.",
    "observe": "Show flows and verdicts, like hubble observe.",
    "relay": "Join standard input and output with this node's agent (kubectl meshbridge runs it in pods).",
    "status": "Show what the node's agent has programmed and what is wrong.",
    "uninstall": "Remove MeshBridge from a cluster, down to what it left on the nodes.",
    "webhook": "Answer the API server's admission reviews of pods and policies.",
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command = importlib.import_module(f"meshbridge.cli.{name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(VERBS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "MESHBRIDGE",
        "max_content_width": 110,
    },
)
@click.version_option(__version__, "--version")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Kernel L3/L4 policy before Envoy, L7 policy by ext_authz, and compensation for sidecar bypass.

    \b
    Examples:
      meshbridge demo run                              the whole story on this machine
      meshbridge observe -n finance --verdict DROPPED  what was dropped, and between whom
      meshbridge monitor --type drop -v                which rule, object and line dropped it
    """
    ctx.obj = {"debug": debug}


def main(argv: list[str] | None = None) -> Any:
    """Run the command line; a MeshBridgeError becomes one sentence on stderr and exit code 1."""
    return run(sys.argv[1:] if argv is None else argv, "meshbridge")


def run(arguments: list[str], name: str) -> Any:
    """Run the command line under a name of its own."""
    debug = "--debug" in arguments
    try:
        return cli.main(args=arguments, prog_name=name, standalone_mode=True)
    except MeshBridgeError as error:
        if debug:
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
