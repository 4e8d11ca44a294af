"""A slow, literal reading of Istio's policies on one concrete request, from raw YAML dicts. No product code in it.

``admits`` is what Envoy with these policies does with a request whose every field is known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

HTTP_FIELDS = (
    "methods", "notMethods", "paths", "notPaths", "hosts", "notHosts", "requestPrincipals", "notRequestPrincipals",
)  # fmt: skip
KEYS = {
    "source.ip": "ipBlocks", "remote.ip": "remoteIpBlocks", "source.namespace": "namespaces",
    "source.principal": "principals", "source.serviceAccount": "serviceAccounts", "source.trustDomain": "trustDomains",
    "destination.port": "ports", "request.auth.principal": "requestPrincipals",
}  # fmt: skip
TRUE = ("1", "t", "T", "TRUE", "true", "True")


@dataclass(frozen=True)
class MeshFacts:
    """MeshConfig: names of the mesh, and the CUSTOM providers it defines; None: nobody answers for any provider."""

    trust_domain: str = "cluster.local"
    aliases: tuple[str, ...] = ()
    providers: dict[str, str] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Caller:
    """Who connects: the certificate presented (None: none), the address, the server name asked for."""

    principal: str | None
    address: str
    sni: str = ""


@dataclass(frozen=True)
class Content:
    """What is sent: bytes that are no HTTP, or a request; ``claims`` are its valid token's, None without one."""

    http: bool
    method: str = ""
    path: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    host: str = ""
    claims: dict[str, Any] | None = field(default=None, hash=False)


CONTENTS = (
    Content(False),
    *(Content(True, method, path) for method in ("GET", "POST") for path in ("/", "/metrics")),
    Content(True, "GET", "/metrics", (("x-team", "a"),)),
)


def admits(
    policies: list[dict[str, Any]],
    namespace: str,
    labels: dict[str, str],
    port: int,
    caller: Caller,
    content: Content,
    mesh: MeshFacts = MeshFacts(),
) -> bool:
    """Whether Envoy of the selected workload lets the request reach the application."""
    strictness = mode(policies, namespace, labels, port)
    if strictness == "STRICT" and caller.principal is None:
        return False
    if strictness == "DISABLE":
        caller = Caller(None, caller.address, caller.sni)
    selected = [p for p in policies if p["kind"] == "AuthorizationPolicy" and selects(p, namespace, labels)]
    asked = _Asked(port, caller, content, mesh)
    for action in ("CUSTOM", "DENY"):
        for policy in selected:
            if policy["spec"].get("action") != action:
                continue
            denies = custom_denies(policy, selected, content.http, mesh) if action == "CUSTOM" else not dry_run(policy)
            if denies and any(matches(rule, policy, asked, action) for rule in rules(policy)):
                return False
    allowing = [p for p in selected if p["spec"].get("action", "ALLOW") == "ALLOW" and not dry_run(p)]
    return not allowing or any(matches(rule, policy, asked, "ALLOW") for policy in allowing for rule in rules(policy))


@dataclass(frozen=True)
class _Asked:
    port: int
    caller: Caller
    content: Content
    mesh: MeshFacts


def dry_run(policy: dict[str, Any]) -> bool:
    return policy["metadata"].get("annotations", {}).get("istio.io/dry-run") in TRUE


def custom_denies(policy: dict[str, Any], selected: list[dict[str, Any]], http: bool, mesh: MeshFacts) -> bool:
    """Whether what the rules match is denied without anybody being asked."""
    if mesh.providers is None:
        return not dry_run(policy)
    customs = [p for p in selected if p["spec"].get("action") == "CUSTOM"]
    if len({p["spec"]["provider"]["name"] for p in customs}) > 1:
        return not dry_run(policy)
    kind = mesh.providers.get(policy["spec"]["provider"]["name"], "undefined")
    if kind == "undefined":
        return not dry_run(policy)
    return dry_run(policy) and (http or kind != "http")


