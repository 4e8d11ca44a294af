"""Objects that are not in force as they were written: refused, defined twice; and what was noticed while parsing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from meshbridge.analysis.finding import Finding, finding, listed, place_of
from meshbridge.analysis.scene import Pods, Scene
from meshbridge.bypass.bypasspolicy import is_bypass_policy
from meshbridge.policy.model import Document, Layer, Refusal, Severity
from meshbridge.policy.parse import POLICY_KINDS

_HOLDS: Final = {
    Layer.NETWORK: "until it is mended, {directions} of {pods} is closed",
    Layer.MESH: "until it is mended, Envoy alone judges captured ports, and excluded ports of {pods} are closed",
}


def refusals(scene: Scene) -> Iterator[Finding]:
    """Every object that is refused, and what therefore holds."""
    for refusal in (*scene.policies.refusals, *scene.bypass_policies.refusals):
        origin = place_of(refusal.document, refusal.path)
        at = f"{refusal.path}: " if refusal.path else ""
        text = f"{at}{refusal.reason}; {_holds(scene, refusal)}"
        yield finding(_code_of(refusal), origin, text, fix=refusal.fix)


def _holds(scene: Scene, refusal: Refusal) -> str:
    if is_bypass_policy(refusal.document):
        return "until it is mended, it accepts nothing"
    if (refusal.document.key[0], refusal.document.kind) not in POLICY_KINDS:
        return "until it is mended, nothing of it is known"
    selected = [pods for pods in scene.pods if _may_concern(scene, refusal, pods)]
    names = listed(selected)
    if not refusal.selectors:
        return "it selects no sidecar, so nothing else follows"
    if not selected:
        return "it selects no pod that is known, so nothing else follows yet"
    directions = " and ".join(direction.name.lower() for direction in sorted(refusal.directions))
    return _HOLDS[refusal.layer].format(pods=names, directions=directions)


def _may_concern(scene: Scene, refusal: Refusal, pods: Pods) -> bool:
    if refusal.layer is Layer.MESH:
        return refusal in pods.selected.refusals
    peer = pods.pod.peer()
    return any(selector.matches(peer) for selector in refusal.selectors)


def _code_of(refusal: Refusal) -> str:
    for code, applies in _SPECIAL.items():
        if applies(refusal.document):
            return code
    return "MB0003"


def _has_both(document: Document) -> bool:
    spec = document.data.get("spec")
    return isinstance(spec, dict) and "selector" in spec and ("targetRefs" in spec or "targetRef" in spec)


def _elements(document: Document) -> Iterator[dict[str, Any]]:
    specs = document.data.get("specs")
    for spec in [document.data.get("spec"), *(specs if isinstance(specs, list) else [])]:
        for name in ("ingress", "ingressDeny", "egress", "egressDeny"):
            elements = spec.get(name) if isinstance(spec, dict) else None
            for element in elements if isinstance(elements, list) else ():
                if isinstance(element, dict):
                    yield element


def _requires(document: Document) -> bool:
    return any("fromRequires" in element or "toRequires" in element for element in _elements(document))


def _fqdns_without_dns(document: Document) -> bool:
    elements = list(_elements(document))
    return any("toFQDNs" in element for element in elements) and not any(map(_sees_dns, elements))


def _sees_dns(element: dict[str, Any]) -> bool:
    ports = element.get("toPorts")
    rules = [port.get("rules") for port in ports if isinstance(port, dict)] if isinstance(ports, list) else []
    return any(isinstance(rule, dict) and "dns" in rule for rule in rules)


_SPECIAL: Final[dict[str, Callable[[Document], bool]]] = {
    "MB0111": _has_both,
    "MB0509": _requires,
    "MB0510": _fqdns_without_dns,
}


def duplicates(scene: Scene) -> Iterator[Finding]:
    """Every further definition of an object, and how it differs from the first."""
    first: dict[tuple[str, str, str, str], Document] = {}
    for document in scene.documents:
        known = first.setdefault(document.key, document)
        if known is document:
            continue
        place, before = place_of(document), place_of(known)
        where = f"{before.file}:{before.line}" if before.file else "another object"
        if known.data == document.data:
            yield finding("MB0002", place, f"is defined already at {where}, in the same words",
                          severity=Severity.INFO, related=[before])  # fmt: skip
        else:
            yield finding("MB0002", place, f"is defined already at {where}, in other words", related=[before])


def notices(scene: Scene) -> Iterator[Finding]:
    """What was noticed of valid objects while they were read."""
    for notice in scene.policies.notices:
        at = f"{notice.path}: " if notice.path else ""
        origin = place_of(notice.document, notice.path)
        yield finding(notice.code, origin, f"{at}{notice.text}", severity=notice.severity)
