"""How packets and peers are written in every printed form: Hubble's and Cilium's spelling."""

from __future__ import annotations

from meshbridge.observe.flow import RESERVED_IDENTITIES, Flow, FlowKind, FlowPeer, FlowVerdict
from meshbridge.observe.reasons import drop_reason
from meshbridge.observe.text import printable
from meshbridge.policy.model import Direction

_TCP_FLAGS = ((0x02, "SYN"), (0x10, "ACK"), (0x04, "RST"), (0x01, "FIN"), (0x08, "PSH"), (0x20, "URG"), (0x40, "ECE"),
              (0x80, "CWR"))  # fmt: skip
_ICMP4 = {
    0: "EchoReply", 3: "DestinationUnreachable", 4: "SourceQuench", 5: "Redirect", 8: "EchoRequest", 11: "TimeExceeded",
    12: "ParameterProblem", 13: "TimestampRequest", 14: "TimestampReply",
}  # fmt: skip
_ICMP6 = {
    1: "DestinationUnreachable", 2: "PacketTooBig", 3: "TimeExceeded", 4: "ParameterProblem", 128: "EchoRequest",
    129: "EchoReply", 133: "RouterSolicitation", 134: "RouterAdvertisement", 135: "NeighborSolicitation",
    136: "NeighborAdvertisement", 137: "Redirect",
}  # fmt: skip
_WITH_PORTS = frozenset({6, 17, 132})


def tcp_flag_names(flags: int) -> list[str]:
    """Names of the flags set, in Hubble's order of interest."""
    return [name for bit, name in _TCP_FLAGS if flags & bit]


def identity_name(number: int) -> str:
    """``host``, ``world`` … for reserved numbers, else the number."""
    return RESERVED_IDENTITIES.get(number, str(number))


def peer_name(peer: FlowPeer) -> str:
    """``namespace/pod``, or the address of what is not a pod."""
    if peer.pod:
        return printable(f"{peer.namespace}/{peer.pod}")
    return str(peer.address) if peer.address else "unknown"


def peer_with_port(flow: Flow, peer: FlowPeer) -> str:
    """``shop/web:41112``, ``10.0.0.9:53``, ``[fd00::9]:53``; without the port where the protocol has none."""
    name = peer_name(peer)
    if flow.protocol not in _WITH_PORTS:
        return name
    return f"[{name}]:{peer.port}" if not peer.pod and ":" in name else f"{name}:{peer.port}"


def peer_with_identity(flow: Flow, peer: FlowPeer) -> str:
    reserved = RESERVED_IDENTITIES.get(peer.identity)
    return f"{peer_with_port(flow, peer)} ({reserved or f'ID:{peer.identity}'})"


def agent_event_text(flow: Flow) -> str:
    """``pod finance/reports: direction ingress, ports 9000``: what the agent noticed, after its name."""
    details = flow.agent.details if flow.agent is not None else ()
    return printable(f"pod {peer_name(flow.destination)}: {', '.join(f'{key} {value}' for key, value in details)}")


def flow_type(flow: Flow) -> str:
    """Hubble's TYPE: the drop's reason, ``policy-verdict:L3-L4 INGRESS``, or where a forwarded packet went."""
    if flow.kind is FlowKind.DROP:
        return drop_reason(flow.reason).text
    if flow.kind is FlowKind.VERDICT:
        return f"policy-verdict:{flow.match_type.text} {flow.direction.name}"
    return "to-endpoint" if flow.direction is Direction.INGRESS else "to-stack"


def flow_verdict(flow: Flow) -> str:
    if flow.kind is FlowKind.VERDICT and flow.verdict is FlowVerdict.AUDIT:
        return "AUDITED"
    return flow.verdict.value


def flow_summary(flow: Flow) -> str:
    """What the packet was: ``TCP Flags: SYN``, ``UDP``, ``ICMPv4 EchoRequest``, ``ethertype 0x8100``."""
    if flow.protocol == 6:
        return f"TCP Flags: {', '.join(tcp_flag_names(flow.tcp_flags)) or 'none'}"
    if flow.protocol in (1, 58):
        return f"{flow.protocol_name} {icmp_name(flow)}"
    if flow.source.address is None and flow.ethertype:
        return f"ethertype 0x{flow.ethertype:04x}"
    return flow.protocol_name if flow.protocol else "IP"


def icmp_name(flow: Flow) -> str:
    names = _ICMP4 if flow.protocol == 1 else _ICMP6
    return names.get(flow.icmp_type, f"type={flow.icmp_type} code={flow.icmp_code}")


def arrow(flow: Flow) -> str:
    """``->`` a request, ``<-`` a reply, ``<>`` where the kernel could not tell (anything it refused)."""
    if flow.reply is None or flow.kind is FlowKind.DROP or flow.verdict is FlowVerdict.DENIED:
        return "<>"
    return "<-" if flow.reply else "->"


def sides(flow: Flow) -> tuple[FlowPeer, FlowPeer]:
    """Left and right of the arrow: whoever opened the flow stands left, so a reply's ends are swapped."""
    return (flow.destination, flow.source) if arrow(flow) == "<-" else (flow.source, flow.destination)
