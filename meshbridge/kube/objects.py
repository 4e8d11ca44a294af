"""From the text of a file to Kubernetes objects: what no API server would take is refused here, by file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshbridge.kube.problems import Problem, ProblemReason
from meshbridge.kube.yaml import YamlDocument, YamlError, read_documents
from meshbridge.policy.cilium import CNI_KINDS, CONFIG_NAME
from meshbridge.policy.model import Document, Source

MAX_OBJECT_BYTES: Final = 3 << 19  # as JSON: the API server's own limit, 1.5 MiB
BIG_FILE_BYTES: Final = 1 << 19  # no object of a smaller file needs to be measured
DEFAULT_NAMESPACE: Final = "default"
MESH_CONFIG: Final = "istio"

POLICY_KINDS: Final = frozenset(
    {
        ("cilium.io", "CiliumNetworkPolicy"),
        ("cilium.io", "CiliumClusterwideNetworkPolicy"),
        ("cilium.io", "CiliumCIDRGroup"),
        ("networking.k8s.io", "NetworkPolicy"),
        ("policy.networking.k8s.io", "ClusterNetworkPolicy"),
        ("policy.networking.k8s.io", "AdminNetworkPolicy"),
        ("policy.networking.k8s.io", "BaselineAdminNetworkPolicy"),
        ("security.istio.io", "AuthorizationPolicy"),
        ("security.istio.io", "PeerAuthentication"),
        ("security.istio.io", "RequestAuthentication"),
        ("meshbridge.io", "BypassPolicy"),
        ("meshbridge.io", "ClusterBypassPolicy"),
    }
)
STATE_KINDS: Final = frozenset(
    {
        ("", "Namespace"),
        ("", "Pod"),
        ("", "Service"),
        ("", "ServiceAccount"),
        ("discovery.k8s.io", "EndpointSlice"),
        ("networking.istio.io", "DestinationRule"),
        ("networking.istio.io", "Gateway"),
        ("networking.istio.io", "ServiceEntry"),
        ("networking.istio.io", "Sidecar"),
        ("networking.istio.io", "WorkloadEntry"),
        ("", "Node"),
        ("", "ConfigMap"),
        ("apps", "Deployment"),
        ("gateway.networking.k8s.io", "Gateway"),
        ("networking.istio.io", "DestinationRule"),
    }
)
_READ: Final = POLICY_KINDS | STATE_KINDS | CNI_KINDS
CLUSTER_SCOPED: Final = frozenset(
    {
        ("", "Namespace"),
        ("", "Node"),
        ("cilium.io", "CiliumNode"),
        ("crd.projectcalico.org", "FelixConfiguration"),
        ("cilium.io", "CiliumClusterwideNetworkPolicy"),
        ("cilium.io", "CiliumCIDRGroup"),
        ("policy.networking.k8s.io", "ClusterNetworkPolicy"),
        ("policy.networking.k8s.io", "AdminNetworkPolicy"),
        ("policy.networking.k8s.io", "BaselineAdminNetworkPolicy"),
        ("meshbridge.io", "ClusterBypassPolicy"),
    }
)

_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class FileContent:
    """The objects of one file, in order, and what of it is passed over."""

    documents: tuple[Document, ...] = ()
    problems: tuple[Problem, ...] = ()


def read_objects(content: bytes, file: str) -> FileContent:
    """Every object of a file that a kind named above describes. All of it, or nothing.

    Raises:
        YamlError: with the line, when the file is not YAML or holds something that is not a Kubernetes object.
    """
    documents: list[Document] = []
    problems: list[Problem] = []
    for document in read_documents(content):
        for item in _items(document):
            found = _object(item, file)
            if isinstance(found, Problem):
                problems.append(found)
                continue
            if found is not None:
                if len(content) > BIG_FILE_BYTES:
                    _check_size(found)
                documents.append(found)
    return FileContent(tuple(documents), tuple(problems))


def is_policy(document: Document) -> bool:
    """Whether a document restricts traffic, so that losing or doubling it could loosen something."""
    return _group_kind(document.api_version, document.kind) in POLICY_KINDS


def _items(document: YamlDocument) -> Iterator[YamlDocument]:
    """The document itself, or the items of a List, each with its own paths."""
    data, line = document.data, document.lines.get("", 1)
    if not isinstance(data, Mapping):
        raise YamlError("a document that is no mapping", line, "write apiVersion, kind and metadata")
    kind = data.get("kind")
    if not isinstance(kind, str) or not kind.endswith("List") or "items" not in data:
        yield document
        return
    items = data["items"]
    if not isinstance(items, list):
        raise YamlError(f"items of a {kind[:80]} that are no list", document.lines.get("items", line), "write a list")
    by_item: list[dict[str, int]] = [{} for _ in items]
    for path, at in document.lines.items():
        head, bracket, rest = path.removeprefix("items[").partition("]")
        if bracket and path.startswith("items["):
            by_item[int(head)][rest.removeprefix(".")] = at
    for item, lines in zip(items, by_item, strict=True):
        if not isinstance(item, Mapping):
            raise YamlError(
                "a list item that is no mapping", lines.get("", line), "write apiVersion, kind and metadata"
            )
        yield YamlDocument(item, lines)


def _object(document: YamlDocument, file: str) -> Document | Problem | None:
    data, lines = document.data, document.lines
    line = lines.get("", 1)
    api_version, kind = data.get("apiVersion"), data.get("kind")
    for field, value in (("apiVersion", api_version), ("kind", kind)):
        if not isinstance(value, str) or not value:
            raise YamlError(f"an object without {field}", lines.get(field, line), f"write {field}")
    group_kind = _group_kind(api_version, kind)
    metadata = data.get("metadata")
    if not isinstance(metadata, Mapping):
        raise YamlError(f"{kind[:80]} without metadata", lines.get("metadata", line), "write metadata with a name")
    if group_kind not in _READ:
        text = f"{file}:{line}: kind {kind[:80]} ({api_version[:80]}) is not read; nothing to do unless you count on it"
        return Problem(ProblemReason.NOT_READ, text, file, line)
    name = _checked(metadata, "name", _NAME, lines, line)
    if group_kind in CLUSTER_SCOPED:
        namespace = ""
    elif metadata.get("namespace") is None:
        namespace = DEFAULT_NAMESPACE
    else:
        namespace = _checked(metadata, "namespace", _NAMESPACE, lines, line)
    if group_kind == ("", "ConfigMap") and name not in (MESH_CONFIG, CONFIG_NAME):
        return None
    uid = metadata.get("uid")
    keep = lines if group_kind in POLICY_KINDS else {"": line}
    return Document(
        kind=kind,
        api_version=api_version,
        namespace=namespace,
        name=name,
        data=data,
        source=Source(file, keep),
        uid=uid if isinstance(uid, str) else "",
    )


def _checked(
    metadata: Mapping[str, Any], field: str, form: re.Pattern[str], lines: Mapping[str, int], line: int
) -> str:
    value = metadata.get(field)
    at = lines.get(f"metadata.{field}", lines.get("metadata", line))
    if not isinstance(value, str) or not form.fullmatch(value):
        shown = "is missing" if value is None else f"{str(value)[:80]!r} is no name"
        raise YamlError(f"metadata.{field} {shown}", at, "use lower-case letters, digits and '-'")
    return value


def _check_size(document: Document) -> None:
    size = len(json.dumps(document.data, ensure_ascii=False).encode())
    if size > MAX_OBJECT_BYTES:
        what = f"{document.kind} {document.name} has {size} bytes, more than {MAX_OBJECT_BYTES}"
        raise YamlError(what, document.source.line(""), "split it into several objects")


def _group_kind(api_version: str, kind: str) -> tuple[str, str]:
    return api_version.rpartition("/")[0], kind
