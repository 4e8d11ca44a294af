"""ConfigMap kube-system/cilium-config: what of Cilium's own configuration decides what its policies mean.

Only that name in that namespace: who may write there runs the cluster, and ``enable-policy: never`` opens all of it.
"""

from __future__ import annotations

from typing import Final

from meshbridge.identity.model import DEFAULT_CLUSTER
from meshbridge.policy.cilium import CiliumSettings, Enforcement
from meshbridge.policy.model import Document, Layer, Notice, Refusal
from meshbridge.policy.parse.parsed import Parsed, origin_of
from meshbridge.policy.parse.reader import Invalid, Reader, shown

_MATCHABLE: Final = ("nodes", "pods")


def parse_cilium_config(document: Document) -> Parsed:
    """The settings it holds; keys that decide no verdict are passed over. Refused: all are Cilium's defaults."""
    try:
        if document.fault:
            raise Invalid("", document.fault, "keep one definition")
        settings = _settings(document)
    except Exception as raised:
        error = Invalid.of(raised)
        refusal = Refusal(document, error.reason, error.path, error.fix, Layer.NETWORK, (), frozenset())
        return Parsed(document, refusals=(refusal,), cilium=CiliumSettings())
    notices: tuple[Notice, ...] = ()
    if settings.enforcement is Enforcement.NEVER:
        text = "no network policy of any kind is enforced"
        notices = (Notice(document, text, "data.enable-policy", code="MB0506"),)
    return Parsed(document, notices=notices, cilium=settings)


def _settings(document: Document) -> CiliumSettings:
    data = Reader(document.data.get("data") or {}, "data").mapping()
    enforcement = Enforcement.DEFAULT
    if "enable-policy" in data:
        enforcement = Enforcement(data["enable-policy"].text([*Enforcement]))
    modes: set[str] = set()
    if "policy-cidr-match-mode" in data:
        at = data["policy-cidr-match-mode"]
        modes = {mode for mode in at.text().replace(",", " ").split() if mode}
        if unknown := sorted(modes - set(_MATCHABLE)):
            at.refuse(f"unknown mode {shown(unknown[0])}", f"use any of: {', '.join(_MATCHABLE)}")
    cluster = data["cluster-name"].text() if "cluster-name" in data else DEFAULT_CLUSTER
    return CiliumSettings(
        enforcement, "pods" in modes, "nodes" in modes, cluster or DEFAULT_CLUSTER,
        origin_of(document, "data.enable-policy"),
    )  # fmt: skip
