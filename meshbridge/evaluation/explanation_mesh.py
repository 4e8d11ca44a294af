"""Which conditions of an AuthorizationPolicy a flow does not meet, and which rules would change Envoy's verdict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from meshbridge.evaluation.ambient import ztunnel_guard
from meshbridge.evaluation.explanation_network import Mismatch, Near, Side, requirement_mismatches, satisfiable
from meshbridge.evaluation.mesh import Facts, condition_on, mesh_verdict_on
from meshbridge.evaluation.question import HttpFields, Token
from meshbridge.identity.model import Peer, ProxyClass
from meshbridge.policy.baseline import FALSE, TRUE, UNDECIDED, UNKNOWN, Guard, MeshVerdict
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import (
    HTTP_ONLY,
    IDENTITY,
    Action,
    Attribute,
    AuthorizationPolicy,
    AuthorizationRule,
    Clause,
    Condition,
    JwtRule,
    MtlsMode,
    selects,
)
from meshbridge.policy.model import Origin, Verdict
from meshbridge.policy.selectors import in_namespace

_OF_TOKEN: Final = {
    Attribute.REQUEST_PRINCIPALS: ("sub",), Attribute.AUDIENCES: ("aud",), Attribute.PRESENTER: ("azp",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MeshFlow:
    """A flow as the destination's proxy sees it, and what guards the destination."""

    receiver: Peer
    guard: Guard
    jwt_rules: tuple[JwtRule, ...]
    facts: Facts
    protocol: AppProtocol

    @property
    def form(self) -> AppProtocol:
        """The form in which rules are compared with the flow; what is sniffed may still be a request."""
        return AppProtocol.TCP if self.protocol is AppProtocol.TCP else AppProtocol.HTTP

    def verdict(self) -> MeshVerdict:
        return mesh_verdict_on(self.guard, self.jwt_rules, self.facts, self.protocol)


def near_mesh(policies: Iterable[AuthorizationPolicy], flow: MeshFlow) -> list[Near]:
    """The rules that would change Envoy's verdict on a flow if they matched it, nearest first.

    Args:
        policies: All there are, not only those that select the destination.
    """
    now = flow.verdict().verdict
    found = list(_near_to_authentication(flow, now))
    selected = {policy.origin for policy in flow.guard.policies}
    for policy in policies:
        mismatches = () if policy.origin in selected else _selection(policy, flow)
        if mismatches is None:
            continue
        found += _near_to_policy(_as_sent(policy, flow), mismatches, flow, now)
    return sorted(found, key=lambda near: near.distance)


def mesh_verdict_without(origins: Iterable[Origin], flow: MeshFlow) -> Verdict:
    """Envoy's verdict if some of the rules of AuthorizationPolicies were not there."""
    without = set(origins)
    policies = tuple(
        replace(policy, rules=tuple(rule for rule in policy.rules if rule.origin not in without))
        for policy in flow.guard.policies
    )
    return replace(flow, guard=replace(flow.guard, policies=policies)).verdict().verdict


def undecided(flow: MeshFlow) -> list[Near]:
    """The rules that leave a flow open, with what each depends on; none of their conditions is known not to hold."""
    found = []
    mode, origin = flow.guard.mtls.at(flow.facts.port)
    if mode is MtlsMode.STRICT and origin is not None and flow.facts.question.principal is UNDECIDED:
        found.append(Near(origin, FALSE, (), depends=(f"{Attribute.PRINCIPALS.value} none",)))
    for policy in flow.guard.policies:
        effect = flow.guard.effect_of(policy, flow.form)
        if effect is None:
            continue
        asked = (f"the answer of provider {policy.provider}",) if effect is Action.CUSTOM else ()
        for rule in policy.rules:
            failing, depends = _conditions(policy, rule, flow)
            if not failing and (depends or asked):
                found.append(
                    Near(rule.origin, TRUE if effect is Action.ALLOW else FALSE, (), depends=(*depends, *asked))
                )
    return found


def wanted(condition: Condition) -> str:
    """A condition in words."""
    name = condition.attribute.value
    if condition.key:
        name += "".join(f"[{key}]" for key in condition.key)
    parts = []
    if condition.values:
        values = ", ".join(condition.values)
        parts.append(f"{name} {values}" if len(condition.values) == 1 else f"{name} in ({values})")
    if condition.not_values:
        parts.append(f"{name} not in ({', '.join(condition.not_values)})")
    return " and ".join(parts)


def _near_to_policy(
    policy: AuthorizationPolicy, selection: tuple[Mismatch, ...], flow: MeshFlow, now: Verdict
) -> Iterator[Near]:
    """By selecting the destination alone, else rule by rule."""
    widened = flow
    if selection:
        widened = replace(flow, guard=replace(flow.guard, policies=(*flow.guard.policies, policy)))
        then = widened.verdict().verdict
        if then is not now:
            yield Near(policy.origin, then, selection, isolates=policy.action is Action.ALLOW)
            return
    for rule in policy.rules:
        failing, depends = _conditions(policy, rule, flow)
        asked = widened
        if flow.form is AppProtocol.TCP and policy.action is Action.ALLOW and (http := _only_of_requests(rule)):
            asked = replace(widened, protocol=AppProtocol.HTTP)
            failing = (Mismatch(Side.FLOW, f"HTTP, which alone has {http}", "is TCP to Envoy"), *failing)
            depends = (http, *depends)
        then = _verdict(asked, rule)
        if then is not now and (selection or failing):
            yield Near(rule.origin, then, (*selection, *failing), depends=depends)


