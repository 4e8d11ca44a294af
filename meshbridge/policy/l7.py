"""The mesh's decision on one request, in two values: what ext_authz answers.

It reads the same rules as the kernel's compiler; what is "needs L7" there is answered here. Whatever cannot be answered
denies.

Spec: ISTIO.md §a, "Order in the filter chain".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from meshbridge.identity.model import Entity, IpNetwork, Peer, Workload
from meshbridge.policy.attributes import Request, request_matches
from meshbridge.policy.baseline import FALSE, TRUE, Guard, rule_matches
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.httpmatch import http_rule_matches
from meshbridge.policy.lowering import guard_of
from meshbridge.policy.mesh import (
    OUR_PROVIDER,
    Action,
    Attribute,
    AuthorizationPolicy,
    AuthorizationRule,
    JwtRule,
    MtlsMode,
)
from meshbridge.policy.model import Anything, Direction, NetworkRule, Origin, PortMatch, Tier, Verdict
from meshbridge.policy.parse.ports import PROTOCOLS
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.tiers import deciding


@dataclass(frozen=True, slots=True)
class RequestDecision:
    """ALLOW or DENY, the rules it comes from, and why in words.

    ``unauthenticated``: a bad token, which is 401 and not 403. ``reported`` are AUDIT and dry-run rules that matched;
    they had no part in the verdict.
    """

    verdict: Verdict
    reason: str
    origins: tuple[Origin, ...] = ()
    reported: tuple[Origin, ...] = ()
    unauthenticated: bool = False

    @property
    def allowed(self) -> bool:
        return self.verdict is Verdict.ALLOW


class _Indexed(NamedTuple):
    policy: AuthorizationPolicy
    rule: AuthorizationRule


class _RuleIndex:
    """Rules by the first segment of the paths they ask for, so that a thousand of them cost no scan."""

    def __init__(self, rules: Iterable[_Indexed]) -> None:
        self._anywhere: list[tuple[int, _Indexed]] = []
        self._by_segment: dict[str, list[tuple[int, _Indexed]]] = {}
        for position, indexed in enumerate(rules):
            segments = _first_segments(indexed.rule)
            if segments is None:
                self._anywhere.append((position, indexed))
            else:
                for segment in segments:
                    self._by_segment.setdefault(segment, []).append((position, indexed))

    def candidates(self, request: Request) -> list[_Indexed]:
        """Every rule that may match, in their order; on TCP, where paths have no meaning, all of them."""
        if request.http:
            found = [*self._anywhere, *self._by_segment.get(_segment(request.url_path), ())]
        else:
            every = [rule for rules in self._by_segment.values() for rule in rules]
            found = list({id(item[1].rule): item for item in [*self._anywhere, *every]}.values())
        return [indexed for _, indexed in sorted(found, key=lambda item: item[0])]


def _segment(path: str) -> str:
    return path.split("/", 2)[1] if path.startswith("/") else ""


def _first_segments(rule: AuthorizationRule) -> set[str] | None:
    """The first path segments the rule can match; None when its paths do not tell."""
    found: set[str] = set()
    for clause in rule.operations:
        paths = [path for condition in clause if condition.attribute is Attribute.PATHS for path in condition.values]
        if not paths:
            return None
        for path in paths:
            parts = path.split("/", 2)
            whole = len(parts) == 3 or not path.endswith("*")
            if len(parts) < 2 or parts[0] or not whole or "{" in parts[1] or (len(parts) == 2 and "*" in parts[1]):
                return None
            found.add(parts[1])
    return found


@dataclass(frozen=True)
class RequestJudge:
    """Decides the requests of one workload. Building it is the expensive part; keep it as long as policies stay."""

    workload: Workload
    guard: Guard
    http_rules: tuple[NetworkRule, ...]
    jwt_rules: tuple[JwtRule, ...]
    _rules: Mapping[Action, _RuleIndex] = field(default_factory=dict, repr=False)
    _allow_policies: tuple[Origin, ...] = ()

    @classmethod
    def of(cls, workload: Workload, policies: PolicySet) -> RequestJudge:
        """A judge for ``workload`` from the cluster's policies."""
        selected = policies.selecting(workload)
        guard = guard_of(workload, selected)
        by_action: dict[Action, list[_Indexed]] = {action: [] for action in Action}
        for policy in guard.policies:
            action = Action.AUDIT if policy.dry_run and policy.action is not Action.CUSTOM else policy.action
            by_action[action] += [_Indexed(policy, rule) for rule in policy.rules]
        network = tuple(rule for rule in selected.network if rule.direction is Direction.INGRESS)
        return cls(
            workload,
            guard,
            network if any(rule.http for rule in network) else (),
            tuple(rule for policy in selected.request_authentication for rule in policy.rules),
            {action: _RuleIndex(rules) for action, rules in by_action.items()},
            (
                *(p.origin for p in guard.policies if p.action is Action.ALLOW and not p.dry_run),
                *(refusal.origin for refusal in guard.refusals if not refusal.may_deny),
            ),
        )

    def decide(self, request: Request) -> RequestDecision:
        """ALLOW or DENY.

        A refused mesh object that may select the workload denies, since nobody knows what it says; one that only allows
        counts as a policy that allows nothing.
        """
        reported = tuple(indexed.rule.origin for indexed in self._matching(Action.AUDIT, request))
        denied = self._denied(request)
        if denied is not None:
            return RequestDecision(Verdict.DENY, denied.reason, denied.origins, reported, denied.unauthenticated)
        origins: tuple[Origin, ...] = ()
        if self._allow_policies:
            allowed = self._matching(Action.ALLOW, request)
            if not allowed:
                reason = "no rule of any ALLOW policy matches the request"
                return RequestDecision(Verdict.DENY, reason, self._allow_policies, reported)
            origins = (allowed[0].rule.origin,)
        reason = f"allowed by {origins[0]}" if origins else "no policy denies the request"
        return RequestDecision(Verdict.ALLOW, reason, origins, reported)

    def http_rules_refuse(self, request: Request) -> tuple[Origin, ...]:
        """The network policies whose HTTP rules refuse the request; none when they let it pass."""
        denial = self._network_denial(request)
        return denial.origins if denial is not None else ()

    def _denied(self, request: Request) -> _Denial | None:
        refusals = [refusal for refusal in self.guard.refusals if refusal.may_deny]
        if refusals:
            return _Denial(f"refused policy: {refusals[0]}", tuple(refusal.origin for refusal in refusals))
        mode, origin = self.guard.mtls.at(request.port)
        if mode is MtlsMode.STRICT and not request.principal:
            return _Denial("mTLS is STRICT and the connection is plaintext", (origin,) if origin else ())
        form = AppProtocol.HTTP if request.http else AppProtocol.TCP
        for indexed in self._matching(Action.CUSTOM, request):
            match self.guard.effect_of(indexed.policy, form):
                case Action.DENY:
                    reason = f"denied by {indexed.rule.origin}, as Envoy cannot be told whom to ask"
                    return _Denial(reason, (indexed.rule.origin,))
                case Action.CUSTOM if not self.guard.mesh.asks(indexed.policy.provider):
                    reason = f"CUSTOM provider {indexed.policy.provider!r} is asked by nobody here"
                    return _Denial(reason, (indexed.rule.origin,))
        if request.token_error and self.jwt_rules:
            origins = tuple(rule.origin for rule in self.jwt_rules)
            return _Denial(f"the token is not valid: {request.token_error}", origins, unauthenticated=True)
        matched = self._matching(Action.DENY, request)
        if matched:
            return _Denial(f"denied by {matched[0].rule.origin}", (matched[0].rule.origin,))
        return self._network_denial(request)

    def _matching(self, action: Action, request: Request) -> list[_Indexed]:
        form = AppProtocol.HTTP if request.http else AppProtocol.TCP
        found = []
        for indexed in self._rules[action].candidates(request):
            policy, rule = indexed
            verdicts = [
                rule_matches(rule, action, partial(request_matches, request, claims, policy, self.guard.mesh), form)
                for claims in (request.claims or (None,))
            ]
            # With several tokens an ALLOW has to hold for each of them, anything else for one. What only Envoy knows
            # allows nothing and denies whatever it may.
            matches = min(verdicts) is TRUE if action is Action.ALLOW else max(verdicts) is not FALSE
            if matches:
                found.append(indexed)
                if action in (Action.ALLOW, Action.DENY):
                    break
        return found

    def _network_denial(self, request: Request) -> _Denial | None:
        """The L7 half of CiliumNetworkPolicies: some rule that covers peer and port has to match the request.

        The kernel has judged the L4 half, denies included; where a rule without HTTP part allows, nothing is left. What
        no rule covers came in as the node's own, whose addresses are not all known here, or where nothing isolates; a
        pod that came in otherwise, on a port with HTTP rules, is another to the kernel than to us.
        """
        if not any(rule.http and self._covers_port(rule, request.port) for rule in self.http_rules):
            return None
        covering = self._covering(request, request.peer)
        if not covering and (request.peer is None or not request.peer.is_pod):
            networks = request.peer.networks if request.peer else frozenset[IpNetwork]()
            covering = self._covering(request, Peer(entities=frozenset({Entity.HOST}), networks=networks))
        elif not covering and any(rule.default_deny for rule in self.http_rules):
            return _Denial("no rule of any network policy covers the source", _isolating(self.http_rules))
        decisive = deciding(covering, isolated=any(rule.default_deny for rule in self.http_rules))
        if not any(rule.http for rule in decisive) or any(not rule.http for rule in decisive):
            return None
        if request.http and any(http_rule_matches(match, request) for rule in decisive for match in rule.http):
            return None
        return _Denial("no http rule of any network policy matches", tuple(sorted({r.origin for r in decisive})))

    def _covering(self, request: Request, peer: Peer | None) -> list[NetworkRule]:
        allowing = (rule for rule in self.http_rules if rule.verdict is not FALSE or rule.tier is Tier.ADMIN)
        return [rule for rule in allowing if self._covers_port(rule, request.port) and _covers_peer(rule, peer)]

    def _covers_port(self, rule: NetworkRule, port: int) -> bool:
        return isinstance(rule.ports, Anything) or any(self._is_port(match, port) for match in rule.ports)

    def _is_port(self, match: PortMatch, port: int) -> bool:
        if match.protocol not in (0, PROTOCOLS["TCP"]):
            return False
        if match.name:
            return any(p.name == match.name and p.port == port and p.protocol == "TCP" for p in self.workload.ports)
        return match.first <= port <= match.last


@dataclass(frozen=True, slots=True)
class _Denial:
    reason: str
    origins: tuple[Origin, ...]
    unauthenticated: bool = False


def _covers_peer(rule: NetworkRule, peer: Peer | None) -> bool:
    if isinstance(rule.peers, Anything):
        return True
    return peer is not None and any(selector.matches(peer) for selector in rule.peers)


def _isolating(rules: Iterable[NetworkRule]) -> tuple[Origin, ...]:
    return tuple(sorted({rule.origin for rule in rules if rule.default_deny}))


def decide_request(workload: Workload, policies: PolicySet, request: Request) -> RequestDecision:
    """Decide one request to ``workload``; who decides many keeps a ``RequestJudge``."""
    return RequestJudge.of(workload, policies).decide(request)


__all__ = ["OUR_PROVIDER", "Request", "RequestDecision", "RequestJudge", "decide_request"]
