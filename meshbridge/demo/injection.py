"""From the pod a person wrote to the pod the kubelet runs: Istio's injection decision and the containers it adds."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from meshbridge.demo import istio_init

INJECT = "sidecar.istio.io/inject"
STATUS = "sidecar.istio.io/status"
PROBE_PORT = 15020
# The mesh's proxyMetadata: without it istio-init writes no IPv6 rules for a pod whose first address is IPv4.
DUAL_STACK = {"name": "ISTIO_DUAL_STACK", "value": "true"}
_FALSE = ("0", "f", "F", "false", "FALSE", "False")


def wants_sidecar(pod: Mapping[str, Any], namespace_labels: Mapping[str, str]) -> bool:
    """Whether the injector adds a sidecar: the namespace is labelled, the pod has not opted out, nor uses hostNetwork.

    The pod's label beats its annotation.
    """
    metadata, spec = pod.get("metadata", {}), pod.get("spec", {})
    if spec.get("hostNetwork"):
        return False
    choice = (metadata.get("labels") or {}).get(INJECT, (metadata.get("annotations") or {}).get(INJECT))
    if choice is not None:
        return str(choice) not in _FALSE
    return namespace_labels.get("istio-injection") == "enabled"


def inject(pod: Mapping[str, Any], namespace_labels: Mapping[str, str]) -> dict[str, Any]:
    """The final pod: unchanged when it gets no sidecar, else with istio-init, istio-proxy and rewritten probes.

    An istio-init that the pod has already keeps its arguments, whatever the annotations say.

    Raises:
        InjectionError: An annotation that Istio's injector refuses.
    """
    final = copy.deepcopy(dict(pod))
    if not wants_sidecar(final, namespace_labels):
        return final
    metadata, spec = final["metadata"], final["spec"]
    annotations = metadata.setdefault("annotations", {}) or {}
    name = f"{metadata.get('namespace', '')}/{metadata.get('name', '')}"
    arguments = istio_init.render({key: str(value) for key, value in annotations.items()}, name)
    written = any(container.get("name") == "istio-init" for container in spec.get("initContainers", ()))
    if annotations.get(istio_init.MODE_ANNOTATION) != "NONE" and not written:
        init = {"name": "istio-init", "args": list(arguments), "env": [DUAL_STACK]}
        spec.setdefault("initContainers", []).append(init)
    probes = _rewrite_probes(spec)
    ports = [{"name": "http-envoy-prom", "containerPort": 15090, "protocol": "TCP"}]
    user = {"runAsUser": 1337, "runAsGroup": 1337}
    env = [DUAL_STACK]
    if probes:
        env += [{"name": "ISTIO_KUBE_APP_PROBERS", "value": json.dumps(probes, sort_keys=True)}]
    proxy = {"name": "istio-proxy", "securityContext": user, "ports": ports, "env": env}
    spec["containers"] = [container for container in spec["containers"] if container.get("name") != "istio-proxy"] + [
        proxy
    ]
    annotations[STATUS] = json.dumps(
        {"initContainers": ["istio-init"], "containers": ["istio-proxy"], "revision": "default"}
    )
    metadata["annotations"] = annotations
    metadata.setdefault("labels", {})["security.istio.io/tlsMode"] = "istio"
    return final


def _rewrite_probes(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Point every HTTP probe at the sidecar's agent, which asks the application itself; return what it has to ask.

    Spec: istio pkg/kube/inject/app_probe.go.
    """
    asked = {}
    for container in spec["containers"]:
        for kind, suffix in (("readinessProbe", "readyz"), ("livenessProbe", "livez"), ("startupProbe", "startupz")):
            probe = container.get(kind)
            if probe and "httpGet" in probe:
                path = f"/app-health/{container['name']}/{suffix}"
                names = {port.get("name"): port["containerPort"] for port in container.get("ports", ())}
                port = probe["httpGet"]["port"]
                asked[path] = {"path": probe["httpGet"].get("path", "/"), "port": names.get(port, port)}
                probe["httpGet"] = {"path": path, "port": PROBE_PORT}
    return asked
