"""The project's own files: inputs are the user's, byte for byte; generated code is what its source says."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent.parent

INPUTS = {
    "ccnp-prometheus-scrape-access.yaml": "0b387a1e3209092d6aa5814b426f3fecf63ce42b732ae26f162bf3ad54ea0021",
    "cilium-l4-policy.yaml": "eeb1f6d5096bd798f02a71a47b04acc8947123927cc63a9740b364ebebd3fdf8",
    "istio-l7-policy.yaml": "c5c0098860b309cc1ea351752a1b3b625dc08dc88f2a78f74096b62b6f4f1da3",
    "prometheus-deployment.yaml": "6f33e3b4cbbcff801c31d6be53efbd1dcc3ebe0412ea4ff8fd62082230459098",
}


@pytest.mark.parametrize(("name", "digest"), INPUTS.items())
def test_input_files_are_byte_identical_to_the_users(name: str, digest: str) -> None:
    assert hashlib.sha256((REPO / "manifests/inputs" / name).read_bytes()).hexdigest() == digest


def test_generated_messages_match_their_protos(tmp_path: Path) -> None:
    protos = sorted((REPO / "protos/meshbridge/protos").glob("*.proto"))
    assert protos
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{REPO / 'protos'}"]
    options = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
    subprocess.run([*command, *options, *map(str, protos)], check=True)
    committed = sorted(path for path in (REPO / "meshbridge/protos").iterdir() if "_pb2" in path.name)
    for path in committed:
        assert path.read_text() == (tmp_path / "meshbridge/protos" / path.name).read_text(), f"run make protos: {path}"
