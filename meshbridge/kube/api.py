"""What is asked of an API server: which kinds it has, lists page by page, watches, and changes of one object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from meshbridge.errors import MeshBridgeError
from meshbridge.policy.model import Document

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

PAGE: Final = 500
MAX_PAGE_BYTES: Final = 1 << 30  # 500 objects of the API server's own 1.5 MiB, and some room
MAX_EVENT_BYTES: Final = 1 << 24
TIMEOUT_S: Final = (5.0, 60.0)  # to connect, and between two pieces of an answer
WRITE_S: Final = 5
"""After this the server gives up a write, so that it is not done long after it was decided."""
_WRITE_TIMEOUT_S: Final = (2.0, WRITE_S + 2.0)

_Request = tuple[str, str, dict[str, str], str | None, list[str]]
"""Method, address, headers, body and form fields."""

OK, CREATED, ACCEPTED, UNAUTHORIZED, FORBIDDEN, NOT_FOUND, CONFLICT, GONE = 200, 201, 202, 401, 403, 404, 409, 410
FIELD_MANAGER: Final = "meshbridge"


class ClusterError(MeshBridgeError):
    """The cluster cannot be read, or not all of what is needed."""


@dataclass(frozen=True, slots=True)
class Resource:
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


class RefusedError(Exception):
    """The server's answer is a failure."""

    def __init__(self, code: int, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list; ``version`` is the resourceVersion of the list as a whole, where a watch goes on."""

    documents: tuple[Document, ...]
    version: str


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a watch. ``document`` is None for a bookmark; ``deleted``: the object is gone."""

    version: str
    document: Document | None = None
    deleted: bool = False


class Api:
    """An API server as one caller may read it."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self.where = f"cluster {client.configuration.host}"

    def discover(self, wanted: set[tuple[str, str]]) -> list[Resource]:
        """Under which name each kind is served, by the version its group prefers among those that have it."""
        found: dict[tuple[str, str], Resource] = {}
        for group in sorted({group for group, _ in wanted}):
            for version in self._versions(group):
                path = f"/apis/{group}/{version}" if group else f"/api/{version}"
                for entry in _mappings(self._discovered(path).get("resources")):
                    plural, kind = str(entry.get("name", "")), str(entry.get("kind", ""))
                    if (group, kind) in wanted and "/" not in plural:
                        resource = Resource(group, version, plural, kind, bool(entry.get("namespaced")))
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
            return self.get(path)
        except RefusedError as refused:
            if refused.code == NOT_FOUND:
                return {}
            raise self.error(refused) from None

    def check_ready(self) -> None:
        """The server has found all the kinds it serves, as far as the caller may ask.

        Raises:
            ClusterError: it is still starting, and may not know a kind that it has; or it cannot be reached.
        """
        from urllib3.exceptions import HTTPError

        try:
            response = self._open(self._request("GET", "/readyz", {}), TIMEOUT_S)
            response.read(MAX_EVENT_BYTES, decode_content=True)
            response.release_conn()
        except (HTTPError, OSError) as error:
            raise self._unreachable(error) from error
        if response.status not in (OK, UNAUTHORIZED, FORBIDDEN, NOT_FOUND):
            raise ClusterError("is not ready yet", where=self.where, fix="wait until it is, or look into its log")

    def pages(self, resource: Resource, namespace: str = "", name: str = "") -> Iterator[Page]:
        """A list, page by page; of one object where ``name`` is given.

        Raises:
            RefusedError: with GONE when the list grew too old to go on with.
            ClusterError: the server cannot be reached, or is none.
        """
        following = ""
        query = {"limit": str(PAGE)} | ({"fieldSelector": f"metadata.name={name}"} if name else {})
        while True:
            answer = self.get(resource.path(namespace), query | ({"continue": following} if following else {}))
            items = answer.get("items") or [] if "items" in answer else None
            if not isinstance(items, list):
                raise self.strange(f"a list of {resource.name} without items")
            metadata = answer.get("metadata")
            metadata = metadata if isinstance(metadata, Mapping) else {}
            documents = tuple(self.document(item, resource.kind, resource.api_version) for item in items)
            yield Page(documents, str(metadata.get("resourceVersion") or ""))
            following = str(metadata.get("continue") or "")
            if not following:
                return

    def events(
        self, resource: Resource, version: str, timeout_s: int, namespace: str = "", name: str = ""
    ) -> Iterator[Event]:
        """What happens to objects of a kind after ``version``, until the server ends the watch after ``timeout_s``.

        Raises:
            RefusedError: with GONE when ``version`` is too old.
            ClusterError: the server cannot be reached, or goes away.
        """
        query = {
            "watch": "1", "allowWatchBookmarks": "true", "resourceVersion": version, "timeoutSeconds": str(timeout_s),
        } | ({"fieldSelector": f"metadata.name={name}"} if name else {})  # fmt: skip
        for line in self._lines(resource.path(namespace), query, timeout_s):
            try:
                event = json.loads(line)
                kind, item = event["type"], event["object"]
            except (ValueError, RecursionError, KeyError, TypeError):
                raise self.strange(f"an event of {resource.name} that is no JSON object") from None
            if kind == "ERROR":
                code = item.get("code") if isinstance(item, Mapping) else None
                raise RefusedError(code if isinstance(code, int) else 0, _message(json.dumps(item).encode()))
            metadata = item.get("metadata") if isinstance(item, Mapping) else None
            at = str(metadata.get("resourceVersion") or "") if isinstance(metadata, Mapping) else ""
            if kind == "BOOKMARK":
                yield Event(at)
            elif kind in ("ADDED", "MODIFIED", "DELETED"):
                document = self.document(item, resource.kind, resource.api_version)
                yield Event(at, document, deleted=kind == "DELETED")

    def document(self, item: Any, kind: str, api_version: str) -> Document:
        """The object as a manifest would have it: items of a list do not say what they are."""
        metadata = item.get("metadata") if isinstance(item, Mapping) else None
        if not isinstance(metadata, Mapping) or not isinstance(metadata.get("name"), str):
            raise self.strange(f"a {kind} without a name")
        kept = {key: value for key, value in metadata.items() if key != "managedFields"}
        namespace, uid = metadata.get("namespace"), metadata.get("uid")
        return Document(
            kind, api_version, namespace if isinstance(namespace, str) else "", metadata["name"],
            {**item, "apiVersion": api_version, "kind": kind, "metadata": kept},
            uid=uid if isinstance(uid, str) else "",
        )  # fmt: skip

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Mapping[str, Any]:
        """The JSON object at a path.

        Raises:
            RefusedError: the server says no.
            ClusterError: it cannot be reached, or answers something else.
        """
        return self._answer(path, self._request("GET", path, query or {}))

    def merge(self, resource: Resource, namespace: str, name: str, patch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The object with ``patch`` merged into it; with ``metadata.resourceVersion`` only into that version of it.

        Spec: RFC 7386.

        Raises:
            RefusedError: the server says no.
            ClusterError: it cannot be reached, or answers something else.
        """
        return self.patch(_path(resource, namespace, name), patch)

    def read(self, resource: Resource, namespace: str, name: str) -> Mapping[str, Any] | None:
        """An object as it is now, None where there is none.

        Raises:
            RefusedError: the server says no.
            ClusterError: it cannot be reached, or answers something else.
        """
        path = _path(resource, namespace, name)
        try:
            return self._answer(path, self._request("GET", path, {}), _WRITE_TIMEOUT_S)
        except RefusedError as refused:
            if refused.code == NOT_FOUND:
                return None
            raise

    def create(self, resource: Resource, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """A new object, as the server has it.

        Raises:
            RefusedError: the server says no; with CONFLICT where there is one already.
            ClusterError: it cannot be reached, or answers something else.
        """
        path = resource.path(body["metadata"].get("namespace", ""))
        return self._write("POST", path, {}, {**body, "apiVersion": resource.api_version}, "application/json")

    def replace(self, resource: Resource, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The object is what ``body`` says, as the server has it; with ``metadata.resourceVersion`` only that version.

        Raises:
            RefusedError: the server says no; with CONFLICT where it is another version.
            ClusterError: it cannot be reached, or answers something else.
        """
        metadata = body["metadata"]
        path = _path(resource, metadata.get("namespace", ""), metadata["name"])
        return self._write("PUT", path, {}, {**body, "apiVersion": resource.api_version}, "application/json")

    def delete(self, resource: Resource, namespace: str, name: str, *, uid: str) -> None:
        """That very object is gone, or going; another of its name stays.

        Raises:
            RefusedError: the server says no; with CONFLICT where another has its name.
            ClusterError: it cannot be reached, or answers something else.
        """
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": uid}}
        try:
            self._write("DELETE", _path(resource, namespace, name), {}, options, "application/json")
        except RefusedError as refused:
            if refused.code != NOT_FOUND:
                raise

    def apply(
        self,
        resource: Resource,
        body: Mapping[str, Any],
        *,
        dry_run: bool = False,
        status: bool = False,
        force: bool = False,
        manager: str = FIELD_MANAGER,
    ) -> Mapping[str, Any]:
        """The object exists and is what ``body`` says; what others say of it stays.

        Args:
            dry_run: Only have the server say what it would.
            status: Write its status alone; an object that is not there is not made.
            force: What ``body`` says is taken over from whoever else said it.
            manager: Under whose name; what the same one said before and does not say now is taken back.

        Raises:
            RefusedError: the server says no; with CONFLICT where somebody else says otherwise.
            ClusterError: it cannot be reached, or answers something else.

        Spec: Kubernetes, "Server-Side Apply".
        """
        metadata = body["metadata"]
        path = _path(resource, metadata.get("namespace", ""), metadata["name"]) + ("/status" if status else "")
        query = {"fieldManager": manager, "fieldValidation": "Strict"}
        query |= ({"dryRun": "All"} if dry_run else {}) | ({"force": "true"} if force else {})
        text = json.dumps({**body, "apiVersion": resource.api_version})  # JSON is YAML
        return self._write("PATCH", path, query, text, "application/apply-patch+yaml")

    def patch(self, path: str, patch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The object at a path with ``patch`` merged into it; see ``merge``."""
        return self._write("PATCH", path, {}, patch, "application/merge-patch+json")

    def post(self, path: str, body: Mapping[str, Any], answer_s: float = TIMEOUT_S[1]) -> Mapping[str, Any]:
        """What the server makes of ``body``: the object it creates, or its answer to a review.

        Args:
            answer_s: how long the server may say nothing.

        Raises:
            RefusedError: the server says no; with CONFLICT where the object is there already.
            ClusterError: it cannot be reached, or answers something else.
        """
        request = self._request("POST", path, {}, body, "application/json")
        return self._answer(path, request, (TIMEOUT_S[0], answer_s))

    def _write(
        self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | str, content_type: str
    ) -> Mapping[str, Any]:
        bounded = {**query, "timeout": f"{WRITE_S}s"}
        return self._answer(path, self._request(method, path, bounded, body, content_type), _WRITE_TIMEOUT_S)

    def _answer(self, path: str, request: _Request, timeout_s: tuple[float, float] | None = None) -> Mapping[str, Any]:
        from urllib3.exceptions import HTTPError

        try:
            response = self._open(request, timeout_s or TIMEOUT_S)
            content = response.read(MAX_PAGE_BYTES + 1, decode_content=True)
            response.release_conn()
        except (HTTPError, OSError) as error:
            raise self._unreachable(error) from error
        if len(content) > MAX_PAGE_BYTES:
            raise ClusterError(f"an answer of more than {MAX_PAGE_BYTES} bytes to {path}", where=self.where)
        if response.status not in (OK, CREATED, ACCEPTED):
            raise RefusedError(response.status, _message(content))
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self.strange(f"the answer to {path} is no JSON object")
        return answer

    def _lines(self, path: str, query: Mapping[str, str], timeout_s: int) -> Iterator[bytes]:
        from urllib3.exceptions import HTTPError

        try:
            # the server ends the watch by itself; one that says nothing for longer is gone
            response = self._open(self._request("GET", path, query), (TIMEOUT_S[0], timeout_s + TIMEOUT_S[1]))
            if response.status != OK:
                raise RefusedError(response.status, _message(response.read(MAX_EVENT_BYTES, decode_content=True)))
            pending = b""
            try:
                for piece in response.stream(1 << 16, decode_content=True):
                    *whole, pending = (pending + piece).split(b"\n")
                    if len(pending) > MAX_EVENT_BYTES:
                        raise ClusterError(f"an event of more than {MAX_EVENT_BYTES} bytes", where=self.where)
                    yield from (line for line in whole if line.strip())
            finally:
                response.close()
        except (HTTPError, OSError) as error:
            raise self._unreachable(error) from error

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | str | None = None,
        content_type: str = "",
    ) -> _Request:
        headers = {"Accept": "application/json"} | ({"Content-Type": content_type} if body else {})
        return self._client.param_serialize(
            method, path, query_params=list(query.items()), header_params=headers, body=body,
            auth_settings=["BearerToken"],
        )  # fmt: skip

    def _open(self, request: _Request, timeout_s: tuple[float, float]) -> Any:
        return self._client.call_api(*request, _request_timeout=timeout_s).response

    def _unreachable(self, error: BaseException) -> ClusterError:
        fix = "is it running, and is its address in the kubeconfig right? With -f no cluster is needed"
        return ClusterError(f"cannot be reached: {_cause(error)}", where=self.where, fix=fix)

    def strange(self, what: str) -> ClusterError:
        """The server answers what no API server would."""
        return ClusterError(what, where=self.where, fix="is this a Kubernetes API server?")

    def error(self, refused: RefusedError) -> ClusterError:
        """A refusal as a person reads it."""
        what, fix = f"answers {refused.code}: {refused.message}", "try again"
        if refused.code == UNAUTHORIZED:
            what, fix = "does not accept the credentials", "log in again, or choose another --context"
        return ClusterError(what, where=self.where, fix=fix)


def _path(resource: Resource, namespace: str, name: str) -> str:
    return f"{resource.path(namespace)}/{quote(name, safe='')}"


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
