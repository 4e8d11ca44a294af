"""A request as policies see it, and what each attribute of a condition asks of it.

Spec: ISTIO.md §a, the table of fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from meshbridge.identity.model import IpAddress, Peer
from meshbridge.policy.baseline import FALSE, TRUE, UNKNOWN, condition_matches
from meshbridge.policy.mesh import (
    HTTP_ONLY,
    IDENTITY,
    Attribute,
    AuthorizationPolicy,
    Claims,
    Condition,
    MeshSettings,
    network_of,
)
from meshbridge.policy.model import Verdict
from meshbridge.policy.strings import (
    matches_host,
    matches_identity,
    matches_path,
    matches_text,
    request_principal_forms,
)

_SPACE_DELIMITED: Final = frozenset({"scope", "permission"})
"""Claims that Istio has Envoy split at spaces before policies see them (OAuth writes scopes so)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request on an HTTP chain, or one connection on a TCP chain (``http`` false: only addresses and identity).

    ``path`` is as sent, with its query. ``headers`` has what was sent several times joined by commas, ``repeated`` each
    of those by itself. ``principal`` is the verified certificate's SPIFFE name, None on plaintext.
    ``remote`` is what remoteIpBlocks ask of, the source unless the mesh trusts a forwarded address. ``claims`` are the
    payloads of verified tokens, ``token_error`` says that there was a token and it is not valid. ``peer`` is who holds
    the source address, for the network policies' HTTP rules; None matches no selector.
    """

    source: IpAddress
    port: int
    destination: IpAddress | None = None
    principal: str | None = None
    sni: str = ""
    http: bool = True
    method: str = ""
    path: str = ""
    host: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    repeated: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    remote: IpAddress | None = None
    claims: tuple[Claims, ...] = field(default=(), hash=False)
    token_error: str = ""
    peer: Peer | None = None

    @property
    def url_path(self) -> str:
        """The path without query and fragment."""
        return self.path.partition("?")[0].partition("#")[0]

    def header(self, name: str) -> str | None:
        """A header by its lower-case name, pseudo-headers included; None when it was not sent."""
        match name:
            case ":method":
                return self.method
            case ":path":
                return self.path
            case ":authority" | "host":
                return self.host
            case _:
                return self.headers.get(name)

    def sent(self, name: str) -> tuple[str, ...]:
        """Each value of a header by itself, which is how Envoy's RBAC looks at them; none when it was not sent."""
        header = self.header(name)
        return self.repeated.get(name, () if header is None else (header,))


def request_matches(
    request: Request, claims: Claims | None, policy: AuthorizationPolicy, mesh: MeshSettings, condition: Condition
) -> Verdict:
    """Whether a condition holds for a request made with one token, or none.

    On a TCP chain conditions only HTTP answers hold, which is how Envoy's filters leave them out; that ALLOW rules with
    one are gone is ``rule_matches``'s business. What other filters have told Envoy is NEEDS_L7: nobody tells us.
    """
    if condition.attribute is Attribute.METADATA:
        return UNKNOWN
    if condition.attribute in HTTP_ONLY and not request.http:
        return TRUE
    return condition_matches(
        condition, lambda value: TRUE if _value(request, claims, policy, mesh, condition, value) else FALSE
    )


def _value(
    request: Request,
    claims: Claims | None,
    policy: AuthorizationPolicy,
    mesh: MeshSettings,
    condition: Condition,
    value: str,
) -> bool:
    attribute = condition.attribute
    if attribute in IDENTITY:
        return matches_identity(attribute, value, request.principal, policy.namespace, mesh)
    match attribute:
        case Attribute.METHODS:
            return matches_text(value, request.method)
        case Attribute.PATHS:
            return matches_path(value, request.url_path)
        case Attribute.HOSTS:
            return matches_host(value, request.host)
        case Attribute.HEADER:
            return any(value == "*" or matches_text(value, sent) for sent in request.sent(condition.key[0]))
        case Attribute.PORTS:
            return int(value) == request.port
        case Attribute.IP_BLOCKS:
            return request.source in network_of(value)
        case Attribute.REMOTE_IP_BLOCKS:
            return (request.remote or request.source) in network_of(value)
        case Attribute.DESTINATION_IP:
            return request.destination is not None and request.destination in network_of(value)
        case Attribute.SNI:
            return matches_text(value, request.sni)
        case Attribute.REQUEST_PRINCIPALS:
            return claims is not None and _request_principal(value, claims)
        case Attribute.AUDIENCES:
            return claims is not None and _claim(value, claims, ("aud",))
        case Attribute.PRESENTER:
            return claims is not None and _claim(value, claims, ("azp",))
        case Attribute.CLAIM:
            return claims is not None and _claim(value, claims, condition.key)
    raise AssertionError(attribute)


def _request_principal(pattern: str, claims: Claims) -> bool:
    issuer, subject = claims.get("iss"), claims.get("sub")
    if not isinstance(issuer, str) or not isinstance(subject, str):
        return False
    of_issuer, of_subject = request_principal_forms(pattern)
    return of_issuer.matches(issuer) and of_subject.matches(subject)


def _claim(pattern: str, claims: Claims, path: tuple[str, ...]) -> bool:
    found: Any = claims
    for name in path:
        if not isinstance(found, Mapping) or name not in found:
            return False
        found = found[name]
    if isinstance(found, str):
        members = found.split(" ") if len(path) == 1 and path[0] in _SPACE_DELIMITED else [found]
        return any(matches_text(pattern, member) for member in members)
    if isinstance(found, list):
        return any(isinstance(member, str) and matches_text(pattern, member) for member in found)
    return False
