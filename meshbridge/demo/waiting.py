"""Waiting for a condition with a deadline: the only way this harness waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from meshbridge.demo.errors import DemoError

T = TypeVar("T")
_POLL_S = 0.02


def wait_for(
    condition: Callable[[], T | None], timeout_s: float, what: str, detail: Callable[[], str] = lambda: ""
) -> T:
    """The first true value of ``condition``.

    Raises:
        DemoError: ``what`` has not come true in ``timeout_s``; ``detail`` is asked for what to show then.
    """
    value = poll(condition, timeout_s)
    if not value:
        raise DemoError(
            f"waited {timeout_s:g} s for {what}",
            where="demo",
            fix=detail() or "look into the logs of `meshbridge demo status`",
        )
    return value


def poll(condition: Callable[[], T], timeout_s: float) -> T:
    """The first true value of ``condition``, or its last value when ``timeout_s`` has passed."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value or time.monotonic() >= deadline:
            return value
        time.sleep(_POLL_S)
