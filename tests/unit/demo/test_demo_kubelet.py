"""What the kubelet does in one pass, without making any pod."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshbridge.demo import kubelet, names, records, store
from meshbridge.demo.records import PodRecord

POD = {
    "kind": "Pod",
    "metadata": {"name": "web", "namespace": "shop"},
    "spec": {"containers": [{"name": "app", "command": ["sleep"]}]},
}


@pytest.fixture
def manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kubelet reads manifests; all else of its state is in the same temporary directory."""
    directory = tmp_path / "manifests"
    directory.mkdir()
    monkeypatch.setattr(kubelet, "STORE", store.Store(directory))
    monkeypatch.setattr(kubelet, "KUBELET_STATUS", tmp_path / "status.json")
    monkeypatch.setattr(records, "PODS", tmp_path / "pods")
    monkeypatch.setattr(names, "HOSTS", tmp_path / "hosts")
    monkeypatch.setattr(kubelet.Kubelet, "_keep_components", lambda self, now: None)
    return directory


class Recording(kubelet.Kubelet):
    """Says which pods it would make or remove."""

    __slots__ = ("made",)

    def _submit(self, key: str, job: Callable[[PodRecord], None], record: PodRecord) -> None:
        self.made = [*getattr(self, "made", []), (key, job)]


def test_manifests_are_read_again_only_when_they_changed(manifests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = store.Store.objects

    def counted(of: store.Store) -> list[Any]:
        reads.append(of)
        return read(of)

    monkeypatch.setattr(store.Store, "objects", counted)
    one = Recording(ThreadPoolExecutor(1))
    for now in range(5):
        one.sync(float(now))
    assert len(reads) == 1
    store.write(
        manifests / "pod.yaml", yaml.safe_dump_all([{"kind": "Namespace", "metadata": {"name": "shop"}}, POD]).encode()
    )
    for now in range(5, 8):
        one.sync(float(now))
    assert len(reads) == 2
    assert one.made[0][0] == "shop/web"
