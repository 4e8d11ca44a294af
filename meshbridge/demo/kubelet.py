"""The kubelet's part, as a background process: it makes the pods that the manifests ask for, and keeps them running.

It also keeps the components running, as a DaemonSet would. All it knows is in the records on disk, so that a new one
goes on where a killed one stopped. One process plays the kubelets of all nodes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import Any

import structlog
import yaml

from meshbridge.demo import components, names, pods, records, store
from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import KUBELET, KUBELET_STATUS, MANIFESTS, NODES
from meshbridge.demo.records import PodRecord
from meshbridge.demo.workloads import DesiredPod, desired_pods

log = structlog.get_logger()

TICK_S = 0.1
PROBE_PERIOD_S = 5.0
FIRST_POD_ADDRESS = 10
_BACKOFF_S = (1.0, 2.0, 5.0, 10.0)
_SETTLED_S = 30.0
STORE = store.Store(MANIFESTS)
_LOCK_NAME = "\0meshbridge-demo-kubelet"


@dataclass(slots=True)
class Backoff:
    """When something that keeps failing may be tried again."""

    failures: int = 0
    last: float = 0.0

    def due(self, now: float) -> bool:
        return not self.failures or now - self.last >= _BACKOFF_S[min(self.failures, len(_BACKOFF_S)) - 1]

    def tried(self, now: float) -> None:
        self.failures = 1 if now - self.last > _SETTLED_S else self.failures + 1
        self.last = now


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the manifests of one ``version`` ask for; reading it ten times a second would take a fifth of a core."""

    version: object
    objects: Sequence[Mapping[str, Any]]
    desired: Mapping[str, DesiredPod]
    refused: Mapping[str, str]


@dataclass(slots=True)
class Kubelet:
    """One reconcile loop. ``jobs`` are the pods that a worker thread is making or removing right now."""

    workers: ThreadPoolExecutor
    wanted: Wanted | None = None
    jobs: dict[str, Future[None]] = field(default_factory=dict)
    backoffs: dict[str, Backoff] = field(default_factory=dict)
    probed: dict[str, float] = field(default_factory=dict)
    stopping: bool = False

    def run(self) -> None:
        """Reconcile until told to stop. Jobs under way are left as they are: `down` finds them in the records."""
        register_nodes()
        while not self.stopping:
            try:
                self.sync(time.monotonic())
            except Exception:  # whatever a pass stumbles over, the pods that run are not to be left alone
                log.exception("pass.failed")
            time.sleep(TICK_S)

    def sync(self, now: float) -> None:
        """One pass: components, then pods to remove, to make, to restart and to probe; then a report of what is."""
        self._keep_components(now)
        version = STORE.version()
        if self.wanted is None or self.wanted.version != version:
            objects = STORE.objects()
            self.wanted = Wanted(version, objects, *desired_pods(objects, tuple(NODES)))
        desired, refused = self.wanted.desired, self.wanted.refused
        self.jobs = {key: job for key, job in self.jobs.items() if not job.done()}
        existing = records.load_pods()
        for key, record in existing.items():
            if key in self.jobs:
                continue
            if key not in desired or desired[key].digest != record.digest:
                self._submit(key, pods.remove, record)
            elif record.stage is not records.Stage.RUNNING:
                if self._backoff(key).due(now):  # left half made, by a failure or by a kubelet that was killed
                    self._submit(key, pods.remove, record)
            else:
                self._tend(record, now)
        for key, pod in desired.items():
            if key not in existing and key not in self.jobs and self._backoff(key).due(now):
                self._backoff(key).tried(now)
                record = allocate(pod, existing).save()
                existing[key] = record
                self._submit(key, self._create, record)
        names.write_hosts(self.wanted.objects, existing.values())
        report(existing, desired, refused)

    def _create(self, record: PodRecord) -> None:
        try:
            pods.create(record)
            log.info("pod.started", pod=record.key, node=record.node, address=record.ipv4)
        except Exception as error:  # whatever it was: shown, and tried again from nothing
            log.error("pod.failed", pod=record.key, error=str(error))
            current = records.load_pods().get(record.key, record)
            replace(current, stage=records.Stage.FAILED, message=str(error)).save()

    def _tend(self, record: PodRecord, now: float) -> None:
        for name in pods.ended(record):
            backoff = self._backoff(f"{record.key}/{name}")
            if backoff.due(now):
                backoff.tried(now)
                log.warning("container.restarted", pod=record.key, container=name)
                record = pods.start_container(replace(record, restarts=record.restarts + 1), name)
        if now - self.probed.get(record.key, 0.0) >= PROBE_PERIOD_S:
            self.probed[record.key] = now
            ready = pods.probe(record)
            if ready != record.ready:
                record = replace(record, ready=ready).save()
                pods.write_status(record, "Running")
                log.info("pod.readiness_changed", pod=record.key, ready=ready)

    def _keep_components(self, now: float) -> None:
        known = records.load_components()
        for component in components.all_components():
            process = known.get(component.name)
            backoff = self._backoff(component.name)
            if (process is None or not process.alive) and component.can_start() and backoff.due(now):
                backoff.tried(now)
                log.info("component.started", component=component.name, again=process is not None)
                components.start_component(component)
            elif process is not None and process.alive and not backoff.failures:
                backoff.tried(now)

    def _backoff(self, key: str) -> Backoff:
        return self.backoffs.setdefault(key, Backoff())

    def _submit(self, key: str, job: Callable[[PodRecord], None], record: PodRecord) -> None:
        self.jobs[key] = self.workers.submit(job, record)


