"""Explanations on random clusters: they agree with the evaluator, and what they say of a near rule is true."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_network
from itertools import product
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from policygen import PORTS, outsiders, random_pods, random_policies
from random_cluster import OUTSIDERS, RandomCluster
from test_answers_against_oracle import asked, cluster_objects, documents_of, random_question

from meshbridge.evaluation.cluster import Cluster
from meshbridge.evaluation.evaluator import Evaluator
from meshbridge.evaluation.explanation import Explanation, Stage, explain_flow
from meshbridge.evaluation.explanation_network import (
    Mismatch,
    NetworkFlow,
    Side,
    mismatches_of,
    near_network,
    verdict_without,
)
from meshbridge.evaluation.question import Question, parse_question
from meshbridge.identity.model import ContainerPort, Entity, IpFamily, Peer, Workload
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import Compiler
from meshbridge.policy.coverage import coverage
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.model import Direction, Judge, Layer, NetworkRule, PortMatch, Verdict
from meshbridge.policy.peers import PeerIndex
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.ports import PREFIX_ANY, PREFIX_PORT, masked
from meshbridge.policy.selectors import (
    CidrPeers,
    ClusterPeers,
    EntityPeers,
    LabelSource,
    Operator,
    Requirement,
    Selector,
)

CHECKED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PEER = 300
REQUESTS: tuple[dict[str, Any], ...] = (
    {}, {"http": {"method": "GET", "path": "/a", "host": "api"}}, {"http": {"method": "PUT"}, "token": "bad"},
    {"http": {"method": "POST", "path": "/x/b", "host": "h", "headers": {"x-user": "ann"}}, "token": "absent"},
    {"claims": {"iss": "iss", "sub": "bob", "scope": "read"}, "http": {"method": "GET", "path": "/", "host": "h"}},
)  # fmt: skip
PRINCIPALS: tuple[dict[str, Any], ...] = (
    {}, {"peer_principal": None}, {"peer_principal": "spiffe://cluster.local/ns/shop/sa/default"},
    {"peer_principal": "cluster.local/ns/pay/sa/robot"},
)  # fmt: skip


def cases(seed: int, count: int = 8) -> Iterator[tuple[Cluster, Question]]:
    rng = random.Random(seed)
    pods = random_pods(rng, rng.randint(2, 5))
    objects = cluster_objects(rng, pods, sidecars=rng.random() < 0.8)
    cluster = Cluster(documents_of(objects + random_policies(rng, network=5, mesh=4)))
    for _ in range(count):
        flow = json.loads(asked(*random_question(rng, pods, outsiders())))
        yield cluster, parse_question(flow | rng.choice(REQUESTS) | rng.choice(PRINCIPALS))


def changing_cases(seed: int, count: int = 6) -> Iterator[tuple[Cluster, Question]]:
    """Flows in a cluster with two nodes and every kind of exclusion, after some changes to it."""
    rng = random.Random(seed)
    changing = RandomCluster(rng, tuple(range(10, 30)))
    changing.start()
    for _ in range(rng.randint(10, 40)):
        changing.change()
    cluster = Cluster(changing.documents.values())
    ends = [address for pod in changing.pods.values() for address in pod.addresses]
    for _ in range(count if ends else 0):
        destination = rng.choice(ends)
        alike = [end for end in (*ends, *OUTSIDERS) if (":" in end) == (":" in destination)]
        flow = {"src": rng.choice(alike), "dst": destination, "port": rng.choice(PORTS)}
        if rng.random() < 0.2:
            flow |= {"src": destination, "dst": flow["src"]}
        yield cluster, parse_question(flow | rng.choice(REQUESTS) | rng.choice(PRINCIPALS))


@CHECKED
@given(st.integers(min_value=0, max_value=2**32), st.sampled_from([cases, changing_cases]))
def test_an_explanation_agrees_with_the_evaluator_and_with_its_own_steps(
    seed: int, source: Callable[[int], Iterator[tuple[Cluster, Question]]]
) -> None:
    for cluster, question in source(seed):
        evaluator = Evaluator(cluster)
        answer = evaluator.answer(evaluator.prepare(question))
        explanation = explain_flow(cluster, question)
        assert explanation.verdict is answer.verdict
        assert verdict_of_steps(explanation) is answer.verdict
        denying = [step.stage for step in explanation.steps if step.verdict is Verdict.DENY]
        assert explanation.decided_by == (denying[0] if denying else None)
        for step in explanation.steps:
            assert all(near.verdict is not step.verdict for near in step.near or ())
            assert list(step.near or ()) == sorted(step.near or (), key=lambda near: near.distance)
            assert all(near.mismatches for near in step.near or ())


def verdict_of_steps(explanation: Explanation) -> Verdict:
    """What the steps come to: the strictest, where what an earlier one leaves open a later one may have answered."""
    said = {step.stage: step.verdict for step in explanation.steps if step.verdict is not None}
    if Stage.HTTP_RULES in said and said[Stage.INGRESS] is Verdict.NEEDS_L7:
        del said[Stage.INGRESS]
    if Stage.ENVOY in said and said[Stage.EARLY] is Verdict.NEEDS_L7:
        del said[Stage.EARLY]
    return min(said.values(), default=Verdict.ALLOW)


@CHECKED
@given(st.integers(min_value=0, max_value=2**32))
def test_a_rule_without_mismatches_is_one_that_the_compiler_covers_the_flow_with(seed: int) -> None:
    rules, flow = random_flow(random.Random(seed))
    for rule in rules:
        if rule.direction is flow.direction:
            assert (mismatches_of(rule, flow) == ()) == covers(rule, flow), (rule, flow)


@settings(CHECKED, max_examples=100)
@given(st.integers(min_value=0, max_value=2**32))
def test_what_a_near_rule_wants_makes_it_match_and_changes_the_verdict(seed: int) -> None:
    rules, flow = random_flow(random.Random(seed))
    nearest = near_network(rules, flow)
    assume(nearest)
    for near in nearest:
        candidates = [rule for rule in rules if rule.origin == near.origin and rule.direction is flow.direction]
        changed = list(changes(flow, near.mismatches))
        if near.isolates:
            met = [f for f in changed if any(rule.subject.matches(f.subject) for rule in candidates)]
            assert met or not changed, (near, flow)
            continue
        met = [f for f in changed if any(covers(rule, f) for rule in candidates)]
        assert met or not changed, (near, flow)
        for other in met:
            before = {i for i, rule in enumerate(rules) if rule.direction is flow.direction and covers(rule, flow)}
            after = {i for i, rule in enumerate(rules) if rule.direction is flow.direction and covers(rule, other)}
            selected = [rule.subject.matches(other.subject) for rule in rules]
            untouched = [rule.subject.matches(flow.subject) for rule in rules]
            gained = [rules[i].origin for i in after - before]
            if before <= after and gained == [near.origin] and selected == untouched:
                assert compiled(rules, flow) is not near.verdict
                assert compiled(rules, other) is near.verdict, (near, flow)


@CHECKED
@given(st.integers(min_value=0, max_value=2**32))
def test_without_the_rules_that_deny_the_verdict_is_the_one_foretold(seed: int) -> None:
    rules, flow = random_flow(random.Random(seed))
    for denying in (rule for rule in rules if rule.verdict is Verdict.DENY and rule.direction is flow.direction):
        left = [rule for rule in rules if rule.origin != denying.origin]
        assert verdict_without(rules, [denying.origin], flow) is compiled(left, flow)


def random_flow(rng: random.Random) -> tuple[list[NetworkRule], NetworkFlow]:
    """All rules of random policies, and a flow of one of the pods."""
    pods = random_pods(rng, 4)
    policies = PolicySet.of(documents_of(random_policies(rng, network=6)))
    rules = [rule for rule in policies.network if not rule.http]
    networks = policies.referenced_networks()

    def peer_of(holder: Any) -> Peer:
        containing = frozenset(network for network in networks if holder.address in network)
        if not holder.is_pod:
            return Peer(entities=frozenset(map(Entity, holder.entities)), networks=containing)
        return Peer(
            holder.namespace, holder.labels, holder.namespace_labels, holder.service_account, networks=containing
        )

    source, destination, protocol, port = random_question(rng, pods, outsiders())
    direction = rng.choice((Direction.INGRESS, Direction.EGRESS))
    subject, other = (destination, source) if direction is Direction.INGRESS else (source, destination)
    if not subject.is_pod:
        direction, subject, other = Direction(1 - direction), other, subject
    ports = tuple(ContainerPort(name, number, kind) for name, number, kind in (
        subject if direction is Direction.INGRESS else other).ports)  # fmt: skip
    peer = replace(peer_of(other), ports=frozenset(ports) if direction is Direction.EGRESS else frozenset())
    localhost = Entity.HOST in peer.entities and direction is Direction.INGRESS
    return rules, NetworkFlow(direction, peer_of(subject), peer, protocol, port, ports, localhost)


def covers(rule: NetworkRule, flow: NetworkFlow) -> bool:
    """By the compiler's own coverage."""
    if not rule.subject.matches(flow.subject):
        return False
    for numbers, spots in coverage(rule, PeerIndex({PEER: flow.peer}), flow.ports, flow.direction):
        for protocol, port, prefix in spots:
            every = prefix == PREFIX_ANY
            inside = protocol == flow.protocol and masked(flow.port, min(prefix, PREFIX_PORT)) == port
            if (every or inside) and (PEER in numbers or numbers == [0]):
                return True
    return False


