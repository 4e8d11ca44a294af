"""The API server's part at admission: pods are shown to MeshBridge's review before they are in force."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from meshbridge.bypass.admission import review
from meshbridge.bypass.inventory import inventory
from meshbridge.controller.meshconfig import read_mesh_config
from meshbridge.demo.errors import DemoError
from meshbridge.demo.store import Store
from meshbridge.kube.manifests import is_manifest
from meshbridge.kube.objects import MESH_CONFIG, read_objects
from meshbridge.kube.yaml import YamlError
from meshbridge.policy.mesh import DEFAULT_MESH
from meshbridge.policy.model import Document
from meshbridge.policy.parse.workloads import TEMPLATE_KINDS


def admit(store: Store, source: Path) -> list[str]:
    """What whoever applies ``source`` is to be warned of.

    Raises:
        DemoError: a BypassPolicy in force, or in the file, denies one of its pods; nothing of the file is applied then.
    """
    applied = _documents(source)
    keys = {document.key for document in applied}
    others = [d for path in store.files() if is_manifest(path.name) for d in _documents(path) if d.key not in keys]
    objects = [*others, *applied]
    configs = [d for d in objects if d.kind == "ConfigMap" and d.name == MESH_CONFIG]
    mesh = read_mesh_config(configs[0]) if configs else DEFAULT_MESH
    found = inventory(objects, mesh=mesh, now=datetime.now(UTC))
    pods = {f"{d.namespace}/{d.name}" for d in applied if d.kind == "Pod" or d.kind in TEMPLATE_KINDS}
    warnings: list[str] = []
    for workload in found.workloads:
        if workload.key not in pods:
            continue
        reviewed = review(workload, found)
        if reviewed.denied:
            raise DemoError(
                f'admission webhook "bypass.meshbridge.io" denied the request: {"; ".join(reviewed.denied)}',
                where=f"pod {workload.key}", fix="accept the loss in a BypassPolicy, or let Envoy see the port",
            )  # fmt: skip
        warnings += reviewed.warnings
    return warnings


def _documents(path: Path) -> list[Document]:
    """The objects of a file; one that cannot be read is the controller's to name."""
    try:
        return list(read_objects(path.read_bytes(), str(path)).documents)
    except (OSError, YamlError):
        return []
