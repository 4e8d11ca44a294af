"""``meshbridge bench``: the figures of docs/benchmarks.md, on this machine."""

from __future__ import annotations

import json
import shutil
import sys

import click
from rich import box
from rich.console import Console
from rich.table import Table

from meshbridge.bench.figures import Report, Section, markdown, table
from meshbridge.bench.runner import PARTS, run

EXIT_FAILED = 1
EXIT_MISSED = 3
MIN_WIDTH = 140  # of the widest table; a narrower terminal wraps lines instead of losing figures


@click.command(name="bench", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", "names", multiple=True, type=click.Choice(list(PARTS)), help="Only this part; repeatable.")
@click.option("--quick", is_flag=True, help="Fewer repeats and smaller sizes: a look, not a figure.")
@click.option("-o", "--output", type=click.Choice(["table", "json", "markdown"]), default="table", show_default=True)
@click.option("--list", "list_parts", is_flag=True, help="Name the parts and stop.")
def command(names: tuple[str, ...], quick: bool, output: str, list_parts: bool) -> None:
    """Measure what MeshBridge costs, as ratios within one run, pinned to one core (root).

    Progress goes to stderr, figures to stdout. Load stays inside namespaces the bench makes and removes.

    \b
    Examples:
      meshbridge bench --quick --only tcp
      meshbridge bench -o json > figures.json
    \b
    Exit codes: 0 all targets met, 1 something could not be measured, 2 an option cannot be used, 3 a target was missed.
    """
    if list_parts:
        for name, part in PARTS.items():
            click.echo(f"{name:10} {part.summary}")
        return
    progress = Console(stderr=True)
    wanted = [name for name in PARTS if not names or name in names]
    if progress.is_terminal:
        with progress.status("bench") as status:
            report = run(wanted, quick=quick, tell=status.update)
    else:
        report = run(wanted, quick=quick, tell=_LinePerPart())
    if output == "json":
        click.echo(json.dumps(report.record(), indent=2, ensure_ascii=False))
    elif output == "markdown":
        click.echo(markdown(report), nl=False)
    else:
        show(report)
    sys.exit(EXIT_FAILED if report.failures else EXIT_MISSED if report.missed else 0)


class _LinePerPart:
    """Progress for logs: a line when the subject before the colon changes, not one per repeat."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, text: str) -> None:
        subject = text.partition(":")[0]
        if subject != self._last:
            click.echo(f"bench: {text}", err=True)
        self._last = subject


def show(report: Report) -> None:
    """Print tables, notes and targets for people."""
    console = Console(highlight=False, width=max(shutil.get_terminal_size().columns, MIN_WIDTH))
    console.print("machine: " + ", ".join(f"{key} {value}" for key, value in report.machine.items()), markup=False)
    if report.quick:
        console.print("quick run: few repeats and small sizes; do not quote these figures")
    for section in report.sections:
        console.print()
        show_section(console, section)
    for failure in report.failures:
        console.print(f"\n{failure.name}: not measured: {failure.reason}", markup=False, style="red")
    met = [target for section in report.sections for target in section.targets if target.met]
    console.print(
        f"\nbench: {len(met)} targets met, {len(report.missed)} missed, {len(report.failures)} parts not measured, "
        f"in {report.elapsed_s:.0f} s"
    )


def show_section(console: Console, section: Section) -> None:
    titles, *lines = table(section)
    drawn = Table(title=section.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(titles):
        drawn.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    for line in lines:
        drawn.add_row(*line)
    console.print(drawn, markup=False)
    for target in section.targets:
        console.print(f"  {target}", markup=False, style="green" if target.met else "bold red")
    for note in section.notes:
        console.print(f"  {note}", markup=False)
