"""What the author of a pod reads when its bypasses lose something."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from meshbridge.bypass.admission import Admission, review
from meshbridge.bypass.inventory import inventory
from meshbridge.kube.objects import read_objects

POD = """
apiVersion: v1
kind: Namespace
metadata: {name: finance, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Pod
metadata:
  name: api
  namespace: finance
  labels: {app: api}
  annotations: {traffic.sidecar.istio.io/excludeInboundPorts: "%s"}
spec: {containers: [{name: app, ports: [{containerPort: 8080}]}]}
---
"""


def reviewed(policy: str = "", ports: str = "8080") -> Admission:
    text = POD % ports
    if policy:
        head = "apiVersion: meshbridge.io/v1alpha1\nkind: BypassPolicy\nmetadata: {name: p, namespace: finance}\n"
        text += f"{head}spec: {policy}\n"
    found = inventory(read_objects(text.encode(), "all.yaml").documents, now=datetime(2026, 11, 24, tzinfo=UTC))
    (workload,) = found.workloads
    return review(workload, found)


def test_without_a_policy_the_author_is_warned_of_what_is_lost_and_weakened() -> None:
    (warning,) = reviewed().warnings
    assert warning == (
        "inbound TCP 8080 bypasses Envoy by excludeInboundPorts "
        '(annotation traffic.sidecar.istio.io/excludeInboundPorts: "8080"): '
        "loses encryption, which no BypassPolicy accepts; weakened: peer-certificate, telemetry"
    )


OUTCOMES = {
    "accepted": ("{accept: [encryption], reason: r}", 0, 0),
    "not accepted, warned": ("{}", 0, 1),
    "not accepted, compensated": ("{otherwise: compensate}", 0, 0),
    "not accepted, denied": ("{otherwise: deny}", 1, 0),
    "a route not allowed": ("{routes: [], otherwise: deny}", 1, 0),
    "a policy nobody understands": ("{mode: off}", 1, 1),
}


@pytest.mark.parametrize(("policy", "denied", "warnings"), OUTCOMES.values(), ids=OUTCOMES.keys())
def test_what_policies_let_in(policy: str, denied: int, warnings: int) -> None:
    found = reviewed(policy)
    assert (len(found.denied), len(found.warnings)) == (denied, warnings)


def test_a_pod_that_never_starts_is_said_to() -> None:
    assert any("never starts" in warning for warning in reviewed(ports="090").warnings)
