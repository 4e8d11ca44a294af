"""The mesh's verdict where ztunnel gives it: connections only, and not quite the sidecar's meaning.

Spec: ISTIO.md §a, "Ambient", differences 1 to 6; §b, "Ambient".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from meshbridge.identity.model import DEFAULT_TRUST_DOMAIN
from meshbridge.policy.baseline import Guard
from meshbridge.policy.mesh import (
    HTTP_ONLY,
    Action,
    Attribute,
    AuthorizationPolicy,
    AuthorizationRule,
    Clause,
    Condition,
    EffectiveMtls,
    MtlsMode,
    Scopes,
)

_ELSEWHERE: Final = HTTP_ONLY | {Attribute.REMOTE_IP_BLOCKS, Attribute.SNI, Attribute.METADATA}
_NOT_IN_WHEN: Final = frozenset({Attribute.SERVICE_ACCOUNTS, Attribute.TRUST_DOMAINS})
_NOBODY: Final = "/"
"""A namespace that no identity is of."""

_STRICT, _UNSET, _PERMISSIVE = MtlsMode.STRICT, MtlsMode.UNSET, MtlsMode.PERMISSIVE


def ztunnel_guard(guard: Guard) -> Guard:
    """The policies as ztunnel is sent them; a sidecar's TCP form of the result is what ztunnel decides.

    Principals are taken as they are written: to ztunnel cluster.local is no name for another trust domain.
    """
    policies = tuple(
        replace(policy, rules=tuple(filter(None, (_rule(policy, rule) for rule in policy.rules))))
        for policy in guard.policies
        if policy.action in (Action.ALLOW, Action.DENY) and not policy.dry_run
    )
    mesh = replace(guard.mesh, trust_domain=DEFAULT_TRUST_DOMAIN, trust_domain_aliases=())
    return replace(guard, policies=policies, mesh=mesh)


def ztunnel_mtls(scopes: Scopes) -> EffectiveMtls:
    """Where ztunnel refuses plaintext. It never turns mutual TLS off, so DISABLE is PERMISSIVE.

    Istio sends it STRICT as policies, and not for every combination: a workload's UNSET with a port's DISABLE leaves
    the port STRICT; with a port's PERMISSIVE below a namespace's UNSET and a STRICT mesh, nothing is STRICT.

    Spec: istio, pilot/pkg/serviceregistry/ambient/authorization.go, convertedSelectorPeerAuthentications and
    convertPeerAuthentication.
    """
    mesh, namespace, workload = scopes
    above = namespace if namespace is not None and namespace.mode is not _UNSET else mesh
    inherits_strict = above is not None and above.mode is _STRICT
    if workload is None:
        return EffectiveMtls(_STRICT, above.origin) if above is not None and inherits_strict else EffectiveMtls()
    own = workload.mode
    strict = own is _STRICT or (own is _UNSET and inherits_strict)
    base = EffectiveMtls(_STRICT, workload.origin if own is _STRICT or above is None else above.origin)
    ports = {port: mode for port, mode in workload.port_modes.items() if mode is not _UNSET}
    if not strict:
        demanding = {port: (_STRICT, workload.origin) for port, mode in ports.items() if mode is _STRICT}
        return EffectiveMtls(_PERMISSIVE, workload.origin, demanding)
    exempting = {port for port, mode in ports.items() if mode is not _STRICT}
    if not (exempting if own is _STRICT else [port for port, mode in ports.items() if mode is _PERMISSIVE]):
        return base
    if own is _UNSET and namespace is not None and namespace.mode is not _STRICT:
        return EffectiveMtls()
    return replace(base, ports=dict.fromkeys(sorted(exempting), (_PERMISSIVE, workload.origin)))


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
    return replace(rule, sources=sources, operations=operations, conditions=tuple(map(_literal, rule.conditions)))


def _literal(condition: Condition) -> Condition:
    """A namespace has one wildcard, at an end; any further star is one, which no namespace has."""
    if condition.attribute is not Attribute.NAMESPACES:
        return condition

    def literal(value: str) -> str:
        return _NOBODY if "*" in (value[1:] if value.startswith("*") else value.removesuffix("*")) else value

    return replace(
        condition, values=tuple(map(literal, condition.values)), not_values=tuple(map(literal, condition.not_values))
    )


def _clauses(clauses: tuple[Clause, ...], dropped: Callable[[Attribute], bool]) -> tuple[Clause, ...] | None:
    """Alternatives without the conditions that are dropped. One left empty matches nobody, all of them nothing."""
    kept = []
    for clause in clauses:
        left = tuple(_literal(condition) for condition in clause if not dropped(condition.attribute))
        if left or not clause:
            kept.append(left)
    return tuple(kept) if kept else None
