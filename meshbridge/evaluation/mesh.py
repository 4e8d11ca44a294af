"""The mesh's verdict on a flow of which some things are said and others are not.

The rules and their three-valued logic are ``policy.baseline``'s; what a condition is worth comes from the question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address
from typing import Final

from meshbridge.evaluation.question import HttpFields, Question, Token, address_of
from meshbridge.identity.model import IpAddress
from meshbridge.policy.attributes import Request, request_matches
from meshbridge.policy.baseline import (
    FALSE,
    TRUE,
    UNKNOWN,
    Guard,
    MeshVerdict,
    Principal,
    condition_matches,
    verdict_of,
    verdict_of_forms,
)
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import (
    HTTP_ONLY,
    IDENTITY,
    Attribute,
    AuthorizationPolicy,
    Condition,
    JwtRule,
    MeshSettings,
    MtlsMode,
    network_of,
)
from meshbridge.policy.model import Verdict
from meshbridge.policy.paths import normalized
from meshbridge.policy.precedence import DropReason
from meshbridge.policy.strings import matches_identity, matches_text

_OF_TOKEN: Final = frozenset({Attribute.REQUEST_PRINCIPALS, Attribute.AUDIENCES, Attribute.PRESENTER, Attribute.CLAIM})
_FORWARDED_FOR: Final = "x-forwarded-for"
_NOWHERE: Final = ip_address("::")
_PART_OF: Final = {
    Attribute.METHODS: "method", Attribute.PATHS: "path", Attribute.HOSTS: "host",
}  # fmt: skip
_PSEUDO: Final = {":method": "method", ":path": "path", ":authority": "host", "host": "host"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a flow at the destination: the question, and the addresses it leads to.

    ``destinations`` are the addresses the connection may have come in by; ``port`` is the pod's own. A ``gateway``
    believes x-forwarded-for only as far as the mesh trusts proxies before it, a sidecar its last address.
    """

    question: Question
    port: int
    source: IpAddress | None
    destinations: tuple[IpAddress, ...]
    gateway: bool = False


Known = Callable[[Facts, AppProtocol, Guard, AuthorizationPolicy, Condition], Verdict]


def mesh_verdict_on(
    guard: Guard,
    jwt_rules: tuple[JwtRule, ...],
    facts: Facts,
    protocol: AppProtocol,
    known: Known | None = None,
) -> MeshVerdict:
    """What Envoy at the destination decides, as far as the question tells.

    Args:
        jwt_rules: of the RequestAuthentications that select the destination: with any, a bad token is refused.
        protocol: what Envoy takes the port for. A request that is described is one: what is sniffed is then HTTP.
        known: whether a condition holds, for who wants to suppose something; else what the question says.
    """
    question = facts.question
    if protocol is AppProtocol.AUTO and question.http is not None:
        protocol = AppProtocol.HTTP
    if question.token is Token.BAD and jwt_rules and protocol is AppProtocol.HTTP:
        return MeshVerdict(FALSE, tuple(sorted({rule.origin for rule in jwt_rules})), DropReason.MESH_POLICY_DENY)
    for rule in jwt_rules if question.claims is not None else ():
        if rule.space_delimited and question.claims is not None and question.claims.get("iss") in (None, rule.issuer):
            question = replace(question, claims=rule.as_policies_see(question.claims))
    if guard.mtls.at(facts.port)[0] is MtlsMode.DISABLE:
        question = replace(question, principal=None)
    if question.http is not None and protocol is AppProtocol.HTTP:
        http = normalized_http(question.http, guard.mesh)
        if http is None:
            return MeshVerdict(FALSE, (), DropReason.MESH_POLICY_DENY)
        question = question if http is question.http else replace(question, http=http)
    facts = facts if question is facts.question else replace(facts, question=question)
    principal = question.principal
    presents = UNKNOWN if isinstance(principal, Principal) else _certain(principal is not None)

    def verdict(form: AppProtocol) -> MeshVerdict:
        return verdict_of(guard, facts.port, form, presents, partial(known or condition_on, facts, form, guard))

    return verdict_of_forms(verdict, protocol)


