"""PeerAuthentication: which mTLS mode a workload's ports demand.

Spec: ISTIO.md §b.
"""

from __future__ import annotations

from typing import Final

from meshbridge.policy.mesh import MtlsMode, PeerAuthentication
from meshbridge.policy.model import Document
from meshbridge.policy.parse.labels import match_labels_only
from meshbridge.policy.parse.parsed import Parsed, contradiction_notices, origin_of, refused_mesh, spec_of
from meshbridge.policy.parse.reader import Invalid, Reader, shown
from meshbridge.policy.selectors import Selector

MADE_BY_FIX: Final = {"app.kubernetes.io/managed-by": "meshbridge"}
MADE_PREFIX: Final = "meshbridge-"


def parse_peer_authentication(document: Document) -> Parsed:
    """One policy; a selector without labels is no selector."""
    selector: Selector | None = None
    try:
        spec = Reader(spec_of(document), "spec").fields("selector", "mtls", "portLevelMtls")
        if "selector" in spec:
            selector = Selector.of(match_labels_only(spec["selector"]))
            selector = selector if selector.requirements else None
        mode = _mode(spec["mtls"]) if "mtls" in spec else MtlsMode.UNSET
        ports: dict[int, MtlsMode] = {}
        if "portLevelMtls" in spec:
            if selector is None:
                spec["portLevelMtls"].refuse("needs a selector", "write selector.matchLabels")
            ports = _port_modes(spec["portLevelMtls"])
    except Exception as raised:
        error = Invalid.of(raised)
        return refused_mesh(document, error, selector or Selector())
    created = _created(document)
    policy = PeerAuthentication(
        document.namespace, document.name, mode, origin_of(document, ""), selector, ports, created,
        mode is MtlsMode.UNSET and is_made_by_fix(document) and set(ports.values()) <= {MtlsMode.DISABLE},
    )  # fmt: skip
    notices = contradiction_notices(document, [("spec.selector", selector)] if selector else [])
    return Parsed(document, peer_authentication=(policy,), notices=notices)


def is_made_by_fix(document: Document) -> bool:
    """Whether the object carries the label and the name of those that MeshBridge makes to mend half bypasses."""
    metadata = document.data.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    labelled = isinstance(labels, dict) and MADE_BY_FIX.items() <= labels.items()
    return labelled and document.name.startswith(MADE_PREFIX)


def _mode(at: Reader) -> MtlsMode:
    fields = at.fields("mode")
    return MtlsMode(fields["mode"].text(list(MtlsMode))) if "mode" in fields else MtlsMode.UNSET


def _port_modes(at: Reader) -> dict[int, MtlsMode]:
    if not isinstance(at.value, dict):
        at.refuse(f"expected a mapping of ports, found {shown(at.value)}", 'write "8080": {mode: DISABLE}')
    found: dict[int, MtlsMode] = {}
    for key, value in at.value.items():
        item = Reader(value, f"{at.path}.{key}")
        text = str(key)
        if isinstance(key, bool) or not text.isascii() or not text.isdigit() or len(text) > 5:
            item.refuse(f"{shown(key)} is no port", "use 1..65535")
        if not 1 <= int(text) <= 65535:
            item.refuse(f"{shown(key)} is no port", "use 1..65535")
        found[int(text)] = _mode(item)
    return found


def _created(document: Document) -> str:
    metadata = document.data.get("metadata")
    created = metadata.get("creationTimestamp") if isinstance(metadata, dict) else None
    return created if isinstance(created, str) else ""
