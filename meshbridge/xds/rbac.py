"""AuthorizationPolicy as Envoy's own RBAC, in the form of HTTP chains or of TCP chains.

The third reader of the same rules, beside the kernel's compiler and ``policy.l7``: where these differ one of them is
wrong. CUSTOM, AUDIT and dry-run policies are not in it.

Spec: ISTIO.md §a: the table of fields, string forms, "HTTP-only on TCP".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

from envoy_data_plane.envoy.config.core.v3 import CidrRange, TypedExtensionConfig
from envoy_data_plane.envoy.config.listener.v3 import Filter
from envoy_data_plane.envoy.config.rbac.v3 import (
    Permission,
    PermissionSet,
    Policy,
    Principal,
    PrincipalAuthenticated,
    PrincipalSet,
    Rbac,
    RbacAction,
    SourcedMetadata,
)
from envoy_data_plane.envoy.config.route.v3 import HeaderMatcher
from envoy_data_plane.envoy.extensions.filters.http.rbac.v3 import Rbac as HttpRbac
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.filters.network.rbac.v3 import Rbac as TcpRbac
from envoy_data_plane.envoy.extensions.path.match.uri_template.v3 import UriTemplateMatchConfig
from envoy_data_plane.envoy.type.matcher.v3 import (
    ListMatcher,
    MetadataMatcher,
    MetadataMatcherPathSegment,
    OrMatcher,
    PathMatcher,
    RegexMatcher,
    StringMatcher,
    ValueMatcher,
)
from envoy_data_plane.google.protobuf import Any

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
    MeshSettings,
    network_of,
)
from meshbridge.policy.strings import (
    TextForm,
    TextPattern,
    domain_forms,
    principal_forms,
    request_principal_forms,
)
from meshbridge.xds.names import JWT_METADATA_NAMESPACE, JWT_PAYLOAD_KEY

_SCHEME: Final = "spiffe://"
_PRESENT: Final = StringMatcher(safe_regex=RegexMatcher(regex=".+"))
_ANYONE: Final = Principal(any=True)
_ANYTHING: Final = Permission(any=True)

_ASKED_OF_SOURCE: Final = IDENTITY | {
    Attribute.IP_BLOCKS,
    Attribute.REMOTE_IP_BLOCKS,
    Attribute.REQUEST_PRINCIPALS,
    Attribute.AUDIENCES,
    Attribute.PRESENTER,
    Attribute.CLAIM,
    Attribute.HEADER,
}


def http_rbac(policies: Sequence[AuthorizationPolicy], mesh: MeshSettings) -> list[HttpFilter]:
    """The filters for an HTTP chain, DENY before ALLOW. They stand behind jwt_authn and before the router."""
    return [
        HttpFilter(name=f"meshbridge.rbac.{rules.action.name.lower()}", typed_config=Any.pack(HttpRbac(rules=rules)))
        for rules in rbac_rules(policies, mesh, AppProtocol.HTTP)
    ]


def tcp_rbac(policies: Sequence[AuthorizationPolicy], mesh: MeshSettings, stat_prefix: str) -> list[Filter]:
    """The filters for a TCP chain, DENY before ALLOW. They stand before tcp_proxy and judge the client's first byte."""
    return [
        Filter(
            name=f"meshbridge.rbac.{rules.action.name.lower()}",
            typed_config=Any.pack(TcpRbac(rules=rules, stat_prefix=f"{stat_prefix}_{rules.action.name.lower()}")),
        )
        for rules in rbac_rules(policies, mesh, AppProtocol.TCP)
    ]


def rbac_rules(policies: Sequence[AuthorizationPolicy], mesh: MeshSettings, form: AppProtocol) -> list[Rbac]:
    """At most one RBAC per action. An ALLOW policy of which no rule is left still makes one: it denies everything."""
    found = []
    for action in (Action.DENY, Action.ALLOW):
        enforced = [policy for policy in policies if policy.action is action and not policy.dry_run]
        if enforced:
            rules = {
                f"ns[{policy.namespace}]-policy[{policy.name}]-rule[{index}]": _Lowering(policy, mesh, form).rule(rule)
                for policy in enforced
                for index, rule in enumerate(policy.rules)
                if not _lost_on_tcp(rule, action, form)
            }
            found.append(Rbac(action=RbacAction[action.name], policies=rules))
    return [rbac for rbac in found if rbac.policies or rbac.action is RbacAction.ALLOW]


def _lost_on_tcp(rule: AuthorizationRule, action: Action, form: AppProtocol) -> bool:
    http_only = any(condition.attribute in HTTP_ONLY for condition in rule.all_conditions)
    return form is AppProtocol.TCP and action is Action.ALLOW and http_only


