"""Istio from its own charts: istiod with its injector, validation and CA. Its images are images.py's."""

from __future__ import annotations

from typing import Any

import yaml
from control_plane import built
from host import run
from images import ISTIO_HUB, ISTIO_TAG
from kubectl import Kubectl, Object, wait_until

NAMESPACE = "istio-system"
ROLLED_OUT_S = 120


def operator(settings: dict[str, Any] | None = None) -> Object:
    """What is installed, in the form of istioctl. ``settings`` are put over spec.values.

    Upstream Envoy has none of Istio's own filters (metadata exchange, its ALPN and stats), so they are off.
    """
    values: dict[str, Any] = {
        "global": {"proxy": {"resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
                             "readinessInitialDelaySeconds": 0, "readinessPeriodSeconds": 1},
                   "proxy_init": {"resources": {"requests": {"cpu": "10m", "memory": "32Mi"}}}},
        "pilot": {
            "autoscaleEnabled": False,
            "resources": {"requests": {"cpu": "10m", "memory": "128Mi"}},
            "env": {"PILOT_ENABLE_METADATA_EXCHANGE": "false", "PILOT_ENABLE_ALPN_FILTER": "false"},
        },
        "telemetry": {"enabled": False},
        "sidecarInjectorWebhook": {"rewriteAppHTTPProbe": True},
    }  # fmt: skip
    for name, value in (settings or {}).items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return {
        "apiVersion": "install.istio.io/v1alpha1", "kind": "IstioOperator",
        "metadata": {"name": "e2e", "namespace": NAMESPACE},
        "spec": {"profile": "minimal", "hub": ISTIO_HUB, "tag": ISTIO_TAG, "values": values,
                 "meshConfig": {
                     "accessLogFile": "/dev/stdout",
                     # What tests read of a sidecar's own statistics; Istio leaves most of them out.
                     "defaultConfig": {"proxyStatsMatcher": {"inclusionRegexps": ["listener.*downstream_cx_total"]}},
                 }},
    }  # fmt: skip


def manifest(settings: dict[str, Any] | None = None) -> list[Object]:
    """Istio's objects as its own charts render them."""
    istio = built("istio")
    text = run(
        [istio / "bin/istioctl", "manifest", "generate", "--manifests", istio / "share/manifests", "-f", "-"],
        stdin=yaml.safe_dump(operator(settings)), where="istioctl",
    ).stdout  # fmt: skip
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def install(kubectl: Kubectl, settings: dict[str, Any] | None = None) -> None:
    """Apply Istio; it may still be starting when this returns."""
    objects = manifest(settings)
    first = [each for each in objects if each["kind"] in ("CustomResourceDefinition", "Namespace")]
    if not any(each["kind"] == "Namespace" for each in objects):
        first.append({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    kubectl.apply_all(first)
    kubectl.apply_all(each for each in objects if each not in first)


def wait_ready(kubectl: Kubectl) -> None:
    """Return when istiod serves and its webhook injects."""
    kubectl.roll_out("deployment/istiod", NAMESPACE, ROLLED_OUT_S)
    pod = {"apiVersion": "v1", "kind": "Pod",
           "metadata": {"name": "probe", "labels": {"sidecar.istio.io/inject": "true"}},
           "spec": {"containers": [{"name": "probe", "image": "none"}]}}  # fmt: skip

    def injects() -> bool:
        done = kubectl.done(
            "create", "--dry-run=server", "-o", "yaml", "-f", "-", stdin=yaml.safe_dump(pod), check=False
        )
        return done.returncode == 0 and "istio-proxy" in done.stdout

    wait_until(injects, "istiod's webhook injects", ROLLED_OUT_S, lambda: kubectl.state(NAMESPACE))