def normalized_http(http: HttpFields, mesh: MeshSettings) -> HttpFields | None:
    """The request as policies see it; None: Envoy refuses its path before anybody is asked."""
    if http.path is None:
        return http
    path = normalized(http.path, mesh.path_normalization)
    if path is None or path == http.path:
        return None if path is None else http
    return replace(http, path=path)


def condition_on(
    facts: Facts, form: AppProtocol, guard: Guard, policy: AuthorizationPolicy, condition: Condition
) -> Verdict:
    """Whether a condition of a policy holds, by the form Envoy gives it; NEEDS_L7: the question does not tell."""
    question, attribute = facts.question, condition.attribute
    if attribute in HTTP_ONLY:
        return TRUE if form is AppProtocol.TCP else _of_request(facts, guard, policy, condition)
    if attribute in IDENTITY:
        principal = question.principal
        if isinstance(principal, Principal):
            return UNKNOWN
        return condition_matches(
            condition,
            lambda value: _certain(matches_identity(attribute, value, principal, policy.namespace, guard.mesh)),
        )
    match attribute:
        case Attribute.PORTS:
            return condition_matches(condition, lambda value: _certain(int(value) == facts.port))
        case Attribute.IP_BLOCKS:
            return _in_networks(condition, () if facts.source is None else (facts.source,))
        case Attribute.REMOTE_IP_BLOCKS:
            remote = _remote(facts, form, guard.mesh.trusted_proxies)
            return _in_networks(condition, () if remote is None else (remote,))
        case Attribute.DESTINATION_IP:
            return _in_networks(condition, facts.destinations)
        case Attribute.SNI:
            sni = question.sni
            if sni is None:
                return UNKNOWN
            return condition_matches(condition, lambda value: _certain(matches_text(value, sni)))
        case _:
            return UNKNOWN


def _of_request(facts: Facts, guard: Guard, policy: AuthorizationPolicy, condition: Condition) -> Verdict:
    question, attribute = facts.question, condition.attribute
    claims = question.claims
    if attribute in _OF_TOKEN:
        told = claims is not None or question.token in (Token.ABSENT, Token.BAD)
        if not told and (question.token is Token.VALID or question.http is None):
            return UNKNOWN
        if question.token in (Token.ABSENT, Token.BAD):
            claims = None
    elif question.http is None:
        return UNKNOWN
    http = question.http or HttpFields()
    part = _PART_OF.get(attribute) or (_PSEUDO.get(condition.key[0]) if attribute is Attribute.HEADER else None)
    if part is not None and getattr(http, part) is None:
        return UNKNOWN
    request = Request(
        source=facts.source or _NOWHERE,
        port=facts.port,
        method=http.method or "",
        path=http.path or "",
        host=http.host or "",
        headers=http.joined,
        repeated=http.sent,
    )
    return request_matches(request, claims, policy, guard.mesh, condition)


def _remote(facts: Facts, form: AppProtocol, trusted_proxies: int) -> IpAddress | None:
    """Whom Envoy takes for the client: the peer, unless a proxy before it says otherwise; None: nobody has said."""
    question = facts.question
    if question.remote_ip is not None:
        return question.remote_ip
    if form is AppProtocol.TCP:
        return facts.source
    if question.http is None:
        return None
    told = question.http.joined.get(_FORWARDED_FOR, "").split(",")
    back = trusted_proxies if facts.gateway else 1
    if not 0 < back <= len(told):
        return facts.source
    return address_of(told[-back].strip()) or facts.source


def _in_networks(condition: Condition, addresses: tuple[IpAddress, ...]) -> Verdict:
    """Whether all addresses are inside, as the condition wants; that some are leaves it open."""

    def inside(value: str) -> Verdict:
        network = network_of(value)
        found = {address in network for address in addresses}
        return UNKNOWN if len(found) != 1 else _certain(found.pop())

    return condition_matches(condition, inside)


def _certain(value: bool) -> Verdict:
    return TRUE if value else FALSE
