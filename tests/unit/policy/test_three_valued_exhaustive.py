"""The three-valued logic and both lowerings, checked on every case of a small universe.

What is certain in three values has to hold however the unknown turns out. So a dropped packet is one that Envoy would
refuse whatever it reads (early deny is sound), and a passed one on an excluded port is one that Envoy would let through
whatever it reads (compensation only subtracts). The two-valued meaning is written out here, from Istio's documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest

from meshbridge.policy.baseline import FALSE, TRUE, UNKNOWN, Guard, MeshVerdict, verdict_of, verdict_of_forms
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.lowering import lower_captured, lower_excluded
from meshbridge.policy.mesh import (
    Action,
    Attribute,
    AuthorizationPolicy,
    AuthorizationRule,
    Condition,
    EffectiveMtls,
    MeshSettings,
    MtlsMode,
    ProviderKind,
)
from meshbridge.policy.model import Document, Judge, Origin, Refusal, Verdict

VALUES = (FALSE, UNKNOWN, TRUE)
ORIGIN = Origin("AuthorizationPolicy", "shop", "p")


def completions(value: Verdict) -> tuple[bool, ...]:
    """What an unknown may turn out to be."""
    return {TRUE: (True,), FALSE: (False,), UNKNOWN: (False, True)}[value]


def certain(values: Sequence[bool]) -> Verdict:
    return {(True,): TRUE, (False,): FALSE}.get(tuple(sorted(set(values))), UNKNOWN)


@pytest.mark.parametrize("left", VALUES)
def test_not_is_what_all_completions_agree_on(left: Verdict) -> None:
    assert ~left is certain([not value for value in completions(left)])
    assert ~~left is left


@pytest.mark.parametrize(("left", "right"), list(itertools.product(VALUES, repeat=2)))
def test_and_and_or_are_what_all_completions_agree_on(left: Verdict, right: Verdict) -> None:
    pairs = list(itertools.product(completions(left), completions(right)))
    assert min(left, right) is certain([a and b for a, b in pairs])
    assert max(left, right) is certain([a or b for a, b in pairs])
    assert ~min(left, right) is max(~left, ~right)
    assert min(left, max(left, right)) is left


def test_the_operators_are_associative_and_distribute() -> None:
    for a, b, c in itertools.product(VALUES, repeat=3):
        assert min(a, max(b, c)) is max(min(a, b), min(a, c))
        assert max(a, min(b, c)) is min(max(a, b), max(a, c))


# The universe: two atoms (a name, a method), a port, rules of every shape over them, two policies, mTLS, a refusal.

NAME, METHOD, PORT = (
    Condition(attribute, ("x",)) for attribute in (Attribute.PRINCIPALS, Attribute.METHODS, Attribute.PORTS)
)
RULES = {
    "anything": AuthorizationRule(ORIGIN),
    "name": AuthorizationRule(ORIGIN, ((NAME,),)),
    "method": AuthorizationRule(ORIGIN, operations=((METHOD,),)),
    "name and method": AuthorizationRule(ORIGIN, ((NAME,),), ((METHOD,),)),
    "when name": AuthorizationRule(ORIGIN, conditions=(NAME,)),
    "name or anybody": AuthorizationRule(ORIGIN, ((NAME,), ()), ((METHOD, PORT),)),
}
PROVIDERS = ("other", "meshbridge", "http", "none")
MESH = MeshSettings(providers=(("other", ProviderKind.GRPC), ("http", ProviderKind.HTTP)))


def policy(action: Action, *rules: AuthorizationRule, provider: str = "", dry_run: bool = False) -> AuthorizationPolicy:
    return AuthorizationPolicy("shop", "p", action, rules, ORIGIN, provider=provider, dry_run=dry_run)


def small_policies() -> list[AuthorizationPolicy]:
    enforced = [policy(action, rule) for action in (Action.ALLOW, Action.DENY) for rule in RULES.values()]
    idle = [
        policy(Action.ALLOW),
        policy(Action.ALLOW, RULES["name"], dry_run=True),
        policy(Action.AUDIT, RULES["name"]),
    ]
    custom = [policy(Action.CUSTOM, RULES["method"], provider=name) for name in PROVIDERS]
    return [*enforced, *idle, *custom, policy(Action.CUSTOM, RULES["name"], provider="other", dry_run=True)]


POLICIES = small_policies()
REFUSALS: dict[str, tuple[Refusal, ...]] = {
    "none": (),
    "may deny": (Refusal(Document("AuthorizationPolicy", "", "shop", "r", {}), "bad"),),
    "only allows": (Refusal(Document("AuthorizationPolicy", "", "shop", "r", {}), "bad", may_deny=False),),
}
MEANINGS: dict[str, tuple[AuthorizationPolicy | None, ...]] = {
    "none": (None,),
    "only allows": (policy(Action.ALLOW), policy(Action.ALLOW, RULES["anything"])),
    "may deny": (policy(Action.ALLOW), policy(Action.ALLOW, RULES["anything"]), policy(Action.DENY, RULES["anything"])),
}
"""What a policy that nobody could read may have meant."""


@dataclass(frozen=True)
class Facts:
    """Everything about a connection; ``asked`` is what another provider would answer."""

    name: bool
    method: bool
    port: bool
    presents: bool
    asked: bool

    def holds(self, condition: Condition) -> bool:
        return {Attribute.PRINCIPALS: self.name, Attribute.METHODS: self.method, Attribute.PORTS: self.port}[
            condition.attribute
        ]


def envoy_admits(policies: Sequence[AuthorizationPolicy], strict: bool, http: bool, facts: Facts) -> bool:
    """Two values, from Istio's documents: CUSTOM, then DENY, then ALLOW, with the form of the filter chain."""
    if strict and not facts.presents:
        return False
    providers = {p.provider for p in policies if p.action is Action.CUSTOM}
    allowing = [p for p in policies if p.action is Action.ALLOW and not p.dry_run]
    for each in policies:
        if each.action is Action.CUSTOM and any(rule_holds(rule, http, facts, False) for rule in each.rules):
            unusable = each.provider == "none" or len(providers) > 1
            if (unusable and not each.dry_run) or (not unusable and each.dry_run and (http or each.provider != "http")):
                return False
            asked = not unusable and each.provider != "meshbridge" and (http or each.provider != "http")
            if asked and not facts.asked:
                return False
        denies = each.action is Action.DENY and not each.dry_run
        if denies and any(rule_holds(rule, http, facts, False) for rule in each.rules):
            return False
    return not allowing or any(rule_holds(rule, http, facts, True) for each in allowing for rule in each.rules)


