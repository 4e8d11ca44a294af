"""``meshbridge webhook``: what the API server asks about pods and policies before they are in force."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import click
import structlog

from meshbridge import log as logs
from meshbridge.cli.certificates import secret_certificates
from meshbridge.controller.http import serve_http
from meshbridge.controller.meshconfig import MeshConfigError, read_mesh_config
from meshbridge.errors import SettingsError
from meshbridge.kube.api import Api, ClusterError, RefusedError
from meshbridge.kube.cluster import ISTIO_NAMESPACE, connect, own_namespace
from meshbridge.kube.follow import Follower
from meshbridge.kube.objects import MESH_CONFIG, POLICY_KINDS
from meshbridge.kube.ownobjects import trust_webhook
from meshbridge.policy.cilium import CNI_KINDS
from meshbridge.policy.mesh import DEFAULT_MESH
from meshbridge.policy.parse.registry import REGISTRY_KINDS
from meshbridge.webhook.admission import gate, mutate, validate
from meshbridge.webhook.certificates import OWNER, OwnCertificates
from meshbridge.webhook.injector import CONFIG_MAP, mesh_defaults
from meshbridge.webhook.server import WebhookServer
from meshbridge.webhook.surroundings import Surroundings
from meshbridge.xds.auth import write_private_file

log = structlog.get_logger()

CERTIFICATE_CHECK_S: Final = 10.0
RETRY_S: Final = 2.0
INJECTOR_CHECK_S: Final = 60.0
SERVICE: Final = "meshbridge-webhook"
CONFIGURATION: Final = "bypass.meshbridge.io"
NAMES: Final = ("meshbridge-webhook.meshbridge-system.svc", "localhost", "127.0.0.1", "::1")
SAID_OF_NODES: Final = CNI_KINDS | {("", "Node")}
"""What says whether something encrypts between nodes; where it may not be read, nothing does."""

KINDS: Final = POLICY_KINDS | REGISTRY_KINDS | {("", kind) for kind in ("Namespace", "Pod", "Service", "ConfigMap")}


@click.command(name="webhook", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--listen", default="127.0.0.1:9443", show_default=True, metavar="HOST:PORT", help="Where HTTPS is served."
)
@click.option("--kubeconfig", type=click.Path(path_type=Path), help="In a pod its own is taken.")
@click.option("--context", help="A context of the kubeconfig.")
@click.option("--istio-namespace", default=ISTIO_NAMESPACE, show_default=True, help="Where Istio's ConfigMap is.")
@click.option(
    "--injector-config", default=CONFIG_MAP, show_default=True, metavar="NAME",
    help="The injector's ConfigMap there, whose mesh-wide values are read; a revision has its own.",
)  # fmt: skip
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain, PEM; read again when it changes.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its key, PEM.")
@click.option(
    "--tls-secret", metavar="NAME",
    help="In place of files: the Secret in which replicas keep a certificate that they make and renew; configurations "
    "that name the Service are told whom to believe.",
)  # fmt: skip
@click.option("--namespace", help="For --tls-secret: where MeshBridge runs. [the pod's own, else meshbridge-system]")
@click.option(
    "--configuration", default=CONFIGURATION, show_default=True, metavar="NAME",
    help="For --tls-secret: the ValidatingWebhookConfiguration and MutatingWebhookConfiguration.",
)  # fmt: skip
@click.option(
    "--state-dir",
    "state",
    default="/var/lib/meshbridge/webhook",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where, without --tls-cert and --tls-secret, a CA and a certificate are made and renewed.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME|ADDRESS",
    help=f"What that certificate is for; may be given again. [{', '.join(NAMES)}]",
)
@click.option(
    "--ca-bundle-file", type=click.Path(path_type=Path), help="Write what API servers verify that certificate by, PEM."
)
@click.option(
    "--deny-refused",
    is_flag=True,
    help="Deny policies of other owners' kinds that MeshBridge does not understand; else their authors are warned.",
)
@click.option("--metrics", "http_address", metavar="HOST:PORT", help="Serve /metrics, /problems, /healthz on loopback.")
@click.option(
    "--linger",
    "linger_s",
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="After SIGTERM, how long to go on answering while API servers still may ask.",
)
@click.option("--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning"]))
def command(
    listen: str,
    kubeconfig: Path | None,
    context: str | None,
    istio_namespace: str,
    injector_config: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_secret: str | None,
    namespace: str | None,
    configuration: str,
    state: Path,
    names: tuple[str, ...],
    ca_bundle_file: Path | None,
    deny_refused: bool,
    http_address: str | None,
    linger_s: float,
    log_level: str,
) -> None:
    """Answer admission reviews of pods, templates and policies over HTTPS, until SIGTERM.

    /validate warns of what a pod's bypasses lose, denies what BypassPolicies deny, and refuses BypassPolicies that are
    not understood. /mutate gives pods annotated 'meshbridge.io/bypass: auto' their exclusions, /gate the readiness gate
    that a BypassPolicy asks for. deploy/webhook has the
    configurations that make an API server ask.

    \b
    Examples:
      meshbridge webhook --kubeconfig ~/.kube/config --ca-bundle-file /tmp/ca.pem
      meshbridge webhook --listen 0.0.0.0:9443 --tls-secret meshbridge-webhook-tls --metrics 127.0.0.1:9403
      meshbridge webhook --listen 0.0.0.0:9443 --tls-cert /tls/tls.crt --tls-key /tls/tls.key --metrics 127.0.0.1:9403
    """
    logs.configure(log_level)
    if (tls_cert is None) is not (tls_key is None):
        raise SettingsError("only one of certificate and key", where="--tls-cert, --tls-key", fix="give both")
    if tls_cert is not None and (names or ca_bundle_file or tls_secret):
        raise SettingsError(
            "are for a certificate that is made here", where="--name, --ca-bundle-file, --tls-secret",
            fix="leave them out",
        )  # fmt: skip
    namespace = namespace or own_namespace()
    api = Api(connect(kubeconfig, context))
    follower = Follower(api, istio_namespace, KINDS, SAID_OF_NODES)
    injector = partial(_injector, api, istio_namespace, injector_config)
    around = Surroundings()
    judges = {
        "/validate": lambda request: validate(request, around, datetime.now(UTC), deny_refused=deny_refused),
        "/mutate": lambda request: mutate(request, around, datetime.now(UTC)),
        "/gate": lambda request: gate(request, around, datetime.now(UTC)),
    }
    server = WebhookServer(*_address(listen), judges, lambda: {"synced": around.synced})
    renew = partial(_renew_own, server, OwnCertificates(state, names or NAMES), ca_bundle_file)
    if tls_cert is not None:
        renew = partial(server.use_certificate, tls_cert, tls_key)
    if tls_secret is not None:
        named = names or (f"{SERVICE}.{namespace}.svc",)
        renew = partial(_renew_shared, server, api, namespace, tls_secret, named, configuration, ca_bundle_file)
    _first_certificate(renew)
    http = serve_http(http_address, lambda: follower.problems, lambda: around.synced) if http_address else None
    try:
        asyncio.run(_serve(server, _follow(follower, around, istio_namespace, injector), renew, linger_s))
    finally:
        if http is not None:
            http.shutdown()


async def _serve(
    server: WebhookServer, following: Coroutine[Any, Any, None], renew: Callable[[], None], linger_s: float
) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    threading.Thread(target=server.serve_forever, name="https", daemon=True).start()
    log.info("webhook.started")
    running = [
        asyncio.create_task(following, name="follow-cluster"),
        asyncio.create_task(_look_after(renew), name="renew-certificates"),
    ]
    stopped = asyncio.create_task(stop.wait(), name="wait-for-signal")
    done, _ = await asyncio.wait([*running, stopped], return_when=asyncio.FIRST_COMPLETED)
    log.info("webhook.draining")
    server.draining = True
    if stopped in done:
        await asyncio.sleep(linger_s)
    await asyncio.to_thread(server.drain)
    for task in (*running, stopped):
        task.cancel()
    await asyncio.gather(*running, stopped, return_exceptions=True)
    for task in done - {stopped}:
        task.result()


async def _follow(
    follower: Follower, around: Surroundings, istio_namespace: str, injector: Callable[[], Mapping[str, Any]]
) -> None:
    """Keep what is around at what the API server says. Settings of the mesh that are not understood change nothing."""
    key, mesh = ("", "ConfigMap", istio_namespace, MESH_CONFIG), DEFAULT_MESH
    values: Mapping[str, Any] = {}
    ask_at_s = 0.0
    async for changes in follower.changes():
        if not changes.complete:
            continue
        if key in changes.documents:
            try:
                mesh = next(map(read_mesh_config, changes.documents[key]), DEFAULT_MESH)
            except MeshConfigError as error:
                log.error("mesh_config.refused", reason=str(error))
        if time.monotonic() >= ask_at_s:
            ask_at_s = time.monotonic() + INJECTOR_CHECK_S
            try:
                values = await asyncio.to_thread(injector)
            except ClusterError as error:
                log.warning("injector.not_read", reason=str(error))
        await asyncio.to_thread(around.apply, changes.documents, mesh, mesh_defaults(values, mesh))


def _injector(api: Api, namespace: str, name: str) -> Mapping[str, Any]:
    """The injector's ConfigMap; empty where there is none, or none that may be read."""
    try:
        return api.get(f"/api/v1/namespaces/{quote(namespace, safe='')}/configmaps/{quote(name, safe='')}")
    except RefusedError as refused:
        log.warning("injector.not_read", reason=refused.message)
        return {}


