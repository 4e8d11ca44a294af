"""What a finding claims holds: on random clusters, by the literal evaluator, which shares no code with the compiler."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import ASKED, EGRESS, INGRESS, Flow, Holder, mesh_allows, network_allows
from policygen import NODE4, NODE6, NODE_LABELS, PORTS, REMOTE4, REMOTE6, outsiders, random_pods, random_policies

from meshbridge.analysis import isolation, meshrules, networkrules, selection
from meshbridge.analysis.finding import Finding
from meshbridge.analysis.scene import Scene
from meshbridge.policy.model import Document

CHECKED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FLOWS = 300
NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132}
PROTOCOLS = (6, 17, 132, 1, 58)


def scene_of(holders: list[Holder], policies: list[dict[str, Any]]) -> Scene:
    objects = [*cluster_objects(holders), *policies]
    return Scene(
        Document(o["kind"], o["apiVersion"], o["metadata"].get("namespace", ""), o["metadata"]["name"], o)
        for o in objects
    )


def cluster_objects(holders: list[Holder]) -> list[dict[str, Any]]:
    """Nodes, namespaces and pods; consecutive holders are the two addresses of one pod."""
    found: list[dict[str, Any]] = []
    for name, addresses in {"one": (NODE4, NODE6), "two": (REMOTE4, REMOTE6)}.items():
        status = {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]}
        meta = {"name": name, "labels": NODE_LABELS[name]}
        found.append({"apiVersion": "v1", "kind": "Node", "metadata": meta, "status": status})
    for namespace, labels in {h.namespace: h.namespace_labels for h in holders}.items():
        found.append({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}})
    for v4, v6 in zip(holders[::2], holders[1::2], strict=True):
        ports = [{"name": name, "containerPort": port, "protocol": protocol} for name, port, protocol in v4.ports]
        meta = {"name": pod_name(v4), "namespace": v4.namespace, "labels": v4.labels}
        proxy = {"name": "istio-proxy", "args": ["proxy", "sidecar"]}
        spec = {
            "nodeName": "one", "serviceAccountName": v4.service_account,
            "containers": [{"name": "app", "ports": ports}, proxy],
        }  # fmt: skip
        status = {"phase": "Running", "podIPs": [{"ip": str(v4.address)}, {"ip": str(v6.address)}]}
        found.append({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec, "status": status})
    return found


def pod_name(v4: Holder) -> str:
    return f"pod-{str(v4.address).replace('.', '-')}"


def without(policies: list[dict[str, Any]], found: Finding) -> list[dict[str, Any]]:
    """The policies, with nobody in the rule a finding is about; its object goes on isolating what it selects."""
    changed = copy.deepcopy(policies)
    origin = found.origin
    policy = next(
        p
        for p in changed
        if (p["kind"], p["metadata"].get("namespace", ""), p["metadata"]["name"])
        == (origin.kind, origin.namespace, origin.name)
    )
    *steps, last = [int(s) if s.isdigit() else s for s in origin.rule.replace("[", ".").replace("]", "").split(".")]
    holder: Any = policy
    for step in steps:
        holder = holder[step]
    if policy["kind"] == "AuthorizationPolicy":
        del holder[last]
        return changed
    peers = "from" if "ingress" in steps else "to"
    nobody = [{"podSelector": {"matchLabels": {"nobody": "at-all"}}}]
    holder[last] = {peers: nobody} if policy["kind"] == "NetworkPolicy" else {f"{peers}Endpoints": []}
    return changed


def network_flows(pods: list[Holder]) -> list[Flow]:
    others = [*pods, *outsiders()]
    return [
        Flow(endpoint, peer, direction, protocol, port, "host" in peer.entities)
        for endpoint in pods
        for peer in others
        if peer is not endpoint and peer.address.version == endpoint.address.version
        for direction in (INGRESS, EGRESS)
        for protocol in PROTOCOLS
        for port in ((0, 8, 128) if protocol in (1, 58) else (*PORTS, 81, 7))
    ]


@CHECKED
@given(st.integers(0, 2**63 - 1))
def test_rules_without_influence_change_no_flow(seed: int) -> None:
    rng = random.Random(seed)
    pods = random_pods(rng, 3)
    policies = random_policies(rng, network=7)
    for found in networkrules.without_influence(scene_of(pods, policies)):
        fewer = without(policies, found)
        for flow in rng.sample(network_flows(pods), FLOWS):
            assert network_allows(policies, flow) == network_allows(fewer, flow), (str(found.origin), flow)


@CHECKED
@given(st.integers(0, 2**63 - 1))
def test_rules_of_the_mesh_that_are_pointless_change_no_request(seed: int) -> None:
    rng = random.Random(seed)
    pods = random_pods(rng, 3)
    policies = random_policies(rng, network=0, mesh=8)
    scene = scene_of(pods, policies)
    claimed = [*meshrules.never_matching(scene), *meshrules.made_pointless(scene)]
    flows = [
        Flow(endpoint, peer, INGRESS, 6, port)
        for endpoint in pods
        for peer in (*pods, *outsiders())
        if peer is not endpoint and peer.address.version == endpoint.address.version
        for port in PORTS
    ]
    for found in claimed:
        fewer = without(policies, found)
        for flow in rng.sample(flows, min(len(flows), 12)):
            for asked in ASKED:
                before, after = (mesh_allows(every, flow, asked) for every in (policies, fewer))
                assert before == after, (str(found.origin), found.text, flow, asked)


@CHECKED
@given(st.integers(0, 2**63 - 1))
def test_policies_that_select_nothing_can_go(seed: int) -> None:
    rng = random.Random(seed)
    pods = random_pods(rng, 3)
    policies = random_policies(rng, network=6)
    for found in selection.selecting_nothing(scene_of(pods, policies)):
        named = (found.origin.kind, found.origin.namespace, found.origin.name)
        fewer = [p for p in policies if (p["kind"], p["metadata"].get("namespace", ""), p["metadata"]["name"]) != named]
        if any("specs" in p for p in policies if p not in fewer):
            continue  # another part of it may select
        for flow in rng.sample(network_flows(pods), FLOWS):
            assert network_allows(policies, flow) == network_allows(fewer, flow), (str(found.origin), flow)


@CHECKED
@given(st.integers(0, 2**63 - 1))
def test_ports_that_are_said_to_stop_working_let_nobody_in(seed: int) -> None:
    rng = random.Random(seed)
    pods = random_pods(rng, 4)
    policies = random_policies(rng, network=3)
    by_name = {f"{v4.namespace}/{pod_name(v4)}": v4 for v4 in pods[::2]}
    for found in isolation.default_deny(scene_of(pods, policies)):
        for name, ports in re.findall(r"of (\S+)(?: \(and \d+ like it\))?, ([^;]*?) stops? working", found.text):
            for port, protocol in re.findall(r"(\d+)/([A-Z]+)", ports):
                for peer in (*pods, *outsiders()):
                    known = peer.address.version == 4 and peer is not by_name[name] and "host" not in peer.entities
                    flow = Flow(by_name[name], peer, INGRESS, NUMBERS[protocol], int(port))
                    assert not (known and network_allows(policies, flow)), (found.text, peer)


def test_random_clusters_have_findings_of_these_kinds() -> None:
    found: dict[str, set[str]] = {}
    for seed in range(50):
        rng = random.Random(seed)
        scene = scene_of(random_pods(rng, 3), random_policies(rng, network=7, mesh=8))
        for analyzer in (
            networkrules.without_influence, meshrules.never_matching, meshrules.made_pointless,
            selection.selecting_nothing,
        ):  # fmt: skip
            found.setdefault(analyzer.__module__.rpartition(".")[2], set()).update(f.code for f in analyzer(scene))
    assert found == {
        "networkrules": {"MB0502", "MB0503"},
        "meshrules": {"MB0501", "MB0502", "MB0503"},
        "selection": {"MB0401"},
    }
