"""What audited compensation would have dropped: new connections by pod, port and peer, since the agent started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from meshbridge.observe.flow import Flow, FlowPeer
from meshbridge.policy.model import Direction, Origin

MAX_ROWS: Final = 1024
_Row = tuple[str, Direction, int, str]
_OTHERS: Final[_Row] = ("", Direction.INGRESS, 0, "")
"""Where everything is counted for which there is no row left."""


@dataclass(slots=True)
class _Count:
    flows: int = 0
    last_ns: int = 0
    origins: tuple[Origin, ...] = ()


@dataclass(slots=True)
class AuditCounts:
    """Belongs to the event loop's thread. What the kernel could not tell of is not counted: it was at least so many."""

    total: int = 0
    _counts: dict[_Row, _Count] = field(default_factory=dict)

    def add(self, flow: Flow) -> None:
        """Count a new connection that was let through by audit alone; one judged again was there before."""
        if not flow.audit or flow.rejudged:
            return
        inbound = flow.direction is Direction.INGRESS
        pod, peer = (flow.destination, flow.source) if inbound else (flow.source, flow.destination)
        row = (_name(pod), flow.direction, flow.destination.port, _name(peer))
        if row not in self._counts and len(self._counts) >= MAX_ROWS:
            row = _OTHERS
        count = self._counts.setdefault(row, _Count())
        count.flows += 1
        count.last_ns = max(count.last_ns, flow.time_ns)
        count.origins = flow.rules
        self.total += 1

    def records(self, node: str) -> list[dict[str, Any]]:
        """As JSON has them, of what happened most first; the row without a pod is all that found no other."""
        rows: Iterable[tuple[_Row, _Count]] = sorted(self._counts.items(), key=lambda item: (-item[1].flows, item[0]))
        return [
            {
                "node": node,
                "pod": pod,
                "direction": direction.name.lower(),
                "port": port,
                "peer": peer,
                "flows": count.flows,
                "last_unix_ns": count.last_ns,
                "origins": [origin.record() for origin in count.origins],
            }
            for (pod, direction, port, peer), count in rows
        ]


def _name(peer: FlowPeer) -> str:
    return f"{peer.namespace}/{peer.pod}" if peer.pod else str(peer.address)
