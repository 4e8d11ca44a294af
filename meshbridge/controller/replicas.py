"""Where the controllers are: a node reports to each of them, since each may lead, and tells others what it heard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final

from meshbridge.kube.manifests import Key
from meshbridge.policy.model import Document

MAX_REPLICAS: Final = 16
_SERVICE_NAME: Final = "kubernetes.io/service-name"


@dataclass(frozen=True, slots=True)
class OwnService:
    """The Service in front of the controllers, and the port on which each of them listens."""

    namespace: str
    name: str
    port: int

    def may_change(self, keys: Iterable[Key]) -> bool:
        """Whether these objects may say something else of where they are."""
        return any(key[:3] == ("discovery.k8s.io", "EndpointSlice", self.namespace) for key in keys)

    def replicas(self, documents: Mapping[Key, tuple[Document, ...]]) -> tuple[str, ...]:
        """``HOST:PORT`` of those that are ready, in order."""
        found: set[str] = set()
        for key, held in documents.items():
            if self.may_change([key]):
                for document in held:
                    found.update(self._of_slice(document.data))
        return tuple(sorted(found)[:MAX_REPLICAS])

    def _of_slice(self, data: Mapping[str, Any]) -> Iterable[str]:
        labels = (data.get("metadata") or {}).get("labels") or {}
        if labels.get(_SERVICE_NAME) != self.name:
            return
        for endpoint in data.get("endpoints") or ():
            if (endpoint.get("conditions") or {}).get("ready") is not False:
                for address in _addresses(endpoint.get("addresses") or ()):
                    yield f"[{address}]:{self.port}" if address.version == 6 else f"{address}:{self.port}"


def _addresses(texts: Iterable[str]) -> Iterable[IPv4Address | IPv6Address]:
    for text in texts:
        with suppress(ValueError):  # a host name, in a slice of such
            yield ip_address(text)
