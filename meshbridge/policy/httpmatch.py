"""The HTTP rules of a CiliumNetworkPolicy against one request."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from meshbridge.policy.attributes import Request
from meshbridge.policy.model import HttpMatch

_MAX_SUBJECT: Final = 4096
"""Longer paths and hosts match nothing, so that an expression with two repeats stays cheap."""


def http_rule_matches(match: HttpMatch, request: Request) -> bool:
    """Whether every field that is set matches; expressions have to match as a whole."""
    return (
        _whole(match.method, request.method)
        and _whole(match.path, request.path)
        and _whole(match.host, request.host)
        and all(_header(name, value, request) for name, value in match.headers)
    )


def _header(name: str, value: str | None, request: Request) -> bool:
    sent = request.header(name)
    return sent is not None and (value is None or sent == value)


def _whole(pattern: str, subject: str) -> bool:
    if not pattern:
        return True
    return len(subject) <= _MAX_SUBJECT and _compiled(pattern).fullmatch(subject) is not None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