def rule_holds(rule: AuthorizationRule, http: bool, facts: Facts, allows: bool) -> bool:
    def clause_holds(clause: Sequence[Condition]) -> bool:
        return all(facts.holds(c) for c in clause if http or c.attribute is not Attribute.METHODS)

    asks_http = any(condition.attribute is Attribute.METHODS for condition in rule.all_conditions)
    if allows and asks_http and not http:
        return False
    return (
        any(clause_holds(clause) for clause in rule.sources)
        and any(clause_holds(clause) for clause in rule.operations)
        and clause_holds(rule.conditions)
    )


@dataclass(frozen=True)
class Partial:
    """What is known of a connection, in three values."""

    name: Verdict
    method: Verdict
    port: Verdict
    presents: Verdict

    def completions(self) -> Iterator[Facts]:
        parts = (self.name, self.method, self.port, self.presents)
        for name, method, port, presents in itertools.product(*map(completions, parts)):
            for asked in (False, True):
                yield Facts(name, method, port, presents, asked)

    def known(self, form: AppProtocol) -> Callable[[AuthorizationPolicy, Condition], Verdict]:
        values: Mapping[Attribute, Verdict] = {
            Attribute.PRINCIPALS: self.name,
            Attribute.METHODS: TRUE if form is AppProtocol.TCP else self.method,
            Attribute.PORTS: self.port,
        }
        return lambda _, condition: values[condition.attribute]


PARTIALS = [
    Partial(name, method, port, presents)
    for name, method, port, presents in itertools.product(VALUES, VALUES, (FALSE, TRUE), VALUES)
    if not (presents is FALSE and name is not FALSE) and not (presents is UNKNOWN and name is TRUE)
]
"""Who presents no certificate has no name."""


