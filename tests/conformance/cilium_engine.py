"""Cilium's own policy engine as a process: cases in, verdicts out. The program is in the folder ``cilium``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

SOURCES = Path(__file__).parent / "cilium"
CACHE = Path(os.environ.get("MESHBRIDGE_GO_CACHE", "/var/cache/meshbridge/go"))


def built_engine() -> Path:
    """The program, built where no build of these sources is kept; without Go the test is skipped, in CI it fails."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    program = CACHE / f"cilium-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        reason = "needs Go to build Cilium's policy engine"
        pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = CACHE / f".{program.name}.{os.getpid()}"
    command = ["nice", "-n", "15", go, "build", "-p", "2", "-trimpath", "-o", str(unfinished), "."]
    environment = {**os.environ, "GOFLAGS": "-mod=readonly", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}
    done = subprocess.run(command, cwd=SOURCES, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"Cilium's policy engine does not build:\n{done.stderr[-2000:]}", pytrace=False)
    unfinished.rename(program)
    return program


def ask_cilium(program: Path, cases: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cilium's answers, one for each case; see ``cilium/main.go`` for their form."""
    asked = "".join(json.dumps(case) + "\n" for case in cases)
    done = subprocess.run([program], input=asked, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
