"""``meshbridge health``: what a kubelet's probe runs. It imports next to nothing, since it runs every few seconds."""

from __future__ import annotations

import http.client
import sys

import click

UNHEALTHY = 1


@click.command(name="health", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("address", metavar="HOST:PORT")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0.1), default=5.0, show_default=True, metavar="SECONDS")
def command(address: str, timeout_s: float) -> None:
    """Ask the component whose --metrics is HOST:PORT whether it serves by the cluster's policies.

    \b
    Example:
      meshbridge health 127.0.0.1:9401
    \b
    Exit codes: 0 it does, 1 it does not yet, or nobody answers.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise click.BadParameter("write HOST:PORT", param_hint="HOST:PORT")
    try:
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        said = response.read(4096).decode(errors="replace").strip()
    except (OSError, OverflowError, http.client.HTTPException) as error:
        click.echo(f"{address}: does not answer: {error}", err=True)
        sys.exit(UNHEALTHY)
    healthy = response.status == http.client.OK
    click.echo(f"{address}: {'serves' if healthy else 'does not serve yet'}: {said}", err=not healthy)
    sys.exit(0 if healthy else UNHEALTHY)
