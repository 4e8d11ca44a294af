"""What the harness remembers about each pod and component, on disk before it exists, so that `down` finds all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Self

from meshbridge.demo import store
from meshbridge.demo.layout import COMPONENTS, NODES, PODS, NodeLayout, pod_interface, pod_netns
from meshbridge.demo.network import PodNetwork
from meshbridge.demo.processes import ProcessId


class Stage(StrEnum):
    """How far a pod has come; what is neither is still being made, or was left so."""

    CREATING = "creating"
    RUNNING = "running"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class PodRecord:
    """A pod as the kubelet made it. ``digest`` is that of the spec it was made from."""

    namespace: str
    name: str
    uid: str
    digest: str
    node: str
    ipv4: str
    ipv6: str
    pod: Mapping[str, Any] = field(hash=False)
    processes: Mapping[str, ProcessId] = field(default_factory=dict, hash=False)
    stage: Stage = Stage.CREATING
    ready: bool = False
    restarts: int = 0
    message: str = ""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def layout(self) -> NodeLayout:
        return NODES[self.node]

    @property
    def netns(self) -> str:
        return pod_netns(self.namespace, self.name)

    @property
    def network(self) -> PodNetwork:
        return PodNetwork(self.netns, pod_interface(self.uid), IPv4Address(self.ipv4), IPv6Address(self.ipv6))

    @property
    def service_account(self) -> str:
        return str(self.pod["spec"].get("serviceAccountName") or "default")

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """The application's containers."""
        return [container for container in self.pod["spec"]["containers"] if container["name"] != "istio-proxy"]

    @property
    def proxy(self) -> Mapping[str, Any] | None:
        """The istio-proxy container; None when the pod has no sidecar."""
        return next(
            (container for container in self.pod["spec"]["containers"] if container["name"] == "istio-proxy"), None
        )

    @property
    def init_arguments(self) -> tuple[str, ...] | None:
        """Arguments of the istio-init container; None when there is none."""
        for container in self.pod["spec"].get("initContainers", ()):
            if container["name"] == "istio-init":
                return tuple(container["args"])
        return None

    @property
    def sysctls(self) -> dict[str, str]:
        """Those of the pod's network namespace."""
        asked = (self.pod["spec"].get("securityContext") or {}).get("sysctls", ())
        return {item["name"]: str(item["value"]) for item in asked if item["name"].startswith("net.")}

    @property
    def path(self) -> Path:
        return PODS / f"{self.namespace}_{self.name}.json"

    def save(self) -> Self:
        store.write(self.path, json.dumps(asdict(self)).encode(), 0o600)
        return self

    def with_process(self, name: str, process: ProcessId) -> PodRecord:
        return replace(self, processes={**self.processes, name: process})


def load_pods() -> dict[str, PodRecord]:
    """Every recorded pod by namespace/name."""
    records = {}
    for path in sorted(PODS.glob("*.json")):
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:  # removed since it was listed
            continue
        data["processes"] = {name: ProcessId(**process) for name, process in data["processes"].items()}
        data["stage"] = Stage(data["stage"])
        record = PodRecord(**data)
        records[record.key] = record
    return records


def save_component(name: str, process: ProcessId) -> None:
    store.write(COMPONENTS / f"{name}.json", json.dumps(asdict(process)).encode())


def load_components() -> dict[str, ProcessId]:
    """The last known process of every component: the controller, and each node's agent and authz."""
    return {path.stem: ProcessId(**json.loads(path.read_text())) for path in sorted(COMPONENTS.glob("*.json"))}
