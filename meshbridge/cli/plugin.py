"""``kubectl meshbridge``: the same verbs for the cluster of a kubeconfig; agents are asked on all of its nodes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from meshbridge.cli import run
from meshbridge.errors import MeshBridgeError

NAMESPACE: Final = "meshbridge-system"
AGENTS: Final = "app.kubernetes.io/name=meshbridge,app.kubernetes.io/component=agent"

_OF_AGENTS: Final = {"observe": (), "monitor": (), "endpoint": (), "bypass": ("list", "show", "audit")}
"""Verbs that ask agents; with subverbs, only those."""
_HELP: Final = {"-h", "--help", "--version"}
_FILES: Final = ("-f", "--filename")


@dataclass(frozen=True, slots=True)
class Call:
    """What a command line of the plugin means.

    Args:
        arguments: For ``meshbridge``.
        agents: They are about the agents of the cluster, which have to be reachable then.
        node: Only this node's agent is asked.
    """

    arguments: tuple[str, ...]
    agents: bool = False
    kubeconfig: Path | None = None
    context: str | None = None
    node: str | None = None


def read_call(arguments: Sequence[str]) -> Call:
    """The meaning of a command line.

    Verbs that read a cluster know ``--context`` and the like; from those that ask agents they are taken away.
    """
    verb = arguments[0] if arguments else ""
    if _HELP & set(arguments) or not verb or verb.startswith("-"):
        return Call(tuple(arguments))
    given = {name: _value(arguments, name) for name in ("--kubeconfig", "--context", "--node", "--socket")}
    if verb == "status":
        ask = given["--node"] is not None
        if not ask:
            return Call((*arguments, *([] if "--cluster" in arguments else ["--cluster"])))
    elif not _asks_agents(arguments) or given["--socket"] is not None:
        return Call(tuple(arguments))
    left = _without(arguments, ("--kubeconfig", "--context"), ("-A", "--all-namespaces"))
    kubeconfig = Path(given["--kubeconfig"]) if given["--kubeconfig"] else None
    return Call(tuple(left), agents=True, kubeconfig=kubeconfig, context=given["--context"], node=given["--node"])


def main(argv: Sequence[str] | None = None) -> Any:
    """Run the plugin; errors as ``meshbridge`` has them."""
    call = read_call(sys.argv[1:] if argv is None else argv)
    if not call.agents:
        return run(list(call.arguments), "kubectl meshbridge")
    with ExitStack() as stack:
        try:
            stack.enter_context(_tunnels(call))
        except MeshBridgeError as error:
            if "--debug" in call.arguments:
                raise
            click.echo(f"Error: {error}", err=True)
            sys.exit(1)
        return run(list(call.arguments), "kubectl meshbridge")


def _tunnels(call: Call) -> Any:
    from meshbridge.cli.tunnel import Exit, tunnels
    from meshbridge.kube.api import Api, ClusterError, RefusedError
    from meshbridge.kube.cluster import connect
    from meshbridge.kube.podexec import run_in_pod
    from meshbridge.observe.text import printable

    client = connect(call.kubeconfig, call.context)
    api = Api(client)
    try:
        pods = api.get(f"/api/v1/namespaces/{NAMESPACE}/pods", {"labelSelector": AGENTS}).get("items") or []
    except RefusedError as refused:
        raise api.error(refused) from None
    running = {
        str(pod["spec"]["nodeName"]): str(pod["metadata"]["name"])
        for pod in pods
        if (pod.get("status") or {}).get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp")
    }
    chosen = {node: pod for node, pod in running.items() if call.node in (None, node)}
    if not chosen:
        which = f"on node {call.node}" if call.node else "in the cluster"
        raise ClusterError(
            f"no agent runs {which}", where=f"{api.where}, namespace {NAMESPACE}",
            fix="'kubectl meshbridge status' shows what is installed",
        )  # fmt: skip
    exits = [
        Exit(node, partial(run_in_pod, client, NAMESPACE, pod, "agent", ["meshbridge", "relay", "--node", node]))
        for node, pod in sorted(chosen.items())
    ]
    return tunnels(exits, lambda text: click.echo(printable(text), err=True))


def _asks_agents(arguments: Sequence[str]) -> bool:
    verb, subverbs = arguments[0], _OF_AGENTS.get(arguments[0])
    if subverbs is None or (verb == "bypass" and any(a.startswith(_FILES) for a in arguments)):
        return False
    return not subverbs or (len(arguments) > 1 and arguments[1] in subverbs)


def _value(arguments: Sequence[str], name: str) -> str | None:
    for number, each in enumerate(arguments):
        if each == name and number + 1 < len(arguments):
            return arguments[number + 1]
        if each.startswith(f"{name}="):
            return each.removeprefix(f"{name}=")
    return None


def _without(arguments: Sequence[str], options: Sequence[str], flags: Sequence[str]) -> list[str]:
    left: list[str] = []
    skip = False
    for each in arguments:
        if skip:
            skip = False
        elif each in options:
            skip = True
        elif each not in flags and not any(each.startswith(f"{name}=") for name in options):
            left.append(each)
    return left
