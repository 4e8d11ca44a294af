"""A finding as a value: which object, where in it, what is so, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from meshbridge.analysis.codes import CODES, Code
from meshbridge.policy.model import Document, Origin, Severity

_LEVEL: Final = {severity: level for level, severity in enumerate(Severity)}
_MAX_NAMED: Final = 3


def reaches(severity: Severity, threshold: Severity) -> bool:
    """Whether something of ``severity`` is at least as bad as ``threshold``."""
    return _LEVEL[severity] >= _LEVEL[threshold]


@dataclass(frozen=True, slots=True)
class Finding:
    """``origin`` is the object, the path in it and its place; ``related`` are others that have part in it."""

    code: str
    origin: Origin
    text: str
    fix: str
    severity: Severity
    related: tuple[Origin, ...] = ()

    @property
    def explained(self) -> Code:
        return CODES[self.code]

    @property
    def resource(self) -> str:
        """The object as ``istioctl analyze`` names it: ``Kind namespace/name``."""
        return f"{self.origin.kind} {self.origin.policy}".strip()


def finding(
    code: str, origin: Origin, text: str, *, fix: str = "", severity: Severity | None = None,
    related: Iterable[Origin] = (),
) -> Finding:  # fmt: skip
    """A finding of the code's usual severity, with its usual fix, unless something better is known."""
    known = CODES[code]
    others = tuple(dict.fromkeys(other for other in related if other != origin))
    return Finding(code, origin, text, fix or known.fix, severity or known.severity, others)


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Each once, the worst first, then by place: an order that depends on no other."""
    return tuple(
        sorted(
            dict.fromkeys(findings),
            key=lambda f: (-_LEVEL[f.severity], f.origin.file, f.origin.line, f.code, f.origin, f.text),
        )
    )


def place_of(document: Document, path: str = "") -> Origin:
    """An object, and the path in it that is meant."""
    source = document.source
    return Origin(document.kind, document.namespace, document.name, path, source.file, source.line(path))


def listed(names: Iterable[object], most: int = _MAX_NAMED) -> str:
    """``a, b, c and 4 more``."""
    every = [str(name) for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
