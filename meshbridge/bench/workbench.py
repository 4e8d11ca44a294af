"""What every section gets: where to build, on which core to measure, how long, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Workbench:
    """``stack`` takes down at the section's end whatever was registered in it; ``folder`` is removed with it."""

    stack: ExitStack
    folder: Path
    core: int
    quick: bool
    tell: Callable[[str], None]

    def pick(self, full: int, quick: int) -> int:
        """How many: ``quick`` in a quick run."""
        return quick if self.quick else full

    @property
    def seconds(self) -> float:
        """How long one repeat of one variant is measured: short, so that the rounds of a ratio lie close together."""
        return 0.2

    @property
    def repeats(self) -> int:
        return 3 if self.quick else 25
