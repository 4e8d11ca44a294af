"""Findings that somebody does not want to see: by an option, or by an annotation on the object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from meshbridge.analysis.codes import CODES
from meshbridge.analysis.finding import Finding
from meshbridge.errors import MeshBridgeError
from meshbridge.policy.model import Document

SUPPRESS: Final = "meshbridge.io/analyze-suppress"
"""Codes, separated by commas, or ``*``: findings of these codes about the object are not shown."""


class SuppressionError(MeshBridgeError):
    """A ``--suppress`` that cannot be read."""


@dataclass(frozen=True, slots=True)
class Suppression:
    """``CODE=OBJECT``. The object as ``istioctl analyze`` takes it, ``Kind name.namespace``, or as people name it,
    ``namespace/name``; ``*`` and ``?`` stand for any characters and one."""

    code: str
    pattern: str

    @classmethod
    def parse(cls, text: str) -> Suppression:
        """One ``--suppress``.

        Raises:
            SuppressionError: it has no code or no object.
        """
        code, _, pattern = text.partition("=")
        if not code.strip() or not pattern.strip():
            raise SuppressionError(
                f"{text[:120]!r} is no suppression", where="--suppress",
                fix='write CODE=NAMESPACE/NAME or "CODE=Kind NAME.NAMESPACE", with * for any',
            )  # fmt: skip
        return cls(code.strip(), pattern.strip())

    @property
    def is_known(self) -> bool:
        """Whether there are findings of such a code."""
        return any(fnmatchcase(code, self.code) for code in CODES)

    def covers(self, found: Finding) -> bool:
        origin = found.origin
        dotted = f"{origin.name}.{origin.namespace}" if origin.namespace else origin.name
        names = (origin.policy, f"{origin.kind} {origin.policy}", f"{origin.kind} {dotted}")
        return fnmatchcase(found.code, self.code) and any(fnmatchcase(name, self.pattern) for name in names)


def kept(
    findings: Iterable[Finding], suppressions: Iterable[Suppression], documents: Iterable[Document]
) -> tuple[Finding, ...]:
    """The findings that nobody suppresses."""
    every = tuple(suppressions)
    annotated: dict[tuple[str, str, str], frozenset[str]] = {}
    for document in documents:
        if codes := _annotated(document.data):
            annotated[document.kind, document.namespace, document.name] = codes
    return tuple(
        found
        for found in findings
        if not any(suppression.covers(found) for suppression in every)
        and annotated.get((found.origin.kind, found.origin.namespace, found.origin.name), frozenset()).isdisjoint(
            ("*", found.code)
        )
    )


def _annotated(data: Mapping[str, object]) -> frozenset[str]:
    metadata = data.get("metadata")
    annotations = metadata.get("annotations") if isinstance(metadata, dict) else None
    value = annotations.get(SUPPRESS) if isinstance(annotations, dict) else None
    return frozenset(code.strip() for code in value.split(",")) if isinstance(value, str) else frozenset()
