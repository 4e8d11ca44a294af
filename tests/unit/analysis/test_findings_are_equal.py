"""What is looked up, kept and left out to be quick finds the same as going through everything, word for word."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hypothesis import example, given
from hypothesis import strategies as st
from policygen import random_pods, random_policies
from test_findings_are_true import CHECKED, scene_of

from meshbridge.analysis import isolation, networkrules
from meshbridge.analysis.finding import Finding, finding, listed
from meshbridge.analysis.scene import Pods, Reach, Scene, without_effect
from meshbridge.policy.model import Direction, NetworkRule, Origin, Tier, Verdict
from meshbridge.policy.parse.ports import PROTOCOLS


def without_influence(scene: Scene) -> Iterator[Finding]:
    """Every rule, on every kind of pods: the map without it, compiled from all others, and every flow it matches."""
    written: dict[Origin, list[NetworkRule]] = {}
    for rule in scene.policies.network:
        if rule.verdict is Verdict.ALLOW and rule.tier is Tier.NORMAL and rule.peers != ():
            written.setdefault(rule.origin, []).append(rule)
    selecting: dict[Origin, list[Pods]] = {}
    for pods in scene.pods:
        for origin in dict.fromkeys(rule.origin for rule in pods.selected.network if rule.origin in written):
            selecting.setdefault(origin, []).append(pods)
    for origin, every in selecting.items():
        if not any(rule.http for rule in written[origin]):
            found = judged(scene, written[origin], every)
            if found is not None:
                yield found


def judged(scene: Scene, rules: list[NetworkRule], selected: list[Pods]) -> Finding | None:
    origin, direction = rules[0].origin, rules[0].direction
    denying: dict[Origin, None] = {}
    allowing: dict[Origin, None] = {}
    for pods in selected:
        reach = scene.reach(pods, direction)
        if not reach.isolates:
            return None
        others = tuple(without_effect(r) if r.origin == origin else r for r in pods.selected.network)
        without = scene.reach(pods, direction, others)
        for number, protocol, port in networkrules._probes(scene, rules, pods, direction):
            decision = without.decide(number, protocol, port).network
            if decision.verdict is not reach.decide(number, protocol, port).network.verdict:
                return None
            (denying if decision.verdict is Verdict.DENY else allowing).update(dict.fromkeys(decision.origins))
    if denying and not allowing:
        return finding("MB0502", origin, f"everything it allows is denied by {listed(denying)}", related=denying)
    if not denying:
        text = f"everything it allows is allowed by {listed(allowing)} too"
        return finding("MB0503", origin, text, related=allowing) if allowing else None
    text = f"part of what it allows is denied by {listed(denying)}, the rest is allowed by {listed(allowing)} too"
    return finding("MB0503", origin, text, related=[*denying, *allowing])


def unreachable(scene: Scene, pods: Pods, before: Reach, after: Reach) -> list[str]:
    found = []
    for other in scene.pods:
        for port, protocol in scene._declared_by(other.pod) if other is not pods else ():
            number = PROTOCOLS[protocol]
            if other.number in before.passing(number, port) and other.number not in after.passing(number, port):
                found.append(f"{other.names[0]}:{port}")
    return found


@CHECKED
@example(362)  # a deny rule by a port's name, met only where another rule's ports begin
@given(st.integers(0, 2**63 - 1))
def test_rules_without_influence(seed: int) -> None:
    rng = random.Random(seed)
    pods, policies = random_pods(rng, 4), random_policies(rng, network=12)
    policies += [{**p, "metadata": {**p["metadata"], "name": f"{p['metadata']['name']}-again"}} for p in policies[:4]]
    scene = scene_of(pods, policies)
    assert list(map(str, networkrules.without_influence(scene))) == list(map(str, without_influence(scene)))


@CHECKED
@given(st.integers(0, 2**63 - 1))
def test_what_default_deny_makes_unreachable(seed: int) -> None:
    rng = random.Random(seed)
    scene = scene_of(random_pods(rng, 6), random_policies(rng, network=8))
    for pods in scene.pods:
        after = scene.reach(pods, Direction.EGRESS)
        for other in scene.pods:
            before = scene.reach(pods, Direction.EGRESS, other.selected.network)
            quick = isolation._unreachable(scene, pods, before, after)
            assert quick == unreachable(scene, pods, before, after)
