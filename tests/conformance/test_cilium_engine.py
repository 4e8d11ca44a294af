"""CiliumNetworkPolicies as Cilium's own policy engine judges them: the same verdict on every flow."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from cilium_engine import ask_cilium, built_engine
from ciliumgen import PROBES, cilium_policy, maybe, network_policy, random_groups, random_others, random_pods

from meshbridge.identity.model import ContainerPort, Entity, IpAddress, IpFamily, Peer, ProxyClass, Workload
from meshbridge.identity.numbering import number_peers
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import Lookup
from meshbridge.policy.model import Direction, Document, Judge, Verdict
from meshbridge.policy.policyset import PolicySet

pytestmark = pytest.mark.timeout(1800)  # the first run builds the engine

SEED = int(os.environ.get("CONFORMANCE_SEED", "20261124"))
CASES = int(os.environ.get("CONFORMANCE_CASES", "120"))
NOWHERE = "203.0.113.200"
MODES: tuple[list[str], ...] = ([], [], [], ["nodes"], ["pods"], ["pods", "nodes"])


@pytest.fixture(scope="session")
def engine() -> Path:
    return built_engine()


def random_case(rng: random.Random) -> dict[str, Any]:
    """A cluster with policies, in the engine's form."""
    nodes = maybe(rng, 0.2)
    policies = [
        network_policy(rng, f"p{index}")
        if not nodes and maybe(rng, 0.12)
        else cilium_policy(rng, f"p{index}", nodes=nodes)
        for index in range(rng.randint(1, 5))
    ]
    modes = rng.choice(MODES)
    if only_excludes(policies):  # then Cilium's aggregate identities count as pods, hence everybody: docs/adr/0131
        modes = [mode for mode in modes if mode != "pods"]
    # With pods matched by address everybody without one, as they are here, is a question nobody asks.
    others = [each for each in random_others(rng) if "address" in each or "pods" not in modes]
    return cluster_of(
        policies, pods=random_pods(rng, 5), others=others, groups=random_groups(rng),
        enforcement=rng.choice(("default",) * 8 + ("always", "never")), modes=modes, nodes=nodes,
    )  # fmt: skip


def only_excludes(part: Any) -> bool:
    """Whether some cidrGroupSelector in it says nothing but what must not be there."""
    if isinstance(part, list):
        return any(map(only_excludes, part))
    if not isinstance(part, dict):
        return False
    selector = part.get("cidrGroupSelector")
    if selector is not None and "matchLabels" not in selector:
        return all(each["operator"] in ("NotIn", "DoesNotExist") for each in selector["matchExpressions"])
    return any(map(only_excludes, part.values()))


def cluster_of(
    policies: list[dict[str, Any]],
    *,
    pods: list[dict[str, Any]],
    others: list[dict[str, Any]],
    groups: Iterable[dict[str, Any]] = (),
    enforcement: str = "default",
    modes: Iterable[str] = (),
    nodes: bool = True,
) -> dict[str, Any]:
    """A case of the engine, which is told the CIDR groups of every address."""
    groups = list(groups)
    for each in (*pods, *others):
        each["groups"] = [
            {"name": group["metadata"]["name"], "labels": group["metadata"].get("labels", {})}
            for group in groups
            if any(ip_address(each.get("address", NOWHERE)) in ip_network(c) for c in group["spec"]["externalCIDRs"])
        ]
    return {
        "enforcement": enforcement, "cidrMatchMode": list(modes), "nodeLabels": nodes, "pods": pods, "others": others,
        "policies": policies, "groups": groups, "probes": [{"protocol": p, "port": n} for p, n in PROBES],
    }  # fmt: skip


def documents_of(case: dict[str, Any]) -> list[Document]:
    settings = {"enable-policy": case["enforcement"], "policy-cidr-match-mode": ",".join(case["cidrMatchMode"])}
    config = {
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "cilium-config", "namespace": "kube-system"}, "data": settings,
    }  # fmt: skip
    return [
        Document(o["kind"], o["apiVersion"], o["metadata"].get("namespace", ""), o["metadata"]["name"], o)
        for o in (config, *case["groups"], *case["policies"])
    ]


