"""AuthorizationPolicies that Istio, by its own rules, makes something else of than they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from meshbridge.analysis.finding import Finding, finding, listed
from meshbridge.analysis.scene import Pods, Scene
from meshbridge.bypass.guarantees import may_concern
from meshbridge.evaluation.ambient import ztunnel_guard
from meshbridge.identity.model import ProxyClass
from meshbridge.policy.baseline import FALSE, TRUE, UNKNOWN, Guard, condition_matches, rule_matches, verdict_of
from meshbridge.policy.capture import AppProtocol, PortClass
from meshbridge.policy.lowering import guard_of
from meshbridge.policy.mesh import (
    GATEWAY_API,
    GATEWAY_LABEL,
    HTTP_ONLY,
    IDENTITY,
    OUR_PROVIDER,
    Action,
    Attribute,
    AuthorizationPolicy,
    AuthorizationRule,
    Condition,
    MtlsMode,
    ProviderKind,
    RequestAuthentication,
)
from meshbridge.policy.model import Origin, Severity, Verdict
from meshbridge.policy.parse.cluster import Service

Known = Callable[[Condition], Verdict]

OUR_SERVER: Final = {"app.kubernetes.io/name": "meshbridge", "app.kubernetes.io/component": "authz"}
_OURS: Final = "cluster.local"
_WITHOUT_RULE: Final = {
    Action.ALLOW: "it allows nothing",
    Action.DENY: "it denies nothing",
    Action.CUSTOM: "nobody is asked",
}
_OF_TOKEN: Final = frozenset({Attribute.REQUEST_PRINCIPALS, Attribute.AUDIENCES, Attribute.PRESENTER, Attribute.CLAIM})


def _enforced(policy: AuthorizationPolicy) -> bool:
    return not policy.dry_run and policy.action is not Action.AUDIT


def _guarded(scene: Scene) -> Iterator[tuple[AuthorizationPolicy, list[Pods]]]:
    """Every policy that is enforced, with the pods whose sidecars enforce it."""
    found: dict[AuthorizationPolicy, list[Pods]] = {}
    for pods in scene.pods:
        if pods.pod.proxy is ProxyClass.SIDECAR:
            for policy in pods.selected.authorization:
                if _enforced(policy):
                    found.setdefault(policy, []).append(pods)
    yield from found.items()


def _captured_ports(scene: Scene, pods: Pods) -> list[int]:
    classes = scene.capture(pods).inbound[scene.family_of(pods.pod)]
    declared = [port for port, protocol in scene.declared_ports(pods) if protocol == "TCP"]
    return [port for port in declared if classes.at(port) is PortClass.CAPTURED]


def _at_port(port: int, otherwise: Known) -> Known:
    def known(condition: Condition) -> Verdict:
        if condition.attribute is Attribute.PORTS:
            return condition_matches(condition, lambda value: TRUE if int(value) == port else FALSE)
        return otherwise(condition)

    return known


def _nobody(attributes: frozenset[Attribute]) -> Known:
    """What conditions are worth for whoever has none of these attributes; all others are open."""

    def known(condition: Condition) -> Verdict:
        if condition.attribute in attributes:
            return condition_matches(condition, lambda _: FALSE)
        return UNKNOWN

    return known


def http_fields_on_tcp(scene: Scene) -> Iterator[Finding]:
    """HTTP fields on ports that are not HTTP: a DENY gets wider there, an ALLOW never matches."""
    for policy, selected in _guarded(scene):
        for rule in policy.rules:
            if any(condition.attribute in HTTP_ONLY for condition in rule.all_conditions):
                yield from _on_tcp(scene, policy, rule, selected)


def _on_tcp(
    scene: Scene, policy: AuthorizationPolicy, rule: AuthorizationRule, selected: list[Pods]
) -> Iterator[Finding]:
    ports: dict[tuple[AppProtocol, Verdict], dict[str, None]] = {}
    for pods in selected:
        protocols = scene.cluster.protocols(pods.pod)
        for port in _captured_ports(scene, pods):
            protocol = protocols.get(port, AppProtocol.AUTO)
            if protocol is AppProtocol.HTTP or not may_concern(rule, port):
                continue
            known = _at_port(port, lambda c: TRUE if c.attribute in HTTP_ONLY else UNKNOWN)
            matched = rule_matches(rule, policy.action, known, AppProtocol.TCP)
            ports.setdefault((protocol, matched), {})[f"{pods.names[0]}:{port}"] = None
    for (protocol, matched), where in ports.items():
        sniffed = protocol is AppProtocol.AUTO
        if policy.action is Action.DENY:
            what = "denies every connection" if matched is TRUE else "denies by its other fields alone"
            when = "what is not HTTP on" if sniffed else ""
            to = f"to {listed(where)}" if not sniffed else f"of {when} {listed(where)}, whose protocol is sniffed"
            severity = Severity.INFO if sniffed else None
            yield finding("MB0102", rule.origin, f"{what} {to}: on TCP its HTTP fields are dropped", severity=severity)
        elif policy.action is Action.ALLOW and not sniffed:
            text = f"never matches on {listed(where)}: a rule with HTTP fields is dropped on TCP"
            yield finding("MB0103", rule.origin, text)


def providers(scene: Scene) -> Iterator[Finding]:
    """CUSTOM policies that ask nobody, or make a DENY of what should be asked."""
    for policy, selected in _guarded(scene):
        if policy.action is not Action.CUSTOM:
            continue
        kind = scene.mesh.provider(policy.provider)
        if kind is ProviderKind.UNUSABLE:
            text = f"MeshConfig defines no usable provider {policy.provider!r}: what its rules match is denied"
            yield finding("MB0106", policy.origin, text)
        if kind is ProviderKind.HTTP:
            unasked = {
                f"{pods.names[0]}:{port}": None
                for pods in selected
                for port in _captured_ports(scene, pods)
                if scene.cluster.protocols(pods.pod).get(port) is AppProtocol.TCP
                and any(may_concern(rule, port) for rule in policy.rules)
            }
            if unasked:
                text = f"provider {policy.provider!r} speaks HTTP, so nobody asks it about {listed(unasked)}"
                yield finding("MB0104", policy.origin, text)
    servers = [s for s in scene.services if OUR_SERVER.items() <= (s.selector or {}).items()]
    for pods in scene.pods:
        yield from _several_providers(pods)
        yield from _asks_itself(pods)
        yield from _cannot_ask(scene, pods, servers)


def _several_providers(pods: Pods) -> Iterator[Finding]:
    custom = [p for p in pods.selected.authorization if p.action is Action.CUSTOM]
    names = sorted({policy.provider for policy in custom})
    for policy in custom[1:] if len(names) > 1 else ():
        if policy.provider != custom[0].provider:
            text = f"{pods} has CUSTOM policies of the providers {' and '.join(names)}: all their rules deny"
            yield finding("MB0105", policy.origin, text, related=[custom[0].origin])


def _asks_itself(pods: Pods) -> Iterator[Finding]:
    if pods.pod.proxy is not ProxyClass.SIDECAR or not OUR_SERVER.items() <= pods.pod.labels.items():
        return
    for policy in pods.selected.authorization:
        if policy.action is Action.CUSTOM and policy.provider == OUR_PROVIDER:
            text = f"selects {pods}, the server it asks, which has a sidecar: every check waits for itself"
            yield finding("MB0118", policy.origin, text)


def _cannot_ask(scene: Scene, pods: Pods, servers: list[Service]) -> Iterator[Finding]:
    if pods.pod.proxy is not ProxyClass.SIDECAR:
        return
    for policy in pods.selected.authorization:
        if policy.action is not Action.CUSTOM or policy.provider != OUR_PROVIDER:
            continue
        for server in servers:
            hiding = [scene.cluster.registry.hides(pods.pod, server, port.port) for port in server.ports]
            if hiding and (by := hiding[0]) is not None:
                text = (
                    f"{pods} cannot ask: Sidecar {by.namespace}/{by.name} leaves out {server.namespace}/{server.name}"
                )
                yield finding("MB0119", policy.origin, text, related=[by.origin])


def left_out_by_ztunnel(scene: Scene) -> Iterator[Finding]:
    """Rules for ambient pods that ztunnel is never sent, or never matches."""
    left_out: dict[tuple[Origin, Action], list[Pods]] = {}
    for pods in scene.pods:
        if pods.pod.proxy is not ProxyClass.AMBIENT:
            continue
        guard = guard_of(pods.pod, pods.selected)
        kept = {rule.origin for policy in ztunnel_guard(guard).policies for rule in policy.rules}
        for policy in guard.policies:
            for rule in policy.rules if _enforced(policy) else ():
                if rule.origin not in kept:
                    left_out.setdefault((rule.origin, policy.action), []).append(pods)
    for (origin, action), every in left_out.items():
        text = f"ztunnel leaves the rule out for {listed(every)}: {_WITHOUT_RULE[action]}"
        yield finding("MB0117", origin, text)


def foreign_trust_domains(scene: Scene) -> Iterator[Finding]:
    """Names of trust domains that nobody in this mesh has."""
    own = {_OURS, scene.mesh.trust_domain, *scene.mesh.trust_domain_aliases}
    for policy in scene.policies.authorization:
        for rule in policy.rules:
            named: dict[str, None] = {}
            for condition in rule.all_conditions:
                for value in (*condition.values, *condition.not_values):
                    parts = value.split("/")
                    if condition.attribute is Attribute.PRINCIPALS and len(parts) == 5:
                        named[parts[0]] = None
                    elif condition.attribute is Attribute.TRUST_DOMAINS:
                        named[value] = None
            foreign = [domain for domain in named if "*" not in domain and domain not in own]
            if foreign:
                ours = listed(sorted(own - {_OURS}) or [_OURS])
                text = f"nobody in this mesh is of trust domain {listed(foreign)}; its own is {ours}"
                yield finding("MB0107", rule.origin, text)


def identity_over_plaintext(scene: Scene) -> Iterator[Finding]:
    """Rules by identity on ports where callers have none, or need none."""
    for policy, selected in _guarded(scene):
        if policy.action is Action.CUSTOM:
            continue
        for rule in policy.rules:
            if any(condition.attribute in IDENTITY for condition in rule.all_conditions):
                yield from _over_plaintext(scene, policy, rule, selected)


def _over_plaintext(
    scene: Scene, policy: AuthorizationPolicy, rule: AuthorizationRule, selected: list[Pods]
) -> Iterator[Finding]:
    never: dict[str, None] = {}
    evaded: dict[str, None] = {}
    for pods in selected:
        guard = guard_of(pods.pod, pods.selected)
        for port in _captured_ports(scene, pods):
            if not may_concern(rule, port):
                continue
            mode, _ = guard.mtls.at(port)
            matched = rule_matches(rule, policy.action, _at_port(port, _nobody(IDENTITY)), AppProtocol.HTTP)
            escapes = (matched is FALSE) is (policy.action is Action.DENY)
            if mode is MtlsMode.DISABLE and matched is FALSE:
                never[f"{pods.names[0]}:{port}"] = None
            elif mode is MtlsMode.PERMISSIVE and escapes and _lets_in_plaintext(guard, port):
                evaded[f"{pods.names[0]}:{port}"] = None
    if never:
        text = f"asks for an identity, and mutual TLS is off on {listed(never)}: it never matches there"
        yield finding("MB0108", rule.origin, text)
    if evaded:
        what = "does not deny" if policy.action is Action.DENY else "allows"
        yield finding("MB0109", rule.origin, f"{what} callers of {listed(evaded)} that send plaintext")


def _lets_in_plaintext(guard: Guard, port: int) -> bool:
    """Whether some request without a certificate may pass all policies."""
    known = _at_port(port, _nobody(IDENTITY))
    verdict = verdict_of(guard, port, AppProtocol.HTTP, FALSE, lambda _, condition: known(condition))
    return verdict.verdict is not Verdict.DENY


def claims_without_authentication(scene: Scene) -> Iterator[Finding]:
    """Rules by a token's claims where nobody verifies tokens."""
    tokenless = _nobody(_OF_TOKEN)
    for policy, selected in _guarded(scene):
        for rule in policy.rules:
            if not any(condition.attribute in _OF_TOKEN for condition in rule.all_conditions):
                continue
            bare = [p for p in selected if not p.selected.request_authentication and not p.selected.refusals]
            if not bare:
                continue
            matched = rule_matches(rule, policy.action, tokenless, AppProtocol.HTTP)
            effect = "it never matches" if matched is FALSE else "it takes every request for one without a token"
            text = f"asks for claims, and no RequestAuthentication selects {listed(bare)}: {effect}"
            yield finding("MB0110", rule.origin, text)


def absent_targets(scene: Scene) -> Iterator[Finding]:
    """Policies attached to Services or Gateways that do not exist."""
    services = {(service.namespace, service.name) for service in scene.services}
    gateways = {(d.namespace, d.name) for d in scene.documents if (d.key[0], d.kind) == (GATEWAY_API, "Gateway")}
    gateways |= {(w.namespace, w.labels[GATEWAY_LABEL]) for w in scene.workloads if GATEWAY_LABEL in w.labels}
    attached: list[AuthorizationPolicy | RequestAuthentication] = [
        *scene.policies.authorization,
        *scene.policies.request_authentication,
    ]
    for policy in attached:
        for target in policy.targets:
            there = {"Service": services, "Gateway": gateways}.get(target.kind)
            if there is None or (policy.namespace, target.name) in there:
                continue
            known = any(namespace == policy.namespace for namespace, _ in there)
            text = f"is attached to {target.kind} {target.name}, which namespace {policy.namespace} does not have"
            text += "" if known else f"; none of the files has a {target.kind} of that namespace"
            yield finding("MB0112", policy.origin, text, severity=None if known else Severity.INFO)
