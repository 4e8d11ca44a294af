"""An AdmissionReview in, an AdmissionReview out: pods by their bypasses, policies by our parsers.

Spec: admission.k8s.io/v1; warnings as the API server takes them (256 characters each, 4,096 in all).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from meshbridge.bypass.admission import Admission, review
from meshbridge.bypass.annotations import STATUS
from meshbridge.bypass.automatic import ANNOTATION, AUTO, Automatic, automatic_exclusions, is_automatic
from meshbridge.bypass.bypasspolicy import is_bypass_policy, parse_bypass_policy
from meshbridge.bypass.proof import GATE
from meshbridge.errors import MeshBridgeError
from meshbridge.observe.text import printable
from meshbridge.policy.mesh import OUR_PROVIDER, Action, AuthorizationPolicy
from meshbridge.policy.model import Direction, Document, Layer, Refusal
from meshbridge.policy.parse import POLICY_KINDS, parse
from meshbridge.policy.parse.reader import shown
from meshbridge.policy.parse.workloads import TEMPLATE_KINDS
from meshbridge.policy.providers import Meeting
from meshbridge.webhook.surroundings import Surroundings

API_VERSION: Final = "admission.k8s.io/v1"
KIND: Final = "AdmissionReview"
MAX_WARNINGS: Final = 8
MAX_WARNING: Final = 256  # characters; the API server cuts what is longer
MAX_MESSAGE: Final = 4_000
FORBIDDEN, INVALID = 403, 422

_NOT_SYNCED: Final = (
    "MeshBridge's webhook has not read the whole cluster yet; what bypasses the sidecar is compensated in the kernel "
    "all the same, and 'meshbridge bypass list' shows it"
)


class ReviewError(MeshBridgeError):
    """What was sent is no AdmissionReview that can be answered."""


@dataclass(frozen=True, slots=True)
class Request:
    """The part of an AdmissionRequest that decides; ``old`` is None but for updates."""

    uid: str
    operation: str
    document: Document
    old: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """``denied`` not empty: refused, for that reason. ``patch`` is a JSON patch, ``audit`` goes into the audit log."""

    warnings: tuple[str, ...] = ()
    denied: str = ""
    code: int = FORBIDDEN
    fields: tuple[Mapping[str, str], ...] = ()
    patch: tuple[Mapping[str, Any], ...] = ()
    audit: Mapping[str, str] = field(default_factory=dict, hash=False)


def read_request(review: Any) -> Request:
    """The request of an AdmissionReview.

    Raises:
        ReviewError: it is none, of another version, or without an object.
    """
    if not isinstance(review, Mapping):
        raise ReviewError("is no JSON object", where="AdmissionReview")
    version, kind = review.get("apiVersion"), review.get("kind")
    if (version, kind) != (API_VERSION, KIND):
        what = f"apiVersion {shown(version)}, kind {shown(kind)} is not known"
        raise ReviewError(what, where="AdmissionReview", fix=f"send {API_VERSION} {KIND}")
    request = _mapping(review, "request")
    given = _mapping(request, "object")
    metadata = _mapping(given, "metadata")
    uid, operation = (_text(request, name) for name in ("uid", "operation"))
    if not uid:
        raise ReviewError("without a uid", where="AdmissionReview request")
    name = _text(metadata, "name") or _text(request, "name") or _text(metadata, "generateName") or uid
    namespace = _text(metadata, "namespace") or _text(request, "namespace")
    document = Document(_text(given, "kind"), _text(given, "apiVersion"), namespace, name, dict(given))
    old = request.get("oldObject")
    return Request(uid, operation, document, old if isinstance(old, Mapping) else None)


def answered(request: Request, answer: Answer) -> dict[str, Any]:
    """The AdmissionReview to send back."""
    response: dict[str, Any] = {"uid": request.uid, "allowed": not answer.denied}
    if answer.denied:
        reason = "Invalid" if answer.code == INVALID else "Forbidden"
        response["status"] = {"code": answer.code, "reason": reason, "message": printable(answer.denied)[:MAX_MESSAGE]}
        if answer.fields:
            response["status"]["details"] = {"causes": list(answer.fields)}
    if warnings := _fitting(answer.warnings):
        response["warnings"] = warnings
    if answer.patch:
        response["patchType"] = "JSONPatch"
        response["patch"] = base64.b64encode(json.dumps(list(answer.patch)).encode()).decode()
    if answer.audit:
        response["auditAnnotations"] = {name: printable(text) for name, text in answer.audit.items()}
    return {"apiVersion": API_VERSION, "kind": KIND, "response": response}


def validate(request: Request, around: Surroundings, now: datetime, *, deny_refused: bool = False) -> Answer:
    """What there is to say of a pod, a template of pods or a policy.

    Args:
        deny_refused: A policy of somebody else's kind that we do not understand is denied; else its author is warned.
    """
    document = request.document
    group = document.api_version.rpartition("/")[0]
    if is_bypass_policy(document):
        return _bypass_policy(request, now)
    if (group, document.kind) in POLICY_KINDS:
        return _policy(request, around, deny_refused=deny_refused)
    if document.kind == "Pod" and not group:
        return _pod(document, around, now)
    if document.kind in TEMPLATE_KINDS and not _unchanged(request):
        return _template(document, around, now)
    return Answer()


def mutate(request: Request, around: Surroundings, now: datetime) -> Answer:
    """The exclusions of a pod annotated ``meshbridge.io/bypass: auto``, before the injector sees it.

    A pod that has its sidecar, or its exclusions, gets nothing: asking twice is asking once.
    """
    document = request.document
    if document.kind != "Pod":
        return Answer()
    inventory = around.near(document, now)
    workload = next(iter(inventory.workloads), None)
    if workload is None or not is_automatic(workload) or STATUS in workload.annotations:
        return Answer()
    if not around.synced:
        return Answer((f"no port of it is excluded: {_NOT_SYNCED}",), audit={"refused": _NOT_SYNCED})
    found = automatic_exclusions(workload, around.with_others(workload, inventory))
    patch = [
        {"op": "add", "path": f"/metadata/annotations/{name.replace('~', '~0').replace('/', '~1')}", "value": value}
        for name, value in found.annotations
        if workload.annotations.get(name) != value
    ]
    refused = _staying(found)
    audit = {"excluded": "; ".join(f"{name}={value}" for name, value in found.annotations)}
    audit["refused"] = "; ".join(refused)
    return Answer(refused, patch=tuple(patch), audit={name: text for name, text in audit.items() if text})


def gate(request: Request, around: Surroundings, now: datetime) -> Answer:
    """The readiness gate of a pod that a BypassPolicy with ``readinessGate`` selects; twice is as once."""
    document = request.document
    inventory = around.near(document, now) if document.kind == "Pod" else None
    workload = next(iter(inventory.workloads), None) if inventory is not None else None
    if inventory is None or workload is None or workload.host_network:  # nobody hooks that one, so nobody proves it
        return Answer()
    if not around.synced:
        return Answer(audit={"gate": _NOT_SYNCED})
    asking = [p.origin for p in inventory.bypass_policies.selecting(workload.peer()) if p.readiness_gate]
    gates = document.data.get("spec", {}).get("readinessGates") or []
    if not asking or {"conditionType": GATE} in gates:
        return Answer()
    own = {"conditionType": GATE}
    path, value = ("/spec/readinessGates/-", own) if gates else ("/spec/readinessGates", [own])
    return Answer(
        patch=({"op": "add", "path": path, "value": value},),
        audit={"gate": f"{GATE}, for {', '.join(map(str, asking))}"},
    )


def _pod(document: Document, around: Surroundings, now: datetime) -> Answer:
    found = _reviewed(document, around, now)
    return Answer(found.warnings, "; ".join(found.denied))


def _template(document: Document, around: Surroundings, now: datetime) -> Answer:
    """Nobody is refused a template: its pods are, and whoever writes it is told so already."""
    found = _reviewed(document, around, now)
    staying: tuple[str, ...] = ()
    inventory = around.near(document, now)
    for workload in inventory.workloads:
        if is_automatic(workload) and around.synced:
            staying = _staying(automatic_exclusions(workload, around.with_others(workload, inventory)))
    return Answer((*(f"its pods will be refused: {why}" for why in found.denied), *found.warnings, *staying))


def _reviewed(document: Document, around: Surroundings, now: datetime) -> Admission:
    if not around.synced:
        return Admission(warnings=(f"not reviewed: {_NOT_SYNCED}",))
    inventory = around.near(document, now)
    if not inventory.workloads:
        unread = parse(document).refusals
        return Admission(warnings=tuple(f"not reviewed, as it is not understood: {refusal}" for refusal in unread))
    return review(inventory.workloads[0], inventory)


def _staying(found: Automatic) -> tuple[str, ...]:
    """The ports that ``auto`` leaves with Envoy, as their author reads it."""
    return tuple(
        f"{ANNOTATION}: {AUTO} excludes nothing: {refused.why}"
        if not refused.port
        else f"{'inbound' if refused.direction is Direction.INGRESS else 'outbound'} TCP {refused.port} "
        f"stays with Envoy: {refused.why}"
        for refused in found.refused
    )


def _bypass_policy(request: Request, now: datetime) -> Answer:
    """Our own kinds are refused where we do not understand them: nobody else would."""
    policy = parse_bypass_policy(request.document)
    if policy.refusal is not None and not _unchanged(request):
        return _invalid((policy.refusal,))
    if policy.accept and policy.is_expired(now):
        return Answer((f"{policy.origin} accepts nothing any more: spec.until is over",))
    return Answer()


def _policy(request: Request, around: Surroundings, *, deny_refused: bool) -> Answer:
    if _unchanged(request):
        return Answer()
    parsed = parse(request.document)
    if parsed.refusals and deny_refused:
        return _invalid(parsed.refusals)
    refused = tuple(f"not understood by MeshBridge: {refusal}; {_held(refusal)}" for refusal in parsed.refusals)
    warnings = (*refused, *map(str, parsed.notices))
    for policy in parsed.authorization:
        if policy.action is Action.CUSTOM and around.synced:
            denied, told = _provider(policy, around.meetings(policy))
            if denied:
                return Answer(denied=denied)
            warnings += told
    return Answer(warnings)


def _provider(policy: AuthorizationPolicy, found: Sequence[Meeting]) -> tuple[str, tuple[str, ...]]:
    """Why a CUSTOM policy of our provider is refused; or what else there is to say of providers that meet.

    A policy of somebody else's provider is not ours to refuse.
    """
    ours = policy.provider == OUR_PROVIDER
    warnings = []
    for meeting in sorted(found, key=lambda meeting: (not meeting.certain, meeting.other.origin)):
        other = meeting.other
        what = f"{other.origin.kind} {other.origin.policy} asks provider {other.provider!r} for the same pods"
        instead = "ask MeshBridge by 'meshbridge ext-authz envoyfilter' in place of CUSTOM"
        if OUR_PROVIDER not in (policy.provider, other.provider):
            instead = "use one provider for a workload"
        if ours and meeting.certain:
            return (
                f"provider {policy.provider!r} beside another: {what}, and Istio would deny everything; {instead}",
                (),
            )
        sure = (
            "Istio denies everything there"
            if meeting.certain
            else "where a pod has both labels Istio denies everything"
        )
        warnings.append(f"{what}: {sure}; {instead}")
    return "", tuple(warnings)


def _invalid(refusals: Sequence[Refusal]) -> Answer:
    fields = [{"field": r.path, "message": r.reason, "reason": "FieldValueInvalid"} for r in refusals]
    return Answer(denied="; ".join(map(str, refusals)), code=INVALID, fields=tuple(fields))


def _held(refusal: Refusal) -> str:
    if refusal.layer is Layer.MESH:
        return "until then excluded ports of what it may select are closed"
    return "until then what it selects is isolated" if refusal.selectors else "until then it means nobody"


def _unchanged(request: Request) -> bool:
    """An update of metadata alone, such as of the finalizers of an object that goes: nothing new to judge."""
    if request.old is None:
        return False
    new, old = request.document.data, request.old
    return all(new.get(name) == old.get(name) for name in (new.keys() | old.keys()) - {"metadata", "status"})


def _fitting(warnings: Iterable[str]) -> list[str]:
    """No more and none longer than the API server passes on; what is left out is counted."""
    texts = [text if len(text) <= MAX_WARNING else f"{text[: MAX_WARNING - 1]}…" for text in map(printable, warnings)]
    texts = list(dict.fromkeys(texts))
    if len(texts) <= MAX_WARNINGS:
        return texts
    left = len(texts) - MAX_WARNINGS + 1
    return [*texts[: MAX_WARNINGS - 1], f"and {left} more: 'meshbridge bypass plan -f' shows all of them"]


def _mapping(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = given.get(name)
    if not isinstance(found, Mapping):
        raise ReviewError(f"without {name}", where="AdmissionReview")
    return found


def _text(given: Mapping[str, Any], name: str) -> str:
    found = given.get(name, "")
    if not isinstance(found, str):
        raise ReviewError(f"{name} {shown(found)} is no text", where="AdmissionReview")
    return found
