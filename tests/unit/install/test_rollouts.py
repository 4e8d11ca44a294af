"""How far a workload is, from what the API server says of it and of its pods."""

from __future__ import annotations

from typing import Any

import pytest

from meshbridge.install.rollout import rollout_of

LABELS = {"app.kubernetes.io/component": "agent"}


def workload(kind: str, status: dict[str, int], generation: int = 2) -> dict[str, Any]:
    metadata = {"name": "w", "generation": generation, "labels": LABELS}
    template = {"spec": {"containers": [{"image": "r/mb:1"}]}}
    return {"kind": kind, "metadata": metadata, "spec": {"replicas": 2, "template": template}, "status": status}


def daemon_set(seen: int, current: int, updated: int, available: int) -> dict[str, Any]:
    return workload("DaemonSet", {
        "observedGeneration": seen, "desiredNumberScheduled": 3, "currentNumberScheduled": current,
        "updatedNumberScheduled": updated, "numberAvailable": available,
    })  # fmt: skip


def deployment(seen: int, replicas: int, updated: int, available: int) -> dict[str, Any]:
    return workload("Deployment", {
        "observedGeneration": seen, "replicas": replicas, "updatedReplicas": updated, "availableReplicas": available,
    })  # fmt: skip


CASES = {
    "every node": (daemon_set(2, 3, 3, 3), 3, True),
    "one node is missing": (daemon_set(2, 3, 3, 2), 2, False),
    "one node has the old version": (daemon_set(2, 3, 2, 3), 2, False),
    "nobody has looked yet": (daemon_set(1, 3, 3, 3), 0, False),
    "no node at all": (workload("DaemonSet", {"observedGeneration": 2}), 0, False),
    "both replicas": (deployment(2, 2, 2, 2), 2, True),
    "an old replica is still there": (deployment(2, 3, 2, 3), 2, False),
    "a replica does not serve": (deployment(2, 2, 2, 1), 1, False),
    "a Deployment that was just made": (workload("Deployment", {}), 0, False),
}


@pytest.mark.parametrize(("given", "ready", "complete"), CASES.values(), ids=CASES.keys())
def test_rollouts(given: dict[str, Any], ready: int, complete: bool) -> None:
    found = rollout_of(given, ())
    assert (found.ready, found.complete, found.image) == (ready, complete, "r/mb:1")


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p", "labels": LABELS}, "spec": {"nodeName": "n"}, "status": status}


WAITS = {
    "it is not scheduled": (
        pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "no free ports"}]), "no free ports",
    ),
    "its image is not there": (
        pod(containerStatuses=[{"state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}}}]),
        "ErrImagePull: not found",
    ),
    "it crashes": (
        pod(containerStatuses=[{"state": {"waiting": {"reason": "CrashLoopBackOff"}},
                                "lastState": {"terminated": {"exitCode": 1}}}]),
        "CrashLoopBackOff, last ended with 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "said"), WAITS.values(), ids=WAITS.keys())
def test_what_a_rollout_waits_for(given: dict[str, Any], said: str) -> None:
    (text,) = rollout_of(daemon_set(2, 3, 3, 2), [given]).waits_for
    assert text.startswith("pod p on n: ")
    assert said in text


def test_a_pod_that_is_on_its_way_is_no_fault() -> None:
    starting = pod(containerStatuses=[{"state": {"waiting": {"reason": "ContainerCreating"}}}])
    assert rollout_of(daemon_set(2, 3, 3, 2), [starting]).waits_for == ()
