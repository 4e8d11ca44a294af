"""``bypass promote`` on files: one word changes, or nothing does and it is said why."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from meshbridge.cli import cli

HEAD = "apiVersion: meshbridge.io/v1alpha1\nkind: BypassPolicy\nmetadata: {name: reports, namespace: finance}\n"
OTHER = HEAD.replace("reports", "other") + "spec: {mode: audit}\n"
CLUSTER = "apiVersion: meshbridge.io/v1alpha1\nkind: ClusterBypassPolicy\nmetadata: {name: all}\n"


def promote(*argv: str) -> Result:
    return CliRunner().invoke(cli, ["bypass", "promote", *argv])


PROMOTED = {
    "block": (HEAD + "spec:\n  mode: audit   # for a week\n  otherwise: deny", "mode: audit "),
    "flow": (HEAD + "spec: {selector: {matchLabels: {mode: x}}, mode: audit, otherwise: deny}\n", "mode: audit,"),
    "quoted": (HEAD + "spec:\n  'mode' : \"audit\"\n", "audit"),
    "JSON": (
        '{"apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy",\n'
        ' "metadata": {"name": "reports", "namespace": "finance"}, "spec": {"mode": "audit"}}', "audit",
    ),
    "carriage returns": ((HEAD + "spec:\n  mode: audit\n").replace("\n", "\r\n"), "audit"),
    "among others": (OTHER + "---\n# audit\n" + HEAD + "spec:\n  mode:   audit\n---\n" + CLUSTER, "  audit\n---"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "before"), PROMOTED.values(), ids=PROMOTED.keys())
def test_one_word_changes_and_no_other_byte(tmp_path: Path, text: str, before: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_bytes(text.encode())
    file.chmod(0o640)
    dry = promote("finance/reports", "-f", str(tmp_path), "--dry-run")
    assert (dry.exit_code, file.read_bytes()) == (0, text.encode()), dry.output
    done = promote("finance/reports", "-f", str(tmp_path))
    assert done.exit_code == 0, done.output
    position = text.rindex(before) + before.index("audit")
    assert file.read_bytes().decode() == text[:position] + "enforce" + text[position + len("audit") :]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["p.yaml"]
    again = promote("finance/reports", "-f", str(tmp_path))
    assert (again.exit_code, "enforces already" in again.output) == (0, True)


REFUSED = {
    "not there": (OTHER, "not in these files"),
    "there twice": (HEAD + "spec: {mode: audit}\n---\n" + HEAD + "spec: {mode: audit}\n", "defined 2 times"),
    "on a line of its own": (HEAD + "spec:\n  mode:\n    audit\n", "write mode: enforce by hand"),
    "twice on a line": (HEAD + "spec: {mode: audit} # was mode: audit\n", "write mode: enforce by hand"),
    "as an anchor": (HEAD + "spec:\n  mode: &m audit\n", "write mode: enforce by hand"),
    "as part of text": (HEAD + "spec: {reason: 'mode: audit', mode: \"au\\x64it\"}\n", "means more than the mode"),
    "not understood": (HEAD + "spec: {mode: audit, routes: no}\n", "mend it first"),
}


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_changed_stays_as_it_is(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text)
    done = promote("finance/reports", "-f", str(file))
    assert done.exit_code == 1
    assert says in str(done.exception)
    assert file.read_text() == text


def test_a_name_without_a_namespace_is_of_the_cluster(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(CLUSTER + "spec: {mode: audit}\n")
    assert promote("all", "-f", str(file)).exit_code == 0
    assert file.read_text() == CLUSTER + "spec: {mode: enforce}\n"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "p.yaml", tmp_path / "p.yaml"
    real.write_text(HEAD + "spec: {mode: audit}\n")
    link.symlink_to(real)
    assert promote("finance/reports", "-f", str(link)).exit_code == 0
    assert link.is_symlink()
    assert "enforce" in real.read_text()
