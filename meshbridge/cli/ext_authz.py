"""``meshbridge ext-authz``: the objects by which Istio's Envoys ask our ext_authz server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

import click
import yaml

from meshbridge.xds import istio
from meshbridge.xds.istio import Authz, Object

_LABEL: Final = re.compile(
    r"([A-Za-z0-9](?:[A-Za-z0-9./_-]*[A-Za-z0-9])?)=([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)?"
)
_SETTINGS: Final[dict[str, Any]] = {"help_option_names": ["-h", "--help"]}


def _labels(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for each in ",".join(value).split(",") if value else ():
        match = _LABEL.fullmatch(each)
        if match is None:
            raise click.BadParameter(f"{each!r} is no label; write app=web")
        found[match[1]] = match[2] or ""
    return found


def _where(command: Callable[..., None]) -> Callable[..., None]:
    """The options that name our server."""
    for option in (
        click.option("-o", "--output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True),
        click.option(
            "--fail-open", is_flag=True, help="Let pass what nobody answers. docs/ext-authz.md has what that costs."
        ),
        click.option(
            "--authz-port", type=click.IntRange(1, 65535), default=istio.PORT, show_default=True, help="Its port there."
        ),
        click.option("--authz-service", default=istio.SERVICE, show_default=True, help="The Service of our server."),
        click.option("--authz-namespace", default=istio.NAMESPACE, show_default=True, help="Its namespace."),
    ):
        command = option(command)
    return command


def _whom(command: Callable[..., None]) -> Callable[..., None]:
    """The options that name pods."""
    for option in (
        click.option("--name", default=istio.ENVOY_FILTER, show_default=True, help="The object's name."),
        click.option(
            "-l", "--selector", "labels", multiple=True, callback=_labels, metavar="KEY=VALUE",
            help="Labels of the pods; may be given again. Without it all pods of the namespace.",
        ),
        click.option(
            "-n", "--namespace", required=True,
            help="Where the pods are; Istio's root namespace stands for the whole mesh.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@click.group(name="ext-authz", context_settings=_SETTINGS)
def command() -> None:
    """Write what makes Istio's Envoys ask MeshBridge's ext_authz server. Nothing is applied.

    \b
    Examples:
      meshbridge ext-authz provider                                what MeshConfig needs, once
      meshbridge ext-authz policy -n istio-system | kubectl apply -f -      the whole mesh
      meshbridge ext-authz policy -n finance -l app=ledger         some pods
      meshbridge ext-authz envoyfilter -n finance -l app=ledger    the same where another provider is asked already
    """


@command.command(name="provider", context_settings=_SETTINGS)
@_where
def provider(output: str, **authz: Any) -> None:
    """The element of extensionProviders in MeshConfig, with a finite timeout.

    \b
    Example:
      meshbridge ext-authz provider
    """
    _print({"extensionProviders": [istio.provider(_authz(**authz))]}, output)


@command.command(name="policy", context_settings=_SETTINGS)
@click.option("-o", "--output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
@_whom
def policy(output: str, namespace: str, labels: dict[str, str], name: str) -> None:
    """An AuthorizationPolicy CUSTOM that has Istio ask our provider about every request to these pods.

    Where CUSTOM policies of another provider select the same pod, Istio denies everything: use envoyfilter there.

    \b
    Example:
      meshbridge ext-authz policy -n finance -l app=ledger | kubectl apply -f -
    """
    _print(istio.custom_policy(namespace, labels, name), output)


@command.command(name="envoyfilter", context_settings=_SETTINGS)
@_where
@_whom
def envoyfilter(output: str, namespace: str, labels: dict[str, str], name: str, **authz: Any) -> None:
    """An EnvoyFilter with an ext_authz filter of our own, beside any provider of Istio's.

    It stands last in the inbound chains: what Istio refuses is not asked about, and verified claims come along.

    \b
    Example:
      meshbridge ext-authz envoyfilter -n finance -l app=ledger | kubectl apply -f -
    """
    _print(istio.envoy_filter(_authz(**authz), namespace, labels, name), output)


def _authz(authz_namespace: str, authz_service: str, authz_port: int, fail_open: bool) -> Authz:
    return Authz(authz_namespace, authz_service, authz_port, fail_open)


def _print(found: Object, output: str) -> None:
    click.echo(json.dumps(found, indent=2) if output == "json" else yaml.safe_dump(found, sort_keys=False).rstrip("\n"))
