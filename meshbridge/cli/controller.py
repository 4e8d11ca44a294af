"""``meshbridge controller``: policies and workloads in, snapshots for agents, authz servers and Envoys out."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import click
import structlog

from meshbridge import log as logs
from meshbridge.cli.certificates import CHECK_S, CONTROLLER_SECRET, Pair, controller_pair, pair_of_files
from meshbridge.controller.bypassreports import Reports
from meshbridge.controller.controller import Controller
from meshbridge.controller.events import Events
from meshbridge.controller.fixing import Fixes
from meshbridge.controller.http import serve_http
from meshbridge.controller.leading import lead
from meshbridge.controller.podgates import PodGates
from meshbridge.controller.policystatus import PolicyStatus
from meshbridge.controller.replicas import OwnService
from meshbridge.controller.tokenreviews import TokenReviews
from meshbridge.controller.writer import ClusterWriter, Part
from meshbridge.errors import SettingsError
from meshbridge.kube.api import Api, ClusterError
from meshbridge.kube.cluster import ISTIO_NAMESPACE, connect, own_namespace
from meshbridge.kube.follow import Follower
from meshbridge.kube.kept import KeptContent
from meshbridge.kube.lease import Election
from meshbridge.kube.manifests import Manifests
from meshbridge.kube.tokenreview import review_token
from meshbridge.kube.watch import watch
from meshbridge.policy.mesh import DEFAULT_MESH
from meshbridge.xds.auth import AUDIENCE, Authenticator, TokenKey, load_key, load_or_create_key
from meshbridge.xds.reports import ReportServer
from meshbridge.xds.secrets import SecretStore, load_or_create_authority
from meshbridge.xds.server import UNIX, DeltaServer, ServerCertificate, start_server

log = structlog.get_logger()

GRACE_S = 1.0
RETRY_S = 2.0
LEASE = "meshbridge-controller"


@click.command(name="controller", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--manifests",
    "directories",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of YAML to read and watch; may be given again, a later one replaces objects of an earlier one.",
)
@click.option("--kubernetes", is_flag=True, help="Read and watch the API server in place of directories.")
@click.option("--kubeconfig", type=click.Path(path_type=Path), help="For --kubernetes; in a pod its own is taken.")
@click.option("--context", help="A context of the kubeconfig.")
@click.option(
    "--istio-namespace",
    default=ISTIO_NAMESPACE,
    show_default=True,
    help="For --kubernetes: where Istio's ConfigMap is.",
)
@click.option(
    "--listen",
    default="unix:/run/meshbridge/controller.sock",
    show_default=True,
    metavar="ADDR",
    help="unix:PATH, or HOST:PORT with TLS.",
)
@click.option(
    "--tls-cert", type=click.Path(path_type=Path), help="Certificate chain of the server, PEM; for HOST:PORT."
)
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its key, PEM.")
@click.option(
    "--tls-secret",
    metavar="NAME",
    default=CONTROLLER_SECRET,
    show_default=True,
    help="With --kubernetes and HOST:PORT, in place of files: the Secret that replicas share; made and renewed.",
)
@click.option(
    "--state-dir",
    "--state",
    "state",
    default="/var/lib/meshbridge",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where the CA's key is kept; made when missing.",
)
@click.option(
    "--token-key",
    type=click.Path(path_type=Path),
    help="Key that tokens are signed with. [STATE/token.key, made when missing]",
)
@click.option(
    "--authentication",
    type=click.Choice(["kubernetes", "token-key"]),
    help="Who vouches for callers. [kubernetes with --kubernetes, unless --token-key is given; else token-key]",
)
@click.option("--namespace", help="For --kubernetes: where MeshBridge runs. [the pod's own, else meshbridge-system]")
@click.option(
    "--read-only", is_flag=True,
    help="For --kubernetes: write nothing into the cluster, neither status nor Events, reports or fixes.",
)  # fmt: skip
@click.option(
    "--metrics", "http_address", metavar="HOST:PORT", help="Serve /metrics, /problems and /healthz on loopback."
)
@click.option("--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning"]))
def command(
    directories: tuple[Path, ...],
    kubernetes: bool,
    kubeconfig: Path | None,
    context: str | None,
    istio_namespace: str,
    listen: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_secret: str,
    state: Path,
    token_key: Path | None,
    authentication: str | None,
    namespace: str | None,
    read_only: bool,
    http_address: str | None,
    log_level: str,
) -> None:
    """Read policies and workloads, and serve every node and every sidecar what concerns it, until SIGTERM.

    With --kubernetes, one of several controllers, by the Lease meshbridge-controller, also writes into the cluster what
    it finds: conditions of BypassPolicies, Events on policies that are refused and pods that are not enforced, and a
    BypassReport for each pod that passes by its sidecar.

    \b
    Examples:
      meshbridge controller --manifests manifests/demo --state-dir /var/lib/meshbridge --metrics 127.0.0.1:9401
      meshbridge controller --kubernetes --kubeconfig ~/.kube/config
      meshbridge controller --kubernetes --listen 10.0.0.1:9400 --metrics 127.0.0.1:9401      in a pod
    """
    logs.configure(log_level)
    if bool(directories) is kubernetes:
        raise SettingsError(
            "one source of objects is needed", where="--manifests, --kubernetes", fix="give one of them"
        )
    if (tls_cert is None) is not (tls_key is None):
        raise SettingsError("only one of certificate and key", where="--tls-cert, --tls-key", fix="give both")
    api = Api(connect(kubeconfig, context)) if kubernetes else None
    namespace = namespace or own_namespace()
    pair: Callable[[], Pair] | None = None
    if tls_cert is not None and tls_key is not None:
        pair = partial(pair_of_files, tls_cert, tls_key)
    elif api is not None and not listen.startswith(UNIX):
        pair = partial(controller_pair, api, namespace, tls_secret)
    authenticator = _authenticator(authentication, api, namespace, token_key, state)
    authority = load_or_create_authority(state, DEFAULT_MESH.trust_domain, datetime.now(UTC))
    own = _own_service(listen, namespace or own_namespace()) if api is not None else None
    controller = Controller(SecretStore(authority), own_service=own)
    server, reports = DeltaServer(authenticator, controller), ReportServer(authenticator, controller)
    http = serve_http(http_address, lambda: controller.problems, lambda: controller.synced) if http_address else None
    source: Manifests | Follower
    election = None
    if api is not None:
        source = Follower(api, istio_namespace)
        if not read_only:
            election = Election(api, namespace or own_namespace(), LEASE, _identity())
    else:
        source = Manifests(directories, KeptContent(state / "last-readable"))
    try:
        asyncio.run(_serve(controller, server, reports, source, listen, pair, election))
    finally:
        if http is not None:
            http.shutdown()


def _authenticator(
    chosen: str | None, api: Api | None, namespace: str, token_key: Path | None, state: Path
) -> Authenticator:
    """Who tells the callers of this controller apart."""
    if chosen is None:
        chosen = "kubernetes" if api is not None and token_key is None else "token-key"
    if chosen == "token-key":
        return TokenKey(load_key(token_key) if token_key is not None else load_or_create_key(state / "token.key"))
    if api is None:
        raise SettingsError("needs an API server", where="--authentication kubernetes", fix="add --kubernetes")
    if token_key is not None:
        raise SettingsError(
            "is not used with --authentication kubernetes", where="--token-key", fix="leave one of them out"
        )
    return TokenReviews(lambda token: review_token(api, token, AUDIENCE), namespace)


async def _serve(
    controller: Controller,
    servicer: DeltaServer,
    reports: ReportServer,
    source: Manifests | Follower,
    listen: str,
    pair: Callable[[], Pair] | None,
    election: Election | None,
) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    certificate = await _first_certificate(pair, stop) if pair is not None else None
    if stop.is_set():
        return
    server = await start_server(servicer, listen, certificate, reports)
    log.info("controller.started", listen=listen)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_follow(controller, source), name="follow-source")
            tasks.create_task(controller.maintain_sidecars(), name="maintain-sidecars")
            if pair is not None and certificate is not None:
                tasks.create_task(_renew(certificate, pair), name="renew-certificate")
            if election is not None:
                report = partial(controller.report_write_problems, "lease")
                tasks.create_task(lead(election, _writer(controller, election), report), name="lead")
            tasks.create_task(_raise_when(stop), name="wait-for-signal")
    except* _Stopped:
        log.info("controller.draining")
    finally:
        servicer.drain()
        await server.stop(GRACE_S)


async def _first_certificate(pair: Callable[[], Pair], stop: asyncio.Event) -> ServerCertificate | None:
    """The certificate to begin with; where it is kept by an API server that is away, once that is back."""
    while not stop.is_set():
        try:
            return ServerCertificate(*await asyncio.to_thread(pair))
        except ClusterError as error:
            log.error("certificate.not_read", reason=str(error))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), RETRY_S)
    return None


async def _renew(certificate: ServerCertificate, pair: Callable[[], Pair]) -> None:
    """Present what the files or the Secret say, which may have changed; where they cannot be used, as before."""
    while True:
        await asyncio.sleep(CHECK_S)
        try:
            certificate.use(*await asyncio.to_thread(pair))
        except (SettingsError, ClusterError) as error:
            log.error("certificate.not_renewed", reason=str(error))


def _writer(controller: Controller, election: Election) -> ClusterWriter:
    api = election.api

    def parts() -> list[Part]:
        fixes = Fixes(api)
        events = Events(api, election.identity, more=fixes.notices)
        return [fixes, PolicyStatus(api, fixes.of), PodGates(api), events, Reports(api)]

    return ClusterWriter(
        controller.picture,
        controller.picture_stale,
        parts,
        lambda: election.held_for_s,
        partial(controller.report_write_problems, "objects"),
    )


def _own_service(listen: str, namespace: str) -> OwnService | None:
    """Where the controllers are, as far as nodes can reach others than the one they are connected to."""
    _, _, port = listen.rpartition(":")
    return OwnService(namespace, LEASE, int(port)) if port.isdigit() and not listen.startswith("unix:") else None


def _identity() -> str:
    """This process's alone: one that is started anew under the same name waits for the lease like any other."""
    return f"{socket.gethostname()}_{uuid.uuid4()}"


async def _follow(controller: Controller, source: Manifests | Follower) -> None:
    """Keep the controller at what the directories, or the API server, say."""
    async for changes in source.changes() if isinstance(source, Follower) else watch(source):
        if not changes.complete:
            controller.cannot_read_yet(source.problems)
            continue
        controller.apply(changes.documents, source.problems)
        if changes.documents:
            log.info("objects.read", changed=len(changes.documents), objects=len(source.documents))


class _Stopped(Exception):
    """Ends the task group; nothing is wrong."""


async def _raise_when(stop: asyncio.Event) -> None:
    await stop.wait()
    raise _Stopped
