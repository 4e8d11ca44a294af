"""What may stand in the way of an installation, from facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshbridge.install.preflight import (
    ClusterFacts,
    Finding,
    NodeFacts,
    Outcome,
    cluster_findings,
    failed,
    node_findings,
)


def node(name: str, kernel: str = "6.1.0-1-amd64", **info: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "status": {"nodeInfo": {"kernelVersion": kernel, **info}}}


def istiod(image: str) -> dict[str, Any]:
    return {"spec": {"template": {"spec": {"containers": [{"image": image}]}}}}


def named(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}, "webhooks": [{"rules": [{"resources": ["pods"]}]}]}


def custom(name: str, provider: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "shop"}, "spec": {"provider": {"name": provider}}}


GOOD = ClusterFacts(
    version="v1.34.4", nodes=[node("a"), node("b")], istiods=[istiod("registry.test/pilot:1.27.1")],
    mesh_configured=True, injector_configured=True, mutating=[named("istio-sidecar-injector")],
)  # fmt: skip
CILIUM = {"metadata": {"name": "cilium", "namespace": "kube-system"}}
CASES = {
    "an old API server": ({"version": "v1.29.3"}, "API server", Outcome.FAIL, "too old"),
    "an API server's version nobody can read": ({"version": "x"}, "API server", Outcome.WARN, "not understood"),
    "no rights": ({"missing_rights": ["create clusterroles"]}, "rights", Outcome.FAIL, "create clusterroles"),
    "an old kernel": ({"nodes": [node("a"), node("b", "4.19.0")]}, "kernel of b", Outcome.FAIL, "too old"),
    "an old kernel that will do": ({"nodes": [node("a"), node("b", "5.10.0")]}, "kernel of b", Outcome.OK, "clsact"),
    "one node": ({"nodes": [node("a")]}, "nodes", Outcome.WARN, "cannot share it"),
    "no node": ({"nodes": []}, "nodes", Outcome.FAIL, "none"),
    "another architecture": (
        {"nodes": [node("a"), node("b", architecture="s390x")]}, "architecture", Outcome.FAIL, "b: neither amd64",
    ),
    "Windows": (
        {"nodes": [node("a"), node("b", "10.0", operatingSystem="windows")]}, "operating system", Outcome.WARN, "b are",
    ),
    "no Istio": ({"istiods": []}, "Istio", Outcome.WARN, "no istiod"),
    "an old Istio": ({"istiods": [istiod("pilot:1.18.0")]}, "Istio", Outcome.FAIL, "too old"),
    "an Istio somebody built": ({"istiods": [istiod("pilot:ours")]}, "Istio", Outcome.OK, "istiod ours"),
    "no settings of the mesh": ({"mesh_configured": False}, "Istio", Outcome.WARN, "istio-system/istio:"),
    "no settings of the injector": ({"injector_configured": False}, "Istio", Outcome.WARN, "istio-sidecar-injector"),
    "Cilium enforces": ({"cilium": [CILIUM]}, "Cilium", Outcome.FAIL, "twice"),
    "Cilium does not": (
        {"cilium": [CILIUM], "cilium_config": {"enable-policy": "never"}}, "Cilium", Outcome.OK, "no policies",
    ),
    "another provider": ({"custom": [custom("p", "opa")]}, "CUSTOM providers", Outcome.WARN, "opa by shop/p"),
    "our provider": ({"custom": [custom("p", "meshbridge")]}, "CUSTOM providers", Outcome.OK, "no AuthorizationPolicy"),
    "somebody has our webhooks' name": (
        {"validating": [named("bypass.meshbridge.io")]}, "webhooks", Outcome.FAIL, "label",
    ),
    "our own webhooks": (
        {"validating": [named("bypass.meshbridge.io", **{"app.kubernetes.io/name": "meshbridge"})]},
        "webhooks", Outcome.OK, "no other",
    ),
    "a webhook that changes pods after ours": ({"mutating": [named("vault")]}, "webhooks", Outcome.WARN, "vault"),
    "a webhook that changes pods before ours": ({"mutating": [named("agent")]}, "webhooks", Outcome.OK, "no other"),
    "a namespace no agent may run in": (
        {"namespace": {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}},
        "namespace", Outcome.WARN, "restricted",
    ),
    "an installation": ({"installed": ["r/mb:1"]}, "installed", Outcome.OK, "r/mb:1"),
}  # fmt: skip


def one(findings: list[Finding], what: str) -> Finding:
    """The worst of that name."""
    return max((f for f in findings if f.what == what), key=lambda f: list(Outcome).index(f.outcome))


@pytest.mark.parametrize(("change", "what", "outcome", "text"), CASES.values(), ids=CASES.keys())
def test_findings_of_a_cluster(change: dict[str, Any], what: str, outcome: Outcome, text: str) -> None:
    findings = cluster_findings(replace(GOOD, **change))
    found = one(findings, what)
    assert (found.outcome, text in found.text) == (outcome, True), found
    assert failed(findings) is (outcome is Outcome.FAIL)
    assert found.fix or outcome is Outcome.OK or what == "operating system"


def test_a_cluster_in_which_nothing_stands_in_the_way() -> None:
    assert {f.outcome for f in cluster_findings(GOOD)} == {Outcome.OK}


NODE = NodeFacts(
    kernel="6.18.0", machine="x86_64",
    mounts=["bpf /sys/fs/bpf bpf rw 0 0", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0"],
    conflists={"10-ptp.conflist": ["ptp", "portmap"]},
)  # fmt: skip
NODES = {
    "an old kernel": ({"kernel": "4.19"}, "kernel", Outcome.FAIL),
    "tcx": ({}, "kernel", Outcome.OK),
    "no bpffs": ({"mounts": ["cgroup2 /sys/fs/cgroup cgroup2 rw 0 0"]}, "bpffs", Outcome.FAIL),
    "another file system there": ({"mounts": ["t /sys/fs/bpf tmpfs rw 0 0"]}, "bpffs", Outcome.FAIL),
    "cgroup v1": ({"mounts": ["bpf /sys/fs/bpf bpf rw 0 0"]}, "cgroup", Outcome.WARN),
    "no bpf": ({"bpf": "not permitted", "lockdown": "confidentiality"}, "bpf", Outcome.FAIL),
    "interpreted": ({"jit": "0"}, "bpf", Outcome.WARN),
    "no CNI": ({"conflists": {}}, "CNI", Outcome.WARN),
    "a CNI configuration that is none": ({"conflists": {"a": "is no CNI"}}, "CNI", Outcome.FAIL),
    "another machine": ({"machine": "riscv64"}, "architecture", Outcome.FAIL),
}


@pytest.mark.parametrize(("change", "what", "outcome"), NODES.values(), ids=NODES.keys())
def test_findings_of_a_node(change: dict[str, Any], what: str, outcome: Outcome) -> None:
    findings = node_findings(replace(NODE, **change))
    assert one(findings, what).outcome is outcome
    assert failed(findings) is (outcome is Outcome.FAIL)