def compiled(rules: list[NetworkRule], flow: NetworkFlow) -> Verdict:
    """The verdict of the compiled map."""
    subject = flow.subject
    ports = flow.ports if flow.direction is Direction.INGRESS else ()
    workload = Workload(
        subject.namespace or "", "subject", "", "", (), subject.labels, subject.namespace_labels,
        service_account=subject.service_account, ports=ports,
    )  # fmt: skip
    policies = PolicySet(network=tuple(rules))
    index = {PEER: flow.peer}
    capture = replace(Capture.none(), judges=frozenset(Judge))
    policy_map = Compiler(index).map(
        workload, policies, policies.selecting(workload), capture, flow.direction, IpFamily.IPV4
    )
    decision = evaluate(policy_map, PEER, flow.protocol, flow.port, localhost=flow.localhost)
    assert decision.network.layer is Layer.NETWORK
    return decision.network.verdict


def changes(flow: NetworkFlow, mismatches: tuple[Mismatch, ...]) -> Iterator[NetworkFlow]:
    """Flows in which each mismatch is mended, in every way there is; none where one cannot be mended here."""
    subject_side = flow.sides[0]
    for choice in product(*(list(mended(mismatch)) for mismatch in mismatches)):
        changed = flow
        for mismatch, mend in zip(mismatches, choice, strict=True):
            if mismatch.of is Side.FLOW:
                changed = replace(changed, protocol=mend[0], port=mend[1])
            elif mismatch.of is subject_side:
                changed = replace(changed, subject=mend(changed.subject))
            else:
                changed = replace(changed, peer=mend(changed.peer))
        yield changed


