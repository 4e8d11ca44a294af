"""Why an answer is what it is, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from meshbridge.policy.baseline import MeshVerdict
from meshbridge.policy.capture import PortClass
from meshbridge.policy.evaluate import Decision, LayerDecision
from meshbridge.policy.explain import explain_layer
from meshbridge.policy.model import Judge, Layer, Origin, Verdict

_MAX_ORIGINS: Final = 16


@dataclass(frozen=True, slots=True)
class Reason:
    """Why, in a sentence; ``origin`` is the rule, None where no policy is the reason."""

    text: str
    origin: Origin | None = None


def reasons_of(
    verdict: Verdict, decisions: Sequence[Decision], mesh: MeshVerdict, port_class: PortClass, broken: Reason | None
) -> tuple[Reason, ...]:
    """Of a DENY and a NEEDS_L7 who says so, of an ALLOW all who let it pass."""
    layers = [layer for decision in decisions for layer in (decision.network, decision.mesh)]
    found: list[Reason] = []
    for layer in layers:
        relevant = layer.verdict is verdict or (verdict is Verdict.ALLOW and layer.verdict is not Verdict.DENY)
        if (relevant and layer.layer is Layer.NETWORK) or (relevant and layer.verdict is Verdict.DENY):
            found += _from_layer(layer)
    if port_class is PortClass.CAPTURED and mesh.verdict is verdict and (mesh.origins or broken is None):
        said = LayerDecision(Layer.MESH, mesh.verdict, mesh.origins, mesh.deny_reason, Judge.ENVOY)
        known = {reason.origin for reason in found if reason.origin is not None}
        found += [reason for reason in _from_layer(said) if reason.origin is None or reason.origin not in known]
    if broken is not None:
        found.append(broken)
    return tuple(found) or (Reason("no policy restricts it"),)


def _from_layer(layer: LayerDecision) -> tuple[Reason, ...]:
    return _explained(
        layer.layer, layer.verdict, layer.deny_reason, layer.judge, layer.localhost, layer.origins[:_MAX_ORIGINS]
    )


@lru_cache(maxsize=8192)
def _explained(
    layer: Layer, verdict: Verdict, deny_reason: int, judge: Judge | None, localhost: bool, origins: tuple[Origin, ...]
) -> tuple[Reason, ...]:
    def text(of: tuple[Origin, ...]) -> str:
        return explain_layer(LayerDecision(layer, verdict, of, deny_reason, judge, localhost=localhost))

    if not origins:
        return (Reason(text(())),) if localhost or verdict is not Verdict.ALLOW else ()
    return tuple(Reason(text((origin,)), origin) for origin in origins)
