"""Why a flow passes or not, in sentences a person can act on: the rule, the object, the line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from meshbridge.policy.evaluate import Decision, LayerDecision
from meshbridge.policy.model import Judge, Layer, Origin, Verdict
from meshbridge.policy.precedence import DropReason

_MAX_NAMED: Final = 5
_JUDGES: Final = {Judge.ENVOY: "Envoy", Judge.EXT_AUTHZ: "MeshBridge's ext_authz"}
_FAMILY: Final = {Layer.NETWORK: "network policy", Layer.MESH: "mesh policy"}


def explain(decision: Decision, flow: str) -> tuple[str, ...]:
    """The verdict on ``flow`` (in the caller's words, "a to b, TCP 8080"), then what each family says."""
    match decision.verdict:
        case Verdict.ALLOW:
            first = f"{flow}: passes"
        case Verdict.NEEDS_L7:
            judges = {layer.judge for layer in (decision.network, decision.mesh) if layer.judge is not None}
            names = " and ".join(_JUDGES[judge] for judge in sorted(judges))
            first = f"{flow}: passes in the kernel; {names} decides each request"
        case Verdict.DENY:
            first = f"{flow}: dropped by {_FAMILY[decision.deciding.layer]}"
    return (first, explain_layer(decision.network), explain_layer(decision.mesh))


def explain_layer(decision: LayerDecision) -> str:
    """What one family of policies says and where that is written."""
    by = _named(decision.origins)
    return f"{_FAMILY[decision.layer]}: {phrase(decision)}{f' {by}' if by else ''}"


def phrase(decision: LayerDecision) -> str:
    """What one family of policies says; the names of the rules, where there are any, go on with it."""
    if decision.localhost:
        return "no rule allows it, but a pod's own node may always reach it"
    if decision.verdict is Verdict.NEEDS_L7:
        return "depends on more than the packet shows:"
    if decision.verdict is Verdict.ALLOW:
        return "allowed by" if decision.origins else "nothing restricts it"
    match decision.deny_reason:
        case DropReason.POLICY:
            return "no rule allows it, and it is isolated by"
        case DropReason.MESH_POLICY:
            return "no ALLOW rule can match, of"
        case DropReason.NO_L7_JUDGE:
            return "depends on the request, and nobody judges requests on this port:"
        case DropReason.COMPENSATION:
            return "the port bypasses Envoy, which would not surely have allowed it:"
        case DropReason.SERVICE_BACKENDS_DIFFER:
            return "not every backend of the Service may be reached:"
        case DropReason.NO_SERVICE_BACKENDS:
            return "nobody is known to answer behind the Service's port, and not just anybody may:"
        case _:
            return "denied by"


def _named(origins: Iterable[Origin]) -> str:
    named = [str(origin) for origin in origins]
    more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    return ", ".join(named[:_MAX_NAMED]) + more
