"""The option ``--observed``: connections that were seen, as one more source of who uses what."""

from __future__ import annotations

from typing import BinaryIO

import click

from meshbridge.bypass.observed import MAX_LINE_BYTES, ObservedFlow, parse_observed

observed_option = click.option(
    "--observed", type=click.File("rb"), metavar="FLOWS.jsonl",
    help="Connections that were seen, as 'meshbridge observe -o json' prints them; - is standard input.",
)  # fmt: skip


def read_observed(flows: BinaryIO | None) -> tuple[ObservedFlow, ...]:
    """The connections in a file; none without one.

    Raises:
        ObservedError: a line is not what ``meshbridge observe -o json`` prints.
    """
    return parse_observed(iter(lambda: flows.readline(MAX_LINE_BYTES + 1), b"")) if flows is not None else ()
