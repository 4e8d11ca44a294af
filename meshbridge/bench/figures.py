"""What a section of the bench hands back: rows of figures, and targets with whether they were met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Value = float | int | str | None


@dataclass(frozen=True, slots=True)
class Column:
    """``form`` is a format specification for numbers, e.g. ``.2f``; text is shown as it is, None as ``–``."""

    key: str
    title: str
    form: str = ""

    def show(self, value: Value) -> str:
        if value is None:
            return "–"
        return value if isinstance(value, str) else format(value, self.form)


@dataclass(frozen=True, slots=True)
class Target:
    """A promise and what was measured; met when ``measured`` is at most ``limit``."""

    text: str
    measured: float
    limit: float
    unit: str = "×"

    @property
    def met(self) -> bool:
        return self.measured <= self.limit

    def __str__(self) -> str:
        verdict = "met" if self.met else "MISSED"
        return f"{verdict}: {self.text}: {self.measured:.3g} {self.unit}, target at most {self.limit:g} {self.unit}"


@dataclass(frozen=True, slots=True)
class Section:
    """One table. ``notes`` say how it was measured and what it does not show."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Value]]
    targets: Sequence[Target] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A section that could not be measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one run measured on one machine."""

    machine: Mapping[str, str]
    quick: bool
    sections: Sequence[Section]
    failures: Sequence[Failure] = ()
    elapsed_s: float = 0.0

    @property
    def missed(self) -> list[Target]:
        return [target for section in self.sections for target in section.targets if not target.met]

    def record(self) -> dict[str, Any]:
        """The report as JSON can carry it."""
        record = asdict(self)
        for section, plain in zip(self.sections, record["sections"], strict=True):
            for target, plain_target in zip(section.targets, plain["targets"], strict=True):
                plain_target["met"] = target.met
            plain["columns"] = {column.key: column.title for column in section.columns}
        return record


def table(section: Section) -> list[list[str]]:
    """Titles, then one line of text per row."""
    lines = [[column.title for column in section.columns]]
    lines += [[column.show(row.get(column.key)) for column in section.columns] for row in section.rows]
    return lines


def markdown(report: Report) -> str:
    """The report as docs/benchmarks.md holds it."""
    lines = [", ".join(f"{key} {value}" for key, value in report.machine.items())]
    for section in report.sections:
        titles, *rows = table(section)
        lines += [
            "",
            f"### {section.title}",
            "",
            _markdown_row(titles),
            _markdown_row([":--", *["--:"] * len(titles[1:])]),
        ]
        lines += map(_markdown_row, rows)
        remarks = [*(f"**{target}**" if not target.met else str(target) for target in section.targets), *section.notes]
        lines += ["", *(f"- {remark}" for remark in remarks)] if remarks else []
    lines += [f"\n{failure.name}: not measured: {failure.reason}" for failure in report.failures]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
