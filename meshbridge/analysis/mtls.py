"""PeerAuthentications and DestinationRules that do not do what they say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from meshbridge.analysis.finding import Finding, finding, listed, place_of
from meshbridge.analysis.scene import Pods, Scene
from meshbridge.identity.model import ProxyClass
from meshbridge.policy.capture import PortClass
from meshbridge.policy.lowering import guard_of
from meshbridge.policy.mesh import MtlsMode, PeerAuthentication
from meshbridge.policy.model import Document
from meshbridge.policy.parse.cluster import Service

_DESTINATION_RULES: Final = ("networking.istio.io", "DestinationRule")


def several_of_one_scope(scene: Scene) -> Iterator[Finding]:
    """PeerAuthentications beside an older one of the same scope."""
    scopes: dict[object, list[PeerAuthentication]] = {}
    for policy in scene.policies.peer_authentication:
        if policy.selector is None:
            scopes.setdefault(policy.namespace, []).append(policy)
    for pods in scene.pods:
        own = [p for p in scene.policies.peer_authentication if p.namespace == pods.pod.namespace]
        concerned = [p for p in own if p.selector is not None and p.selector.matches(pods.pod.peer())]
        scopes.setdefault(tuple(concerned), concerned)
    for scope, policies in scopes.items():
        ordered = sorted(policies, key=lambda p: (p.created or "9", p.namespace, p.name))
        for policy in ordered[1:]:
            oldest = ordered[0]
            known = oldest.created and policy.created and oldest.created < policy.created
            which = f"{oldest.origin.policy} is older and counts" if known else "which is older the files do not say"
            of = f"namespace {policy.namespace}" if isinstance(scope, str) else "the same workload"
            text = f"stands beside {oldest.origin.policy} for {of}: only the oldest counts, and {which}"
            yield finding("MB0201", policy.origin, text, related=[oldest.origin])


def ignored_in_root(scene: Scene) -> Iterator[Finding]:
    """PeerAuthentications of the root namespace with a selector."""
    for policy in scene.policies.peer_authentication:
        if policy.selector is not None and policy.namespace == scene.mesh.root_namespace:
            yield finding("MB0205", policy.origin, "has a selector in the root namespace, so Istio ignores it")


def absent_ports(scene: Scene) -> Iterator[Finding]:
    """Port-level modes for ports that no pod they select declares."""
    for policy in scene.policies.peer_authentication:
        if policy.selector is None or not policy.port_modes:
            continue
        selected = [
            pods
            for pods in scene.pods
            if pods.pod.namespace == policy.namespace and policy.selector.matches(pods.pod.peer())
        ]
        declared = {port for pods in selected for port, protocol in scene.declared_ports(pods) if protocol == "TCP"}
        declared |= {port for pods in selected for port in scene.probe_ports(pods)}
        for port in policy.port_modes if declared else ():
            if port in declared:
                continue
            targets = sorted({target for pods in selected for target in _targets(scene, pods, port)})
            fix = f"{port} is the Service's port: name the pod's own, {listed(targets)}" if targets else ""
            text = f"portLevelMtls names port {port}, and the pods it selects declare {listed(sorted(declared), 8)}"
            yield finding("MB0202", policy.origin, text, fix=fix)


def _targets(scene: Scene, pods: Pods, port: int) -> Iterator[int]:
    """The ports of the pods behind a Service's port of this number."""
    for service in scene.services:
        for entry in service.ports if service.selects(pods.pod) else ():
            target = entry.target_at(pods.pod.ports)
            if entry.port == port and target is not None:
                yield target


def strict_on_excluded(scene: Scene) -> Iterator[Finding]:
    """Declared ports that are STRICT and excluded from the sidecar."""
    for pods in scene.pods:
        if pods.pod.proxy is not ProxyClass.SIDECAR:
            continue
        guard = guard_of(pods.pod, pods.selected)
        classes = scene.capture(pods).inbound[scene.family_of(pods.pod)]
        for port, protocol in scene.declared_ports(pods):
            mode, origin = guard.mtls.at(port)
            if protocol != "TCP" or mode is not MtlsMode.STRICT or origin is None:
                continue
            if classes.at(port) is PortClass.EXCLUDED:
                text = f"port {port} of {pods} is STRICT and bypasses the sidecar: nobody asks for a certificate"
                yield finding("MB0203", scene.origin_of(pods), text, related=[origin])


def disabled_against_strict(scene: Scene) -> Iterator[Finding]:
    """DestinationRules that make clients send plaintext to what demands mutual TLS."""
    for document in scene.documents:
        if (document.key[0], document.kind) != _DESTINATION_RULES:
            continue
        spec = document.data.get("spec")
        policy = spec.get("trafficPolicy") if isinstance(spec, dict) else None
        service = _service(scene, document, spec.get("host")) if isinstance(spec, dict) else None
        if not isinstance(policy, dict) or service is None:
            continue
        for path, port in _disabled(policy):
            broken = dict(_strict(scene, service, port))
            if broken:
                text = f"clients send plaintext to {listed(broken)}, where mutual TLS is demanded"
                related = [origin for origin in broken.values() if origin is not None]
                yield finding("MB0204", place_of(document, path), text, related=related)


def _service(scene: Scene, document: Document, host: Any) -> Service | None:
    """The Service a host means, as seen from the rule's namespace."""
    if not isinstance(host, str):
        return None
    name, _, rest = host.partition(".")
    namespace = rest.partition(".")[0] or document.namespace
    return next((s for s in scene.services if (s.namespace, s.name) == (namespace, name)), None)


def _disabled(policy: dict[str, Any]) -> Iterator[tuple[str, int | None]]:
    """Where TLS is switched off: for a Service's port, or None for all others."""
    if _mode(policy) == "DISABLE":
        yield "spec.trafficPolicy.tls", None
    settings = policy.get("portLevelSettings")
    for index, setting in enumerate(settings if isinstance(settings, list) else ()):
        port = setting.get("port") if isinstance(setting, dict) else None
        if isinstance(port, dict) and isinstance(port.get("number"), int) and _mode(setting) == "DISABLE":
            yield f"spec.trafficPolicy.portLevelSettings[{index}]", port["number"]


def _mode(settings: dict[str, Any]) -> object:
    tls = settings.get("tls")
    return tls.get("mode") if isinstance(tls, dict) else None


def _strict(scene: Scene, service: Service, port: int | None) -> Iterator[tuple[str, Any]]:
    """``pod:port`` behind the Service where Envoy demands mutual TLS, with the policy that says so."""
    for pods in scene.pods:
        if pods.pod.proxy is not ProxyClass.SIDECAR or not service.selects(pods.pod):
            continue
        guard = guard_of(pods.pod, pods.selected)
        classes = scene.capture(pods).inbound[scene.family_of(pods.pod)]
        for entry in service.ports:
            target = entry.target_at(pods.pod.ports)
            if target is None or entry.protocol != "TCP" or port not in (None, entry.port):
                continue
            mode, origin = guard.mtls.at(target)
            if mode is MtlsMode.STRICT and classes.at(target) is PortClass.CAPTURED:
                yield f"{pods.names[0]}:{target}", origin
