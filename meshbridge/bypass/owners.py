"""Processes that run as the proxy's user and are not the proxy: what they send goes past Envoy without any rule.

The redirect rules let go what a socket of the proxy's user or group sends (``-m owner``), and anybody may be that user.
Who the proxy is follows from who holds the listening sockets that the rules redirect to, and from who shares its
container; never from a name.

Spec: ISTIO.md §c, the rules of ISTIO_OUTPUT; net/netfilter/xt_owner.c: the ids a socket was made with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.classify import owner_numbers
from meshbridge.bypass.expected import expected_redirection
from meshbridge.bypass.state import CaptureState, Route, RouteKind, Span
from meshbridge.identity.model import ProxyClass, Workload
from meshbridge.policy.capture import PortClass
from meshbridge.policy.model import Direction

MAX_IMPOSTORS: Final = 8
"""Of one pod that are told one by one."""


@dataclass(frozen=True, slots=True)
class ProxyOwner:
    """Whose packets the rules of a pod leave alone, and the ports they redirect everybody else's to."""

    uids: frozenset[int]
    gids: frozenset[int]
    ports: frozenset[int]


@dataclass(frozen=True, slots=True)
class Process:
    """A process in a pod's network namespace. ``started`` tells it from another of the same number.

    ``uids`` and ``gids`` are the real, effective, saved and filesystem ones: it may take on any of the first three
    without asking. Supplementary groups are not among them, since the rules do not look at those. ``container`` is what
    its control groups are called; empty: they do not tell containers apart here.
    """

    pid: int
    parent: int
    started: int
    command: str
    uids: frozenset[int]
    gids: frozenset[int]
    container: str = ""


@dataclass(frozen=True, slots=True)
class Impostor:
    """A process that is not the proxy and sends as if it were: by its own ids, or by a socket that was made with them.

    ``what`` is ``uid`` or ``gid``.
    """

    pid: int
    started: int
    command: str
    what: str
    number: int
    by_socket: bool = False

    def __str__(self) -> str:
        how = "holds a socket of" if self.by_socket else "runs as"
        return f"process {self.pid} ({self.command}) {how} {self.what} {self.number}"


@dataclass(frozen=True, slots=True)
class Impostors:
    """Those of one pod, the oldest first; ``more`` are not named."""

    named: tuple[Impostor, ...] = ()
    more: int = 0

    def __bool__(self) -> bool:
        return bool(self.named)

    def routes(self) -> tuple[Route, ...]:
        """One for each that is named, the last one with how many are not."""
        texts = [str(impostor) for impostor in self.named]
        if self.more:
            texts[-1] += f"; {self.more} more are not named"
        return tuple(Route(RouteKind.PROXY_OWNER, text) for text in texts)


NO_IMPOSTORS: Final = Impostors()


def proxy_owner(workload: Workload) -> ProxyOwner | None:
    """Whose packets a pod's rules leave alone; None without a sidecar, or where nothing is redirected to it."""
    if workload.proxy is not ProxyClass.SIDECAR:
        return None
    config = expected_redirection(workload, MeshDefaults()).config
    if config is None:
        return None
    ports = {15001, 15006, *owner_numbers((config.proxy_port, config.inbound_port))}
    return ProxyOwner(
        frozenset(owner_numbers(config.uids)), frozenset(owner_numbers(config.gids)), frozenset(p for p in ports if p)
    )


def borrowed(owner: ProxyOwner, uids: Collection[int], gids: Collection[int]) -> tuple[str, int] | None:
    """The first of these ids that is the proxy's: ``uid`` or ``gid``, and the number."""
    for what, held, own in (("uid", uids, owner.uids), ("gid", gids, owner.gids)):
        if found := own.intersection(held):
            return what, min(found)
    return None


def proxy_processes(
    known: Mapping[int, Process], holders: Collection[int], last: str = ""
) -> tuple[frozenset[int], str]:
    """The numbers of those processes that are the proxy, and the container that they are in.

    With containers that can be told apart it is all of the container that has held a capture port for longest; once
    known (``last``) it stays the one while it holds any, so that nobody takes over by listening there as well. Without,
    it is whoever holds one, with their children and those that started them.

    Args:
        known: Those with an id of the proxy's, and the holders, by number; who is not among them ends a line.
        holders: Those that hold a listening socket on a capture port.
    """
    holding = sorted((known[pid] for pid in holders if pid in known), key=lambda held: (held.started, held.pid))
    if not holding:
        return frozenset(), last
    containers = [held.container for held in holding if held.container]
    if containers:
        container = last if last in containers else containers[0]
        return frozenset(pid for pid, process in known.items() if process.container == container), container
    found = {held.pid for held in holding}
    for held in holding:
        found |= set(_ancestors(known, held))
    grown = True
    while grown:
        children = {pid for pid, process in known.items() if process.parent in found} - found
        found |= children
        grown = bool(children)
    return frozenset(found), ""


def _ancestors(known: Mapping[int, Process], process: Process) -> Iterable[int]:
    seen: set[int] = set()
    while (parent := known.get(process.parent)) is not None and parent.pid not in seen:
        seen.add(parent.pid)
        process = parent
    return seen


def named(found: Iterable[Impostor]) -> Impostors:
    """These, once each, as they are told."""
    every = sorted({one.pid: one for one in found}.values(), key=lambda one: (one.started, one.pid))
    return Impostors(tuple(every[:MAX_IMPOSTORS]), max(0, len(every) - MAX_IMPOSTORS))


def with_impostors(state: CaptureState, found: Impostors) -> CaptureState:
    """The same pod, where what its proxy's user sends counts as bypassing Envoy: somebody else sends it too."""
    if not found:
        return state
    more = len(found.named) - 1 + found.more
    text = str(found.named[0]) + (f", and {more} more" if more else "")
    route = Route(RouteKind.PROXY_OWNER, text)
    return replace(state, spans=tuple(_told(span, route) for span in state.spans))


def _told(span: Span, route: Route) -> Span:
    of_proxy = span.direction is Direction.EGRESS and span.route.kind is RouteKind.PROXY_OWNER
    if not of_proxy or span.port_class is not PortClass.UNGUARDED:
        return span
    return replace(span, port_class=PortClass.EXCLUDED, route=route)
