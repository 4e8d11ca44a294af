"""What we answer a Check with, before it becomes a message."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

FORBIDDEN = 403
UNAUTHORIZED = 401
UNAVAILABLE = 503


class Reason(StrEnum):
    """Why; one of few, so that it can be a metric's label and a client's header."""

    ALLOWED = "allowed"
    NO_POLICY = "no-policy"
    POLICY = "policy"
    BAD_TOKEN = "bad-token"
    IDENTITY = "identity-differs"
    CALLER = "caller-differs"
    BAD_REQUEST = "bad-check-request"
    UNKNOWN_WORKLOAD = "unknown-workload"
    NOT_READY = "not-ready"
    FAILURE = "internal-failure"


@dataclass(frozen=True, slots=True)
class Answer:
    """``text`` is a sentence for whoever is refused.

    ``policy`` is ``namespace/name`` of the policy that decided, "" when none did; ``rule`` is for the log, with the
    file and line it was written in. ``sets`` and ``removes`` are headers of a request that is forwarded.
    """

    allowed: bool
    reason: Reason
    text: str = ""
    policy: str = ""
    rule: str = ""
    status: int = FORBIDDEN
    sets: tuple[tuple[str, str], ...] = ()
    removes: tuple[str, ...] = ()


def refuse(reason: Reason, text: str, *, status: int = FORBIDDEN) -> Answer:
    """A refusal that no policy's rule made."""
    return Answer(False, reason, text, status=status)
