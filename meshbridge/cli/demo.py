"""``meshbridge demo``: a sample mesh on this machine, and the walk through it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from meshbridge.demo import admission, lifecycle, pods, records
from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import LOGS
from meshbridge.demo.walk import runner
from meshbridge.demo.walk.report import Report

EXIT_DEGRADED = 3
_SETTINGS = {"help_option_names": ["-h", "--help"]}
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(name="demo", context_settings=_SETTINGS)
def command() -> None:
    """A sample mesh of two nodes on this machine, with the real controller, agents, authz and Envoys.

    \b
    Examples:
      meshbridge demo run
      meshbridge demo up
      meshbridge demo exec finance/client -- curl -si http://transaction-service.finance:8080/
      meshbridge demo delete -f manifests/inputs/cilium-l4-policy.yaml
      meshbridge demo down
    """


@command.command(name="run")
@click.option(
    "--report", "report_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all checks as JSON."
)
@click.option("--keep", is_flag=True, help="Leave the mesh running afterwards.")
@click.pass_context
def run(ctx: click.Context, report_file: Path | None, keep: bool) -> None:
    """Walk through the whole story: what is expected, what was seen, and how it was measured."""
    with lifecycle.exclusive():
        ctx.exit(1 if runner.run(Report(Console()), keep, report_file) else 0)


@command.command(name="up")
@click.option(
    "--manifests", type=click.Path(exists=True, file_okay=False, path_type=Path), help="In place of the sample."
)
def up(manifests: Path | None) -> None:
    """Bring the mesh up and leave it running."""
    with lifecycle.exclusive():
        if lifecycle.is_up():
            click.echo("the sample mesh is already running; `meshbridge demo status` shows it")
            return
        lifecycle.up(click.echo, manifests)
    click.echo("up. Try: meshbridge demo exec finance/client -- curl -si http://transaction-service.finance:8080/")


@command.command(name="down")
def down() -> None:
    """Take the mesh down; nothing of it stays."""
    with lifecycle.exclusive():
        lifecycle.down(click.echo)


@command.command(name="exec", context_settings={**_SETTINGS, "ignore_unknown_options": True})
@click.argument("pod", metavar="NS/POD")
@click.argument("argv", nargs=-1, required=True, metavar="-- CMD...", type=click.UNPROCESSED)
def exec_(pod: str, argv: tuple[str, ...]) -> None:
    """Run a command in a pod, as its application's user."""
    lifecycle.require_up()
    prepared = pods.exec_command(lifecycle.find_pod(pod), list(argv))
    full = prepared.full_argv()
    os.execvpe(full[0], full, {**os.environ, **prepared.env})


@command.command(name="apply")
@click.option("-f", "--filename", type=_FILE, required=True)
def apply(filename: Path) -> None:
    """Put the objects of a file in force, replacing those of the same name; a pod that a BypassPolicy denies is not."""
    lifecycle.require_up()
    for warning in admission.admit(lifecycle.STORE, filename):
        click.echo(f"Warning: {warning}", err=True)
    keys = lifecycle.STORE.apply(filename)
    for kind, namespace, name in keys:
        click.echo(f"{kind} {f'{namespace}/' if namespace else ''}{name} applied")
    if not keys:
        click.echo(
            f"{filename} holds no readable object; copied as it is, `meshbridge status` says what is wrong with it"
        )
    lifecycle.wait_pods(click.echo)


@command.command(name="delete")
@click.option("-f", "--filename", type=_FILE, required=True)
def delete(filename: Path) -> None:
    """Take the objects named in a file out of force."""
    lifecycle.require_up()
    keys = lifecycle.STORE.delete(filename)
    for kind, namespace, name in keys:
        click.echo(f"{kind} {f'{namespace}/' if namespace else ''}{name} deleted")
    if not keys:
        raise DemoError("nothing of it was in force", where=str(filename))
    lifecycle.wait_pods(click.echo)


@command.command(name="status")
def status() -> None:
    """Show the processes and pods of the mesh; exit code 3 when one of them is not as it should be."""
    lifecycle.require_up()
    processes = Table("PROCESS", "PID", "STATE", "LOG", box=None)
    all_well = True
    for name, process in sorted(records.load_components().items()):
        all_well &= process.alive
        processes.add_row(name, str(process.pid), "running" if process.alive else "ended", str(LOGS / f"{name}.log"))
    shown = Table("POD", "NODE", "IPV4", "IPV6", "SIDECAR", "READY", "RESTARTS", "MESSAGE", box=None)
    states, existing = lifecycle.pod_states(), records.load_pods()
    for key in sorted({*states, *existing}):
        state, record = states.get(key, {}), existing.get(key)
        ready = bool(state.get("ready"))
        all_well &= ready
        place = (record.node, record.ipv4, record.ipv6, "yes" if record.proxy else "no") if record else ("", "", "", "")
        restarts = str(record.restarts) if record else ""
        shown.add_row(key, *place, "yes" if ready else "no", restarts, str(state.get("message", "")))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(processes)
    console.print()
    console.print(shown)
    sys.exit(0 if all_well else EXIT_DEGRADED)


@command.command(name="kubelet", hidden=True)
def kubelet() -> None:
    """Be the kubelet of all nodes (started by `up`)."""
    from meshbridge import log
    from meshbridge.demo import kubelet as kubelet_process

    log.configure()
    sys.stdin.close()
    lifecycle.record_kubelet()
    kubelet_process.main()