class _Lowering:
    """One policy's rules. On TCP a condition only HTTP answers is left out, which makes a DENY rule wider."""

    def __init__(self, policy: AuthorizationPolicy, mesh: MeshSettings, form: AppProtocol) -> None:
        self._policy, self._mesh, self._form = policy, mesh, form

    def rule(self, rule: AuthorizationRule) -> Policy:
        asked_of_source = [c for c in rule.conditions if c.attribute in _ASKED_OF_SOURCE]
        asked_of_operation = [c for c in rule.conditions if c.attribute not in _ASKED_OF_SOURCE]
        return Policy(
            principals=[_all_ids(self._ids([*clause, *asked_of_source])) for clause in rule.sources],
            permissions=[_all_rules(self._rules([*clause, *asked_of_operation])) for clause in rule.operations],
        )

    def _ids(self, clause: Iterable[Condition]) -> list[Principal]:
        return [
            part
            for condition in self._kept(clause)
            for part in _parts(condition, lambda c, value: self._principal(c, value), _any_id, _not_id)
        ]

    def _rules(self, clause: Iterable[Condition]) -> list[Permission]:
        return [
            part for condition in self._kept(clause) for part in _parts(condition, _permission, _any_rule, _not_rule)
        ]

    def _kept(self, clause: Iterable[Condition]) -> Clause:
        return tuple(c for c in clause if self._form is not AppProtocol.TCP or c.attribute not in HTTP_ONLY)

    def _principal(self, condition: Condition, value: str) -> Principal:
        match condition.attribute:
            case Attribute.PRINCIPALS:
                return _any_id([_certificate(_principal_text(form)) for form in principal_forms(value, self._mesh)])
            case Attribute.NAMESPACES:
                name = ".*".join(re.escape(part) for part in value.split("*"))
                return _certificate(_regex(f".*/ns/{name}/.*"))
            case Attribute.SERVICE_ACCOUNTS:
                namespace, _, account = value.rpartition("/")
                namespace = re.escape(namespace or self._policy.namespace)
                return _certificate(_regex(f"{_SCHEME}.+/ns/{namespace}/(.+/|)sa/{re.escape(account)}(/.+)?"))
            case Attribute.TRUST_DOMAINS:
                return _any_id([_certificate(_domain_text(form)) for form in domain_forms(value, self._mesh)])
            case Attribute.IP_BLOCKS:
                return Principal(direct_remote_ip=_cidr(value))
            case Attribute.REMOTE_IP_BLOCKS:
                return Principal(remote_ip=_cidr(value))
            case Attribute.REQUEST_PRINCIPALS:
                return _request_principal(value)
            case Attribute.AUDIENCES:
                return _claim(("aud",), _text(value))
            case Attribute.PRESENTER:
                return _claim(("azp",), _text(value))
            case Attribute.CLAIM:
                return _claim(condition.key, _text(value))
            case Attribute.HEADER:
                return Principal(header=_header(condition.key[0], value))
        raise AssertionError(condition.attribute)


def _permission(condition: Condition, value: str) -> Permission:
    match condition.attribute:
        case Attribute.METHODS:
            return Permission(header=_header(":method", value))
        case Attribute.HOSTS:
            return Permission(header=_header(":authority", value, ignore_case=True))
        case Attribute.PATHS if "{" in value:
            return Permission(uri_template=_template(value))
        case Attribute.PATHS:
            return Permission(url_path=PathMatcher(path=_text(value)))
        case Attribute.PORTS:
            return Permission(destination_port=int(value))
        case Attribute.DESTINATION_IP:
            return Permission(destination_ip=_cidr(value))
        case Attribute.SNI:
            return Permission(requested_server_name=_text(value))
        case Attribute.METADATA:
            filter_name, key = condition.key
            left = _metadata(filter_name, key, value)
            return Permission(sourced_metadata=SourcedMetadata(metadata_matcher=left))
    raise AssertionError(condition.attribute)


P = TypeVar("P", Principal, Permission)


def _parts(
    condition: Condition, make: Callable[[Condition, str], P], any_of: Callable[[list[P]], P], none_of: Callable[[P], P]
) -> list[P]:
    """Some of the values, where any are written, and none of the not-values."""
    wanted = [any_of([make(condition, value) for value in condition.values])] if condition.values else []
    unwanted = condition.not_values
    return wanted + ([none_of(any_of([make(condition, value) for value in unwanted]))] if unwanted else [])


def _any_id(ids: list[Principal]) -> Principal:
    return ids[0] if len(ids) == 1 else Principal(or_ids=PrincipalSet(ids=ids))


def _all_ids(ids: list[Principal]) -> Principal:
    return Principal(and_ids=PrincipalSet(ids=ids)) if ids else _ANYONE


def _not_id(principal: Principal) -> Principal:
    return Principal(not_id=principal)


