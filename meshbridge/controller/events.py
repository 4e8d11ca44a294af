"""Events on objects that are not ours: why a policy is refused, which pod is not enforced or has a ghost bypass.

One Event for each object and reason, under a name that follows from both: whoever leads finds it and counts it up. It
is written when what it says changes, and again before the API server forgets it (after an hour) for as long as it
holds; never because the cluster was looked at again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

from meshbridge.bypass.export import MANAGED_BY
from meshbridge.controller.picture import Picture
from meshbridge.controller.writer import Outbox
from meshbridge.kube.api import Api, Resource
from meshbridge.kube.problems import Problem, ProblemReason
from meshbridge.policy.model import Document
from meshbridge.xds.nodereport import CAPTURED, ENFORCED, PROVED, ConditionStatus

EVENTS: Final = Resource("", "v1", "events", "Event", True)
COMPONENT: Final = "meshbridge-controller"
MAX_MESSAGE: Final = 1_024
MAX_NAME: Final = 200
AGAIN_S: Final = 1_800.0
"""A quarter of an hour and more before the server's default of an hour is over."""
PATIENCE_S: Final = 10.0
"""A pod that is just starting may not be hooked yet, and two writings of one Event are at least this far apart."""
PER_LOOK: Final = 50
OUR_GROUP: Final = "meshbridge.io"
"""Our own kinds have conditions."""

_OF_PROBLEMS: Final[Mapping[ProblemReason, str]] = {
    ProblemReason.REFUSED: "Refused", ProblemReason.CONFLICT: "Conflict", ProblemReason.NOTICE: "HardlyMeant",
}  # fmt: skip
_OF_CONDITIONS: Final = {ENFORCED: "NotEnforced", CAPTURED: "GhostBypass", PROVED: "ProofFailed"}