def our_answer(case: dict[str, Any], inert: Iterable[str] = ()) -> tuple[set[str], list[list[list[str]]]]:
    """The policies we refuse, and our verdicts in the engine's form; ``inert`` ones are left out of the verdicts."""
    documents = documents_of(case)
    refused = {refusal.document.name for refusal in PolicySet.of(documents).refusals}
    policies = PolicySet.of(document for document in documents if document.name not in {*inert, *refused})
    names = policies.referenced_port_names()
    pods = [_workload(index, pod) for index, pod in enumerate(case["pods"])]
    holders: dict[IpAddress, Peer] = {
        pod.addresses[0]: replace(pod.peer(), ports=frozenset(port for port in pod.ports if port.name in names))
        for pod in pods
    }
    for index, other in enumerate(case["others"]):
        address = ip_address(other.get("address") or int(ip_address(NOWHERE)) + index)
        holders[address] = _peer(address, other)
    numbering = number_peers(holders, policies.referenced_networks())
    numbers = [numbering.addresses[address].identity for address in holders]
    compiler = Compiler(numbering.identities)
    found = []
    for pod in pods:
        maps = compiler.endpoint(pod, policies, Capture.sidecar(frozenset(Judge)))
        verdicts = []
        for direction in Direction:
            lookup = Lookup.of(maps.map(direction, IpFamily.IPV4))
            lines = []
            for number, peer in zip(numbers, holders.values(), strict=True):
                localhost = direction is Direction.INGRESS and Entity.HOST in peer.entities
                line = ""
                for protocol, port in PROBES:
                    verdict = lookup.decide(number, protocol, port, localhost=localhost).network.verdict
                    line += {Verdict.DENY: "0", Verdict.NEEDS_L7: "7", Verdict.ALLOW: "1"}[verdict]
                lines.append(line)
            verdicts.append(lines)
        found.append(verdicts)
    return refused, found


def _workload(index: int, pod: dict[str, Any]) -> Workload:
    return Workload(
        pod["namespace"], f"pod-{index}", f"uid-{index}", "one", (ip_address(pod["address"]),), pod["labels"],
        pod["namespaceLabels"], {}, pod["serviceAccount"],
        tuple(ContainerPort(port["name"], port["port"], port["protocol"]) for port in pod["ports"]),
        proxy=ProxyClass.SIDECAR,
    )  # fmt: skip


def _peer(address: IpAddress, other: dict[str, Any]) -> Peer:
    entities = {Entity(entity) for entity in other["entities"]}
    if "address" in other and not entities & {Entity.HOST, Entity.REMOTE_NODE}:
        entities |= {Entity.WORLD, Entity.WORLD_IPV4 if address.version == 4 else Entity.WORLD_IPV6}
    return Peer(labels=other.get("nodeLabels", {}), entities=frozenset(entities))


def differences(engine: Path, cases: list[dict[str, Any]]) -> tuple[int, list[tuple[dict[str, Any], str]]]:
    """How many cells were compared, and each case that differs with a sentence on its first difference."""
    cells, found = 0, []
    for case, theirs in zip(cases, ask_cilium(engine, cases), strict=True):
        refused, _ = our_answer(case)
        if refused != set(theirs["refused"]):
            found.append((case, f"we refuse {sorted(refused)}, Cilium {theirs['refused']}"))
            continue
        _, ours = our_answer(case, theirs["refused"])
        peers = [*case["pods"], *case["others"]]
        for pod, (our_pod, their_pod) in enumerate(zip(ours, theirs["verdicts"], strict=True)):
            for direction in Direction:
                for peer, our_line, their_line in zip(peers, our_pod[direction], their_pod[direction], strict=True):
                    cells += len(PROBES)
                    for probe, our, their in zip(PROBES, our_line, their_line, strict=True):
                        # Cilium sends all of a port to its proxy once any rule on it has HTTP rules.
                        if our != their and (our, their) != ("1", "7"):
                            text = f"pod {pod} {direction.name} {probe} with {peer}: ours {our}, Cilium's {their}"
                            found.append((case, text))
                            break
                    else:
                        continue
                    break
                else:
                    continue
                break
            else:
                continue
            break
    return cells, found