def _any_rule(rules: list[Permission]) -> Permission:
    return rules[0] if len(rules) == 1 else Permission(or_rules=PermissionSet(rules=rules))


def _all_rules(rules: list[Permission]) -> Permission:
    return Permission(and_rules=PermissionSet(rules=rules)) if rules else _ANYTHING


def _not_rule(permission: Permission) -> Permission:
    return Permission(not_rule=permission)


def _certificate(name: StringMatcher) -> Principal:
    return Principal(authenticated=PrincipalAuthenticated(principal_name=name))


def _principal_text(pattern: str) -> StringMatcher:
    if pattern == "*":
        return _PRESENT
    if pattern.startswith("*"):
        return _regex(f"{_SCHEME}.*{re.escape(pattern[1:])}")
    return _text(_SCHEME + pattern)


def _domain_text(pattern: str) -> StringMatcher:
    if pattern == "*":
        return StringMatcher(prefix=_SCHEME)
    if pattern.startswith("*"):
        return _regex(f"{_SCHEME}[^/]*{re.escape(pattern[1:])}/.*")
    if pattern.endswith("*"):
        return _regex(f"{_SCHEME}{re.escape(pattern[:-1])}[^/]*/.*")
    return StringMatcher(prefix=f"{_SCHEME}{pattern}/")


def _request_principal(pattern: str) -> Principal:
    """Issuer and subject; both have to be there."""
    issuer, subject = request_principal_forms(pattern)
    return _all_ids([_claim(("iss",), _matcher(issuer)), _claim(("sub",), _matcher(subject))])


def _matcher(pattern: TextPattern) -> StringMatcher:
    match pattern.form:
        case TextForm.EXACT:
            return StringMatcher(exact=pattern.text)
        case TextForm.PREFIX:
            return StringMatcher(prefix=pattern.text)
        case TextForm.SUFFIX:
            return StringMatcher(suffix=pattern.text)
        case TextForm.PRESENT:
            return _PRESENT


def _claim(path: tuple[str, ...], text: StringMatcher) -> Principal:
    """A claim that is the text, or a list with it."""
    keys = [MetadataMatcherPathSegment(key=key) for key in (JWT_PAYLOAD_KEY, *path)]
    is_text = ValueMatcher(string_match=text)
    has_text = ValueMatcher(list_match=ListMatcher(one_of=is_text))
    value = ValueMatcher(or_match=OrMatcher(value_matchers=[is_text, has_text]))
    matcher = MetadataMatcher(filter=JWT_METADATA_NAMESPACE, path=keys, value=value)
    return Principal(sourced_metadata=SourcedMetadata(metadata_matcher=matcher))


def _metadata(filter_name: str, key: str, value: str) -> MetadataMatcher:
    """What another filter has left under ``key``: a text, or a list with it where the value stands in brackets."""
    matcher = ValueMatcher(string_match=_text(value))
    if value.startswith("[") and value.endswith("]"):
        one_of = ValueMatcher(string_match=_text(value.strip("[]")))
        matcher = ValueMatcher(list_match=ListMatcher(one_of=one_of))
    return MetadataMatcher(filter=filter_name, path=[MetadataMatcherPathSegment(key=key)], value=matcher)


def _header(name: str, value: str, *, ignore_case: bool = False) -> HeaderMatcher:
    if value == "*":
        return HeaderMatcher(name=name, present_match=True)
    return HeaderMatcher(name=name, string_match=_text(value, ignore_case=ignore_case))


def _template(pattern: str) -> TypedExtensionConfig:
    """Envoy's own template, in which ``*`` is a segment and ``**`` whatever follows."""
    config = UriTemplateMatchConfig(path_template=pattern.replace("{*}", "*").replace("{**}", "**"))
    name = "envoy.path.match.uri_template.uri_template_matcher"
    return TypedExtensionConfig(name=name, typed_config=Any.pack(config))


def _text(pattern: str, *, ignore_case: bool = False) -> StringMatcher:
    """One wildcard at an end; ``*`` alone is presence; anywhere else it is a literal."""
    if pattern == "*":
        return _PRESENT
    if pattern.startswith("*"):
        return StringMatcher(suffix=pattern[1:], ignore_case=ignore_case)
    if pattern.endswith("*"):
        return StringMatcher(prefix=pattern[:-1], ignore_case=ignore_case)
    return StringMatcher(exact=pattern, ignore_case=ignore_case)


def _regex(pattern: str) -> StringMatcher:
    return StringMatcher(safe_regex=RegexMatcher(regex=f"(?s){pattern}"))


def _cidr(value: str) -> CidrRange:
    network = network_of(value)
    return CidrRange(address_prefix=str(network.network_address), prefix_len=network.prefixlen)
