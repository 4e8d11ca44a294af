"""CiliumCIDRGroup: CIDRs by a name, or by labels, that Cilium's policies refer to."""

from __future__ import annotations

from meshbridge.policy.model import Document, Layer, Refusal
from meshbridge.policy.parse.cluster import CidrGroup
from meshbridge.policy.parse.parsed import Parsed
from meshbridge.policy.parse.reader import Invalid, Reader

_OF_CILIUM = "io.cilium.k8s"
"""Labels with this prefix are Cilium's own, and nobody else's to set."""


def parse_cilium_cidr_group(document: Document) -> Parsed:
    """One group. What refers to a refused one allows nobody by it, and denies everybody.

    Spec: Cilium, pkg/policy/k8s/cilium_cidr_group.go; a bad CIDR, which Cilium leaves out, refuses the group here.
    """
    try:
        if document.fault:
            raise Invalid("", document.fault, "keep one definition")
        return Parsed(document, objects=(_group(document),))
    except Exception as raised:
        error = Invalid.of(raised)
        refusal = Refusal(document, error.reason, error.path, error.fix, Layer.NETWORK, (), frozenset())
        return Parsed(document, objects=(CidrGroup(document.name, networks=None),), refusals=(refusal,))


def _group(document: Document) -> CidrGroup:
    metadata = Reader(document.data.get("metadata") or {}, "metadata").mapping()
    written = metadata["labels"].mapping() if "labels" in metadata else {}
    labels = {key: at.text() for key, at in written.items() if not key.startswith(_OF_CILIUM)}
    fields = Reader(document.data.get("spec"), "spec").fields("externalCIDRs")
    cidrs = fields["externalCIDRs"].items() if "externalCIDRs" in fields else []
    networks = tuple(dict.fromkeys(item.network(bare_address=False) for item in cidrs))
    return CidrGroup(document.name, labels, networks)