def rules(policy: dict[str, Any]) -> list[dict[str, Any]]:
    return list(policy["spec"].get("rules") or [])


def selects(policy: dict[str, Any], namespace: str, labels: dict[str, str]) -> bool:
    if policy["metadata"]["namespace"] not in (namespace, "istio-system"):
        return False
    wanted = policy["spec"].get("selector", {}).get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items())


def mode(policies: list[dict[str, Any]], namespace: str, labels: dict[str, str], port: int) -> str:
    """Mesh, namespace, workload: the narrower wins, the oldest of a scope, UNSET inherits; ports need a selector."""
    found = "PERMISSIVE"
    scopes: list[list[dict[str, Any]]] = [[], [], []]
    for policy in policies:
        if policy["kind"] != "PeerAuthentication":
            continue
        own, selector = policy["metadata"]["namespace"], policy["spec"].get("selector")
        if selector is None and own == "istio-system":
            scopes[0].append(policy)
        elif selector is None and own == namespace:
            scopes[1].append(policy)
        elif selector is not None and own == namespace and selects(policy, namespace, labels):
            scopes[2].append(policy)
    for scope in scopes:
        for policy in sorted(scope, key=lambda p: p["metadata"].get("creationTimestamp", "9"))[:1]:
            written = policy["spec"].get("mtls", {}).get("mode", "UNSET")
            found = written if written != "UNSET" else found
            if policy["spec"].get("selector") is not None:
                at_port = policy["spec"].get("portLevelMtls", {}).get(port, {}).get("mode", "UNSET")
                found = at_port if at_port != "UNSET" else found
    return found


def matches(rule: dict[str, Any], policy: dict[str, Any], asked: _Asked, action: str) -> bool:
    sources = [item["source"] for item in rule.get("from", [])] or [{}]
    operations = [item["operation"] for item in rule.get("to", [])] or [{}]
    whens = rule.get("when", [])
    if any(not is_known(when["key"]) for when in whens):
        return False
    if not asked.content.http:
        http = any(f in HTTP_FIELDS for group in (*sources, *operations) for f in group) or any(
            when["key"].startswith("request.") for when in whens
        )
        if http and action == "ALLOW":
            return False
        sources = [{f: v for f, v in source.items() if f not in HTTP_FIELDS} for source in sources]
        operations = [{f: v for f, v in operation.items() if f not in HTTP_FIELDS} for operation in operations]
        whens = [when for when in whens if not when["key"].startswith("request.")]
    return (
        any(all(holds(name, values, policy, asked) for name, values in source.items()) for source in sources)
        and any(all(holds(name, values, policy, asked) for name, values in o.items()) for o in operations)
        and all(when_holds(when, policy, asked) for when in whens)
    )


def is_known(key: str) -> bool:
    return (
        key in KEYS
        or key in ("connection.sni", "destination.ip", "request.auth.audiences", "request.auth.presenter")
        or key.startswith(("request.headers[", "request.auth.claims["))
    )


def when_holds(when: dict[str, Any], policy: dict[str, Any], asked: _Asked) -> bool:
    def any_of(values: list[str]) -> bool:
        key = when["key"]
        if key in KEYS:
            return holds(KEYS[key], values, policy, asked)
        if key == "connection.sni":
            return any(text(value, asked.caller.sni) for value in values)
        if key.startswith("request.headers["):
            sent = dict(asked.content.headers).get(key[len("request.headers[") : -1].lower())
            return sent is not None and any(value == "*" or text(value, sent) for value in values)
        path = {"request.auth.audiences": ["aud"], "request.auth.presenter": ["azp"]}.get(key)
        return claim(path or re.findall(r"\[([^\]]+)\]", key), values, asked.content.claims)

    if "values" in when and not any_of(when["values"]):
        return False
    return "notValues" not in when or not any_of(when["notValues"])


