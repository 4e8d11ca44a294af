"""Go programs beside the tests that drive engines of other projects: built once for each state of their sources."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

THIRD_PARTY = Path(__file__).parent.parent.parent / "scripts/third-party"


def built(sources: Path) -> Path:
    """The program of a folder; where no Go is to be had the test is skipped, in CI it fails."""
    done = subprocess.run([THIRD_PARTY, sources], capture_output=True, text=True, check=False)
    if done.returncode:
        if "needs Go" in done.stderr and not os.environ.get("CI"):
            pytest.skip(done.stderr.strip())
        pytest.fail(f"{sources.name} does not build:\n{done.stderr[-2000:]}", pytrace=False)
    where = subprocess.check_output([THIRD_PARTY, "--path", sources], text=True).strip()
    return Path(where, "bin", sources.name)


def ask(program: Path, cases: Iterable[Any]) -> list[Any]:
    """The program's answers, one for each case; its ``main.go`` says what they look like."""
    asked = "".join(json.dumps(case) + "\n" for case in cases)
    done = subprocess.run([program], input=asked, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
