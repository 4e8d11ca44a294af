"""How far a Deployment or DaemonSet is on its way to what was asked for, and what it waits for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshbridge.install.manifests import Object, component_of

_IN_ORDER: Final = frozenset({"ContainerCreating", "PodInitializing"})
"""Reasons to wait that say nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One workload. ``ready`` counts pods of the version asked for that serve; ``waits_for`` are sentences."""

    component: str
    kind: str
    name: str
    image: str
    wanted: int
    ready: int
    complete: bool
    waits_for: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.ready} of {self.wanted} ready"


def rollout_of(workload: Object, pods: Iterable[Object]) -> Rollout:
    """Where a workload stands, by its status and by its pods.

    Complete means that the controller of its kind has seen the newest version of it, that every pod is of that version
    and serves, and that none of an older one is left.
    """
    status, spec = workload.get("status") or {}, workload["spec"]
    seen = status.get("observedGeneration", 0) >= workload["metadata"].get("generation", 0)
    if workload["kind"] == "DaemonSet":
        wanted, updated = status.get("desiredNumberScheduled", 0), status.get("updatedNumberScheduled", 0)
        serving, all_of_it = status.get("numberAvailable", 0), status.get("currentNumberScheduled", 0)
        # a set that was just made has no status yet, and one for no node at all is not what anybody wants
        seen = seen and wanted > 0
    else:
        wanted, updated = spec.get("replicas", 1), status.get("updatedReplicas", 0)
        serving, all_of_it = status.get("availableReplicas", 0), status.get("replicas", 0)
    complete = seen and updated >= wanted and serving >= wanted and all_of_it <= wanted
    component = component_of(workload)
    own = [pod for pod in pods if component_of(pod) == component]
    waits = () if complete else tuple(dict.fromkeys(text for pod in own for text in waits_for(pod)))
    image = spec["template"]["spec"]["containers"][0].get("image", "")
    ready = min(updated, serving, wanted) if seen else 0
    return Rollout(component, workload["kind"], workload["metadata"]["name"], image, wanted, ready, complete, waits)


def waits_for(pod: Object) -> list[str]:
    """Why a pod does not serve, as far as its status tells; empty while it is merely on its way."""
    name, node = pod["metadata"]["name"], pod.get("spec", {}).get("nodeName") or ""
    where = f"pod {name}" + (f" on {node}" if node else "")
    status = pod.get("status") or {}
    said = []
    for condition in _mappings(status.get("conditions")):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            said.append(f"{where}: not scheduled: {_sentence(condition.get('message'))}")
    for container in (
        *_mappings(status.get("initContainerStatuses")),
        *_mappings(status.get("containerStatuses")),
    ):
        state = container.get("state") or {}
        waiting = state.get("waiting") or {}
        if waiting.get("reason") and waiting["reason"] not in _IN_ORDER:
            last = (container.get("lastState") or {}).get("terminated") or {}
            code = f", last ended with {last['exitCode']}" if "exitCode" in last else ""
            said.append(f"{where}: {waiting['reason']}{code}: {_sentence(waiting.get('message'))}")
    return said


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _sentence(value: Any) -> str:
    return " ".join(str(value or "no reason given").split())[:300]
