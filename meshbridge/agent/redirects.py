"""The redirect rules of this node's pods, as they really are in the pods' network namespaces.

A pod whose namespace is not found or cannot be read has no rules that were seen, so nothing of it counts as captured,
and it is said why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import structlog

from meshbridge.agent.processes import PodProcesses
from meshbridge.bypass.rules import SeenRules
from meshbridge.datapath.links import Link
from meshbridge.datapath.redirect import NamespaceError, RedirectReader, find_namespaces, namespace_number

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Seen:
    """The rules of pods by UID, why those of a pod were not seen, and the paths of their network namespaces.

    ``processes``: what was found in there.
    """

    rules: Mapping[str, SeenRules] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    namespaces: Mapping[str, str] = field(default_factory=dict)
    processes: Mapping[str, PodProcesses] = field(default_factory=dict)


@dataclass(slots=True)
class Redirects:
    """The rules last seen of each pod, by UID; ``problems`` says why those of a pod were not.

    Everything here blocks and belongs to one thread, in the node's network namespace.
    """

    seen: dict[str, SeenRules] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    _reader: RedirectReader = field(default_factory=RedirectReader)
    _announced: dict[str, str] = field(default_factory=dict)
    _paths: dict[str, str] = field(default_factory=dict)

    def announce(self, uid: str, netns: str) -> None:
        """A CNI plugin says where the pod's namespace is; believed only if the pod's interface leads there."""
        self._announced[uid] = netns

    def look(self, interfaces: Mapping[str, Iterable[Link]]) -> Seen:
        """Read the rules of these pods as they are now.

        Args:
            interfaces: The node's ends of each pod's veths, by UID. Pods that are missing are forgotten.
        """
        told = dict(self.problems)
        for uid in (self.seen.keys() | self.problems.keys() | self._paths.keys()) - interfaces.keys():
            self._forget(uid)
        numbers = {uid: _number(links) for uid, links in interfaces.items()}
        self._locate(numbers)
        for uid in interfaces:
            self._read(uid)
        for uid, problem in self.problems.items():
            if told.get(uid) != problem:
                log.warning("redirects.not_seen", uid=uid, reason=problem)
        return Seen(dict(self.seen), dict(self.problems), dict(self._paths))

    def _locate(self, numbers: Mapping[str, int | None]) -> None:
        """Bring ``_paths`` up to date: a path counts while the pod's interface leads to the namespace behind it."""
        for uid, number in numbers.items():
            path = self._paths.get(uid) or self._announced.get(uid)
            if path is not None and number is not None and _is(path, number):
                self._paths[uid] = path
            elif gone := self._paths.pop(uid, None):
                self._reader.forget(gone)
        lacking = {number for uid, number in numbers.items() if number is not None and uid not in self._paths}
        found = find_namespaces(lacking) if lacking else {}
        for uid, number in numbers.items():
            if number in found and uid not in self._paths:
                self._paths[uid] = found[number]

    def _read(self, uid: str) -> None:
        path = self._paths.get(uid)
        if path is None:
            self.seen.pop(uid, None)
            self.problems[uid] = "its network namespace was not found, so its redirect rules are not known"
            return
        try:
            self.seen[uid] = self._reader.read(path)
            problems = self.seen[uid].problems
        except NamespaceError as error:
            self.seen.pop(uid, None)
            problems = (str(error),)
        if problems:
            self.problems[uid] = f"its redirect rules are not known: {'; '.join(problems)}"
        else:
            self.problems.pop(uid, None)

    def _forget(self, uid: str) -> None:
        if path := self._paths.pop(uid, None):
            self._reader.forget(path)
        for held in (self.seen, self.problems, self._announced):
            held.pop(uid, None)


def _number(links: Iterable[Link]) -> int | None:
    """The namespace that a pod's interfaces lead to; None when they lead nowhere, or to several."""
    numbers = {link.peer_netns for link in links}
    return numbers.pop() if len(numbers) == 1 else None


def _is(path: str, number: int) -> bool:
    try:
        return namespace_number(path) == number
    except (NamespaceError, OSError):
        return False
