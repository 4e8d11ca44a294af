"""What is said of a near AuthorizationPolicy is true: a flow, or a pod, changed as it says changes the answer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policygen import outsiders, random_pods, random_policies
from test_answers_against_oracle import cluster_objects, documents_of
from test_explanation_properties import PRINCIPALS, REQUESTS

from meshbridge.evaluation.cluster import Cluster
from meshbridge.evaluation.evaluator import Evaluator
from meshbridge.evaluation.explanation import Stage, explain_flow
from meshbridge.evaluation.explanation_network import Mismatch, Near
from meshbridge.evaluation.mesh import condition_on
from meshbridge.evaluation.question import HttpFields, Question, Token, parse_question
from meshbridge.policy.baseline import TRUE, rule_matches
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import IDENTITY, Attribute, Condition
from meshbridge.policy.model import Origin, Verdict
from meshbridge.policy.parse.ports import LAST_PORT

CHECKED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
REQUEST = {"http": {"method": "GET", "path": "/a", "host": "api"}, "claims": {"iss": "iss", "sub": "bob"}}
NAMES = ("spiffe://cluster.local/ns/shop/sa/default", "spiffe://cluster.local/ns/pay/sa/robot",
         "spiffe://cluster.local/ns/ops/sa/x", None)  # fmt: skip


def questions(seed: int) -> Iterator[tuple[Cluster, Question]]:
    """Flows to captured ports of pods that no network policy guards, of which everything is said."""
    rng = random.Random(seed)
    pods = random_pods(rng, 3)
    cluster = Cluster(documents_of(cluster_objects(rng, pods, sidecars=True) + random_policies(rng, network=0, mesh=5)))
    for _ in range(6):
        source, destination = rng.choice([p for p in outsiders() if p.address.version == 4]), rng.choice(pods[::2])
        flow = {"src": str(source.address), "dst": str(destination.address), "port": rng.choice((80, 443, 8080, 1001))}
        yield cluster, parse_question(flow | REQUEST | rng.choice(REQUESTS[1:]) | rng.choice(PRINCIPALS[1:]))


@CHECKED
@given(st.integers(min_value=0, max_value=2**32))
def test_a_flow_changed_as_a_near_rule_wants_gets_the_verdict_it_promises(seed: int) -> None:
    for _ in checked(seed):
        pass


def test_most_of_what_near_rules_want_was_tried() -> None:
    found = Counter(outcome for seed in range(30) for outcome in checked(seed))
    assert found["promised"] > 5, found


def checked(seed: int) -> Iterator[str]:
    """Try every near rule of Envoy's step whose conditions the flow can be made to meet."""
    for cluster, question in questions(seed):
        evaluator = Evaluator(cluster)
        step = next((s for s in explain_flow(cluster, question).steps if s.stage is Stage.ENVOY), None)
        before = matching(evaluator, question)
        for near in (step.near or ()) if step is not None else ():
            if near.depends or near.isolates or near.origin.kind != "AuthorizationPolicy":
                continue
            for other in changed(question, near):
                after = matching(evaluator, other)
                if near.origin not in after:
                    continue
                alone = after - before == {near.origin} and before <= after
                if alone:
                    assert evaluator.answer(evaluator.prepare(other)).mesh is near.verdict, (near, other)
                yield "promised" if alone else "another rule matches now"
                break


def matching(evaluator: Evaluator, question: Question) -> set[Origin]:
    """The rules that match a request at the destination."""
    leg = evaluator.prepare(question).legs[0]
    assert leg.receiver.endpoint is not None
    guarded, facts, _ = evaluator.guarded(leg, leg.receiver.endpoint)
    form = AppProtocol.HTTP
    return {
        rule.origin
        for policy in guarded.guard.policies
        for rule in policy.rules
        if rule_matches(rule, policy.action, partial(condition_on, facts, form, guarded.guard, policy), form) is TRUE
    }


def changed(question: Question, near: Near) -> Iterator[Question]:
    """The question with every mismatch mended, in each of a few ways."""
    for ways in product(*(list(mended(mismatch)) for mismatch in near.mismatches)):
        found = question
        for way in ways:
            http = way.pop("http", None)
            claims = way.pop("claims", None)
            found = replace(found, **way)
            if http is not None:
                found = replace(found, http=replace(found.http or HttpFields(), **http))
            if claims is not None:
                found = replace(found, claims={**(found.claims or {}), **claims}, token=Token.VALID)
        yield found


def mended(mismatch: Mismatch) -> Iterator[dict[str, Any]]:
    condition = mismatch.condition
    if mismatch.wants == "mutual TLS":
        yield {"principal": NAMES[0]}
    if mismatch.wants.startswith("a valid token"):
        yield {"token": Token.ABSENT}
    if not isinstance(condition, Condition):
        return
    values = [concrete(value) for value in condition.values] or ["zz"]
    match condition.attribute:
        case attribute if attribute in IDENTITY:
            yield from ({"principal": name} for name in NAMES)
        case Attribute.METHODS:
            yield from ({"http": {"method": value}} for value in values)
        case Attribute.PATHS:
            yield from ({"http": {"path": value if value.startswith("/") else f"/{value}"}} for value in values)
        case Attribute.PORTS:
            yield from ({"port": int(value) if value.isdigit() else LAST_PORT} for value in values)
        case Attribute.IP_BLOCKS:
            yield from ({"source": str(holder.address)} for holder in outsiders())
        case Attribute.REMOTE_IP_BLOCKS:
            yield from ({"remote_ip": holder.address} for holder in outsiders())
        case Attribute.REQUEST_PRINCIPALS:
            yield from ({"claims": {"iss": "iss", "sub": sub}} for sub in ("bob", "eve"))
            yield {"token": Token.ABSENT, "claims": None}
        case Attribute.CLAIM:
            yield from ({"claims": {condition.key[0]: value}} for value in values)
        case Attribute.HEADER:
            yield from ({"http": {"headers": ((condition.key[0], value),)}} for value in values)


def concrete(pattern: str) -> str:
    return pattern.replace("*", "x" if pattern == "*" else "")


@pytest.mark.parametrize("request_", REQUESTS[1:])
def test_what_leaves_a_flow_open_is_named(request_: dict[str, Any]) -> None:
    """Whoever is told NEEDS_L7 is told at least one thing to say."""
    for seed in range(40):
        rng = random.Random(seed)
        pods = random_pods(rng, 3)
        policies = random_policies(rng, network=0, mesh=5)
        cluster = Cluster(documents_of(cluster_objects(rng, pods, sidecars=True) + policies))
        flow = {"src": "8.8.8.8", "dst": str(pods[0].address), "port": 80, **request_}
        step = next((s for s in explain_flow(cluster, parse_question(flow)).steps if s.stage is Stage.ENVOY), None)
        if step is not None and step.verdict is Verdict.NEEDS_L7:
            assert step.open, (seed, step)
            assert all(near.depends for near in step.open), (seed, step)
