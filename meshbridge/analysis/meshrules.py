"""Rules of AuthorizationPolicies that can never match, or that others make pointless.

What is claimed here follows from the rules alone, for every request there can be: where two conditions cannot be
compared with certainty, nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Final

from meshbridge.analysis.finding import Finding, finding
from meshbridge.analysis.scene import Scene
from meshbridge.policy.mesh import (
    Action,
    Attribute,
    AuthorizationPolicy,
    AuthorizationRule,
    Clause,
    Condition,
    MeshSettings,
    network_of,
)
from meshbridge.policy.strings import matches_host, matches_identity, matches_text

_MAX_COMBINATIONS: Final = 256
_NETWORKS: Final = frozenset({Attribute.IP_BLOCKS, Attribute.REMOTE_IP_BLOCKS, Attribute.DESTINATION_IP})
_SINGLE: Final = frozenset(
    {Attribute.PORTS, Attribute.METHODS, Attribute.HOSTS, Attribute.PATHS, Attribute.SNI, Attribute.PRESENTER}
)
"""What a request has exactly one of, and Istio compares as plain strings."""

_OF_NAME: Final = frozenset({Attribute.NAMESPACES, Attribute.SERVICE_ACCOUNTS, Attribute.TRUST_DOMAINS})


def never_matching(scene: Scene) -> Iterator[Finding]:
    """Rules whose conditions exclude each other in every combination of their sources and operations."""
    for policy in scene.policies.authorization:
        for rule in policy.rules:
            reasons = [_impossible(clause, policy, scene.mesh) for clause in _combinations(rule)]
            if reasons and all(reasons):
                yield finding("MB0501", rule.origin, f"can never match: {reasons[0]}")


def _combinations(rule: AuthorizationRule) -> Iterator[Clause]:
    if len(rule.sources) * len(rule.operations) <= _MAX_COMBINATIONS:
        for source, operation in product(rule.sources, rule.operations):
            yield (*source, *operation, *rule.conditions)


def _impossible(clause: Clause, policy: AuthorizationPolicy, mesh: MeshSettings) -> str:
    """Why all conditions of a clause cannot hold together; empty when they perhaps can."""
    by_attribute: dict[Attribute, list[Condition]] = {}
    for condition in clause:
        by_attribute.setdefault(condition.attribute, []).append(condition)
    for attribute, conditions in by_attribute.items():
        for condition in conditions:
            if condition.values and not any(_survives(value, attribute, conditions) for value in condition.values):
                return f"no value of {attribute.value} satisfies all conditions on it"
    names = [(attribute, c) for attribute in _OF_NAME for c in by_attribute.get(attribute, ()) if c.values]
    for condition in by_attribute.get(Attribute.PRINCIPALS, ()):
        exact = condition.values and all("*" not in value for value in condition.values)
        for attribute, other in names if exact else ():
            if not any(
                matches_identity(attribute, value, principal, policy.namespace, mesh)
                for principal in condition.values
                for value in other.values
            ):
                return f"no {Attribute.PRINCIPALS.value} it names is of the {attribute.value} it names"
    return ""


def _survives(value: str, attribute: Attribute, conditions: list[Condition]) -> bool:
    """Whether something that ``value`` matches may satisfy every condition on its attribute."""
    if attribute in _NETWORKS:
        network = network_of(value)
        for condition in conditions:
            if any(_contains(other, value) for other in condition.not_values):
                return False
            overlaps = (network.overlaps(network_of(other)) for other in condition.values)
            if condition.values and not any(overlaps):
                return False
        return True
    if attribute in _SINGLE and "*" not in value and "{" not in value:
        return all(
            (not c.values or any(_matches(other, value, attribute) for other in c.values))
            and not any(_matches(other, value, attribute) for other in c.not_values)
            for c in conditions
        )
    return not any(value in c.not_values for c in conditions if attribute is not Attribute.HEADER or not c.key)


def _matches(pattern: str, value: str, attribute: Attribute) -> bool:
    if attribute is Attribute.HOSTS:
        return matches_host(pattern, value)
    if attribute is Attribute.PATHS and "{" in pattern:
        return True
    return pattern == value if attribute is Attribute.PORTS else matches_text(pattern, value)


def _contains(network: str, value: str) -> bool:
    outer, inner = network_of(network), network_of(value)
    return outer.version == inner.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def made_pointless(scene: Scene) -> Iterator[Finding]:
    """ALLOW rules that a DENY rule covers on all they select, and rules that another one of their action covers."""
    enforced = [p for p in scene.policies.authorization if not p.dry_run]
    covering = [(p, rule) for p in enforced if p.action in (Action.ALLOW, Action.DENY) for rule in p.rules]
    reaching: dict[tuple[str, Action], list[tuple[AuthorizationPolicy, AuthorizationRule]]] = {}
    for policy, rule in covering:
        reaching.setdefault((policy.namespace, policy.action), []).append((policy, rule))
    for policy, rule in covering:
        places = dict.fromkeys((policy.namespace, scene.mesh.root_namespace))
        for action in (Action.DENY, Action.ALLOW):
            if action is Action.ALLOW and policy.action is Action.DENY:
                continue
            found = next(
                (
                    other
                    for place in places
                    for by, other in reaching.get((place, action), ())
                    if other is not rule
                    and _selects_all_of(by, policy, scene.mesh)
                    and covers(other, rule, by.namespace == policy.namespace)
                    and (by.action is not policy.action or not covers(rule, other, True) or other.origin < rule.origin)
                ),
                None,
            )
            if found is None:
                continue
            by_rule = found.origin
            if action is policy.action:
                text = f"{by_rule} already {'allows' if action is Action.ALLOW else 'denies'} all it matches"
                yield finding("MB0503", rule.origin, text, related=[by_rule])
            else:
                yield finding("MB0502", rule.origin, f"everything it allows is denied by {by_rule}", related=[by_rule])
            break


def _selects_all_of(by: AuthorizationPolicy, policy: AuthorizationPolicy, mesh: MeshSettings) -> bool:
    """Whether ``by`` selects every workload that ``policy`` does."""
    reaches = by.namespace in (policy.namespace, mesh.root_namespace)
    return reaches and set(by.selector.requirements) <= set(policy.selector.requirements)


def covers(wide: AuthorizationRule, narrow: AuthorizationRule, same_namespace: bool) -> bool:
    """Whether every request that ``narrow`` matches surely is one that ``wide`` matches."""
    combinations = list(_combinations(narrow))
    return bool(combinations) and all(
        any(all(_implied(c, clause, same_namespace) for c in source) for source in wide.sources)
        and any(all(_implied(c, clause, same_namespace) for c in operation) for operation in wide.operations)
        and all(_implied(c, clause, same_namespace) for c in wide.conditions)
        for clause in combinations
    )


def _implied(condition: Condition, clause: Clause, same_namespace: bool) -> bool:
    return any(
        other.attribute is condition.attribute
        and other.key == condition.key
        and (same_namespace or condition.attribute is not Attribute.SERVICE_ACCOUNTS)
        and (not condition.values or (bool(other.values) and _each_within(other.values, condition)))
        and all(value in other.not_values for value in condition.not_values)
        for other in clause
    )


def _each_within(values: tuple[str, ...], condition: Condition) -> bool:
    if condition.attribute in _NETWORKS:
        return all(any(_contains(wide, value) for wide in condition.values) for value in values)
    return all(any(wide in (value, "*") for wide in condition.values) for value in values)
