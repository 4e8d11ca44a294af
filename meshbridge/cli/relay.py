"""``meshbridge relay``: the node's agent by standard input and output, as ``kubectl meshbridge`` reaches it."""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import suppress

import click

from meshbridge.observe.client import find_agents


@click.command(name="relay", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--node", metavar="NAME", help="The agent's node; needed where several agents are on this machine.")
def command(node: str | None) -> None:
    """Join standard input and output with the socket of this node's agent, until either ends.

    \b
    Exit codes: 0 one of them ended, 1 no agent listens.
    """
    agents = find_agents(None, node)
    if len(agents) > 1:
        raise click.UsageError(f"agents of several nodes are here: say --node {' or '.join(a.name for a in agents)}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
        try:
            agent.connect(str(agents[0].socket))
        except OSError as error:
            click.echo(f"{agents[0].socket}: {error.strerror}", err=True)
            sys.exit(1)
        threading.Thread(target=_forward, args=(agent,), daemon=True).start()
        with suppress(OSError):
            while data := agent.recv(65536):
                while data:
                    data = data[os.write(1, data) :]
    os._exit(0)  # the other thread waits for input that may never come


def _forward(agent: socket.socket) -> None:
    with suppress(OSError):
        while data := os.read(0, 65536):
            agent.sendall(data)
    with suppress(OSError):
        agent.shutdown(socket.SHUT_RDWR)
