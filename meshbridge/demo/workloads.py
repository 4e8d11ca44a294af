"""Which pods should run where: the parts of the Deployment controller and the scheduler that the sample mesh needs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshbridge.demo.injection import inject


@dataclass(frozen=True, slots=True)
class DesiredPod:
    """A pod to run: its final spec, and a digest that changes when a running pod has to be replaced."""

    namespace: str
    name: str
    pod: Mapping[str, Any] = field(hash=False)
    digest: str = ""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def node(self) -> str:
        return str(self.pod["spec"]["nodeName"])


def desired_pods(
    objects: Iterable[Mapping[str, Any]], nodes: Sequence[str]
) -> tuple[dict[str, DesiredPod], dict[str, str]]:
    """Every pod that the objects ask for, by namespace/name, and why others cannot be.

    A pod keeps its node: where the manifest names none, its own name decides.
    """
    objects = tuple(objects)
    namespaces = {
        item["metadata"]["name"]: item["metadata"].get("labels") or {}
        for item in objects
        if item.get("kind") == "Namespace"
    }
    pods: dict[str, DesiredPod] = {}
    problems: dict[str, str] = {}
    for pod in _pods(objects):
        metadata = pod["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        key = f"{namespace}/{name}"
        try:
            if namespace not in namespaces:
                raise ValueError(f"namespace {namespace!r} does not exist")
            labels = {**namespaces[namespace], "kubernetes.io/metadata.name": namespace}
            _refuse_what_is_not_played(pod["spec"])
            final = inject(_schedule(pod, nodes), labels)
            digest = hashlib.sha256(json.dumps(final, sort_keys=True).encode()).hexdigest()
            pods[key] = DesiredPod(namespace, name, final, digest)
        except Exception as error:  # one bad pod must not stop the others; it is shown with its reason
            problems[key] = str(error) or type(error).__name__
    return pods, problems


def _refuse_what_is_not_played(spec: Mapping[str, Any]) -> None:
    if spec.get("hostNetwork"):
        raise ValueError("hostNetwork pods are not played here; leave hostNetwork out")
    foreign = [item["name"] for item in spec.get("initContainers", ()) if item["name"] != "istio-init"]
    if foreign:
        raise ValueError(f"init containers are not played here; leave out {', '.join(foreign)}")


def _pods(objects: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for item in objects:
        if item.get("kind") == "Pod":
            pod = copy.deepcopy(dict(item))
            pod["metadata"].setdefault("namespace", "default")
            yield pod
        elif item.get("kind") == "Deployment":
            yield from _replicas(item)


def _replicas(deployment: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    metadata, spec = deployment["metadata"], deployment["spec"]
    template = spec["template"]
    digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]
    for number in range(spec.get("replicas", 1)):
        pod_metadata = copy.deepcopy(template.get("metadata") or {})
        pod_metadata["name"] = f"{metadata['name']}-{digest}-{number}"
        pod_metadata["namespace"] = metadata.get("namespace", "default")
        pod_metadata["labels"] = {**(pod_metadata.get("labels") or {}), "pod-template-hash": digest}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": pod_metadata, "spec": copy.deepcopy(template["spec"])}


def _schedule(pod: dict[str, Any], nodes: Sequence[str]) -> dict[str, Any]:
    spec = pod["spec"]
    wanted = spec.get("nodeName") or (spec.get("nodeSelector") or {}).get("kubernetes.io/hostname")
    if wanted is None:
        name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        wanted = nodes[hashlib.sha256(name.encode()).digest()[0] % len(nodes)]
    if wanted not in nodes:
        raise ValueError(f"node {wanted!r} does not exist; nodes are {', '.join(nodes)}")
    spec["nodeName"] = wanted
    return pod
