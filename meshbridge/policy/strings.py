"""How Istio's strings match: exact, prefix, suffix, presence; principals, namespaces, service accounts, trust domains.

Spec: ISTIO.md §a, "String forms".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

from meshbridge.policy.mesh import Attribute, MeshSettings

_SCHEME = "spiffe://"
_OURS = "cluster.local"
"""In a principal this trust domain always means the mesh's own."""

TEMPLATE_LITERAL: Final = "-a-zA-Z0-9._~%!$&'()*+,;:@="
"""What Envoy's path templates let a segment consist of, as the inside of a character class."""


class TextForm(StrEnum):
    EXACT = "exact"
    PREFIX = "prefix"
    SUFFIX = "suffix"
    PRESENT = "present"


@dataclass(frozen=True, slots=True)
class TextPattern:
    """One string of a policy in the form Istio gives it; ``text`` is without its wildcard."""

    form: TextForm
    text: str = ""

    def matches(self, value: str) -> bool:
        match self.form:
            case TextForm.EXACT:
                return value == self.text
            case TextForm.PREFIX:
                return value.startswith(self.text)
            case TextForm.SUFFIX:
                return value.endswith(self.text)
            case TextForm.PRESENT:
                return value != ""


_PRESENT: Final = TextPattern(TextForm.PRESENT)


def matches_text(pattern: str, value: str) -> bool:
    """One wildcard at an end; ``*`` alone is presence; anywhere else it is a literal."""
    if pattern == "*":
        return value != ""
    if pattern.startswith("*"):
        return value.endswith(pattern[1:])
    if pattern.endswith("*"):
        return value.startswith(pattern[:-1])
    return value == pattern


def matches_host(pattern: str, value: str) -> bool:
    """Hosts ignore case in every form; the port is part of the value as the client sent it."""
    return matches_text(pattern.lower(), value.lower())


def matches_path(pattern: str, path: str) -> bool:
    """A path without query; ``{*}`` stands for one segment, ``{**}`` for any number of them."""
    if "{" in pattern:
        return _template(pattern).fullmatch(path) is not None
    return matches_text(pattern, path)


@lru_cache(maxsize=4096)
def _template(pattern: str) -> re.Pattern[str]:
    """A path template as Envoy matches it, to the path's end.

    Spec: Envoy, uri_template_lib: an operator takes no character outside ``TEMPLATE_LITERAL``.
    """
    parts = re.split(r"(\{\*\*\}|\{\*\})", pattern)
    forms = {"{*}": f"[{TEMPLATE_LITERAL}]+", "{**}": f"[{TEMPLATE_LITERAL}/]*"}
    return re.compile("".join(forms.get(part, re.escape(part)) for part in parts))


@lru_cache(maxsize=4096)
def request_principal_forms(pattern: str) -> tuple[TextPattern, TextPattern]:
    """What a request principal asks of the issuer and of the subject.

    They are parted at the last slash. Only a wildcard at an end of the whole counts: beside a leading one the subject
    is exact, beside a trailing one the issuer is.

    Spec: istio, pilot/pkg/security/authz/model/generator.go, requestPrincipalGenerator.
    """
    issuer, slash, subject = pattern.rpartition("/")
    if pattern == "*":
        return _PRESENT, _PRESENT
    if pattern.startswith("*"):
        if not slash:
            return _PRESENT, TextPattern(TextForm.SUFFIX, pattern[1:])
        first = _PRESENT if issuer == "*" else TextPattern(TextForm.SUFFIX, issuer[1:])
        return first, TextPattern(TextForm.EXACT, subject)
    if pattern.endswith("*"):
        if not slash:
            return TextPattern(TextForm.PREFIX, pattern[:-1]), _PRESENT
        second = _PRESENT if subject == "*" else TextPattern(TextForm.PREFIX, subject[:-1])
        return TextPattern(TextForm.EXACT, issuer), second
    if not slash:
        issuer, subject = pattern, ""
    return TextPattern(TextForm.EXACT, issuer), TextPattern(TextForm.EXACT, subject)


def matches_identity(
    attribute: Attribute, pattern: str, principal: str | None, policy_namespace: str, mesh: MeshSettings
) -> bool:
    """One value of an identity attribute against a verified SPIFFE name; without a name nothing ever matches.

    Args:
        principal: With or without ``spiffe://``; None where no certificate was presented.
        policy_namespace: What a service account without a namespace is looked up in.
    """
    if not principal:
        return False
    uri = principal if principal.startswith(_SCHEME) else _SCHEME + principal
    match attribute:
        case Attribute.PRINCIPALS:
            return any(_matches_principal(form, uri) for form in principal_forms(pattern, mesh))
        case Attribute.NAMESPACES:
            return _namespace(pattern).fullmatch(uri) is not None
        case Attribute.SERVICE_ACCOUNTS:
            namespace, _, account = pattern.rpartition("/")
            return _service_account(namespace or policy_namespace, account).fullmatch(uri) is not None
        case Attribute.TRUST_DOMAINS:
            domain = uri.removeprefix(_SCHEME).partition("/")[0]
            return any(matches_text(form, domain) for form in domain_forms(pattern, mesh))
    raise AssertionError(attribute)


def _matches_principal(pattern: str, uri: str) -> bool:
    if pattern == "*":
        return True
    if pattern.startswith("*"):
        return uri.removeprefix(_SCHEME).endswith(pattern[1:])
    return matches_text(_SCHEME + pattern, uri)


@lru_cache(maxsize=4096)
def principal_forms(pattern: str, mesh: MeshSettings) -> tuple[str, ...]:
    """A principal of the mesh's own trust domain under each of its names; any other as written.

    Spec: istio, pilot/pkg/security/trustdomain/bundle.go, ReplaceTrustDomainAliases.
    """
    domain, *rest = pattern.split("/")
    own = (mesh.trust_domain, *mesh.trust_domain_aliases)
    if len(rest) != 4 or domain == "*" or not (domain == _OURS or any(matches_text(domain, name) for name in own)):
        return (pattern,)
    forms = (
        pattern if domain.startswith("*") and matches_text(domain, name) else "/".join([name, *rest]) for name in own
    )
    return tuple(dict.fromkeys(forms))


def domain_forms(pattern: str, mesh: MeshSettings) -> tuple[str, ...]:
    """A trust domain under each of the mesh's names; here cluster.local has no other meaning than itself."""
    own = (mesh.trust_domain, *mesh.trust_domain_aliases)
    return own if pattern in own else (pattern,)


@lru_cache(maxsize=4096)
def _namespace(pattern: str) -> re.Pattern[str]:
    name = ".*".join(re.escape(part) for part in pattern.split("*"))
    return re.compile(f".*/ns/{name}/.*", re.DOTALL)


@lru_cache(maxsize=4096)
def _service_account(namespace: str, account: str) -> re.Pattern[str]:
    return re.compile(rf"spiffe://.+/ns/{re.escape(namespace)}/(.+/|)sa/{re.escape(account)}(/.+)?", re.DOTALL)