@dataclass(frozen=True, slots=True)
class Regarding:
    """The object an Event is on."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Notice:
    """What is to be said on an object; of each reason one thing. ``patient``: it may be over in a moment."""

    regarding: Regarding
    reason: str
    message: str
    patient: bool = False

    @property
    def name(self) -> str:
        """Of its Event: the same for the same object and reason."""
        about = self.regarding
        key = "\0".join((about.api_version, about.kind, about.namespace, about.name, about.uid, self.reason))
        return f"{about.name[:MAX_NAME]}.{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"

    @property
    def namespace(self) -> str:
        return self.regarding.namespace or "default"


def notices(picture: Picture) -> Iterator[Notice]:
    """Everything to be said, each once."""
    for key, problems in picture.problems.items():
        documents = picture.documents.get(key, ())
        if documents and documents[0].uid and key[0] != OUR_GROUP:
            yield from _of_object(documents[0], problems)
    for pod in picture.enforced:
        report = picture.reports.get(pod.node)
        for condition in report.conditions.get(pod.uid, ()) if report is not None and pod.uid else ():
            if condition.status is ConditionStatus.FALSE and condition.type in _OF_CONDITIONS:
                about = Regarding("v1", "Pod", pod.namespace, pod.name, pod.uid)
                text = _cut(condition.message or condition.reason)
                yield Notice(about, _OF_CONDITIONS[condition.type], text, condition.type == ENFORCED)


def _of_object(document: Document, problems: Iterable[Problem]) -> Iterator[Notice]:
    about = Regarding(document.api_version, document.kind, document.namespace, document.name, document.uid)
    texts: dict[str, list[str]] = {}
    for problem in problems:
        if problem.reason in _OF_PROBLEMS:
            texts.setdefault(_OF_PROBLEMS[problem.reason], []).append(problem.text)
    for reason, found in texts.items():
        yield Notice(about, reason, _cut("; ".join(sorted(set(found)))))


@dataclass(frozen=True, slots=True)
class _Written:
    message: str
    count: int
    at_s: float


class Events:
    """Brings the Events to what is to be said.

    Cost: at first one read and one write for each notice, ``PER_LOOK`` of them at a time; later a write for a change,
    and one every half hour.
    """

    def __init__(
        self,
        api: Api,
        instance: str,
        clock: Callable[[], float] = time.monotonic,
        more: Callable[[], Iterable[Notice]] = tuple,
    ) -> None:
        """
        Args:
            more: what else is to be said.
        """
        self._api, self._instance, self._clock, self._more = api, instance, clock, more
        self._written: dict[str, _Written] = {}
        self._since: dict[str, float] = {}
        self._tried: dict[str, float] = {}

    def write(self, picture: Picture, out: Outbox, now: datetime) -> None:
        """Everything to be said stands in an Event."""
        wanted = {notice.name: notice for notice in (*notices(picture), *self._more())}
        clock_s = self._clock()
        self._written = {name: written for name, written in self._written.items() if name in wanted}
        self._since = {name: self._since.get(name, clock_s) for name in wanted}
        self._tried = {name: tried_s for name, tried_s in self._tried.items() if name in wanted}
        due = [notice for name, notice in wanted.items() if self._is_due(name, notice, clock_s)]
        due.sort(key=lambda notice: self._tried.get(notice.name, 0.0))  # one that is refused keeps no other waiting
        for notice in due[:PER_LOOK]:
            self._tried[notice.name] = clock_s
            self._tell(notice, out, now)
        out.unfinished |= len(due) > PER_LOOK

    def _is_due(self, name: str, notice: Notice, clock_s: float) -> bool:
        written = self._written.get(name)
        if written is None:
            return not notice.patient or clock_s - self._since[name] >= PATIENCE_S
        age_s = clock_s - written.at_s
        return age_s >= AGAIN_S or (written.message != notice.message and age_s >= PATIENCE_S)

    def _tell(self, notice: Notice, out: Outbox, now: datetime) -> None:
        stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        known = self._written.get(notice.name)
        count = known.count if known is not None else 0
        present = None
        if known is None:
            look = partial(self._api.read, EVENTS, notice.namespace, notice.name)
            present = out.read("get events", look, str(notice.regarding))
        if present is not None:
            count = present["count"] if isinstance(present.get("count"), int) else 1
            if present.get("message") == notice.message and _age_s(present, now) < AGAIN_S:
                self._written[notice.name] = _Written(notice.message, count, self._clock() - _age_s(present, now))
                return
        if count:
            body = {"count": count + 1, "lastTimestamp": stamp, "message": notice.message}
            act = partial(self._api.merge, EVENTS, notice.namespace, notice.name, body)
        else:
            act = partial(self._api.create, EVENTS, self._event(notice, stamp))
        done = out.write("patch events" if count else "create events", act, str(notice.regarding))
        if done is not None:
            self._written[notice.name] = _Written(notice.message, count + 1, self._clock())
        else:
            self._written.pop(notice.name, None)  # the server may have forgotten it: looked up the next time

    def _event(self, notice: Notice, stamp: str) -> dict[str, Any]:
        about = notice.regarding
        return {
            "kind": "Event",
            "metadata": {"name": notice.name, "namespace": notice.namespace, "labels": dict(MANAGED_BY)},
            "involvedObject": {
                "apiVersion": about.api_version, "kind": about.kind, "namespace": about.namespace, "name": about.name,
                "uid": about.uid,
            },
            "reason": notice.reason,
            "message": notice.message,
            "type": "Warning",
            "count": 1,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "source": {"component": COMPONENT},
            "reportingComponent": COMPONENT,
            "reportingInstance": self._instance[:128],
        }  # fmt: skip


def _age_s(event: Mapping[str, Any], now: datetime) -> float:
    """Since it was written last, by the clock of whoever did; clocks may differ."""
    try:
        age_s = (now - datetime.fromisoformat(str(event.get("lastTimestamp")))).total_seconds()
    except (ValueError, TypeError):
        return AGAIN_S
    return max(age_s, 0.0)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 1]}…"
