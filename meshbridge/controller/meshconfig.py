"""The mesh's own settings, from the ConfigMap istiod reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from meshbridge.errors import MeshBridgeError
from meshbridge.kube.yaml import YamlError, read_documents
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Document

NAMESPACE: Final = "istio-system"
_TRUST_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9._]{0,253}[a-z0-9])?")


class MeshConfigError(MeshBridgeError):
    """The ConfigMap says something that is not understood; the settings before it stay."""


def read_mesh_config(document: Document) -> MeshSettings:
    """What ``data.mesh`` of ConfigMap istio-system/istio says; what it leaves out is Istio's default.

    Raises:
        MeshConfigError: it is no YAML mapping, or a setting has a wrong type.

    Spec: istio.mesh.v1alpha1.MeshConfig rootNamespace, trustDomain, trustDomainAliases.
    """
    where = str(document)
    data = document.data.get("data")
    text = data.get("mesh", "") if isinstance(data, Mapping) else ""
    if not isinstance(text, str):
        raise MeshConfigError("data.mesh is no text", where=where, fix="write it as a block: 'mesh: |-'")
    try:
        documents = read_documents(text.encode("utf-8", "surrogatepass"))
    except YamlError as error:
        raise MeshConfigError(f"data.mesh, line {error.line}: {error}", where=where, fix="correct it") from None
    config: Any = documents[0].data if documents else {}
    if not isinstance(config, Mapping):
        raise MeshConfigError("data.mesh is no mapping", where=where, fix="see Istio's MeshConfig")
    aliases = config.get("trustDomainAliases") or []
    if not isinstance(aliases, list):
        raise MeshConfigError("trustDomainAliases is no list", where=where, fix="write a list")
    return MeshSettings(
        root_namespace=_name(config, "rootNamespace", DEFAULT_MESH.root_namespace, where),
        trust_domain=_name(config, "trustDomain", DEFAULT_MESH.trust_domain, where),
        trust_domain_aliases=tuple(_checked(alias, "trustDomainAliases", where) for alias in aliases),
        cluster=DEFAULT_MESH.cluster,
    )


def _name(config: Mapping[str, Any], field: str, default: str, where: str) -> str:
    value = config.get(field)
    return default if value in (None, "") else _checked(value, field, where)


def _checked(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str) or not _TRUST_DOMAIN.fullmatch(value):
        raise MeshConfigError(
            f"{field} {str(value)[:80]!r} is no name", where=where, fix="use letters, digits, '-', '.'"
        )
    return value
