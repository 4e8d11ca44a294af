"""Ghost bypasses of this node's pods as they come and go: since when, how many there were, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import structlog

from meshbridge.bypass.ghosts import GhostBypass
from meshbridge.identity.model import IpFamily, Workload
from meshbridge.observe.flow import AgentEvent, Flow, FlowKind, FlowPeer, FlowVerdict
from meshbridge.policy.model import Direction
from meshbridge.protos import observer_pb2 as pb

log = structlog.get_logger()

FOUND, GONE = "ghost-bypass-found", "ghost-bypass-gone"
REASON = "GhostBypass"
STARTING = "Pending"
"""The phase of a pod whose init containers may not have written its rules yet: that is no ghost, and it is closed."""

_FAMILIES = {IpFamily.IPV4: "ipv4", IpFamily.IPV6: "ipv6"}


@dataclass(frozen=True, slots=True)
class _Ghost:
    workload: Workload
    bypass: GhostBypass
    since_ns: int


@dataclass(slots=True)
class Ghosts:
    """By pod UID; ``found`` counts all there ever were. A ghost is the same as long as its ports and its route are."""

    node: str
    found: int = 0
    _known: dict[tuple[str, GhostBypass], _Ghost] = field(default_factory=dict)

    def update(self, now: Mapping[str, tuple[Workload, tuple[GhostBypass, ...]]], time_ns: int) -> list[Flow]:
        """These are the ghost bypasses now; what is to be told of the change."""
        present = {
            (uid, bypass): workload
            for uid, (workload, bypasses) in now.items()
            for bypass in bypasses
            if workload.phase != STARTING
        }
        events = []
        for key in self._known.keys() - present.keys():
            ghost = self._known.pop(key)
            events.append(self._event(GONE, ghost, time_ns))
        for key in present.keys() - self._known.keys():
            ghost = self._known[key] = _Ghost(present[key], key[1], time_ns)
            self.found += 1
            events.append(self._event(FOUND, ghost, time_ns))
        return events

    def pods(self, direction: Direction) -> int:
        """How many pods have one in this direction."""
        return len({uid for uid, bypass in self._known if bypass.direction is direction})

    def condition(self, uid: str) -> pb.Condition | None:
        """What is said of a pod that has any: all of them, and since when it has one."""
        ghosts = [ghost for (of, _), ghost in self._known.items() if of == uid]
        if not ghosts:
            return None
        said = sorted((ghost.bypass.direction, ghost.bypass.family, str(ghost.bypass)) for ghost in ghosts)
        return pb.Condition(
            type="Captured", status=False, reason=REASON, message="; ".join(text for *_, text in said),
            since_unix_ns=min(ghost.since_ns for ghost in ghosts),
        )  # fmt: skip

    def _event(self, name: str, ghost: _Ghost, time_ns: int) -> Flow:
        workload, bypass = ghost.workload, ghost.bypass
        details = {
            "direction": bypass.direction.name.lower(), "family": _FAMILIES[bypass.family], "ports": str(bypass.ports),
            "route": str(bypass.route),
        }  # fmt: skip
        log.warning(name.replace("-bypass-", "_bypass."), pod=workload.key, **details)
        return Flow(
            time_ns, self.node, FlowKind.AGENT, FlowVerdict.NONE, direction=bypass.direction,
            destination=FlowPeer(namespace=workload.namespace, pod=workload.name),
            agent=AgentEvent(name, tuple(details.items())),
        )  # fmt: skip
