"""Follow an API server: every kind that is read, listed and then watched, each by a thread of its own.

What is known stays in force while a kind cannot be read: a list or a watch that fails is tried again, later each time,
and is a problem until it succeeds. Nothing is told before every kind was listed once or is known to be absent, since a
policy that is not seen looks like none.

Cost: one thread and one connection for each kind; a change costs its event, a lost watch one list of its kind.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import structlog

from meshbridge.errors import MeshBridgeError
from meshbridge.kube.api import FORBIDDEN, GONE, NOT_FOUND, Api, RefusedError, Resource
from meshbridge.kube.manifests import Changes, Key
from meshbridge.kube.objects import MESH_CONFIG, POLICY_KINDS, STATE_KINDS
from meshbridge.kube.problems import Problem, ProblemReason
from meshbridge.policy.cilium import CONFIG_NAME, CONFIG_NAMESPACE
from meshbridge.policy.model import Document

log = structlog.get_logger()

SETTLE_S: Final = 0.004  # objects that change together are taken in together
WATCH_S: Final = 300
ABSENT_AGAIN_S: Final = 10.0  # how soon a definition that is installed later is noticed
BRIEF_S: Final = 1.0  # a list or a watch that the server ends sooner is not begun anew at once
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.25, 30.0

_OF_TEMPLATES: Final = frozenset({"apps", "batch"})
"""In a cluster the pods made from templates are there."""


class Follower:
    """The objects of a cluster, kept up to date; ``documents`` is what was told last.

    Only ``kinds`` are followed, and those that are ``optional``: while one of these cannot be read, there are none.
    """

    def __init__(
        self,
        api: Api,
        istio_namespace: str,
        kinds: Set[tuple[str, str]] = POLICY_KINDS | STATE_KINDS,
        optional: Set[tuple[str, str]] = frozenset(),
    ) -> None:
        self._api = api
        configs = [(istio_namespace, MESH_CONFIG), (CONFIG_NAMESPACE, CONFIG_NAME)]
        self._kinds = [
            _Kind(group, kind, namespace, name, (group, kind) in optional)
            for group, kind in sorted(kinds | optional)
            if group not in _OF_TEMPLATES
            for namespace, name in (configs if (group, kind) == ("", "ConfigMap") else [("", "")])
        ]
        self.documents: dict[Key, tuple[Document, ...]] = {}
        self._lock = threading.Lock()
        self._pending: dict[Key, tuple[Document, ...]] = {}
        self._problems: dict[tuple[str, str, str], Problem] = {}
        self._stop = threading.Event()
        self._news: Callable[[], None] = lambda: None

    @property
    def problems(self) -> frozenset[Problem]:
        """The kinds that cannot be read just now, and why."""
        with self._lock:
            return frozenset(self._problems.values())

    @property
    def synced(self) -> bool:
        return all(kind.synced for kind in self._kinds)

    async def changes(self) -> AsyncIterator[Changes]:
        """Yield everything there is once all of it is known, then again after every change or problem.

        Before that, what is yielded is not complete, and empty.
        """
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def news() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(woken.set)

        self._news = news
        for kind in self._kinds:
            threading.Thread(target=self._follow, args=(kind,), name=f"follow-{kind}", daemon=True).start()
        try:
            while True:
                await woken.wait()
                await asyncio.sleep(SETTLE_S)
                woken.clear()
                yield Changes(self._take()) if self.synced else Changes(complete=False)
        finally:
            self._stop.set()  # threads that wait for an event end with the process, or when their watch does

    def _take(self) -> Mapping[Key, tuple[Document, ...]]:
        with self._lock:
            taken, self._pending = self._pending, {}
        for key, documents in taken.items():
            if documents:
                self.documents[key] = documents
            else:
                self.documents.pop(key, None)
        return taken

    def _follow(self, kind: _Kind) -> None:
        failures = 0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._follow_once(kind)
                failures = _in_a_row(failures, began)
                if failures > 1:
                    self._stop.wait(_backoff_s(failures))
            except _Absent:
                self._absent(kind)
                self._stop.wait(ABSENT_AGAIN_S)
            except MeshBridgeError as error:
                failures += 1
                self._report(kind, error)
                self._stop.wait(_backoff_s(failures))
            except Exception as error:  # whatever it is, the kind has to be followed on
                failures += 1
                log.exception("kind.not_followed", kind=str(kind))
                self._report(kind, MeshBridgeError(f"cannot be followed: {error}", where=str(kind)))
                self._stop.wait(_backoff_s(failures))

    def _follow_once(self, kind: _Kind) -> None:
        """List, then watch until the server has forgotten where we are."""
        if not kind.synced:
            self._api.check_ready()  # one that has just started may not know its kinds
        found = self._api.discover({(kind.group, kind.kind)})
        if not found:
            raise _Absent
        try:
            version = self._list(kind, found[0])
            self._resolve(kind)
            brief = 0
            while not self._stop.is_set():
                began = time.monotonic()
                version = self._watch(kind, found[0], version)
                brief = _in_a_row(brief, began)
                if brief:
                    self._stop.wait(_backoff_s(brief))
        except RefusedError as refused:
            if refused.code == GONE:
                return  # listed anew
            if refused.code == NOT_FOUND:
                raise _Absent from None
            raise self._refusal(kind, found[0], refused) from None

    def _absent(self, kind: _Kind) -> None:
        """A definition goes after its objects were deleted one by one; a server that has just started may know none."""
        if kind.keys:
            what = f"is not known to the cluster any more, although {len(kind.keys)} objects of it were not deleted"
            self._report(kind, MeshBridgeError(what, where=str(kind), fix="look whether its definition is there"))
        else:
            self._replace(kind, {})
            self._resolve(kind)

    def _list(self, kind: _Kind, resource: Resource) -> str:
        documents: dict[Key, Document] = {}
        version = ""
        for page in self._api.pages(resource, kind.namespace, kind.name):
            documents.update((document.key, document) for document in page.documents)
            version = page.version
        self._replace(kind, documents)
        return version

    def _watch(self, kind: _Kind, resource: Resource, version: str) -> str:
        for event in self._api.events(resource, version, WATCH_S, kind.namespace, kind.name):
            if event.document is not None:
                self._put(kind, event.document, deleted=event.deleted)
            version = event.version or version
            if self._stop.is_set():
                break
        return version

    def _replace(self, kind: _Kind, documents: Mapping[Key, Document]) -> None:
        with self._lock:
            for key in kind.keys - documents.keys():
                self._pending[key] = ()
            self._pending.update((key, (document,)) for key, document in documents.items())
            kind.keys = set(documents)
            kind.synced = True
        self._news()

    def _put(self, kind: _Kind, document: Document, *, deleted: bool) -> None:
        with self._lock:
            self._pending[document.key] = () if deleted else (document,)
            (kind.keys.discard if deleted else kind.keys.add)(document.key)
        self._news()

    def _refusal(self, kind: _Kind, resource: Resource, refused: RefusedError) -> MeshBridgeError:
        if refused.code != FORBIDDEN:
            return self._api.error(refused)
        return MeshBridgeError(
            f"may not be listed and watched: {refused.message}", where=resource.name,
            fix="give the controller's role the verbs list and watch on it",
        )  # fmt: skip

    def _report(self, kind: _Kind, error: MeshBridgeError) -> None:
        problem = Problem(ProblemReason.UNREADABLE, f"{error}; what was read of it before stays in force")
        with self._lock:
            known = self._problems.get(kind.key)
            self._problems[kind.key] = problem
        if kind.optional and not kind.synced:
            self._replace(kind, {})
        if known != problem:
            log.warning("kind.unreadable", kind=str(kind), reason=str(error))
            self._news()

    def _resolve(self, kind: _Kind) -> None:
        with self._lock:
            known = self._problems.pop(kind.key, None)
        if known is not None:
            log.info("kind.readable", kind=str(kind))
            self._news()


class _Absent(Exception):
    """The cluster does not know the kind."""


@dataclass(slots=True)
class _Kind:
    group: str
    kind: str
    namespace: str = ""
    name: str = ""
    """The only object that is read of the kind; empty: all."""
    optional: bool = False
    keys: set[Key] = field(default_factory=set)
    synced: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.group, self.kind, self.name

    def __str__(self) -> str:
        kind = f"{self.kind}.{self.group}" if self.group else self.kind
        return f"{kind} {self.namespace}/{self.name}" if self.name else kind


def _in_a_row(before: int, began: float) -> int:
    """How often something has now ended soon after it began; whoever asks again at once would ask for ever."""
    return before + 1 if time.monotonic() - began < BRIEF_S else 0


def _backoff_s(failures: int) -> float:
    """Later each time, and not all at the same moment."""
    longest = min(MAX_BACKOFF_S, MIN_BACKOFF_S * float(1 << min(failures, 10)))
    return longest * random.uniform(0.5, 1.0)
