"""What ``meshbridge webhook`` refuses before it serves anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from meshbridge.cli.webhook import command

SETTINGS = {
    "a certificate without its key": (["--tls-cert", "x"], "only one of certificate and key"),
    "names for a given certificate": (["--tls-cert", "x", "--tls-key", "x", "--name", "n"], "made here"),
    "no port": (["--listen", "127.0.0.1"], "is no HOST:PORT"),
    "files that are not there": (["--listen", "127.0.0.1:0", "--tls-cert", "x", "--tls-key", "x"], "cannot be used"),
    "metrics for everybody": (["--listen", "127.0.0.1:0", "--metrics", "0.0.0.0:9403"], "not on loopback"),
}


@pytest.mark.parametrize(("options", "said"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_cannot_be_used_are_refused(tmp_path: Path, options: list[str], said: str) -> None:
    kubeconfig = tmp_path / "config"
    kubeconfig.write_text(
        "{apiVersion: v1, kind: Config, current-context: c, clusters: [{name: c, cluster: {server: 'https://x'}}], "
        "users: [{name: u, user: {}}], contexts: [{name: c, context: {cluster: c, user: u}}]}"
    )
    given = ["--kubeconfig", str(kubeconfig), "--state-dir", str(tmp_path / "state"), *options]
    result = CliRunner().invoke(command, given)
    assert said in str(result.exception)
