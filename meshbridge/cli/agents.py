"""The agents a verb asks: all that answer; one that does not is named, and keeps nobody from seeing the others."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import click

from meshbridge.observe.client import Agent, AgentUnreachable
from meshbridge.observe.text import printable


def answering(agents: Sequence[Agent]) -> list[Agent]:
    """Those of ``agents`` that somebody listens for; the others are named on stderr.

    Raises: AgentUnreachable: nobody does.
    """
    silent = {agent: reason for agent in agents if (reason := _silence(agent))}
    if len(silent) == len(agents):
        agent, reason = next(iter(silent.items()))
        raise AgentUnreachable(
            f"no agent answers ({reason})",
            where=str(agent.socket),
            fix="is 'meshbridge agent' running on this node, and may this user open the socket (root)?",
        )
    for agent, reason in silent.items():
        name = printable(agent.name)
        click.echo(f"Warning: agent {name} does not answer ({reason}): nothing of that node is shown", err=True)
    return [agent for agent in agents if agent not in silent]


def _silence(agent: Agent) -> str:
    """Why nobody listens at the agent's socket; empty when somebody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(agent.socket))
        except OSError as error:
            return error.strerror or str(error)
    return ""