def mended(mismatch: Mismatch) -> Iterator[Any]:
    condition = mismatch.condition
    match condition:
        case Requirement(source=LabelSource.POD, key=key, operator=operator):
            for value in (*condition.values, "some") if operator in (Operator.IN, Operator.EXISTS) else (None, "other"):
                yield lambda peer, value=value: replace(peer, labels=relabelled(peer.labels, key, value))
        case Requirement(source=LabelSource.NAMESPACE_LABEL, key=key, operator=operator) if "/" not in key:
            for value in (*condition.values, "some") if operator in (Operator.IN, Operator.EXISTS) else (None, "other"):
                yield lambda peer, value=value: replace(
                    peer, namespace_labels=relabelled(peer.namespace_labels, key, value)
                )
        case Requirement(source=LabelSource.NAMESPACE | LabelSource.NAMESPACE_LABEL) if condition.values:
            names = condition.values if condition.operator is Operator.IN else ("elsewhere",)
            for name in names:
                yield lambda peer, name=name: replace(peer, namespace=name)
        case Requirement(operator=Operator.DOES_NOT_EXIST):
            yield from ()  # every pod has it
        case Requirement(source=LabelSource.SERVICE_ACCOUNT):
            names = condition.values if condition.operator is Operator.IN else ("another",)
            for name in names:
                yield lambda peer, name=name: replace(peer, service_account=name)
        case EntityPeers():
            for entity in condition.entities:
                yield lambda peer, entity=entity: Peer(entities=frozenset({entity}), networks=peer.networks)
        case ClusterPeers():
            yield lambda peer: Peer("shop", cluster=condition.cluster)
        case CidrPeers():
            world = frozenset({Entity.WORLD})
            yield (
                lambda peer: (
                    replace(peer, networks=inside(condition))
                    if condition.in_cluster
                    else Peer(entities=world, networks=inside(condition))
                )
            )
        case Selector():
            yield from ()  # nobody becomes a pod by a change of labels
        case tuple():
            for match in condition:
                if isinstance(match, PortMatch) and not match.name:
                    yield match.protocol, match.first


def relabelled(labels: Any, key: str, value: str | None) -> dict[str, str]:
    return {**{k: v for k, v in labels.items() if k != key}, **({key: value} if value is not None else {})}


def inside(peers: CidrPeers) -> frozenset[Any]:
    """The CIDRs of which an address inside, and in no exception, is a member: those that contain it."""
    assert ip_network(peers.cidr) == peers.cidr
    return frozenset({peers.cidr})