def _near_to_authentication(flow: MeshFlow, now: Verdict) -> Iterator[Near]:
    """What PeerAuthentication and RequestAuthentication refuse before any rule is asked."""
    question = flow.facts.question
    mode, origin = flow.guard.mtls.at(flow.facts.port)
    if mode is MtlsMode.STRICT and origin is not None and question.principal is None:
        other = replace(flow, facts=replace(flow.facts, question=replace(question, principal=UNDECIDED)))
        if (then := other.verdict().verdict) is not now:
            yield Near(origin, then, (Mismatch(Side.SOURCE, "mutual TLS", "sends plaintext"),))
    if question.token is Token.BAD and flow.jwt_rules and flow.form is AppProtocol.HTTP:
        other = replace(flow, facts=replace(flow.facts, question=replace(question, token=Token.ABSENT)))
        if (then := other.verdict().verdict) is not now:
            yield Near(
                flow.jwt_rules[0].origin, then, (Mismatch(Side.REQUEST, "a valid token or none", "has a bad one"),)
            )


def _verdict(flow: MeshFlow, matching: AuthorizationRule) -> Verdict:
    """The verdict if every condition of one rule held."""
    holding = {id(condition) for condition in matching.all_conditions}

    def known(
        facts: Facts, form: AppProtocol, guard: Guard, policy: AuthorizationPolicy, condition: Condition
    ) -> Verdict:
        return TRUE if id(condition) in holding else condition_on(facts, form, guard, policy, condition)

    return mesh_verdict_on(flow.guard, flow.jwt_rules, flow.facts, flow.protocol, known).verdict


def _as_sent(policy: AuthorizationPolicy, flow: MeshFlow) -> AuthorizationPolicy:
    """The policy as the destination's proxy gets it."""
    if flow.receiver.proxy is not ProxyClass.AMBIENT:
        return policy
    sent = ztunnel_guard(replace(flow.guard, policies=(policy,))).policies
    return sent[0] if sent else replace(policy, rules=())


def _selection(policy: AuthorizationPolicy, flow: MeshFlow) -> tuple[Mismatch, ...] | None:
    """Why a policy does not select the destination; None: it selects no pod behind a sidecar at all."""
    mesh, receiver = flow.guard.mesh, flow.receiver
    found = requirement_mismatches(policy.selector, receiver, Side.DESTINATION)
    if policy.namespace not in (mesh.root_namespace, receiver.namespace):
        has = f"has namespace={receiver.namespace}"
        own = Mismatch(Side.DESTINATION, f"namespace={policy.namespace}", has, in_namespace(policy.namespace))
        found = (own, *found)
    if not satisfiable(policy.selector) or (not found and not selects(policy, receiver, mesh)):
        return None
    return found


def _conditions(
    policy: AuthorizationPolicy, rule: AuthorizationRule, flow: MeshFlow
) -> tuple[tuple[Mismatch, ...], tuple[str, ...]]:
    """What of the nearest alternatives of a rule does not hold, and what is not known to."""
    known = partial(condition_on, flow.facts, flow.form, flow.guard, policy)

    def sorted_out(clause: Clause) -> tuple[list[Condition], list[Condition]]:
        values = [(condition, known(condition)) for condition in clause]
        return [c for c, v in values if v is FALSE], [c for c, v in values if v is UNKNOWN]

    failing: list[Condition] = []
    depends: list[Condition] = []
    for alternatives in (rule.sources, rule.operations, (rule.conditions,)):
        nearest = min((sorted_out(clause) for clause in alternatives), key=lambda found: tuple(map(len, found)))
        failing += nearest[0]
        depends += nearest[1]
    return tuple(_mismatch(c, flow.facts) for c in failing), tuple(map(wanted, depends))


def _only_of_requests(rule: AuthorizationRule) -> str:
    conditions = [condition for condition in rule.all_conditions if condition.attribute in HTTP_ONLY]
    return " and ".join(map(wanted, conditions[:3]))


def _mismatch(condition: Condition, facts: Facts) -> Mismatch:
    attribute, question = condition.attribute, facts.question
    if attribute in HTTP_ONLY:
        side, has = Side.REQUEST, _of_request(condition, question.http, question.claims)
    elif attribute in IDENTITY:
        side, has = Side.SOURCE, f"presents {question.principal}" if question.principal else "sends plaintext"
    elif attribute in (Attribute.IP_BLOCKS, Attribute.REMOTE_IP_BLOCKS):
        told = question.remote_ip if attribute is Attribute.REMOTE_IP_BLOCKS else None
        side, has = Side.SOURCE, f"is {told or facts.source or 'an unknown address'}"
    elif attribute is Attribute.DESTINATION_IP:
        side, has = Side.DESTINATION, f"is {', '.join(map(str, facts.destinations))}"
    elif attribute is Attribute.PORTS:
        side, has = Side.FLOW, f"is to port {facts.port}"
    else:
        side, has = Side.FLOW, f"names the server {question.sni!r}"
    return Mismatch(side, wanted(condition), has, condition)


def _of_request(condition: Condition, http: HttpFields | None, claims: Any) -> str:
    http = http or HttpFields()
    match condition.attribute:
        case Attribute.METHODS:
            return f"is {http.method}"
        case Attribute.PATHS:
            return f"is for {http.path}"
        case Attribute.HOSTS:
            return f"is for host {http.host}"
        case Attribute.HEADER:
            name = condition.key[0]
            value = http.joined.get(name)
            return f"has {name}: {value}" if value is not None else f"has no header {name}"
    if not claims:
        return "has no valid token"
    path = _OF_TOKEN.get(condition.attribute, condition.key)
    found: Any = claims
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return f"has claim {'.'.join(path)}={found}" if found is not None else f"has no claim {'.'.join(path)}"
