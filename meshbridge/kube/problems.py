"""What a person has to mend, found while documents are read or put to use."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ProblemReason(StrEnum):
    UNREADABLE = "unreadable"
    """A file that is not YAML, or holds what no API server would take; its last readable content stays in force."""
    DUPLICATE = "duplicate"
    """An object defined more than once in one directory."""
    NOT_READ = "not-read"
    """A kind or file that is passed over; nothing is wrong unless its author counts on it."""
    REFUSED = "refused"
    """A policy that is not understood: it isolates, or is left to Envoy."""
    NOTICE = "notice"
    """Valid and in force as written, but hardly meant."""
    CONFLICT = "conflict"
    """Two objects that cannot both be right, such as two live pods with one address."""
    NACKED = "nacked"
    """What a node or a sidecar cannot use of what it was sent; it goes on with what it had."""
    UNWRITABLE = "unwritable"
    """What the controller may not write into the cluster, so that it is not to be seen there; policy is in force."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One sentence: where, what, how to fix it. ``file`` and ``line`` are empty and 0 where there is none."""

    reason: ProblemReason
    text: str
    file: str = ""
    line: int = 0
