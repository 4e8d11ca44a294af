"""``meshbridge authz``: the node's ext_authz server, fed by the controller."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import structlog
from google.protobuf.message import Message
from prometheus_client import start_http_server

from meshbridge import log as logs
from meshbridge.authz import metrics
from meshbridge.authz.assemble import ViewBuilder
from meshbridge.authz.judge import Judge
from meshbridge.authz.keysets import KeySets
from meshbridge.authz.server import PROXY_UID, AuthzServer
from meshbridge.authz.view import CurrentView
from meshbridge.cli.connection import connection
from meshbridge.errors import SettingsError
from meshbridge.protos.agent_pb2 import Address, Endpoint, Mesh, Policy
from meshbridge.xds import snapshot as xds
from meshbridge.xds.client import ControllerClient, Update
from meshbridge.xds.messages import MessageError, document_of, holder_of, mesh_of, workload_of

log = structlog.get_logger()


@click.command(name="authz", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--node", required=True, metavar="NAME", help="The node this server answers for.")
@click.option(
    "--controller", metavar="ADDR", help="The controller, as unix:PATH or HOST:PORT. [in a pod, the Service's address]"
)
@click.option(
    "--controller-ca", type=click.Path(path_type=Path), help="Certificates that vouch for it, PEM; for HOST:PORT."
)
@click.option("--controller-name", metavar="NAME", help="What its certificate is for. [HOST; in a pod, the Service]")
@click.option("--token-file", type=click.Path(path_type=Path), help="File with the node's token.")
@click.option("--listen", metavar="ADDR", help="Where Envoys ask, as unix:PATH. [/run/meshbridge/NODE/authz.sock]")
@click.option(
    "--listen-owner",
    type=click.IntRange(0),
    default=PROXY_UID,
    show_default=True,
    help="Envoy's user; only it may ask.",
)
@click.option("--metrics", "metrics_address", metavar="HOST:PORT", help="Serve /metrics there, on loopback only.")
@click.option("--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning"]))
def command(
    node: str,
    controller: str | None,
    controller_ca: Path | None,
    controller_name: str | None,
    token_file: Path | None,
    listen: str | None,
    listen_owner: int,
    metrics_address: str | None,
    log_level: str,
) -> None:
    """Answer Envoy's ext_authz checks by the node's policies, until SIGTERM.

    Before the first revision of the controller, and after any fault of its own, every answer refuses and says why.

    \b
    Example:
      meshbridge authz --node node-a --controller unix:/run/meshbridge/controller.sock \\
        --token-file /run/meshbridge/node-a/token --metrics 127.0.0.1:9402
    """
    logs.configure(log_level)
    at = connection(controller, controller_ca, controller_name, token_file)
    if metrics_address:
        _serve_metrics(metrics_address)
    current = CurrentView()
    key_sets = KeySets(lambda: view.key_sources if (view := current.get()) is not None else ())
    judge = Judge(current, key_sets)
    server = AuthzServer(listen or f"unix:/run/meshbridge/{node}/authz.sock", judge.check, listen_owner)
    client = ControllerClient(at.target, node, lambda: at.token_file.read_text().strip(), at.ca, at.server_name)
    key_sets.start()
    try:
        asyncio.run(_serve(client, current, server, node, key_sets))
    finally:
        key_sets.stop()


async def _serve(
    client: ControllerClient, current: CurrentView, server: AuthzServer, node: str, key_sets: KeySets
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server.start()
    log.info("authz.started")
    follower = asyncio.create_task(_follow(client, current, server.set_ready, node, key_sets), name="follow-controller")
    stopped = asyncio.create_task(stop.wait(), name="wait-for-signal")
    done, _ = await asyncio.wait({follower, stopped}, return_when=asyncio.FIRST_COMPLETED)
    log.info("authz.draining")
    await asyncio.to_thread(server.drain)
    follower.cancel()
    stopped.cancel()
    await asyncio.gather(follower, stopped, return_exceptions=True)
    if follower in done:
        follower.result()


async def _follow(
    client: ControllerClient, current: CurrentView, ready: Callable[[], None], node: str, key_sets: KeySets
) -> None:
    """Make every whole revision the current view. One that says something unknown is withheld, as it might tighten."""
    state = _State(ViewBuilder(node=node))
    async for update in client.updates():
        state.apply(update)
        if state.unreadable:
            for reason in state.unreadable.values():
                log.error("revision.withheld", revision=update.revision, reason=reason)
            continue
        view = await asyncio.to_thread(state.builder.view, update.revision)
        current.set(view)
        key_sets.wake()
        metrics.REVISION.set(update.revision)
        ready()
        log.info("revision.applied", revision=update.revision, pods=len(view.workloads), addresses=len(view.holders))


@dataclass(slots=True)
class _State:
    builder: ViewBuilder
    unreadable: dict[tuple[str, str], str] = field(default_factory=dict)

    def apply(self, update: Update) -> None:
        for type_url, names in update.removed.items():
            for name in names:
                self.unreadable.pop((type_url, name), None)
                self._remove(type_url, name)
        for type_url, messages in update.changed.items():
            for name, message in messages.items():
                self.unreadable.pop((type_url, name), None)
                try:
                    self._put(name, message)
                except MessageError as error:
                    self.unreadable[type_url, name] = str(error)

    def _put(self, name: str, message: Message) -> None:
        match message:
            case Endpoint(fault=fault) if fault:
                self.builder.remove_workload(name)  # nothing reaches it, and what policies it has nobody knows
            case Endpoint():
                self.builder.put_workload(name, workload_of(message))
            case Policy():
                self.builder.put_document(name, document_of(message))
            case Address():
                holder = holder_of(message)
                self.builder.put_holder(name, holder.address, holder.peer, holder.node)
            case Mesh():
                self.builder.mesh = mesh_of(message)

    def _remove(self, type_url: str, name: str) -> None:
        match type_url:
            case xds.ENDPOINT:
                self.builder.remove_workload(name)
            case xds.POLICY:
                self.builder.remove_document(name)
            case xds.ADDRESS:
                self.builder.remove_holder(name)


def _serve_metrics(address: str) -> None:
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "[::1]") or not (port.isascii() and port.isdigit()):
        raise SettingsError(f"cannot serve metrics on {address!r}", where="--metrics", fix="use 127.0.0.1:PORT")
    try:
        start_http_server(int(port), host.strip("[]"))
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"cannot serve metrics on {address!r}: {error}", where="--metrics", fix="choose another port"
        ) from error