def smallest(engine: Path, case: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The same case with as few policies and rules as still differ."""
    _, ((best, why), *_) = differences(engine, [case])
    of_verdicts = why.startswith("pod ")
    changed = True
    while changed:
        candidates = [dict(best, policies=policies) for policies in _smaller(best["policies"])]
        every = differences(engine, candidates)[1] if candidates else []
        found = [one for one in every if one[1].startswith("pod ") is of_verdicts]
        changed = bool(found)
        if found:
            best, why = found[0]
    return best, why


def _smaller(value: Any) -> Iterable[Any]:
    """Every value with one part less."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield value[:index] + value[index + 1 :]
            for less in _smaller(item):
                yield [*value[:index], less, *value[index + 1 :]]
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("metadata", "apiVersion", "kind"):
                continue
            if key not in ("endpointSelector", "fields", "type", "port", "operator", "values", "key"):
                yield {k: v for k, v in value.items() if k != key}
            for less in _smaller(item):
                yield {**value, key: less}


def test_every_verdict_is_ciliums(engine: Path) -> None:
    rng = random.Random(SEED)
    cases = [random_case(rng) for _ in range(CASES)]
    cells, found = differences(engine, cases)
    for case, _ in found[:1]:
        small, why = smallest(engine, case)
        pytest.fail(
            f"{len(found)} of {CASES} cases differ (CONFORMANCE_SEED={SEED}); one of them: {why}\n"
            + yaml.safe_dump({k: small[k] for k in ("policies", "enforcement", "cidrMatchMode", "groups", "pods")}),
            pytrace=False,
        )
    assert cells >= 20_000


CNP: dict[str, Any] = {
    "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "p", "namespace": "shop"},
}  # fmt: skip
POD: dict[str, Any] = {
    "namespace": "shop", "labels": {"role": "y"}, "namespaceLabels": {}, "serviceAccount": "default",
    "address": "10.1.0.1", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
}  # fmt: skip
KNOWN_BUGS: dict[str, tuple[dict[str, Any], str, str]] = {
    # aggregate identities have none of the labels that must not be there, and stand for everybody
    "a selector of nothing but absences takes in everybody": (
        {"ingress": [{"fromEndpoints": [{"matchExpressions": [
            {"key": "role", "operator": "NotIn", "values": ["y"]},
            {"key": "reserved:health", "operator": "DoesNotExist"}]}]}]}, "0", "1"),
    # the entry for type 0 is one for port 0, which is every port
    "type 0 is every type": ({"ingress": [{"icmps": [{"fields": [{"type": 0}]}]}]}, "0", "1"),
}  # fmt: skip


@pytest.mark.parametrize(("rules", "ours", "ciliums"), KNOWN_BUGS.values(), ids=KNOWN_BUGS.keys())
def test_known_bugs(engine: Path, rules: dict[str, Any], ours: str, ciliums: str) -> None:
    """What Cilium lets in against its own texts; not copied. A case that Cilium mended belongs into the generator."""
    policy = {**CNP, "spec": {"endpointSelector": {}, **rules}}
    case = cluster_of([policy], pods=[POD, POD | {"address": "10.1.0.2"}], others=[], nodes=False)
    (answer,) = ask_cilium(engine, [case])
    assert not answer["refused"]
    echo = PROBES.index((1, 8))
    assert (our_answer(case)[1][0][0][1][echo], answer["verdicts"][0][0][1][echo]) == (ours, ciliums)