def guard(policies: Sequence[AuthorizationPolicy], mode: MtlsMode, refused: str) -> Guard:
    return Guard(tuple(policies), EffectiveMtls(mode, ORIGIN), REFUSALS[refused], MESH)


def verdict(of: Guard, partial: Partial, protocol: AppProtocol) -> MeshVerdict:
    return verdict_of_forms(lambda form: verdict_of(of, 8080, form, partial.presents, partial.known(form)), protocol)


PAIRS = [*((one,) for one in POLICIES), *itertools.combinations(POLICIES, 2)]
FORMS = {AppProtocol.HTTP: (True,), AppProtocol.TCP: (False,), AppProtocol.AUTO: (True, False)}


@cache
def outcomes(pair: tuple[int, ...], strict: bool, http: bool, refused: str, partial: Partial) -> frozenset[bool]:
    """What Envoy does under all that the unknown may turn out to be."""
    policies = [POLICIES[index] for index in pair]
    return frozenset(
        envoy_admits([*policies, *([meant] if meant else [])], strict, http, facts)
        for meant in MEANINGS[refused]
        for facts in partial.completions()
    )


@pytest.mark.parametrize("refused", REFUSALS)
@pytest.mark.parametrize("mode", [MtlsMode.PERMISSIVE, MtlsMode.STRICT])
def test_what_is_certain_holds_however_the_unknown_turns_out(mode: MtlsMode, refused: str) -> None:
    strict = mode is MtlsMode.STRICT
    certain_ones = 0
    for pair in PAIRS:
        held = guard(pair, mode, refused)
        indices = tuple(POLICIES.index(each) for each in pair)
        for partial in PARTIALS:
            for protocol, forms in FORMS.items():
                found = verdict(held, partial, protocol)
                if found.verdict is UNKNOWN:
                    continue
                certain_ones += 1
                real = frozenset().union(*(outcomes(indices, strict, http, refused, partial) for http in forms))
                assert real == {found.verdict is TRUE}, (pair, partial, protocol)
    assert certain_ones > 1000


@pytest.mark.parametrize(
    "judges", [frozenset(), frozenset({Judge.ENVOY}), frozenset(Judge)], ids=["none", "envoy", "both"]
)
@pytest.mark.parametrize("value", VALUES)
def test_the_lowerings_go_in_opposite_directions(value: Verdict, judges: frozenset[Judge]) -> None:
    baseline = MeshVerdict(value, (ORIGIN,), 1)
    captured, excluded = lower_captured(baseline, judges).verdict, lower_excluded(baseline).verdict
    assert (captured is FALSE) is (value is FALSE or (value is UNKNOWN and Judge.ENVOY not in judges))
    assert (excluded is TRUE) is (value is TRUE)
    assert excluded <= captured, "what nobody judges again passes less"


def test_early_deny_is_sound_and_compensation_only_subtracts() -> None:
    """Both lowerings of every verdict of the universe, against everything Envoy may do."""
    for pair in PAIRS:
        held = guard(pair, MtlsMode.PERMISSIVE, "none")
        indices = tuple(POLICIES.index(each) for each in pair)
        for partial in PARTIALS:
            for http, protocol in ((True, AppProtocol.HTTP), (False, AppProtocol.TCP)):
                found = verdict(held, partial, protocol)
                real = outcomes(indices, False, http, "none", partial)
                if lower_captured(found, frozenset({Judge.ENVOY})).verdict is FALSE:
                    assert real == {False}, (pair, partial, protocol)
                if lower_excluded(found).verdict is TRUE:
                    assert real == {True}, (pair, partial, protocol)


def turned(each: AuthorizationPolicy) -> AuthorizationPolicy:
    """The policy with all that it lists the other way round."""
    rules = (
        replace(rule, sources=rule.sources[::-1], operations=tuple(clause[::-1] for clause in rule.operations))
        for rule in each.rules[::-1]
    )
    return replace(each, rules=tuple(rules))


def test_order_never_matters() -> None:
    for pair in PAIRS[:: len(PAIRS) // 60]:
        other = [turned(each) for each in pair[::-1]]
        for partial in PARTIALS:
            for protocol in FORMS:
                one, two = (
                    verdict(guard(found, MtlsMode.STRICT, "may deny"), partial, protocol) for found in (pair, other)
                )
                assert one == two
