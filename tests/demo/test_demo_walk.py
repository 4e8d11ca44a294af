"""The whole walk of `make demo`, on real namespaces, kernels' hooks and Envoys; nothing of it may stay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbridge.demo import lifecycle, pods
from meshbridge.demo.layout import INPUTS, meshbridge
from meshbridge.demo.processes import send
from meshbridge.demo.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(420)]


def demo(*argv: str, timeout_s: float = 120, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **settings}
    return subprocess.run(
        [meshbridge(), "demo", *argv], capture_output=True, text=True, timeout=timeout_s, env=env, check=False
    )


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    assert not lifecycle.remains(), "a sample mesh is up; end it with `meshbridge demo down`"
    yield
    demo("down")
    assert not lifecycle.remains()


@pytest.mark.parametrize("attach", ["tcx", "clsact"])
def test_every_check_of_the_walk_passes_and_nothing_stays(tmp_path: Path, attach: str) -> None:
    report_file = tmp_path / "report.json"
    done = demo("run", "--report", str(report_file), timeout_s=400, MESHBRIDGE_AGENT_ATTACH=attach)
    report = json.loads(report_file.read_text())
    failed = [
        f"{check['step']}: {check['expected']}: {check['saw']}" for check in report["checks"] if not check["passed"]
    ]
    assert not failed, "\n".join([*failed, done.stdout[-4000:]])
    assert {check["step"] for check in report["checks"]} >= {*"abcdefghijk", "down"}
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


BAD_POD = """\
apiVersion: v1
kind: Pod
metadata:
  name: refused
  namespace: finance
  annotations:
    traffic.sidecar.istio.io/excludeInboundPorts: "80-90"
spec:
  containers:
  - name: app
    command: ["sleep", "infinity"]
"""


def test_the_verbs_work_on_a_mesh_that_stays_up(tmp_path: Path) -> None:
    assert demo("up").returncode == 0
    assert "already running" in demo("up").stdout
    assert demo("status").returncode == 0

    url = "http://transaction-service.finance:8080/"
    refused = demo("exec", "finance/client", "--", "curl", "-si", url)
    assert "x-meshbridge-policy: finance/transaction-service-l7-jwt" in refused.stdout
    assert demo("exec", "finance/transaction-service", "--", "id", "-u").stdout == "1000\n"
    nobody = demo("exec", "finance/nobody", "--", "true")
    assert nobody.returncode != 0
    assert "finance/client" in nobody.stderr

    policy = str(INPUTS / "cilium-l4-policy.yaml")
    assert demo("exec", "marketing/client", "--", "curl", "-sm1", url).returncode == 28
    assert "deleted" in demo("delete", "-f", policy).stdout
    again = demo("exec", "marketing/client", "--", "curl", "-sm5", "--retry", "5", "--retry-all-errors", url)
    assert "no rule of any ALLOW policy matches" in again.stdout
    assert demo("apply", "-f", policy).returncode == 0

    bad = tmp_path / "bad.yaml"
    bad.write_text(BAD_POD)
    said = demo("apply", "-f", str(bad))
    assert said.returncode != 0
    assert "'80-90' is not a port" in said.stderr
    assert demo("delete", "-f", str(bad)).returncode == 0


def test_a_killed_container_and_a_killed_sidecar_run_again() -> None:
    assert demo("up").returncode == 0
    record = lifecycle.find_pod("finance/transaction-service")
    for name in ("app", "envoy"):
        assert send(record.processes[name], signal.SIGKILL)
    url = "http://transaction-service.finance:8080/"
    wait_for(lambda: not pods.ended(lifecycle.find_pod("finance/transaction-service")), 20, "both to run again")
    wait_for(
        lambda: "x-meshbridge-policy" in demo("exec", "finance/client", "--", "curl", "-sim2", url).stdout,
        20,
        "an answer of the new Envoy",
    )
