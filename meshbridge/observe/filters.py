"""Which flows a person asked for; a function of the flow and of what was asked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from meshbridge.errors import MeshBridgeError
from meshbridge.observe.flow import PROTOCOL_NUMBERS, Flow, FlowKind, FlowPeer, FlowVerdict

# ``--verdict DROPPED`` also means what policy says of a new flow, as in Hubble.
_VERDICTS = {
    "FORWARDED": frozenset({FlowVerdict.FORWARDED, FlowVerdict.ALLOWED}),
    "DROPPED": frozenset({FlowVerdict.DROPPED, FlowVerdict.DENIED}),
    "AUDIT": frozenset({FlowVerdict.AUDIT}),
    "ALLOWED": frozenset({FlowVerdict.ALLOWED}),
    "DENIED": frozenset({FlowVerdict.DENIED}),
}
VERDICT_NAMES = tuple(_VERDICTS)
PROTOCOL_NAMES = ("tcp", "udp", "sctp", "icmp", "icmpv4", "icmpv6")
_DURATION = re.compile(
    r"(?:(?P<hours>\d{1,6})h)?(?:(?P<minutes>\d{1,6})m)?(?:(?P<seconds>\d{1,9}(?:\.\d{1,9})?)s)?", re.ASCII
)


class FilterError(MeshBridgeError):
    """A filter on the command line cannot be used."""


@dataclass(frozen=True, slots=True)
class PodFilter:
    """``namespace/name`` or ``name`` (any namespace); like Hubble's, the name is a prefix: pods of a Deployment."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str) -> PodFilter:
        """Raises: FilterError: more than one slash, or nothing to match."""
        namespace, _, name = text.rpartition("/")
        if "/" in namespace or not (namespace or name):
            raise FilterError(f"{text!r} is no pod", fix="write NAMESPACE/POD, NAMESPACE/ or POD; POD may be a prefix")
        return cls(namespace, name)

    def matches(self, peer: FlowPeer) -> bool:
        if not peer.pod:
            return False
        return peer.pod.startswith(self.name) and (not self.namespace or peer.namespace == self.namespace)


@dataclass(frozen=True, slots=True)
class FlowFilter:
    """All that is set has to hold; within one field any value is enough. The empty filter matches everything.

    Records of lost events match whatever is asked: whoever reads a filtered stream has to know that it has a hole.
    """

    kinds: frozenset[FlowKind] = frozenset()
    namespaces: frozenset[str] = frozenset()
    verdicts: frozenset[str] = frozenset()
    from_pods: tuple[PodFilter, ...] = ()
    to_pods: tuple[PodFilter, ...] = ()
    protocols: frozenset[int] = frozenset()
    ports: frozenset[int] = frozenset()
    endpoint_ids: frozenset[int] = frozenset()
    pods: tuple[PodFilter, ...] = ()
    since_ns: int = 0

    def matches(self, flow: Flow) -> bool:
        if flow.time_ns < self.since_ns:
            return False
        if flow.kind is FlowKind.LOST:
            return True
        ends = (flow.source, flow.destination)
        return (
            (not self.kinds or flow.kind in self.kinds)
            and (not self.namespaces or any(end.namespace in self.namespaces for end in ends))
            and (not self.verdicts or any(flow.verdict in _VERDICTS[name] for name in self.verdicts))
            and (not self.from_pods or any(pod.matches(flow.source) for pod in self.from_pods))
            and (not self.to_pods or any(pod.matches(flow.destination) for pod in self.to_pods))
            and (not self.pods or any(pod.matches(end) for pod in self.pods for end in ends))
            and (not self.protocols or flow.protocol in self.protocols)
            and (not self.ports or any(end.port in self.ports for end in ends))
            and (not self.endpoint_ids or flow.endpoint_id in self.endpoint_ids)
        )


def protocol_numbers(name: str) -> frozenset[int]:
    """The protocols a name on the command line means; ``icmp`` is both families'."""
    wanted = name.lower()
    return frozenset(
        number
        for text, number in PROTOCOL_NUMBERS.items()
        if text.lower() == wanted or (wanted == "icmp" and "ICMP" in text)
    )


def parse_since(text: str, now: datetime) -> int:
    """Nanoseconds since 1970 for ``90s``, ``5m``, ``1h30m`` before ``now``, or for an RFC 3339 time.

    Raises: FilterError: it is neither.
    """
    match = _DURATION.fullmatch(text)
    try:
        if match and text:
            parts = {unit: float(value) for unit, value in match.groupdict(default="0").items()}
            moment = now - timedelta(**parts)
        else:
            moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=now.tzinfo or UTC)
        return max(0, int(moment.timestamp() * 1_000_000) * 1000)
    except (ValueError, OverflowError):
        raise FilterError(
            f"{text!r} is no time", fix="write a duration before now (90s, 5m, 1h30m) or a time (2026-11-24T07:00:00Z)"
        ) from None
