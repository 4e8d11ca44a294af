"""Objects as the API server has them: each kind that is read, in whole lists, or an error that says what is missing.

A kind that the cluster does not have is passed over and named; one that may not be read is never left out in silence,
since a policy that is not seen looks like none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from yaml import YAMLError

from meshbridge.errors import MeshBridgeError
from meshbridge.kube.objects import MESH_CONFIG, POLICY_KINDS, STATE_KINDS
from meshbridge.policy.model import Document

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

ISTIO_NAMESPACE: Final = "istio-system"
PAGE: Final = 500
MAX_PAGE_BYTES: Final = 1 << 30  # 500 objects of the API server's own 1.5 MiB, and some room
TIMEOUT_S: Final = (5.0, 60.0)  # to connect, and between two pieces of an answer
MAX_RESTARTS: Final = 3

_OF_PODS: Final = frozenset({"apps", "batch"})
"""Groups of templates: in a cluster the pods made from them are there."""

_OK, _UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _GONE = 200, 401, 403, 404, 410


class ClusterError(MeshBridgeError):
    """The cluster cannot be read, or not all of what is needed."""


@dataclass(frozen=True, slots=True)
class ClusterContent:
    """What a cluster holds. ``absent`` are kinds it does not know; ``configured``: the mesh's ConfigMap is there."""

    documents: tuple[Document, ...]
    absent: tuple[str, ...] = ()
    configured: bool = True


@dataclass(frozen=True, slots=True)
class _Resource:
    """A kind under the name and version the server has it by."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def name(self) -> str:
        """As roles and ``kubectl`` name it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str) -> str:
        root = f"/apis/{self.api_version}" if self.group else f"/api/{self.version}"
        scope = f"/namespaces/{quote(namespace, safe='')}" if namespace and self.namespaced else ""
        return f"{root}{scope}/{self.plural}"


