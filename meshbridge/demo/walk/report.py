"""What the walk found: one line per check on the screen, and all of it as JSON."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from meshbridge.demo import store


@dataclass(frozen=True, slots=True)
class Check:
    """One claim: what was expected, whether it held, what was seen, and how that was measured."""

    step: str
    expected: str
    passed: bool
    saw: str
    measured: str


@dataclass(slots=True)
class Report:
    """Prints as it goes; nothing is judged here."""

    console: Console
    checks: list[Check] = field(default_factory=list)
    step: str = ""
    started: float = field(default_factory=time.monotonic)
    logs: dict[str, list[str]] = field(default_factory=dict)

    def begin(self, letter: str, title: str, about: str) -> None:
        """From here on checks belong to step ``letter``."""
        self.step = letter
        self.console.print(f"\n[bold]Step {letter}. {escape(title)}[/bold]", highlight=False, soft_wrap=True)
        self.console.print(escape(about), style="dim", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Something a person should know while waiting."""
        self.console.print(f"  {escape(text)}", style="dim", highlight=False, soft_wrap=True)

    def quote(self, command: str, lines: list[str]) -> None:
        """A command a person could have typed, and what it printed."""
        self.console.print(f"  $ {escape(command)}", style="cyan", highlight=False, soft_wrap=True)
        for line in lines:
            self.console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)

    def check(self, expected: str, passed: bool, saw: str, measured: str) -> bool:
        """Record and print one check; returns whether it passed."""
        self.checks.append(Check(self.step, expected, passed, saw, measured))
        word = "[green]PASS[/green]" if passed else "[bold red]FAIL[/bold red]"
        line = f"  {word}  {escape(expected)}: {escape(saw)} [dim]({escape(measured)})[/dim]"
        self.console.print(line, highlight=False, soft_wrap=True)
        return passed

    @property
    def failed(self) -> int:
        return sum(not check.passed for check in self.checks)

    def finish(self) -> None:
        passed = len(self.checks) - self.failed
        self.console.print(f"\ndemo: {passed} checks passed, {self.failed} failed", highlight=False)

    def write(self, path: Path) -> None:
        """All checks as JSON, with the end of the logs when they were kept."""
        document = {
            "passed": len(self.checks) - self.failed,
            "failed": self.failed,
            "duration_s": round(time.monotonic() - self.started, 1),
            "checks": [asdict(check) for check in self.checks],
            **({"logs": self.logs} if self.logs else {}),
        }
        store.write(path, json.dumps(document, indent=2).encode() + b"\n")
