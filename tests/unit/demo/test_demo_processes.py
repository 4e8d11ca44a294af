"""How processes of the sample mesh are started, known and ended."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from meshbridge.demo import records
from meshbridge.demo.kubelet import Backoff, allocate
from meshbridge.demo.layout import NODES
from meshbridge.demo.processes import Command, ProcessId, end, identify, send
from meshbridge.demo.walk.report import Report
from meshbridge.demo.workloads import DesiredPod


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_command_enters_binds_drops_and_runs_in_that_order() -> None:
    command = Command(["app", "--flag"], "mb-pod-x", Path("log"), uid=1000, mounts=[(Path("/a b"), Path("/etc/hosts"))])
    argv = command.full_argv()
    assert argv[:2] == ["nsenter", "--net=/run/netns/mb-pod-x"]
    assert argv[2:6] == ["unshare", "--mount", "--propagation=slave", "sh"]
    assert 'mount --bind "$1" "$2" && shift 2 && exec "$@"' in argv
    assert argv.index("/a b") < argv.index("setpriv") < argv.index("--no-new-privs") < argv.index("app")
    assert argv[-2:] == ["app", "--flag"]


def test_a_process_is_alive_until_it_ends_and_a_zombie_is_not() -> None:
    process = sleeper()
    known = identify(process.pid)
    assert known.alive
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert not known.alive
    process.wait()
    assert not known.alive


def test_a_process_that_has_another_start_time_is_left_alone() -> None:
    process = sleeper()
    try:
        known = identify(process.pid)
        end([ProcessId(known.pid, known.start_ticks - 1)])
        assert not send(ProcessId(known.pid, known.start_ticks - 1), signal.SIGKILL)
        assert known.alive
    finally:
        process.kill()
        process.wait()


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        known = identify(process.pid)
        end([known], grace_s=0.2)
        assert not known.alive


def test_backoff_grows_and_a_thing_that_ran_long_starts_anew() -> None:
    backoff = Backoff()
    assert backoff.due(0)
    backoff.tried(100)
    assert not backoff.due(100.5)
    assert backoff.due(101)
    backoff.tried(101)
    assert not backoff.due(102.5)
    backoff.tried(200)
    assert backoff.failures == 1


def test_a_new_pod_gets_addresses_nobody_has() -> None:
    spec = {"metadata": {}, "spec": {"nodeName": "node-1", "containers": []}}
    first = allocate(DesiredPod("shop", "a", spec), {})
    second = allocate(DesiredPod("shop", "b", spec), {first.key: first})
    assert first.ipv4 != second.ipv4
    assert first.ipv6 != second.ipv6
    assert first.uid != second.uid
    assert second.network.ipv4 in NODES["node-1"].pods_ipv4


def test_the_report_counts_and_its_file_holds_every_check(tmp_path: Path) -> None:
    screen = io.StringIO()
    report = Report(Console(file=screen, width=100))
    report.begin("a", "Title [sic]", "about")
    report.check("it holds", True, "2 bytes", "a counter")
    report.check("it does not [really]", False, "3 bytes", "a counter")
    report.finish()
    report.write(tmp_path / "report.json")
    shown = screen.getvalue()
    assert "PASS  it holds: 2 bytes (a counter)" in shown
    assert "FAIL  it does not [really]: 3 bytes" in shown
    assert shown.endswith("demo: 1 checks passed, 1 failed\n")
    document = json.loads((tmp_path / "report.json").read_text())
    assert (document["passed"], document["failed"]) == (1, 1)
    assert document["checks"][1]["saw"] == "3 bytes"


def test_a_record_that_goes_while_records_are_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PODS", tmp_path)
    spec = {"metadata": {}, "spec": {"nodeName": "node-1", "containers": []}}
    kept = allocate(DesiredPod("shop", "a", spec), {}).save()
    (tmp_path / "shop_b.json").symlink_to(tmp_path / "gone")  # listed, but not there any more when it is opened
    assert list(records.load_pods()) == [kept.key]
