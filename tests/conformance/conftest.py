"""What the comparisons with programs of others share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent.parent
sys.path[:0] = [str(REPO / "tests/envoy"), str(REPO / "tests/apiserver")]

DEFAULT_SEED = 1


@pytest.fixture
def seed() -> int:
    """What everything random in a test follows from; set CONFORMANCE_SEED to try another."""
    found = int(os.environ.get("CONFORMANCE_SEED", DEFAULT_SEED))
    print(f"CONFORMANCE_SEED={found}")
    return found


@pytest.fixture(scope="session")
def third_party() -> Callable[[str], Path]:
    """Where scripts/third-party has put a program: an error in CI where it has not, else a reason to skip."""

    def where(name: str) -> Path:
        command = [str(REPO / "scripts/third-party"), "--path", name]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            if os.environ.get("CI"):
                pytest.fail(f"cannot run in CI: {found.stderr.strip()}", pytrace=False)
            pytest.skip(found.stderr.strip())
        return Path(found.stdout.strip())

    return where
