"""The whole walk of `make demo`, on real namespaces, kernels' hooks and Envoys; nothing of it may stay."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbridge.demo import lifecycle
from meshbridge.demo.layout import meshbridge

pytestmark = [pytest.mark.root, pytest.mark.timeout(420)]


def demo(*argv: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([meshbridge(), "demo", *argv], capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    assert not lifecycle.remains(), "a sample mesh is up; end it with `meshbridge demo down`"
    yield
    demo("down")
    assert not lifecycle.remains()


def test_every_check_of_the_walk_passes_and_nothing_stays(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    done = demo("run", "--report", str(report_file), timeout_s=400)
    report = json.loads(report_file.read_text())
    failed = [
        f"{check['step']}: {check['expected']}: {check['saw']}" for check in report["checks"] if not check["passed"]
    ]
    assert not failed, "\n".join([*failed, done.stdout[-4000:]])
    assert {check["step"] for check in report["checks"]} >= {"a", "b", "c", "d", "e", "f", "down"}
    assert done.returncode == 0
    assert f"demo: {report['passed']} checks passed, 0 failed" in done.stdout
    assert not lifecycle.remains()


def test_down_removes_what_a_killed_up_left() -> None:
    with subprocess.Popen([meshbridge(), "demo", "up"], stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        assert any(line.startswith("processes:") for line in up.stdout)
        up.kill()
    assert lifecycle.remains()
    done = demo("down")
    assert done.returncode == 0, done.stderr
    assert not lifecycle.remains()


def test_down_with_nothing_up_is_no_error() -> None:
    assert demo("down").returncode == 0


def test_a_second_command_is_refused_while_one_is_at_work() -> None:
    with lifecycle.exclusive():
        done = demo("up")
    assert done.returncode != 0
    assert "another demo command is at work" in done.stderr