class _Refused(Exception):
    """The server's answer is a failure."""

    def __init__(self, code: int, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(message)


def connect(kubeconfig: Path | None = None, context: str | None = None) -> ApiClient:
    """A client for the cluster that ``kubectl`` would talk to, or, in a pod without a kubeconfig, for the pod's own.

    Raises:
        ClusterError: there is no cluster configured, or not so that it can be used.
    """
    from kubernetes import config  # here, since only who reads a cluster needs its 35 MB
    from kubernetes.client import ApiClient, Configuration

    location = str(kubeconfig) if kubeconfig else os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")
    settings = Configuration()
    settings.retries = 1
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


def read_cluster(
    client: ApiClient, namespaces: Iterable[str] = (), istio_namespace: str = ISTIO_NAMESPACE
) -> ClusterContent:
    """Every object of the kinds that are read; of ConfigMaps only the mesh's, and never a Secret.

    Args:
        namespaces: Read only these and the mesh's root; none: all.

    Raises:
        ClusterError: the server cannot be reached, or there is a kind that it does not let the caller list.
    """
    only = set(namespaces)
    return _Reader(client).read(sorted(only | {istio_namespace}) if only else [""], istio_namespace)


class _Reader:
    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._where = f"cluster {client.configuration.host}"

    def read(self, scopes: list[str], istio_namespace: str) -> ClusterContent:
        wanted = {(g, k) for g, k in POLICY_KINDS | STATE_KINDS if g not in _OF_PODS and (g, k) != ("", "ConfigMap")}
        resources = self._discover(wanted)
        documents: list[Document] = []
        forbidden: dict[str, str] = {}
        for resource in resources:
            for scope in scopes if resource.namespaced else [""]:
                try:
                    documents += self._list(resource, scope)
                except _Refused as refused:
                    if refused.code == _NOT_FOUND:
                        continue  # its definition went since it was found
                    self._raise_unless_forbidden(refused)
                    forbidden[resource.name] = refused.message
        try:
            config = self._mesh_config(istio_namespace)
        except _Refused as refused:
            self._raise_unless_forbidden(refused)
            forbidden["configmaps"] = refused.message
        if forbidden:
            raise self._forbidden(forbidden)
        known = {(resource.group, resource.kind) for resource in resources}
        absent = sorted(f"{kind}.{group}" if group else kind for group, kind in wanted - known)
        return ClusterContent((*documents, *config), tuple(absent), bool(config))

    def _discover(self, wanted: set[tuple[str, str]]) -> list[_Resource]:
        """Under which name each kind is served, by the version its group prefers among those that have it."""
        found: dict[tuple[str, str], _Resource] = {}
        for group in sorted({group for group, _ in wanted}):
            for version in self._versions(group):
                path = f"/apis/{group}/{version}" if group else f"/api/{version}"
                for entry in _mappings(self._discovered(path).get("resources")):
                    plural, kind = str(entry.get("name", "")), str(entry.get("kind", ""))
                    if (group, kind) in wanted and "/" not in plural:
                        resource = _Resource(group, version, plural, kind, bool(entry.get("namespaced")))
                        found.setdefault((group, kind), resource)
        return [found[key] for key in sorted(found)]

    def _versions(self, group: str) -> list[str]:
        if not group:
            return ["v1"]
        answer = self._discovered(f"/apis/{group}")
        preferred = answer.get("preferredVersion")
        offered = [preferred] if isinstance(preferred, Mapping) else []
        return list(dict.fromkeys(str(v.get("version")) for v in [*offered, *_mappings(answer.get("versions"))]))

    def _discovered(self, path: str) -> Mapping[str, Any]:
        try:
            return self._get(path)
        except _Refused as refused:
            if refused.code == _NOT_FOUND:
                return {}
            raise self._error(refused) from None

    def _list(self, resource: _Resource, namespace: str) -> list[Document]:
        """One list, page by page. When it grew too old to go on with (410), it is begun again."""
        for _ in range(MAX_RESTARTS):
            try:
                return list(self._pages(resource, namespace))
            except _Refused as refused:
                if refused.code != _GONE:
                    raise
        raise ClusterError(
            f"the list of {resource.name} changes faster than it can be read", where=self._where, fix="try again"
        )

    def _pages(self, resource: _Resource, namespace: str) -> Iterator[Document]:
        following = ""
        while True:
            query = {"limit": str(PAGE)} | ({"continue": following} if following else {})
            answer = self._get(resource.path(namespace), query)
            items = answer.get("items") or [] if "items" in answer else None
            if not isinstance(items, list):
                raise self._strange(f"a list of {resource.name} without items")
            for item in items:
                yield self._document(item, resource.kind, resource.api_version)
            metadata = answer.get("metadata")
            following = str(metadata.get("continue") or "") if isinstance(metadata, Mapping) else ""
            if not following:
                return

    def _mesh_config(self, namespace: str) -> list[Document]:
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/configmaps/{MESH_CONFIG}"
        try:
            return [self._document(self._get(path), "ConfigMap", "v1")]
        except _Refused as refused:
            if refused.code == _NOT_FOUND:
                return []
            raise

    def _document(self, item: Any, kind: str, api_version: str) -> Document:
        """The object as a manifest would have it: items of a list do not say what they are."""
        metadata = item.get("metadata") if isinstance(item, Mapping) else None
        if not isinstance(metadata, Mapping) or not isinstance(metadata.get("name"), str):
            raise self._strange(f"a {kind} without a name")
        kept = {key: value for key, value in metadata.items() if key != "managedFields"}
        namespace, uid = metadata.get("namespace"), metadata.get("uid")
        return Document(
            kind, api_version, namespace if isinstance(namespace, str) else "", metadata["name"],
            {**item, "apiVersion": api_version, "kind": kind, "metadata": kept},
            uid=uid if isinstance(uid, str) else "",
        )  # fmt: skip

    def _get(self, path: str, query: Mapping[str, str] | None = None) -> Mapping[str, Any]:
        from urllib3.exceptions import HTTPError

        client = self._client
        try:
            request = client.param_serialize(
                "GET", path, query_params=list((query or {}).items()),
                header_params={"Accept": "application/json"}, auth_settings=["BearerToken"],
            )  # fmt: skip
            response = client.call_api(*request, _request_timeout=TIMEOUT_S).response
            content = response.read(MAX_PAGE_BYTES + 1, decode_content=True)
            response.release_conn()
        except (HTTPError, OSError) as error:
            fix = "is it running, and is its address in the kubeconfig right? With -f no cluster is needed"
            raise ClusterError(f"cannot be reached: {_cause(error)}", where=self._where, fix=fix) from error
        if len(content) > MAX_PAGE_BYTES:
            raise ClusterError(f"an answer of more than {MAX_PAGE_BYTES} bytes to {path}", where=self._where)
        if response.status != _OK:
            raise _Refused(response.status, _message(content))
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._strange(f"the answer to {path} is no JSON object")
        return answer

    def _strange(self, what: str) -> ClusterError:
        return ClusterError(what, where=self._where, fix="is this a Kubernetes API server?")

    def _raise_unless_forbidden(self, refused: _Refused) -> None:
        if refused.code != _FORBIDDEN:
            raise self._error(refused) from None

    def _error(self, refused: _Refused) -> ClusterError:
        what, fix = f"answers {refused.code}: {refused.message}", "try again"
        if refused.code == _UNAUTHORIZED:
            what, fix = "does not accept the credentials", "log in again, or choose another --context"
        return ClusterError(what, where=self._where, fix=fix)

    def _forbidden(self, forbidden: Mapping[str, str]) -> ClusterError:
        names = list(forbidden)
        roles = []
        if listed := ",".join(name for name in names if name != "configmaps"):
            roles.append(f"kubectl create clusterrole meshbridge-reader --verb=list --resource={listed}")
        if "configmaps" in forbidden:
            role = "kubectl create clusterrole meshbridge-mesh-config --verb=get --resource=configmaps"
            roles.append(f"{role} --resource-name={MESH_CONFIG}")
        what = f"may not be read: {', '.join(names)} ({forbidden[names[0]]}), and without them an answer may be wrong"
        fix = f"have these roles made and bound to you: {'; '.join(roles)}"
        return ClusterError(what, where=self._where, fix=fix)


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _message(content: bytes) -> str:
    """What a Status says, else nothing: an answer of another server is no text for a person."""
    try:
        status = json.loads(content)
    except (ValueError, RecursionError):
        return "no reason given"
    return str(status.get("message") or "no reason given")[:400] if isinstance(status, dict) else "no reason given"


def _cause(error: BaseException) -> str:
    """What is at the bottom of a library's error, without its objects' addresses."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return _cause(reason)
    return str(error).rpartition(">: ")[2] or type(error).__name__
