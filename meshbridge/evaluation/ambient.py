"""The mesh's verdict where ztunnel gives it: connections only, and not quite the sidecar's meaning.

Spec: ISTIO.md §a, "Ambient", differences 1 to 6; §b, "Ambient".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from meshbridge.policy.baseline import Guard
from meshbridge.policy.mesh import (
    HTTP_ONLY,
    Action,
    Attribute,
    AuthorizationPolicy,
    AuthorizationRule,
    Clause,
)

_ELSEWHERE: Final = HTTP_ONLY | {Attribute.REMOTE_IP_BLOCKS, Attribute.SNI}
_NOT_IN_WHEN: Final = frozenset({Attribute.SERVICE_ACCOUNTS, Attribute.TRUST_DOMAINS})


def ztunnel_guard(guard: Guard) -> Guard:
    """The policies as ztunnel is sent them; a sidecar's TCP form of the result is what ztunnel decides."""
    policies = tuple(
        replace(policy, rules=tuple(filter(None, (_rule(policy, rule) for rule in policy.rules))))
        for policy in guard.policies
        if policy.action in (Action.ALLOW, Action.DENY) and not policy.dry_run
    )
    return replace(guard, policies=policies, mesh=replace(guard.mesh, trust_domain_aliases=()))


def _rule(policy: AuthorizationPolicy, rule: AuthorizationRule) -> AuthorizationRule | None:
    """The rule without what only Envoy sees; None when an ALLOW needs it, or when nothing is left of a part."""
    asks_envoy = any(c.attribute in _ELSEWHERE for c in rule.all_conditions)
    asks_envoy |= any(c.attribute in _NOT_IN_WHEN for c in rule.conditions)
    if asks_envoy and policy.action is Action.ALLOW:
        return None
    sources = _clauses(rule.sources, lambda a: a in _ELSEWHERE or a is Attribute.TRUST_DOMAINS)
    operations = _clauses(rule.operations, lambda a: a in _ELSEWHERE)
    if sources is None or operations is None:
        return None
    if any(c.attribute in _ELSEWHERE or c.attribute in _NOT_IN_WHEN for c in rule.conditions):
        return None
    return replace(rule, sources=sources, operations=operations)


def _clauses(clauses: tuple[Clause, ...], dropped: Callable[[Attribute], bool]) -> tuple[Clause, ...] | None:
    """Alternatives without the conditions that are dropped. One left empty matches nobody, all of them nothing."""
    kept = []
    for clause in clauses:
        left = tuple(condition for condition in clause if not dropped(condition.attribute))
        if left or not clause:
            kept.append(left)
    return tuple(kept) if kept else None