def main() -> None:
    """Be the kubelet until SIGTERM.

    Raises:
        DemoError: Another one runs.
    """
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(_LOCK_NAME)
    except OSError as error:
        raise DemoError("another kubelet runs", where="demo", fix="`meshbridge demo down` ends it") from error
    kubelet = Kubelet(ThreadPoolExecutor(max_workers=4, thread_name_prefix="pod"))

    def stop(_number: int, _frame: Any) -> None:
        kubelet.stopping = True

    signal.signal(signal.SIGTERM, stop)
    kubelet.run()
    os._exit(0)  # not waiting for the worker threads


def register_nodes() -> None:
    """Report every node as its kubelet does: its addresses and its range of pod addresses."""
    nodes = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name, "labels": {"kubernetes.io/hostname": node.name}},
            "spec": {"podCIDR": str(node.pods_ipv4), "podCIDRs": [str(node.pods_ipv4), str(node.pods_ipv6)]},
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": str(node.ipv4.ip)},
                    {"type": "InternalIP", "address": str(node.ipv6.ip)},
                    {"type": "Hostname", "address": node.name},
                ]
            },
        }
        for node in NODES.values()
    ]
    store.write(KUBELET / "nodes.yaml", yaml.safe_dump_all(nodes, sort_keys=False).encode())


def allocate(pod: DesiredPod, existing: Mapping[str, PodRecord]) -> PodRecord:
    """A record for a new pod, with addresses that no pod of the node has."""
    node = NODES[pod.node]
    taken = {IPv4Address(record.ipv4) for record in existing.values()}
    hosts = range(FIRST_POD_ADDRESS, node.pods_ipv4.num_addresses - 1)
    number = next((number for number in hosts if node.pods_ipv4[number] not in taken), None)
    if number is None:
        raise DemoError(f"no free address in {node.pods_ipv4}", where=f"pod {pod.key}")
    return PodRecord(
        namespace=pod.namespace,
        name=pod.name,
        uid=str(uuid.uuid4()),
        digest=pod.digest,
        node=pod.node,
        ipv4=str(node.pods_ipv4[number]),
        ipv6=str(node.pods_ipv6[number]),
        pod=pod.pod,
    )


def report(existing: Mapping[str, PodRecord], desired: Mapping[str, DesiredPod], refused: Mapping[str, str]) -> None:
    """Write what each wanted pod is doing, for the verbs that wait for it."""
    status: dict[str, dict[str, Any]] = {}
    for key in sorted({*desired, *existing}):
        record = existing.get(key)
        status[key] = {
            "digest": record.digest if record else "",
            "ready": bool(record and record.ready),
            "message": record.message if record else "",
        }
    for key, reason in refused.items():
        status[key] = {"digest": "", "ready": False, "message": reason, "refused": True}
    text = json.dumps(status, indent=1).encode()
    if not KUBELET_STATUS.exists() or KUBELET_STATUS.read_bytes() != text:
        store.write(KUBELET_STATUS, text)
