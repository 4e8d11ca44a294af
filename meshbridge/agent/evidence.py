"""Packets that show a bypass which the redirect rules do not: who owns the socket of what should be Envoy's alone.

A user id is a hint, since any process may run as the proxy. Where control groups tell containers apart, the packet of
such a process is known by the one it comes from, however short it runs. What is told here changes no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from meshbridge.agent.processes import PodProcesses
from meshbridge.identity.model import IpFamily
from meshbridge.observe.flow import AgentEvent, Flow, FlowKind, FlowPeer, FlowVerdict
from meshbridge.policy.capture import Capture, PortClass
from meshbridge.policy.model import Direction

NAME: Final = "ghost-bypass-packet"
MAX_TOLD: Final = 1024
MAX_HELD: Final = 256
HELD_NS: Final = 60 * 10**9
"""How long a packet is kept whose proxy is not known: one that restarts sends before it listens."""
_TCP, _SYN, _ACK = 6, 0x02, 0x10
_Told = tuple[str, Direction, IpFamily, int, int]


@dataclass(frozen=True, slots=True)
class Watched:
    """A pod with a sidecar whose redirect rules were seen: what they leave to Envoy, and as whom that runs."""

    uid: str
    namespace: str
    name: str
    capture: Capture
    proxy_uids: frozenset[int]


@dataclass(slots=True)
class Evidence:
    """Belongs to the event loop's thread. Each pod, direction, family, port and user is told of once."""

    node: str
    watched: Mapping[int, Watched] = field(default_factory=dict)
    """By endpoint number."""
    _told: set[_Told] = field(default_factory=set)
    _held: list[tuple[Watched, Flow]] = field(default_factory=list)
    """Packets of a proxy's user, until it is seen which control group the proxy is in."""

    def of(self, flow: Flow) -> Flow | None:
        """What is to be told of a packet that its pod sent past Envoy, or answered in its place; None: nothing."""
        pod = self.watched.get(flow.endpoint_id)
        address = flow.destination.address
        if pod is None or address is None or flow.direction is not Direction.EGRESS or flow.protocol != _TCP:
            return None
        if flow.uid is None or not flow.tcp_flags & _SYN:
            return None
        answers = bool(flow.tcp_flags & _ACK)
        if flow.uid in pod.proxy_uids:
            if not answers and flow.cgroup_id and len(self._held) < MAX_HELD:
                self._held.append((pod, flow))
            return None
        return self._tell(pod, flow, answers=answers)

    def looked(self, processes: Mapping[str, PodProcesses], since_ns: int) -> list[Flow]:
        """What is to be told of packets that were held, now that the pods' processes were looked at again.

        Args:
            processes: What was found, by UID.
            since_ns: When that look began: what was sent later is decided by the next one.
        """
        held, self._held = self._held, []
        events = []
        for pod, flow in held:
            groups = processes[pod.uid].proxy_cgroups if pod.uid in processes else frozenset()
            if flow.time_ns >= since_ns or (not groups and flow.time_ns > since_ns - HELD_NS):
                self._held.append((pod, flow))
            elif groups and flow.cgroup_id not in groups:
                event = self._tell(pod, flow, answers=False)
                events += [event] if event is not None else []
        return events

    def _tell(self, pod: Watched, flow: Flow, *, answers: bool) -> Flow | None:
        address, uid = flow.destination.address, flow.uid
        if address is None or uid is None:
            return None
        family = IpFamily.of(address)
        port = flow.source.port if answers else flow.destination.port
        if not (_captured_inbound if answers else _captured_outbound)(pod.capture, family, port):
            return None
        told = (pod.uid, Direction.INGRESS if answers else Direction.EGRESS, family, port, uid)
        if told in self._told or len(self._told) >= MAX_TOLD:
            return None
        self._told.add(told)
        details = {
            "direction": told[1].name.lower(), "family": f"ipv{address.version}", "ports": str(port),
            "uid": str(uid), "peer": str(address),
        }  # fmt: skip
        if uid in pod.proxy_uids:
            details["cgroup"] = str(flow.cgroup_id)
        return Flow(
            flow.time_ns, self.node, FlowKind.AGENT, FlowVerdict.NONE, direction=told[1], endpoint_id=flow.endpoint_id,
            destination=FlowPeer(namespace=pod.namespace, pod=pod.name), agent=AgentEvent(NAME, tuple(details.items())),
        )  # fmt: skip

    @property
    def count(self) -> int:
        return len(self._told)


def _captured_inbound(capture: Capture, family: IpFamily, port: int) -> bool:
    return capture.inbound[family].at(port) is PortClass.CAPTURED


def _captured_outbound(capture: Capture, family: IpFamily, port: int) -> bool:
    """Whether no bypass has the port; one towards some destinations counts as one towards all."""
    return not any(bypass.first <= port <= bypass.last for bypass in capture.outbound.get(family, ()))
