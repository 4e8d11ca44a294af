"""Processes of this node's pods that send as if they were the pods' proxies, looked for again and again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog

from meshbridge.bypass.owners import (
    NO_IMPOSTORS,
    Impostor,
    Impostors,
    Process,
    ProxyOwner,
    borrowed,
    named,
    proxy_processes,
)
from meshbridge.datapath.processes import (
    HeldProcess,
    Listener,
    held,
    listeners,
    own_container,
    processes_in,
    translated,
)
from meshbridge.datapath.redirect import NamespaceError, in_namespace, namespace_inode

log = structlog.get_logger()

REST: Final = 20
MAX_REST_S: Final = 6.0
"""With a look at the redirect rules every two seconds and the look itself: within the ten in which one is told."""
MAX_DESCRIPTORS: Final = 4096
"""Descriptors that are looked at in each pod, in its processes that are not the proxy."""


@dataclass(frozen=True, slots=True)
class PodProcesses:
    """What a look at a pod's processes found.

    ``proxy_cgroups`` are those that made the listening sockets of its proxy, empty where that is not known, or where
    control groups do not tell containers apart. ``problem`` says why nothing is known.
    """

    impostors: Impostors = NO_IMPOSTORS
    proxy_cgroups: frozenset[int] = frozenset()
    problem: str = ""


@dataclass(slots=True)
class Processes:
    """Belongs to one thread, in the node's network namespace.

    A look costs a ``stat`` for each process of the node and some more for those of the pods. It is not repeated before
    twenty times as long as it took, but for ``MAX_REST_S``, so that it never takes more than a twentieth of a core.
    """

    looked_ns: int = 0
    """When the last look began."""
    _again_s: float = 0.0
    _found: Mapping[str, PodProcesses] = field(default_factory=dict)
    _containers: dict[str, str] = field(default_factory=dict)
    """In which container each pod's proxy was seen, by UID."""

    def look(self, pods: Mapping[str, tuple[str, ProxyOwner]]) -> dict[str, PodProcesses]:
        """Look at the processes of these pods as they are now.

        Args:
            pods: By UID the path of its network namespace, and whose packets its rules leave alone. Those of which
                nothing is known yet, as before their proxy listens, are missing in the answer.
        """
        began_s = time.monotonic()
        if began_s >= self._again_s:
            self.looked_ns = time.time_ns()
            self._found = self._look(pods)
            now_s = time.monotonic()
            self._again_s = now_s + min(MAX_REST_S, REST * (now_s - began_s))
        return {uid: found for uid, found in self._found.items() if uid in pods}

    def _look(self, pods: Mapping[str, tuple[str, ProxyOwner]]) -> dict[str, PodProcesses]:
        for uid in self._containers.keys() - pods.keys():
            del self._containers[uid]
        listening: dict[str, list[Listener]] = {}
        inodes: dict[str, int] = {}
        for uid, (path, owner) in pods.items():
            try:
                inodes[uid] = namespace_inode(path)
                listening[uid] = in_namespace(path, partial(listeners, owner.ports))
            except (NamespaceError, OSError) as error:
                log.debug("processes.not_read", uid=uid, reason=str(error))
        running = processes_in(frozenset(inodes[uid] for uid, sockets in listening.items() if sockets))
        own = own_container()
        found: dict[str, PodProcesses] = {}
        for uid, sockets in listening.items():
            if sockets:
                pod = _Pod(inodes[uid], running.get(inodes[uid], []), pods[uid][1], sockets, own)
                found[uid], self._containers[uid] = pod.look(self._containers.get(uid, ""))
            elif before := self._found.get(uid):
                found[uid] = PodProcesses(_still_running(before.impostors, inodes[uid]))
        return found


def _still_running(impostors: Impostors, namespace: int) -> Impostors:
    """Those that are still there: while the proxy itself is away nobody else can be told from it."""
    running = []
    for impostor in impostors.named:
        with held(impostor.pid, namespace) as process:
            now = process.process("") if process is not None else None
            if now is not None and now.started == impostor.started:
                running.append(impostor)
    return named(running)


@dataclass(slots=True)
class _Pod:
    """One pod while it is looked at."""

    inode: int
    pids: list[int]
    owner: ProxyOwner
    listening: list[Listener]
    own: str

    def look(self, last: str) -> tuple[PodProcesses, str]:
        holding = self._holders()
        if not holding:
            return PodProcesses(
                problem="no process that holds its Envoy's listening sockets is visible, so who else runs as its user "
                "is not known: run the agent in the node's PID namespace (hostPID)"
            ), last
        suspects = dict(self._suspects(holding))
        proxy, container = proxy_processes(suspects, holding.keys(), last)
        found = [
            Impostor(process.pid, process.started, process.command, *which)
            for process in suspects.values()
            if process.pid not in proxy and (which := borrowed(self.owner, process.uids, process.gids))
        ]
        told = {impostor.pid for impostor in found}
        found += self._by_socket(proxy | told, container)
        cgroups = {one.cgroup for pid in holding.keys() & proxy for one in holding[pid]} if container else set()
        return PodProcesses(named(found), frozenset(cgroups) - {0}), container

    def _holders(self) -> dict[int, list[Listener]]:
        """Who holds the listening sockets: looked for among those that may, the oldest first, until all are found."""
        missing = {listener.inode: listener for listener in self.listening}
        found: dict[int, list[Listener]] = {}
        for process in self._each():
            if not missing:
                break
            for owned in process.descriptors():
                listener = missing.pop(owned.inode, None) if owned is not None else None
                if listener is not None:
                    found.setdefault(process.pid, []).append(listener)
                    if not missing:
                        break
        return found

    def _each(self) -> Iterator[HeldProcess]:
        for pid in sorted(self.pids):
            with held(pid, self.inode) as process:
                if process is not None:
                    yield process

    def _suspects(self, holding: Mapping[int, list[Listener]]) -> Iterator[tuple[int, Process]]:
        """The holders, and everybody with an id of the proxy's, which are counted as the holders count them."""
        mapped = False
        for pid in (*sorted(holding), *(pid for pid in self.pids if pid not in holding)):
            with held(pid, self.inode) as process:
                if process is None or (ids := process.ids()) is None:
                    continue
                if pid in holding and not mapped:
                    self.owner, mapped = _seen_from_here(self.owner, process), True
                if pid in holding or borrowed(self.owner, *ids[:2]):
                    whole = process.process(self.own)
                    if whole is not None:
                        yield pid, whole

    def _by_socket(self, known: frozenset[int] | set[int], container: str) -> Iterator[Impostor]:
        """Whoever else holds a socket that was made as the proxy, as by a process that was it for a moment."""
        left = MAX_DESCRIPTORS
        for process in self._each():
            if process.pid in known:
                continue
            if left <= 0:
                return
            for owned in process.descriptors(left):
                left -= 1
                which = borrowed(self.owner, (owned.uid,), (owned.gid,)) if owned is not None else None
                if owned is not None and which is not None and process.sends_by(owned.inode):
                    whole = process.process(self.own)
                    if whole is not None and not (container and whole.container == container):
                        yield Impostor(whole.pid, whole.started, whole.command, *which, by_socket=True)
                    break


def _seen_from_here(owner: ProxyOwner, holder: HeldProcess) -> ProxyOwner:
    """The ids of the pod's user namespace as the node counts them; the rules mean those of the pod's."""
    return ProxyOwner(
        translated(owner.uids, holder.map_of("uid")), translated(owner.gids, holder.map_of("gid")), owner.ports
    )
