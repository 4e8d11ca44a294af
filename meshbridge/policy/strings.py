"""How Istio's strings match: exact, prefix, suffix, presence; principals, namespaces, service accounts, trust domains.

Spec: ISTIO.md §a, "String forms".
"""

from __future__ import annotations

import re
from functools import lru_cache

from meshbridge.policy.mesh import Attribute, MeshSettings

_SCHEME = "spiffe://"
_OURS = "cluster.local"
"""In a principal this trust domain always means the mesh's own."""


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
    parts = re.split(r"(\{\*\*\}|\{\*\})", pattern)
    forms = {"{*}": r"[^/]+", "{**}": r".*"}
    return re.compile("".join(forms.get(part, re.escape(part)) for part in parts), re.DOTALL)


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
    """A principal of the mesh's own trust domain under each of its names; any other as written."""
    parts = pattern.split("/")
    if len(parts) != 5 or parts[0].startswith("*"):
        return (pattern,)
    own = (mesh.trust_domain, *mesh.trust_domain_aliases)
    if parts[0] != _OURS and parts[0] not in own:
        return (pattern,)
    return tuple("/".join([domain, *parts[1:]]) for domain in own)


def domain_forms(pattern: str, mesh: MeshSettings) -> tuple[str, ...]:
    own = (mesh.trust_domain, *mesh.trust_domain_aliases)
    return own if pattern == _OURS or pattern in own else (pattern,)


@lru_cache(maxsize=4096)
def _namespace(pattern: str) -> re.Pattern[str]:
    name = ".*".join(re.escape(part) for part in pattern.split("*"))
    return re.compile(f".*/ns/{name}/.*", re.DOTALL)


@lru_cache(maxsize=4096)
def _service_account(namespace: str, account: str) -> re.Pattern[str]:
    return re.compile(rf"spiffe://.+/ns/{re.escape(namespace)}/(.+/|)sa/{re.escape(account)}(/.+)?", re.DOTALL)
