"""A slow, literal reading of Istio's policies on one concrete request, from raw YAML dicts. No product code in it.

``admits`` is what Envoy with these policies does with a request whose every field is known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from typing import Any

HTTP_FIELDS = ("methods", "notMethods", "paths", "notPaths", "requestPrincipals", "notRequestPrincipals")


@dataclass(frozen=True)
class Caller:
    """Who connects: the certificate presented (None: none) and the address."""

    principal: str | None
    address: str


@dataclass(frozen=True)
class Content:
    """What is sent: bytes that are no HTTP, or a request without a token."""

    http: bool
    method: str = ""
    path: str = ""
    headers: tuple[tuple[str, str], ...] = ()


CONTENTS = (
    Content(False),
    *(Content(True, method, path) for method in ("GET", "POST") for path in ("/", "/metrics")),
    Content(True, "GET", "/metrics", (("x-team", "a"),)),
)


def admits(
    policies: list[dict[str, Any]], namespace: str, labels: dict[str, str], port: int, caller: Caller, content: Content
) -> bool:
    """Whether Envoy of the selected workload lets the request reach the application."""
    demanded = mode(policies, namespace, labels, port)
    if demanded == "STRICT" and caller.principal is None:
        return False
    if demanded == "DISABLE":
        caller = replace(caller, principal=None)  # no chain takes TLS off, so no certificate is ever read
    selected = [p for p in policies if p["kind"] == "AuthorizationPolicy" and selects(p, namespace, labels)]
    selected = [p for p in selected if p["metadata"].get("annotations", {}).get("istio.io/dry-run") != "true"]
    for action in ("CUSTOM", "DENY"):
        for policy in selected:
            if policy["spec"].get("action") == action and any(
                matches(rule, policy, port, caller, content, action) for rule in rules(policy)
            ):
                return False
    allowing = [p for p in selected if p["spec"].get("action", "ALLOW") == "ALLOW"]
    return not allowing or any(
        matches(rule, policy, port, caller, content, "ALLOW") for policy in allowing for rule in rules(policy)
    )


def rules(policy: dict[str, Any]) -> list[dict[str, Any]]:
    return list(policy["spec"].get("rules") or [])


def selects(policy: dict[str, Any], namespace: str, labels: dict[str, str]) -> bool:
    if policy["metadata"]["namespace"] not in (namespace, "istio-system"):
        return False
    wanted = policy["spec"].get("selector", {}).get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items())


def mode(policies: list[dict[str, Any]], namespace: str, labels: dict[str, str], port: int) -> str:
    """Mesh, namespace, workload: the narrower wins, UNSET inherits; a port's mode counts only with a selector."""
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
        for policy in scope[:1]:
            written = policy["spec"].get("mtls", {}).get("mode", "UNSET")
            found = written if written != "UNSET" else found
            if policy["spec"].get("selector") is not None:
                at_port = policy["spec"].get("portLevelMtls", {}).get(port, {}).get("mode", "UNSET")
                found = at_port if at_port != "UNSET" else found
    return found


def matches(
    rule: dict[str, Any], policy: dict[str, Any], port: int, caller: Caller, content: Content, action: str
) -> bool:
    sources = [item["source"] for item in rule.get("from", [])] or [{}]
    operations = [item["operation"] for item in rule.get("to", [])] or [{}]
    whens = rule.get("when", [])
    if not content.http:
        http = any(f in HTTP_FIELDS for group in (*sources, *operations) for f in group) or any(
            when["key"].startswith("request.") for when in whens
        )
        if http and action == "ALLOW":
            return False
        sources = [{f: v for f, v in source.items() if f not in HTTP_FIELDS} for source in sources]
        operations = [{f: v for f, v in operation.items() if f not in HTTP_FIELDS} for operation in operations]
        whens = [when for when in whens if not when["key"].startswith("request.")]
    return (
        any(all(field(name, values, policy, port, caller, content) for name, values in s.items()) for s in sources)
        and any(
            all(field(name, values, policy, port, caller, content) for name, values in o.items()) for o in operations
        )
        and all(when_holds(when, policy, port, caller, content) for when in whens)
    )


def when_holds(when: dict[str, Any], policy: dict[str, Any], port: int, caller: Caller, content: Content) -> bool:
    names = {
        "source.namespace": "namespaces",
        "source.ip": "ipBlocks",
        "destination.port": "ports",
        "source.principal": "principals",
    }
    key = when["key"]
    if key.startswith("request.headers["):
        value = dict(content.headers).get(key[len("request.headers[") : -1], None)
        held = value is not None and value in when.get("values", [])
        return held if "values" in when else value not in when.get("notValues", [])
    holds = True
    if "values" in when:
        holds = field(names[key], when["values"], policy, port, caller, content)
    if "notValues" in when:
        holds = holds and not field(names[key], when["notValues"], policy, port, caller, content)
    return holds


def field(name: str, values: list[str], policy: dict[str, Any], port: int, caller: Caller, content: Content) -> bool:
    if name.startswith("not"):
        return not field(name[3].lower() + name[4:], values, policy, port, caller, content)
    if name == "ports":
        return str(port) in values
    if name == "ipBlocks":
        return any(ip_address(caller.address) in ip_network(value) for value in values)
    if name == "methods":
        return content.method in values
    if name == "paths":
        return any(
            content.path == value or (value.endswith("*") and content.path.startswith(value[:-1])) for value in values
        )
    if name == "requestPrincipals":
        return False
    if caller.principal is None:
        return False
    _, _, rest = caller.principal.partition("://")
    own_namespace, account = rest.split("/")[2], rest.split("/")[4]
    if name == "principals":
        return any(value in ("*", rest) for value in values)
    if name == "namespaces":
        return own_namespace in values
    if name == "serviceAccounts":
        where = policy["metadata"]["namespace"]
        return any(
            value in (f"{own_namespace}/{account}",) or (value == account and own_namespace == where)
            for value in values
        )
    raise AssertionError(name)
