"""Objects as the API server has them: each kind that is read, in whole lists, or an error that says what is missing.

A kind that the cluster does not have is passed over and named; one that may not be read is never left out in silence,
since a policy that is not seen looks like none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from yaml import YAMLError

from meshbridge.kube.api import FORBIDDEN, GONE, NOT_FOUND, Api, ClusterError, RefusedError, Resource
from meshbridge.kube.objects import MESH_CONFIG, POLICY_KINDS, STATE_KINDS
from meshbridge.policy.cilium import CNI_KINDS, CONFIG_NAME, CONFIG_NAMESPACE
from meshbridge.policy.model import Document

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

KEEPALIVE_S: Final = 5
ISTIO_NAMESPACE: Final = "istio-system"
OWN_NAMESPACE: Final = "meshbridge-system"
MAX_RESTARTS: Final = 3
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

_OF_PODS: Final = frozenset({"apps", "batch"})
"""Groups of templates: in a cluster the pods made from them are there."""


@dataclass(frozen=True, slots=True)
class ClusterContent:
    """What a cluster holds. ``absent`` are kinds it does not know; ``configured``: the mesh's ConfigMap is there."""

    documents: tuple[Document, ...]
    absent: tuple[str, ...] = ()
    configured: bool = True


def connect(kubeconfig: Path | None = None, context: str | None = None) -> ApiClient:
    """A client for the cluster that ``kubectl`` would talk to, or, in a pod without a kubeconfig, for the pod's own.

    Raises:
        ClusterError: there is no cluster configured, or not so that it can be used.
    """
    from kubernetes import config  # here, since only who reads a cluster needs its 35 MB
    from kubernetes.client import ApiClient, Configuration
    from kubernetes.utils.keepalive import tcp_keepalive_socket_options

    location = str(kubeconfig) if kubeconfig else os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")
    settings = Configuration()
    settings.retries = 1
    # An idle watch of a pod that was there before its node's agent has no flow in the kernel's tables until it sends.
    settings.socket_options = tcp_keepalive_socket_options(idle=KEEPALIVE_S, interval=KEEPALIVE_S)
    try:
        if kubeconfig or context or os.environ.get("KUBECONFIG") or os.path.exists(location):
            config.load_kube_config(location, context, settings, persist_config=False)
        elif os.environ.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config(settings)
        else:
            raise ClusterError(
                "there is no kubeconfig, and this is no pod", where=location,
                fix="name manifests with -f, or a kubeconfig with --kubeconfig",
            )  # fmt: skip
    except (config.ConfigException, YAMLError, OSError, ValueError, TypeError) as error:
        fix = "'kubectl config get-contexts' shows what there is"
        raise ClusterError(
            f"cannot be used: {' '.join(str(error).split())}", where=f"kubeconfig {location}", fix=fix
        ) from error
    return ApiClient(settings)


def own_namespace() -> str:
    """The namespace of the pod this runs in; outside of pods the one that MeshBridge is installed in."""
    try:
        return _NAMESPACE_FILE.read_text(encoding="ascii").strip() or OWN_NAMESPACE
    except (OSError, UnicodeDecodeError):
        return OWN_NAMESPACE


def read_cluster(
    client: ApiClient, namespaces: Iterable[str] = (), istio_namespace: str = ISTIO_NAMESPACE
) -> ClusterContent:
    """Every object of the kinds that are read; of ConfigMaps only the mesh's and Cilium's, and never a Secret.

    Args:
        namespaces: Read only these and the mesh's root; none: all.

    Raises:
        ClusterError: the server cannot be reached, or there is a kind that it does not let the caller list.
    """
    only = set(namespaces)
    return _Reader(client).read(sorted(only | {istio_namespace}) if only else [""], istio_namespace)


class _Reader:
    def __init__(self, client: ApiClient) -> None:
        self._api = Api(client)

    def read(self, scopes: list[str], istio_namespace: str) -> ClusterContent:
        wanted = {(g, k) for g, k in POLICY_KINDS | STATE_KINDS if g not in _OF_PODS and (g, k) != ("", "ConfigMap")}
        resources = self._api.discover(wanted)
        documents: list[Document] = []
        forbidden: dict[str, str] = {}
        for resource in resources:
            for scope in scopes if resource.namespaced else [""]:
                try:
                    documents += self._list(resource, scope)
                except RefusedError as refused:
                    if refused.code == NOT_FOUND:
                        continue  # its definition went since it was found
                    self._raise_unless_forbidden(refused)
                    forbidden[resource.name] = refused.message
        try:
            config = [*self._config_map(istio_namespace, MESH_CONFIG)]
            documents += self._config_map(CONFIG_NAMESPACE, CONFIG_NAME)
        except RefusedError as refused:
            self._raise_unless_forbidden(refused)
            forbidden["configmaps"] = refused.message
        if forbidden:
            raise self._forbidden(forbidden)
        documents += self._said_by_cnis()
        known = {(resource.group, resource.kind) for resource in resources}
        absent = sorted(f"{kind}.{group}" if group else kind for group, kind in wanted - known)
        return ClusterContent((*documents, *config), tuple(absent), bool(config))

    def _list(self, resource: Resource, namespace: str) -> list[Document]:
        """One list, page by page. When it grew too old to go on with (410), it is begun again."""
        for _ in range(MAX_RESTARTS):
            try:
                return [d for page in self._api.pages(resource, namespace) for d in page.documents]
            except RefusedError as refused:
                if refused.code != GONE:
                    raise
        raise ClusterError(
            f"the list of {resource.name} changes faster than it can be read", where=self._api.where, fix="try again"
        )

    def _said_by_cnis(self) -> list[Document]:
        """What else says whether something encrypts between nodes; what may not be read says nothing."""
        found: list[Document] = []
        for resource in self._api.discover(set(CNI_KINDS)):
            with suppress(RefusedError):
                found += self._list(resource, "")
        return found

    def _config_map(self, namespace: str, name: str) -> list[Document]:
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/configmaps/{name}"
        try:
            return [self._api.document(self._api.get(path), "ConfigMap", "v1")]
        except RefusedError as refused:
            if refused.code == NOT_FOUND:
                return []
            raise

    def _raise_unless_forbidden(self, refused: RefusedError) -> None:
        if refused.code != FORBIDDEN:
            raise self._api.error(refused) from None

    def _forbidden(self, forbidden: Mapping[str, str]) -> ClusterError:
        names = list(forbidden)
        roles = []
        if listed := ",".join(name for name in names if name != "configmaps"):
            roles.append(f"kubectl create clusterrole meshbridge-reader --verb=list --resource={listed}")
        if "configmaps" in forbidden:
            role = "kubectl create clusterrole meshbridge-mesh-config --verb=get --resource=configmaps"
            roles.append(f"{role} --resource-name={MESH_CONFIG} --resource-name={CONFIG_NAME}")
        what = f"may not be read: {', '.join(names)} ({forbidden[names[0]]}), and without them an answer may be wrong"
        fix = f"have these roles made and bound to you: {'; '.join(roles)}"
        return ClusterError(what, where=self._api.where, fix=fix)
