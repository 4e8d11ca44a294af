"""The mesh's three-valued verdict on one flow, from what a packet shows: DESIGN §2, "Baseline".

Every operator is Kleene's, defined on ``Verdict`` once: AND is min, OR is max, NOT is ``~``. A condition the packet
cannot answer is NEEDS_L7, which here reads "unknown".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Final

from meshbridge.identity.model import IpAddress, IpNetwork
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import (
    HTTP_ONLY,
    IDENTITY,
    OUR_PROVIDER,
    Action,
    Attribute,
    AuthorizationPolicy,
    AuthorizationRule,
    Clause,
    Condition,
    EffectiveMtls,
    MeshSettings,
    MtlsMode,
    ProviderKind,
    network_of,
)
from meshbridge.policy.model import Origin, Refusal, Verdict
from meshbridge.policy.precedence import DropReason
from meshbridge.policy.strings import matches_identity

TRUE, UNKNOWN, FALSE = Verdict.ALLOW, Verdict.NEEDS_L7, Verdict.DENY


class Principal(Enum):
    """What is known of a source's certificate when it is not a name."""

    UNDECIDED = "may present any name or none"


UNDECIDED: Final = Principal.UNDECIDED


@dataclass(frozen=True, slots=True)
class Flow:
    """What is known before Envoy of a TCP connection to an endpoint.

    ``principal`` is UNDECIDED for the early deny, the peer's own name or None for compensation. ``addresses`` are those
    of the endpoint that the connection may have come in by.
    """

    networks: frozenset[IpNetwork]
    port: int
    principal: Principal | str | None = UNDECIDED
    addresses: tuple[IpAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Guard:
    """What guards one workload: the policies selecting it, its mTLS modes, and what was refused.

    ``mtls_past_envoy`` are the modes without what fixes of ours switched off; None where they switched off nothing.
    """

    policies: tuple[AuthorizationPolicy, ...]
    mtls: EffectiveMtls
    refusals: tuple[Refusal, ...]
    mesh: MeshSettings
    mtls_past_envoy: EffectiveMtls | None = None

    @property
    def past_envoy(self) -> Guard:
        """What is to guard a port that Envoy does not see.

        Clients are told to send plaintext there so that the port works at all. Who was to be let in did not change.
        """
        if self.mtls_past_envoy is None:
            return self
        return replace(self, mtls=self.mtls_past_envoy, mtls_past_envoy=None)

    @property
    def rules(self) -> Iterable[AuthorizationRule]:
        return (rule for policy in self.policies for rule in policy.rules)

    def effect_of(self, policy: AuthorizationPolicy, form: AppProtocol) -> Action | None:
        """What Envoy does by a policy; None: nothing. CUSTOM: it asks another provider than us.

        The rules of CUSTOM deny wherever Envoy cannot be told whom to ask: several providers, one that the mesh does
        not define; by dry-run, too. An HTTP provider is not asked on TCP. Ours decides by the same policies again.

        Spec: istio, pilot/pkg/security/authz/builder/builder.go.
        """
        if policy.action is not Action.CUSTOM:
            return None if policy.dry_run or policy.action is Action.AUDIT else policy.action
        kind = self.mesh.provider(policy.provider)
        if kind is ProviderKind.UNUSABLE or len(self.custom_providers) > 1:
            return None if policy.dry_run else Action.DENY
        if kind is ProviderKind.HTTP and form is AppProtocol.TCP:
            return None
        if policy.dry_run:
            return Action.DENY
        return None if policy.provider == OUR_PROVIDER else Action.CUSTOM

    @property
    def custom_providers(self) -> frozenset[str]:
        return frozenset(policy.provider for policy in self.policies if policy.action is Action.CUSTOM)

    @property
    def networks(self) -> frozenset[IpNetwork]:
        """The CIDRs its rules ask of a source."""
        return frozenset(
            network_of(value)
            for rule in self.rules
            for condition in rule.all_conditions
            if condition.attribute in (Attribute.IP_BLOCKS, Attribute.REMOTE_IP_BLOCKS)
            for value in (*condition.values, *condition.not_values)
        )


@dataclass(frozen=True, slots=True)
class MeshVerdict:
    """``origins`` are the rules that decided, or those that leave it open."""

    verdict: Verdict
    origins: tuple[Origin, ...] = ()
    deny_reason: int = 0


def mesh_verdict(guard: Guard, flow: Flow, protocol: AppProtocol) -> MeshVerdict:
    """The verdict on a flow; where Envoy sniffs the protocol both forms have to agree to be certain."""
    if guard.mtls.at(flow.port)[0] is MtlsMode.DISABLE:
        flow = replace(flow, principal=None)  # nobody asks for a certificate, so whatever is sent proves no name
    undecided = isinstance(flow.principal, Principal)
    presents = UNKNOWN if undecided else _certain(flow.principal is not None)

    def verdict(form: AppProtocol) -> MeshVerdict:
        return verdict_of(guard, flow.port, form, presents, partial(_known, flow, form, guard.mesh))

    return verdict_of_forms(verdict, protocol)


def verdict_of_forms(verdict: Callable[[AppProtocol], MeshVerdict], protocol: AppProtocol) -> MeshVerdict:
    """The verdict by the form Envoy gives the policies; a protocol that is sniffed asks both."""
    if protocol is not AppProtocol.AUTO:
        return verdict(protocol)
    http, tcp = (verdict(form) for form in (AppProtocol.HTTP, AppProtocol.TCP))
    if http.verdict is tcp.verdict:
        return MeshVerdict(http.verdict, _origins(http.origins, tcp.origins), max(http.deny_reason, tcp.deny_reason))
    return MeshVerdict(UNKNOWN, _origins(http.origins, tcp.origins))


def verdict_of(
    guard: Guard,
    port: int,
    form: AppProtocol,
    presents: Verdict,
    known: Callable[[AuthorizationPolicy, Condition], Verdict],
) -> MeshVerdict:
    """The verdict by one form, for whatever is known of a flow.

    Args:
        presents: whether the source presents a certificate.
        known: whether a condition of a policy holds.
    """
    open_origins: list[Origin] = []
    mode, mode_origin = guard.mtls.at(port)
    if mode is MtlsMode.STRICT and mode_origin is not None:
        if presents is FALSE:
            return MeshVerdict(FALSE, (mode_origin,), DropReason.MESH_POLICY_DENY)
        if presents is UNKNOWN:
            open_origins.append(mode_origin)
    denying: list[Origin] = []
    allowing: list[Origin] = []
    maybe_allowing: list[Origin] = []
    allow_policies: list[Origin] = []
    for policy in guard.policies:
        effect = guard.effect_of(policy, form)
        if effect is None:
            continue
        if effect is Action.ALLOW:
            allow_policies.append(policy.origin)
        for rule in policy.rules:
            matched = rule_matches(rule, effect, partial(known, policy), form)
            if matched is FALSE:
                continue
            if effect is Action.CUSTOM:
                open_origins.append(rule.origin)
            elif effect is Action.DENY:
                (denying if matched is TRUE else open_origins).append(rule.origin)
            else:
                (allowing if matched is TRUE else maybe_allowing).append(rule.origin)
    if denying:
        return MeshVerdict(FALSE, _origins(denying), DropReason.MESH_POLICY_DENY)
    refused = [refusal.origin for refusal in guard.refusals]
    if allow_policies and not allowing:
        if not maybe_allowing and not refused:
            return MeshVerdict(FALSE, _origins(allow_policies), DropReason.MESH_POLICY)
        open_origins += maybe_allowing
    open_origins += refused
    if open_origins:
        return MeshVerdict(UNKNOWN, _origins(open_origins))
    return MeshVerdict(TRUE, _origins(allowing))


def rule_matches(
    rule: AuthorizationRule, action: Action, known: Callable[[Condition], Verdict], form: AppProtocol
) -> Verdict:
    """Whether a rule matches, in three values, by the form Envoy gives it on a TCP or an HTTP filter chain.

    On TCP an ALLOW rule with a condition only HTTP answers is dropped whole; any other action drops the condition.
    """
    if (
        form is AppProtocol.TCP
        and action is Action.ALLOW
        and any(condition.attribute in HTTP_ONLY for condition in rule.all_conditions)
    ):
        return FALSE
    clauses = (_any(rule.sources, known), _any(rule.operations, known), _all(rule.conditions, known))
    return min(clauses)


def _any(clauses: tuple[Clause, ...], known: Callable[[Condition], Verdict]) -> Verdict:
    return max((_all(clause, known) for clause in clauses), default=FALSE)


def _all(clause: Clause, known: Callable[[Condition], Verdict]) -> Verdict:
    return min((known(condition) for condition in clause), default=TRUE)


def condition_matches(condition: Condition, value_matches: Callable[[str], Verdict]) -> Verdict:
    """Some of the values, where any are written, and none of the not-values."""
    wanted = max((value_matches(value) for value in condition.values), default=FALSE) if condition.values else TRUE
    if not condition.not_values:
        return wanted
    return min(wanted, ~max(value_matches(value) for value in condition.not_values))


def _known(
    flow: Flow, form: AppProtocol, mesh: MeshSettings, policy: AuthorizationPolicy, condition: Condition
) -> Verdict:
    attribute = condition.attribute
    if attribute in HTTP_ONLY:
        return TRUE if form is AppProtocol.TCP else UNKNOWN
    if attribute in IDENTITY:
        if isinstance(flow.principal, Principal):
            return UNKNOWN
        principal = flow.principal
        return condition_matches(
            condition, lambda value: _certain(matches_identity(attribute, value, principal, policy.namespace, mesh))
        )
    if attribute is Attribute.PORTS:
        return condition_matches(condition, lambda value: _certain(int(value) == flow.port))
    if attribute is Attribute.IP_BLOCKS or (attribute is Attribute.REMOTE_IP_BLOCKS and form is AppProtocol.TCP):
        return condition_matches(condition, lambda value: _certain(network_of(value) in flow.networks))
    if attribute is Attribute.DESTINATION_IP:
        return condition_matches(condition, lambda value: _every(network_of(value), flow.addresses))
    return UNKNOWN


def _every(network: IpNetwork, addresses: tuple[IpAddress, ...]) -> Verdict:
    inside = [address in network for address in addresses]
    if not inside or any(inside) != all(inside):
        return UNKNOWN
    return _certain(inside[0])


def _certain(value: bool) -> Verdict:
    return TRUE if value else FALSE


def _origins(*origins: Iterable[Origin]) -> tuple[Origin, ...]:
    return tuple(sorted({origin for group in origins for origin in group}))