def claim(path: list[str], values: list[str], claims: dict[str, Any] | None) -> bool:
    found: Any = claims
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    members = found if isinstance(found, list) else [found]
    if path in (["scope"], ["permission"]) and isinstance(found, str):
        members = found.split(" ")
    return any(isinstance(member, str) and text(value, member) for member in members for value in values)


def holds(name: str, values: list[str], policy: dict[str, Any], asked: _Asked) -> bool:
    if name.startswith("not"):
        return not holds(name[3].lower() + name[4:], values, policy, asked)
    return any(value_holds(name, value, policy, asked) for value in values)


def value_holds(name: str, value: str, policy: dict[str, Any], asked: _Asked) -> bool:
    caller, content = asked.caller, asked.content
    match name:
        case "ports":
            return str(asked.port) == value
        case "ipBlocks":
            return ip_address(caller.address) in ip_network(value)
        case "remoteIpBlocks":
            forwarded = dict(content.headers).get("x-forwarded-for") if content.http else None
            client = forwarded.split(",")[-1].strip() if forwarded else caller.address
            return ip_address(client) in ip_network(value)
        case "methods":
            return text(value, content.method)
        case "hosts":
            return text(value.lower(), content.host.lower())
        case "paths":
            return path_holds(value, content.path.split("?")[0])
        case "requestPrincipals":
            return request_principal(value, content.claims)
    if caller.principal is None:
        return False
    domain, _, namespace, _, account = caller.principal.partition("://")[2].split("/")
    match name:
        case "principals":
            written = value.split("/")
            own = (asked.mesh.trust_domain, *asked.mesh.aliases)
            forms = [value]
            if len(written) == 5 and written[0] in ("cluster.local", *own):
                forms = ["/".join([name, *written[1:]]) for name in own]
            return any(text(form, f"{domain}/ns/{namespace}/sa/{account}") for form in forms)
        case "namespaces":
            return re.fullmatch(".*".join(map(re.escape, value.split("*"))), namespace) is not None
        case "serviceAccounts":
            return value in (f"{namespace}/{account}", account if namespace == policy["metadata"]["namespace"] else "")
        case "trustDomains":
            own = (asked.mesh.trust_domain, *asked.mesh.aliases)
            return domain in own if value in own else text(value, domain)
    raise AssertionError(name)


def text(pattern: str, value: str) -> bool:
    """Exact, or one wildcard at an end; ``*`` alone wants something to be there."""
    if pattern == "*":
        return value != ""
    if pattern.startswith("*"):
        return value.endswith(pattern[1:])
    return value.startswith(pattern[:-1]) if pattern.endswith("*") else value == pattern


def path_holds(pattern: str, path: str) -> bool:
    if "{" not in pattern:
        return text(pattern, path)
    segment = "[-a-zA-Z0-9._~%!$&'()+,;:@]"
    parts = [
        f"{segment}+" if part == "{*}" else f"(?:{segment}|/)*" if part == "{**}" else re.escape(part)
        for part in pattern.split("/")
    ]
    return re.fullmatch("/".join(parts), path) is not None


def request_principal(pattern: str, claims: dict[str, Any] | None) -> bool:
    """Issuer and subject stand around the last slash; a wildcard counts at an end of the whole."""
    if claims is None or not isinstance(claims.get("iss"), str) or not isinstance(claims.get("sub"), str):
        return False
    issuer, subject = claims["iss"], claims["sub"]
    if pattern == "*":
        return bool(issuer) and bool(subject)
    wanted, slash, rest = pattern.rpartition("/")
    if pattern.startswith("*"):
        return subject == rest and text(wanted, issuer) if slash else bool(issuer) and text(pattern, subject)
    if pattern.endswith("*"):
        return issuer == wanted and text(rest, subject) if slash else text(pattern, issuer) and bool(subject)
    return (issuer, subject) == ((wanted, rest) if slash else (pattern, ""))
