"""The mesh's own settings, from the ConfigMap istiod reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from meshbridge.errors import MeshBridgeError
from meshbridge.kube.yaml import YamlError, read_documents
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings, PathNormalization, ProviderKind
from meshbridge.policy.model import Document

NAMESPACE: Final = "istio-system"
SIDECARS: Final = "meshbridge.io/sidecars"
"""On the ConfigMap: who configures the mesh's sidecars, ``istio`` or ``meshbridge``."""
_PROVIDER = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_TRUST_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9._]{0,253}[a-z0-9])?")


class MeshConfigError(MeshBridgeError):
    """The ConfigMap says something that is not understood; the settings before it stay."""


def read_mesh_config(document: Document) -> MeshSettings:
    """What ``data.mesh`` of ConfigMap istio-system/istio says; what it leaves out is Istio's default.

    Raises:
        MeshConfigError: it is no YAML mapping, or a setting has a wrong type.

    Spec: istio.mesh.v1alpha1.MeshConfig, as far as it decides what policies mean and what a sidecar sees.
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
    at = _At(config, where)
    default = at.mapping("defaultConfig")
    return MeshSettings(
        root_namespace=at.name("rootNamespace", DEFAULT_MESH.root_namespace),
        trust_domain=at.name("trustDomain", DEFAULT_MESH.trust_domain),
        trust_domain_aliases=tuple(at.checked(alias, "trustDomainAliases") for alias in at.list("trustDomainAliases")),
        cluster=DEFAULT_MESH.cluster,
        providers=_providers(at),
        path_normalization=_normalization(at.mapping("pathNormalization")),
        registry_only=at.mapping("outboundTrafficPolicy").choice("mode", ("ALLOW_ANY", "REGISTRY_ONLY"))
        == "REGISTRY_ONLY",
        auto_mtls=at.boolean("enableAutoMtls", True),
        trusted_proxies=default.mapping("gatewayTopology").count("numTrustedProxies"),
        interception=default.choice("interceptionMode", ("REDIRECT", "TPROXY", "NONE")) or DEFAULT_MESH.interception,
        own_sidecars=_annotations(document.data, where).choice(SIDECARS, ("istio", "meshbridge")) == "meshbridge",
    )


@dataclass(frozen=True, slots=True)
class _At:
    """A mapping of the configuration, and what error sentences call it."""

    config: Mapping[str, Any]
    where: str
    path: str = ""

    def refuse(self, field: str, what: str, fix: str) -> NoReturn:
        raise MeshConfigError(f"{self.path}{field} {what}", where=self.where, fix=fix)

    def mapping(self, field: str) -> _At:
        value = self.config.get(field)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(field, "is no mapping", "see Istio's MeshConfig")
        return _At(value or {}, self.where, f"{self.path}{field}.")

    def list(self, field: str) -> list[Any]:
        value = self.config.get(field)
        if value is not None and not isinstance(value, list):
            self.refuse(field, "is no list", "write a list")
        return value or []

    def choice(self, field: str, choices: Sequence[str]) -> str:
        value = self.config.get(field)
        if value is not None and value not in choices:
            self.refuse(field, f"{str(value)[:80]!r} is not known", f"use one of: {', '.join(choices)}")
        return value or ""

    def boolean(self, field: str, default: bool) -> bool:
        value = self.config.get(field)
        if value is not None and not isinstance(value, bool):
            self.refuse(field, f"{str(value)[:80]!r} is neither true nor false", "write true or false")
        return default if value is None else value

    def count(self, field: str) -> int:
        value = self.config.get(field)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32):
            self.refuse(field, f"{str(value)[:80]!r} is no count", "write a whole number")
        return value or 0

    def name(self, field: str, default: str) -> str:
        value = self.config.get(field)
        return default if value in (None, "") else self.checked(value, field)

    def checked(self, value: Any, field: str) -> str:
        if not isinstance(value, str) or not _TRUST_DOMAIN.fullmatch(value):
            self.refuse(field, f"{str(value)[:80]!r} is no name", "use letters, digits, '-', '.'")
        return value


def _annotations(data: Mapping[str, Any], where: str) -> _At:
    metadata = data.get("metadata")
    found = metadata.get("annotations") if isinstance(metadata, Mapping) else None
    return _At(found if isinstance(found, Mapping) else {}, where)


def _providers(at: _At) -> tuple[tuple[str, ProviderKind], ...]:
    """The providers a CUSTOM policy can name. One that istiod cannot build an ext_authz filter from is unusable."""
    found: dict[str, ProviderKind] = {}
    for item in at.list("extensionProviders"):
        if not isinstance(item, Mapping):
            at.refuse("extensionProviders", "has an element that is no mapping", "write name and one provider")
        name = item.get("name")
        for kind in (ProviderKind.GRPC, ProviderKind.HTTP):
            if kind.value not in item:
                continue
            config = item[kind.value]
            usable = isinstance(name, str) and bool(_PROVIDER.fullmatch(name)) and name not in found
            usable &= isinstance(config, Mapping) and bool(config.get("service")) and _is_port(config.get("port"))
            found[str(name)] = kind if usable else ProviderKind.UNUSABLE
    return tuple(sorted(found.items()))


def _is_port(value: Any) -> bool:
    text = str(value) if isinstance(value, int | str) else ""
    return text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65536


def _normalization(at: _At) -> PathNormalization:
    known = ("DEFAULT", *(how.value for how in PathNormalization))
    written = at.choice("normalization", known)
    return DEFAULT_MESH.path_normalization if written in ("", "DEFAULT") else PathNormalization(written)
