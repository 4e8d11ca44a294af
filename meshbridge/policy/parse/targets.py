"""``targetRefs``: what a policy is attached to where it has no selector."""

from __future__ import annotations

from typing import Final

from meshbridge.policy.mesh import GATEWAY_API, TargetRef
from meshbridge.policy.parse.reader import Reader, shown

_KINDS: Final = {
    ("", "Service"),
    ("networking.istio.io", "ServiceEntry"),
    (GATEWAY_API, "Gateway"),
    (GATEWAY_API, "GatewayClass"),
}
_MAX_TARGETS: Final = 16


def target_refs(spec: dict[str, Reader]) -> tuple[TargetRef, ...]:
    """The targets of a policy; none: it has a selector, or selects everybody it reaches.

    Raises:
        Invalid: a reference is not understood, or stands beside a selector.

    Spec: istio, validatePolicyTargetReference; ``targetRef`` is the older form of one.
    """
    written = spec["targetRefs"].items() if "targetRefs" in spec else []
    if "targetRef" in spec:
        if written:
            spec["targetRef"].refuse("stands beside targetRefs", "keep targetRefs")
        written = [spec["targetRef"]]
    if written and "selector" in spec:
        spec["selector"].refuse("stands beside targetRefs", "keep one of them")
    if len(written) > _MAX_TARGETS:
        spec["targetRefs"].refuse(f"{len(written)} targets are more than {_MAX_TARGETS}", "write several policies")
    return tuple(_target(at) for at in written)


def _target(at: Reader) -> TargetRef:
    fields = at.fields("group", "kind", "name", "namespace")
    for name in ("kind", "name"):
        if name not in fields or not fields[name].text():
            at.refuse(f"has no {name}", f"write {name}")
    group = fields["group"].text() if "group" in fields else ""
    group = "" if group == "core" else group
    if (group, fields["kind"].text()) not in _KINDS:
        known = ", ".join(f"{group}/{kind}" if group else kind for group, kind in sorted(_KINDS))
        fields["kind"].refuse(f"{shown(fields['kind'].text())} of group {shown(group)} is no target", f"use: {known}")
    if "namespace" in fields and fields["namespace"].text():
        fields["namespace"].refuse("a target is in the policy's own namespace", "delete namespace")
    return TargetRef(group, fields["kind"].text(), fields["name"].text())
