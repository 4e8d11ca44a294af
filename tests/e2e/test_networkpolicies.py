"""Random NetworkPolicies on real pods of two nodes: who reaches whom, held against ``meshbridge evaluate``."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator

import policygen
import pytest
import topology
from images import PROBE
from installed import Installed
from kubectl import Kubectl
from workloads import namespace, pod

SEED = int(os.environ.get("E2E_SEED") or time.time_ns() % 1_000_000)
PODS, ROUNDS, POLICIES = 9, 3, 10
PORTS = policygen.PORTS
Flow = tuple[str, str, int]


@pytest.fixture(scope="module")
def addresses(installed: Installed, kubectl: Kubectl) -> Iterator[dict[str, str]]:
    """Pods by ``namespace/name``, in the namespaces that the policies speak of, on both nodes."""
    rng = random.Random(SEED)
    kubectl.apply(*(namespace(name, labels=labels) for name, labels in policygen.NAMESPACES.items()))
    try:
        pods = []
        for index in range(PODS):
            labels = {"app": rng.choice(policygen.APPS)}
            if rng.random() < 0.6:
                labels["role"] = rng.choice(policygen.ROLES)
            ns, node = list(policygen.NAMESPACES)[index % 3], topology.NODES[index % 2].name
            made = pod(f"pod-{index}", ns, ports=PORTS, node=node, labels=labels)
            del made["spec"]["containers"][0]["readinessProbe"]  # a probe is the node's, which policy always lets in
            pods.append(made)
        kubectl.apply_all(pods)
        for each in policygen.NAMESPACES:
            kubectl("wait", "pod", "--all", "-n", each, "--for=condition=Ready", "--timeout=120s", timeout_s=130)
        yield {
            f"{each['metadata']['namespace']}/{each['metadata']['name']}": each["status"]["podIP"]
            for ns in policygen.NAMESPACES for each in kubectl.items("pods", ns)
        }  # fmt: skip
    finally:
        for each in policygen.NAMESPACES:
            kubectl.delete("namespace", each)


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_every_pair_of_pods_is_as_evaluate_says(
    installed: Installed, kubectl: Kubectl, addresses: dict[str, str], turn: int
) -> None:
    rng = random.Random(f"{SEED} {turn}")
    policies = [policygen.network_policy(rng, f"random-{number}") for number in range(POLICIES)]
    for ns in policygen.NAMESPACES:
        kubectl("delete", "networkpolicy", "--all", "-n", ns)
    kubectl.apply_all(policies)
    flows = [(a, b, port) for a in addresses for b in addresses if a != b for port in PORTS]
    expected = evaluated(installed, flows)
    wait_programmed(installed)
    seen = reached(kubectl, addresses, flows)
    if seen != expected:  # what was applied may still have been on its way
        time.sleep(3)
        seen = reached(kubectl, addresses, flows)
    wrong = {flow: (flow in expected, flow in seen) for flow in flows if (flow in expected) is not (flow in seen)}
    assert not wrong, f"E2E_SEED={SEED}: {len(wrong)} of {len(flows)}: (allowed, reached): {wrong}"
    print(f"seed {SEED}, turn {turn}: {len(expected)} of {len(flows)} flows allowed")


def evaluated(installed: Installed, flows: list[Flow]) -> set[Flow]:
    lines = "\n".join(json.dumps({"src": a, "dst": b, "port": port}) for a, b, port in flows)
    path = installed.cluster.directory / "flows.jsonl"
    path.write_text(lines)
    answers = [json.loads(line) for line in installed.meshbridge("evaluate", "--flows", str(path)).splitlines()]
    assert len(answers) == len(flows)
    return {flow for flow, answer in zip(flows, answers, strict=True) if answer["verdict"] == "ALLOW"}


def wait_programmed(installed: Installed) -> None:
    """Give what was applied the time to be in the kernel."""
    time.sleep(2)
    for each in topology.NODES:
        metrics = installed.metrics(each.name)
        assert metrics["meshbridge_revision_received"] == metrics["meshbridge_revision_programmed"]


def reached(kubectl: Kubectl, addresses: dict[str, str], flows: list[Flow]) -> set[Flow]:
    names = {address: name for name, address in addresses.items()}
    found: set[Flow] = set()
    for source in addresses:
        targets = [[addresses[b], port] for a, b, port in flows if a == source]
        ns, _, name = source.partition("/")
        text = kubectl.exec(name, ns, "python3", PROBE, stdin=json.dumps(targets))
        found.update((source, names[address], port) for address, port in json.loads(text))
    return found
