"""Answers against the literal evaluator and against the compiled maps, on random clusters, policies and flows."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from ipaddress import IPv6Address
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import EGRESS, INGRESS, Flow, Holder, network_allows
from policygen import (
    NODE4,
    NODE6,
    NODE_LABELS,
    PORTS,
    REMOTE4,
    REMOTE6,
    outsiders,
    random_pods,
    random_policies,
)

from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.state import capture_of
from meshbridge.evaluation.batch import answer_lines
from meshbridge.evaluation.cluster import JUDGES, Cluster
from meshbridge.identity.model import Entity, IpFamily, Peer, Workload
from meshbridge.identity.numbering import number_peers
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.model import Direction, Document
from meshbridge.policy.parse import parse
from meshbridge.policy.policyset import PolicySet

CHECKED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PROTOCOLS = {6: "TCP", 17: "UDP", 132: "SCTP", 1: "ICMP", 58: "ICMPv6"}


def documents_of(objects: list[dict[str, Any]]) -> list[Document]:
    return [
        Document(o["kind"], o["apiVersion"], o["metadata"].get("namespace", ""), o["metadata"]["name"], o)
        for o in objects
    ]


def cluster_objects(rng: random.Random, holders: list[Holder], *, sidecars: bool) -> list[dict[str, Any]]:
    """Nodes, namespaces and pods; consecutive holders are the two addresses of one pod, which are all on node one."""
    found: list[dict[str, Any]] = []
    for name, addresses in {"one": (NODE4, NODE6), "two": (REMOTE4, REMOTE6)}.items():
        node_status = {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]}
        node_meta = {"name": name, "labels": NODE_LABELS[name]}
        found.append({"apiVersion": "v1", "kind": "Node", "metadata": node_meta, "status": node_status})
    for namespace, labels in {h.namespace: h.namespace_labels for h in holders}.items():
        found.append({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}})
    for v4, v6 in zip(holders[::2], holders[1::2], strict=True):
        ports = [{"name": name, "containerPort": port, "protocol": protocol} for name, port, protocol in v4.ports]
        containers: list[dict[str, Any]] = [{"name": "app", "ports": ports}]
        annotations = {}
        if sidecars:
            containers.append({"name": "istio-proxy", "args": ["proxy", "sidecar"]})
            annotations = {"traffic.sidecar.istio.io/excludeInboundPorts": str(rng.choice(PORTS))}
        meta = {"name": pod_name(v4), "namespace": v4.namespace, "labels": v4.labels, "annotations": annotations}
        spec = {"nodeName": "one", "serviceAccountName": v4.service_account, "containers": containers}
        status = {"phase": "Running", "podIPs": [{"ip": str(v4.address)}, {"ip": str(v6.address)}]}
        found.append({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec, "status": status})
    return found


def pod_name(v4: Holder) -> str:
    return f"pod-{str(v4.address).replace('.', '-')}"


def random_question(rng: random.Random, pods: list[Holder], world: list[Holder]) -> tuple[Holder, Holder, int, int]:
    version = rng.choice((4, 6))
    mine = [pod for pod in pods if pod.address.version == version]
    others = [*mine, *(holder for holder in world if holder.address.version == version)]
    source, destination = rng.sample(others, 2)
    if not (source.is_pod or destination.is_pod):
        destination = next(pod for pod in mine if pod is not source)
    protocol = rng.choice((6, 6, 6, 17, 132, 1 if version == 4 else 58))
    port = rng.choice((0, 8, 128)) if protocol in (1, 58) else rng.choice(PORTS) + rng.choice((0, 0, 1))
    return source, destination, protocol, port


def asked(source: Holder, destination: Holder, protocol: int, port: int) -> bytes:
    flow = {
        "src": str(source.address), "dst": str(destination.address), "protocol": PROTOCOLS[protocol], "port": port,
    }  # fmt: skip
    return json.dumps(flow).encode()


@CHECKED
@given(st.integers(0, 2**63 - 1))
def test_network_is_what_the_texts_say_at_both_ends(seed: int) -> None:
    rng = random.Random(seed)
    pods = random_pods(rng, 5)
    world = outsiders()
    objects = random_policies(rng)
    cluster = Cluster(documents_of(cluster_objects(rng, pods, sidecars=False) + objects))
    questions = [random_question(rng, pods, world) for _ in range(20)]
    for question, line in zip(questions, answer_lines(cluster, [asked(*q) for q in questions]), strict=True):
        source, destination, protocol, port = question
        expected = True
        if source.is_pod:
            expected &= network_allows(objects, Flow(source, destination, EGRESS, protocol, port))
        if destination.is_pod:
            local = "host" in source.entities
            expected &= network_allows(objects, Flow(destination, source, INGRESS, protocol, port, local))
        record = line.record
        assert record["network"] == ("ALLOW" if expected else "DENY"), (question, objects)
        assert record["kernel"] == ("PASS" if expected else "DROP"), "no mesh policy guards these pods"
        assert record["verdict"] == record["network"]


@CHECKED
@given(st.integers(0, 2**63 - 1))
def test_kernel_is_what_the_compiled_maps_say(seed: int) -> None:
    rng = random.Random(seed)
    pods = random_pods(rng, 4)
    world = [holder for holder in outsiders() if "world" in holder.entities]
    objects = cluster_objects(rng, pods, sidecars=True) + random_policies(rng, network=3, mesh=4)
    cluster = Cluster(documents_of(objects))
    policies = PolicySet.of(documents_of(objects))
    named = policies.referenced_port_names()
    workloads: dict[Any, Workload] = {}
    holders: dict[Any, Peer] = {
        holder.address: Peer(labels=holder.labels, entities=frozenset(Entity(entity) for entity in holder.entities))
        for holder in world
    }
    namespaces = {pod.namespace: pod.namespace_labels for pod in pods}
    for read in (read for document in documents_of(objects) for read in parse(document).objects):
        if isinstance(read, Workload):
            pod = replace(read, namespace_labels=namespaces[read.namespace])
            ports = frozenset(port for port in pod.ports if port.name in named)
            workloads |= dict.fromkeys(pod.addresses, pod)
            holders |= dict.fromkeys(pod.addresses, replace(pod.peer(), ports=ports))
    numbering = number_peers(holders, policies.referenced_networks())
    sidecars = {n: Capture.sidecar().inbound for n, peer in numbering.identities.items() if peer.is_pod}
    compiler = Compiler(numbering.identities, sidecars)
    questions = [random_question(rng, pods, world) for _ in range(12)]
    for question, line in zip(questions, answer_lines(cluster, [asked(*q) for q in questions]), strict=True):
        source, destination, protocol, port = question
        family = IpFamily.IPV6 if isinstance(source.address, IPv6Address) else IpFamily.IPV4
        passes = True
        for end, other, direction in (
            (source, destination, Direction.EGRESS), (destination, source, Direction.INGRESS)
        ):  # fmt: skip
            workload = workloads.get(end.address)
            if workload is not None:
                capture = capture_of(capture_state(workload), judges=JUDGES, intended=True)
                policy_map = compiler.endpoint(workload, policies, capture).map(direction, family)
                passes &= evaluate(policy_map, numbering.addresses[other.address].identity, protocol, port).passes
        assert line.record["kernel"] == ("PASS" if passes else "DROP"), (question, objects)
