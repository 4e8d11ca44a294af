"""What the kernel reported, with names: one record for the ring, the socket and every printed form."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from meshbridge.identity.model import IpAddress
from meshbridge.policy.model import Direction, Layer, Origin

PROTOCOLS = {1: "ICMPv4", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
PROTOCOL_NUMBERS = {name: number for number, name in PROTOCOLS.items()}

# Cilium's names and numbers of reserved identities (bpf/abi.h, enum reserved_identity); people read names.
RESERVED_IDENTITIES = {
    1: "host", 2: "world", 3: "unmanaged", 4: "health", 5: "init", 6: "remote-node", 7: "kube-apiserver", 8: "ingress",
    9: "world-ipv4", 10: "world-ipv6",
}  # fmt: skip


class FlowKind(StrEnum):
    """What made the kernel report it; AGENT: nothing of the kernel's, the agent noticed it by itself."""

    DROP = "drop"
    VERDICT = "verdict"
    TRACE = "trace"
    LOST = "lost"
    AGENT = "agent"


class FlowVerdict(StrEnum):
    """What became of the packet; ALLOWED and DENIED are policy's word on a new flow, NONE: there is no packet."""

    FORWARDED = "FORWARDED"
    DROPPED = "DROPPED"
    AUDIT = "AUDIT"
    ALLOWED = "ALLOWED"
    DENIED = "DENIED"
    NONE = "NONE"


class MatchType(IntEnum):
    """How specific the deciding entry was; numbers as in bpf/abi.h, ``enum match_type``."""

    NONE = 0
    L3_ONLY = 1
    L3_L4 = 2
    L4_ONLY = 3
    ALL = 4
    L3_PROTO = 5
    PROTO_ONLY = 6

    @property
    def text(self) -> str:
        return _MATCH_TEXT[self]


_MATCH_TEXT = ("none", "L3-Only", "L3-L4", "L4-Only", "all", "L3-Proto", "Proto-Only")


class LostBy(StrEnum):
    """Who could not keep up, in a record of kind LOST."""

    KERNEL = "KERNEL_EVENTS"
    CLIENT = "AGENT_RING_BUFFER"


@dataclass(frozen=True, slots=True)
class FlowPeer:
    """One side of a flow as it was known when the packet passed; ``address`` is None when the packet was not IP."""

    address: IpAddress | None = None
    port: int = 0
    identity: int = 0
    namespace: str = ""
    pod: str = ""
    entities: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AgentEvent:
    """Something the agent noticed: its stable name, and what there is to know of it, in the order it is shown."""

    name: str
    details: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Flow:
    """One event of the kernel, resolved. ``reply`` is None where the kernel could not tell (every drop).

    ``agent`` is set where it is none of the kernel's; the pod that it is about is then the destination.
    """

    time_ns: int
    node: str
    kind: FlowKind
    verdict: FlowVerdict
    direction: Direction = Direction.INGRESS
    endpoint_id: int = 0
    ifindex: int = 0
    reason: int = 0
    source: FlowPeer = FlowPeer()
    destination: FlowPeer = FlowPeer()
    protocol: int = 0
    tcp_flags: int = 0
    icmp_type: int = 0
    icmp_code: int = 0
    ethertype: int = 0
    layer: Layer | None = None
    network_verdict: str = ""
    mesh_verdict: str = ""
    network_rules: tuple[Origin, ...] = ()
    mesh_rules: tuple[Origin, ...] = ()
    match_type: MatchType = MatchType.NONE
    reply: bool | None = None
    packet_bytes: int = 0
    uid: int | None = None
    cgroup_id: int = 0
    lost: int = 0
    lost_by: LostBy | None = None
    rejudged: bool = False
    audit: bool = False
    agent: AgentEvent | None = None

    @property
    def rules(self) -> tuple[Origin, ...]:
        """The rules of the layer that decided; of both where the packet passed both."""
        if self.layer is Layer.NETWORK:
            return self.network_rules
        if self.layer is Layer.MESH:
            return self.mesh_rules
        return self.network_rules + self.mesh_rules

    @property
    def protocol_name(self) -> str:
        return PROTOCOLS.get(self.protocol, str(self.protocol))