def _renew_own(server: WebhookServer, own: OwnCertificates, bundle: Path | None) -> None:
    own.renew(datetime.now(UTC))
    _write_bundle(bundle, own.bundle)
    server.use_certificate(own.serving)


def _renew_shared(
    server: WebhookServer,
    api: Api,
    namespace: str,
    secret: str,
    names: Sequence[str],
    configuration: str,
    bundle: Path | None,
) -> None:
    """Serve with the Secret's certificate, and have it believed before."""
    found = secret_certificates(api, namespace, secret, names, OWNER)
    _write_bundle(bundle, found.bundle)
    if not trust_webhook(api, configuration, (namespace, SERVICE), found.bundle):
        log.warning("webhook.not_configured", configuration=configuration)
    server.use_pem(found.serving, f"Secret {namespace}/{secret}")


def _write_bundle(path: Path | None, bundle: bytes) -> None:
    if path is not None and (not path.exists() or path.read_bytes() != bundle):
        write_private_file(path, bundle)


def _first_certificate(renew: Callable[[], None]) -> None:
    """Have a certificate to begin with; where an API server keeps it that is away, once that is back."""
    while True:
        try:
            renew()
            return
        except ClusterError as error:
            log.error("certificate.not_read", reason=str(error))
            time.sleep(RETRY_S)


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise SettingsError(f"{listen!r} is no HOST:PORT", where="--listen", fix="write 127.0.0.1:9443")
    return host.strip("[]"), int(port)


async def _look_after(renew: Callable[[], None]) -> None:
    """Serve with what the certificate's files say, which may have changed; where they cannot be used, as before."""
    while True:
        await asyncio.sleep(CERTIFICATE_CHECK_S)
        try:
            await asyncio.to_thread(renew)
        except (SettingsError, ClusterError, OSError) as error:
            log.error("certificate.not_renewed", reason=str(error))
