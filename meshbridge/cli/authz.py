"""``meshbridge authz``: the node's ext_authz server, fed by the controller."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import click
import structlog
from google.protobuf.message import Message

from meshbridge import log as logs
from meshbridge.authz import metrics
from meshbridge.authz.assemble import ViewBuilder
from meshbridge.authz.http import serve_http
from meshbridge.authz.judge import Judge
from meshbridge.authz.keysets import KeySets
from meshbridge.authz.server import PROXY_UID, UNIX, AuthzServer
from meshbridge.authz.tls import TlsFiles, server_credentials
from meshbridge.authz.view import CurrentView
from meshbridge.cli.connection import connection
from meshbridge.errors import SettingsError
from meshbridge.protos.agent_pb2 import Address, Endpoint, Mesh, Policy
from meshbridge.xds import types as xds
from meshbridge.xds.client import ControllerClient, Update
from meshbridge.xds.messages import MessageError, document_of, holder_of, mesh_of, workload_of

log = structlog.get_logger()

CERTIFICATE_S = 60.0
LINGER_S = 20.0
"""Longer than an endpoint's removal takes to reach every Envoy, and with the drain under Kubernetes' 30 s of grace."""


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
@click.option(
    "--listen", metavar="ADDR", help="Where Envoys ask, as unix:PATH or ADDRESS:PORT. [/run/meshbridge/NODE/authz.sock]"
)
@click.option(
    "--listen-owner",
    type=click.IntRange(0),
    default=PROXY_UID,
    show_default=True,
    help="Envoy's user; only it may ask over unix:PATH.",
)
@click.option(
    "--tls-cert",
    type=click.Path(path_type=Path),
    help="Certificate chain, PEM, for ADDRESS:PORT; followed as it changes.",
)
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its key, PEM.")
@click.option(
    "--client-ca",
    type=click.Path(path_type=Path),
    help="Take only clients with a certificate of these authorities, and tell each about its own pod alone.",
)
@click.option(
    "--plaintext",
    is_flag=True,
    help="Allow ADDRESS:PORT without TLS: where a sidecar stands before it, or the node's own veths are trusted.",
)
@click.option(
    "--linger",
    "linger_s",
    type=click.FloatRange(0, 600),
    help="Seconds to go on answering after SIGTERM, for Envoys that have not heard of it. [0; with ADDRESS:PORT 20]",
)
@click.option(
    "--metrics", "metrics_address", metavar="HOST:PORT", help="Serve /metrics and /healthz there, on loopback only."
)
@click.option("--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning"]))
def command(
    node: str,
    controller: str | None,
    controller_ca: Path | None,
    controller_name: str | None,
    token_file: Path | None,
    listen: str | None,
    listen_owner: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    client_ca: Path | None,
    plaintext: bool,
    linger_s: float | None,
    metrics_address: str | None,
    log_level: str,
) -> None:
    """Answer Envoy's ext_authz checks by the node's policies, until SIGTERM.

    Before the first revision of the controller, and after any fault of its own, every answer refuses and says why. Over
    TCP an Envoy is told about connections to its own pod alone. docs/ext-authz.md has what Istio needs beside it.

    \b
    Examples:
      meshbridge authz --node node-a --controller unix:/run/meshbridge/controller.sock \\
        --token-file /run/meshbridge/node-a/token --metrics 127.0.0.1:9402
      meshbridge authz --node node-a --controller controller:9400 --controller-ca ca.crt --token-file token \\
        --listen 0.0.0.0:9191 --tls-cert cert-chain.pem --tls-key key.pem --client-ca root-cert.pem
    """
    logs.configure(log_level)
    at = connection(controller, controller_ca, controller_name, token_file)
    address = listen or f"{UNIX}/run/meshbridge/{node}/authz.sock"
    files = _tls_files(address, tls_cert, tls_key, client_ca, plaintext=plaintext)
    current = CurrentView()
    key_sets = KeySets(lambda: view.key_sources if (view := current.get()) is not None else ())
    judge = Judge(current, key_sets)
    server = AuthzServer(
        address, judge.check, listen_owner, server_credentials(files, wait_s=CERTIFICATE_S) if files else None
    )
    if metrics_address:
        serve_http(metrics_address, lambda: server.ready)
    client = ControllerClient(at.target, node, lambda: at.token_file.read_text().strip(), at.ca, at.server_name)
    if linger_s is None:
        linger_s = 0 if address.startswith(UNIX) else LINGER_S
    key_sets.start()
    try:
        asyncio.run(_serve(client, current, server, node, key_sets, linger_s))
    finally:
        key_sets.stop()


def _tls_files(
    listen: str, certificate: Path | None, key: Path | None, client_ca: Path | None, *, plaintext: bool
) -> TlsFiles | None:
    """The files of a listener that has TLS; None where it has none, which on TCP has to be asked for."""
    given = certificate or key or client_ca
    if listen.startswith(UNIX):
        if given or plaintext:
            raise SettingsError("TLS settings for a Unix socket", where=f"--listen {listen}", fix="leave them out")
        return None
    host, _, port = listen.rpartition(":")
    if not (_is_address(host) and port.isascii() and port.isdigit()):
        fix = "write unix:PATH, 0.0.0.0:9191 or [::]:9191"
        raise SettingsError(f"{listen!r} is no address to listen on", where="--listen", fix=fix)
    if plaintext:
        if given:
            raise SettingsError("goes with no TLS files", where="--plaintext", fix="leave one of them out")
        return None
    if certificate is None or key is None:
        fix = "give --tls-cert and --tls-key, or --plaintext where the mesh's own mTLS stands before it"
        raise SettingsError("TCP without TLS", where=f"--listen {listen}", fix=fix)
    return TlsFiles(certificate, key, client_ca)


def _is_address(host: str) -> bool:
    with suppress(ValueError):
        return (":" in host) is host.startswith("[") and bool(ip_address(host.strip("[]")))
    return False


async def _serve(
    client: ControllerClient,
    current: CurrentView,
    server: AuthzServer,
    node: str,
    key_sets: KeySets,
    linger_s: float,
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
    if stopped in done:
        # Envoys hear of it by way of the API server and istiod; until then they come here, and are answered by policies
        # that go on being followed.
        server.leave()
        await asyncio.wait({follower}, timeout=linger_s)
    await asyncio.to_thread(server.drain)
    follower.cancel()
    stopped.cancel()
    await asyncio.gather(follower, stopped, return_exceptions=True)
    if follower in done:
        follower.result()
    log.info("authz.stopped")


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
