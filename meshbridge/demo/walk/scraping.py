"""The second half's mesh: Debian's Prometheus, what it scrapes, and what it says of that itself."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from meshbridge.demo import lifecycle, pods, store
from meshbridge.demo.complete import completed
from meshbridge.demo.errors import DemoError
from meshbridge.demo.istio_init import TRAFFIC
from meshbridge.demo.layout import APPLICATION_UID, DEMO, INPUTS, SAMPLE_MANIFESTS
from meshbridge.demo.netns import http_get
from meshbridge.demo.records import PodRecord
from meshbridge.demo.waiting import poll
from meshbridge.demo.walk.context import Walk

PROMETHEUS = "monitoring/prometheus"
NEIGHBOUR = "monitoring/alertmanager"
LEDGER, CAMPAIGNS, STATEMENTS = "finance/ledger", "marketing/campaigns", "finance/statements"
FORGOTTEN, CANARY = "marketing/forgotten", "monitoring/canary"
CONTRADICTORY, OCTAL = "finance/contradictory", "finance/octal"
SCRAPED = (LEDGER, CAMPAIGNS)  # whose policies ask for nothing that only a request shows
METRICS_PORT, API_PORT, WEB_PORT = 8080, 9000, 9090
METRICS_PATH = "/metrics"
SCRAPE_INTERVAL_S = 1.0

MANIFESTS = SAMPLE_MANIFESTS / "scraping"
CCNP = INPUTS / "ccnp-prometheus-scrape-access.yaml"
HALF_BYPASSES = MANIFESTS / "half-bypasses.yaml"
MISLEADING = MANIFESTS / "misleading.yaml"
_FILES = ("monitoring.yaml", "policies.yaml", "targets.yaml")
_STATE = DEMO / "prometheus"
_TARGETS = _STATE / "targets.json"
_HEALTH_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Health:
    """What Prometheus says of one target; ``scraped_at`` is when it last tried (seconds since 1970)."""

    up: bool
    error: str
    scraped_at: float

    def __str__(self) -> str:
        return "up" if self.up else f"down ({self.error})"


def bring(walk: Walk, *, exclusions: bool) -> None:
    """Prometheus and the pods it is to scrape run, ready; Prometheus has no targets yet when it is new.

    Without ``exclusions`` they carry no ``traffic.sidecar.istio.io`` annotation, so that their sidecars see all.
    """
    _prepare()
    with tempfile.TemporaryDirectory(prefix="mb-demo-") as directory:
        for name, objects in sources().items():
            path = Path(directory) / name
            kept = objects if exclusions else [without_exclusions(item) for item in objects]
            path.write_text(yaml.safe_dump_all(kept, sort_keys=False))
            # a file with comments and anchors stays as it is where nothing has to be taken out
            original = MANIFESTS / name
            lifecycle.STORE.apply(original if exclusions and original.exists() else path)
    lifecycle.wait_pods(walk.report.say)


def sources() -> dict[str, list[dict[str, Any]]]:
    """The objects of this half by file; the inputs' Deployment is completed."""
    files = {name: list(yaml.safe_load_all((MANIFESTS / name).read_text())) for name in _FILES}
    return {**files, "prometheus-deployment.yaml": [prometheus_deployment()]}


def prometheus_deployment() -> dict[str, Any]:
    """The inputs' Deployment, with what it leaves out and nothing changed."""
    given = yaml.safe_load((INPUTS / "prometheus-deployment.yaml").read_text())
    return completed(given, yaml.safe_load((MANIFESTS / "prometheus-additions.yaml").read_text()))


def without_exclusions(item: Mapping[str, Any]) -> dict[str, Any]:
    """The object without the annotations that take ports out of a sidecar, its own and its template's."""
    found = dict(item)
    if isinstance(annotations := found.get("annotations"), Mapping):
        found["annotations"] = {key: value for key, value in annotations.items() if not key.startswith(TRAFFIC)}
    for key in ("metadata", "spec", "template"):
        if isinstance(inner := found.get(key), Mapping):
            found[key] = without_exclusions(inner)
    return found


def set_targets(records: Iterable[PodRecord]) -> None:
    """Prometheus scrapes these pods from now on (it watches the file)."""
    groups = [{"targets": [f"{r.ipv4}:{METRICS_PORT}"], "labels": {"pod": r.key}} for r in records]
    store.write(_TARGETS, json.dumps(groups).encode())


def health(walk: Walk) -> dict[str, Health]:
    """What Prometheus's own API says of its targets, by pod; empty while it does not answer."""
    answer = http_get(walk.pod(PROMETHEUS).netns, "127.0.0.1", WEB_PORT, "/api/v1/targets?state=active")
    return read_health(answer.body) if answer.status == 200 else {}


def read_health(body: bytes) -> dict[str, Health]:
    """The answer of ``/api/v1/targets``; targets that were not scraped yet are left out."""
    found = {}
    for target in json.loads(body)["data"]["activeTargets"]:
        if target["health"] != "unknown":
            at = datetime.fromisoformat(target["lastScrape"]).timestamp()
            found[target["labels"]["pod"]] = Health(target["health"] == "up", target["lastError"], at)
    return found


def wait_health(walk: Walk, pods_named: Sequence[str], up: bool, since: float) -> dict[str, Health]:
    """What Prometheus says of these pods, as soon as all are ``up`` (or all down) by a scrape after ``since``.

    What it said last, when that does not come.
    """
    last: dict[str, Health] = {}

    def settled() -> bool:
        last.clear()
        last.update({name: said for name, said in health(walk).items() if name in pods_named})
        return len(last) == len(pods_named) and all(h.up is up and h.scraped_at > since for h in last.values())

    poll(settled, _HEALTH_TIMEOUT_S)
    return last


def health_text(found: Mapping[str, Health], wanted: Sequence[str]) -> str:
    return ", ".join(f"{name} {found.get(name, 'unknown')}" for name in wanted)


def _prepare() -> None:
    binary = pods.PROMETHEUS_CACHE / "usr" / "bin" / "prometheus"
    if not os.access(binary, os.X_OK):
        raise DemoError("Debian's prometheus is not there", where=str(binary), fix="run `make setup`")
    data = _STATE / "data"
    data.mkdir(parents=True, exist_ok=True)
    os.chown(data, APPLICATION_UID, APPLICATION_UID)
    shutil.copyfile(MANIFESTS / "prometheus.yml", _STATE / "prometheus.yml")
    if not _TARGETS.exists():
        set_targets([])
