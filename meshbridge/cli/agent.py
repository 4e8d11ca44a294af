"""``meshbridge agent``: enforce policy on one node until told to stop; what is programmed stays."""

from __future__ import annotations

import contextlib
import gc
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshbridge.errors import MeshBridgeError, SettingsError

if TYPE_CHECKING:
    from meshbridge.agent.agent import Agent

_NODE = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_BPFFS = Path("/sys/fs/bpf/meshbridge")
_RUN = Path("/run/meshbridge")


@click.command(name="agent", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--node", required=True, metavar="NAME", help="This node's name, as in its token.")
@click.option(
    "--controller",
    metavar="ADDRESS",
    help="Where the controller listens: unix:PATH, or HOST:PORT.  [in a pod, the Service's address]",
)
@click.option(
    "--controller-ca", type=click.Path(path_type=Path), help="Certificates that vouch for it, PEM; for HOST:PORT."
)
@click.option("--controller-name", metavar="NAME", help="What its certificate is for. [HOST; in a pod, the Service]")
@click.option(
    "--token-file", type=click.Path(path_type=Path), help="File with the node's token; read at each connection."
)
@click.option(
    "--bpffs", type=click.Path(path_type=Path), default=_BPFFS, show_default=True, help="Where nodes are pinned."
)
@click.option(
    "--socket", type=click.Path(path_type=Path), help="The agent's own socket.  [/run/meshbridge/NODE/agent.sock]"
)
@click.option(
    "--cni-socket",
    type=click.Path(path_type=Path),
    help="Where the CNI plugin meshbridge-cni asks, for root only.  [with --cni-conf-dir /run/meshbridge/cni.sock]",
)
@click.option(
    "--cni-conf-dir",
    type=click.Path(path_type=Path),
    help="Keep meshbridge-cni in the chain that this node's runtime uses, as configured here: /etc/cni/net.d.",
)
@click.option(
    "--cni-bin-dir",
    type=click.Path(path_type=Path),
    default=Path("/opt/cni/bin"),
    show_default=True,
    help="Where the runtime looks for plugins.",
)
@click.option(
    "--cni-plugin",
    type=click.Path(path_type=Path),
    default=Path("/usr/lib/meshbridge/meshbridge-cni"),
    show_default=True,
    help="The program to install there.",
)
@click.option("--metrics", metavar="ADDRESS", default="", help="Serve /metrics on this loopback address and port.")
@click.option("--attach", type=click.Choice(["tcx", "clsact", "auto"]), default="auto", show_default=True)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
@click.option(
    "--cleanup",
    is_flag=True,
    help="Leave the CNI chain, take the programs off all interfaces, unpin everything, and end.",
)
def command(
    node: str,
    controller: str | None,
    controller_ca: Path | None,
    controller_name: str | None,
    token_file: Path | None,
    bpffs: Path,
    socket: Path | None,
    cni_socket: Path | None,
    cni_conf_dir: Path | None,
    cni_bin_dir: Path,
    cni_plugin: Path,
    metrics: str,
    attach: str,
    log_level: str,
    cleanup: bool,
) -> None:
    """Enforce policy on this node. SIGTERM and SIGINT end the process and leave enforcement in place.

    \b
    Examples:
      meshbridge agent --node node-a --controller unix:/run/meshbridge/controller.sock --token-file /etc/mb/token
      meshbridge agent --node node-a --cni-conf-dir /etc/cni/net.d              in a pod: the rest is there
      meshbridge agent --node node-a --cni-conf-dir /etc/cni/net.d --cleanup    stop enforcing: uninstall
    \b
    Exit codes: 0 stopped, 1 the datapath, socket or controller address cannot be used, 2 an option cannot be used.
    """
    _leave_out_what_is_not_needed()
    from meshbridge import log
    from meshbridge.agent import memory
    from meshbridge.datapath.attach import AttachMode

    log.configure(log_level)
    memory.limit_arenas()
    if not _NODE.fullmatch(node):
        raise SettingsError(
            f"{node!r} is no node name", where="--node", fix="use lower-case letters, digits, '-' and '.'"
        )
    mode = None if attach == "auto" else AttachMode(attach)
    chain = None
    if cni_conf_dir is not None:
        from meshbridge.agent.chain import Chain
        from meshbridge.agent.cniserver import DEFAULT_SOCKET

        cni_socket = cni_socket or DEFAULT_SOCKET
        chain = Chain(cni_conf_dir, cni_bin_dir, cni_socket, cni_plugin)
    if cleanup:
        if chain is not None:
            click.echo(f"node {node}: taken out of {chain.remove()} CNI configurations")
        from meshbridge.agent.enforcer import remove_everything

        count = remove_everything(bpffs / node, mode)
        click.echo(f"node {node}: {count} interfaces released, nothing is enforced any more")
        return
    from meshbridge.agent.agent import Agent, AgentSettings
    from meshbridge.cli.connection import connection

    at = connection(controller, controller_ca, controller_name, token_file)

    settings = AgentSettings(
        node=node,
        controller=at.target,
        token_file=at.token_file,
        pin_dir=bpffs / node,
        socket=socket or _RUN / node / "agent.sock",
        metrics=metrics,
        cni=cni_socket,
        chain=chain,
        controller_ca=at.ca,
        controller_name=at.server_name,
        attach=mode,
    )
    import asyncio

    asyncio.run(_run(Agent(settings)))


def _leave_out_what_is_not_needed() -> None:
    """Keep optional imports of libraries out of a process that lives for months and should stay small.

    asyncio would load TLS, hashlib OpenSSL, structlog rich, shutil compression: 20 MB that an agent never uses, whose
    gRPC brings a TLS of its own.
    """
    unused = ["ssl", "_hashlib", "bz2", "lzma", *([] if sys.stderr.isatty() else ["rich"])]
    for name in unused:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None makes the import fail, as if not installed


async def _run(agent: Agent) -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    running = asyncio.ensure_future(agent.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    gc.freeze()  # modules stay for good; no collection needs to walk them
    with contextlib.suppress(asyncio.CancelledError):
        try:
            await running
        except* MeshBridgeError as group:
            raise group.exceptions[0] from None
