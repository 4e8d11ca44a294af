"""Where a verb's objects come from, and what a person reads when they do not come."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meshbridge.cli.documents import DocumentSource, mesh_settings
from meshbridge.cli.files import ManifestError
from meshbridge.kube.api import ClusterError

CONFIG = """
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "{server}"}}}}]
users: [{{name: u, user: {{token: abc}}}}]
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
current-context: c
"""


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_a_cluster_that_does_not_answer_is_named_with_its_address(tmp_path: Path, closed_port: int) -> None:
    path = tmp_path / "config"
    path.write_text(CONFIG.format(server=f"http://127.0.0.1:{closed_port}"))
    with pytest.raises(ClusterError, match=rf"cluster http://127\.0\.0\.1:{closed_port}: cannot be reached: .*refused"):
        DocumentSource(kubeconfig=path).read()


@pytest.mark.parametrize(
    ("text", "context"),
    [("no: config", None), ("{", None), ("\x00", None), (CONFIG.format(server="http://x"), "other")],
)
def test_a_kubeconfig_that_cannot_be_used_is_named(tmp_path: Path, text: str, context: str | None) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ClusterError, match=f"kubeconfig {path}: cannot be used"):
        DocumentSource(kubeconfig=path, context=context).read()


def test_two_meshes_are_not_taken_for_one(tmp_path: Path) -> None:
    text = "{{apiVersion: v1, kind: ConfigMap, metadata: {{name: istio, namespace: {}}}}}"
    for namespace in ("one", "two"):
        (tmp_path / f"{namespace}.yaml").write_text(text.format(namespace))
    with pytest.raises(ManifestError, match="several ConfigMaps"):
        mesh_settings(DocumentSource((tmp_path,)).read())


@pytest.mark.parametrize("module", ["meshbridge.cli.evaluate", "meshbridge.cli.explain", "meshbridge.agent.agent"])
def test_who_reads_no_cluster_does_not_load_its_client(module: str) -> None:
    program = f"import sys, {module}; sys.exit('kubernetes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
