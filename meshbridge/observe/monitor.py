"""Events as ``cilium monitor`` prints them and, with ``verbose``, why: the object, the rule, file and line."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from meshbridge.observe.flow import Flow, FlowKind, FlowVerdict
from meshbridge.observe.names import agent_event_text, icmp_name, identity_name, tcp_flag_names
from meshbridge.observe.reasons import drop_reason
from meshbridge.observe.text import printable
from meshbridge.policy.model import Direction, Layer, Origin

_HOOKS = {Direction.INGRESS: "to_pod.c", Direction.EGRESS: "from_pod.c"}
_DEFAULT_DENY = frozenset({133, 220})


def monitor_lines(flow: Flow, *, verbose: bool = False) -> list[str]:
    """The event's line, then the lines that explain it."""
    if flow.kind is FlowKind.LOST:
        return [f"CPU events lost: {flow.lost} ({flow.lost_by or 'unknown'})"]
    if flow.kind is FlowKind.AGENT:
        return [f">> {printable(flow.agent.name if flow.agent else 'agent')}: {agent_event_text(flow)}"]
    line = {FlowKind.DROP: _drop, FlowKind.VERDICT: _verdict, FlowKind.TRACE: _trace}[flow.kind](flow)
    return [line, *(f"    {text}" for text in explanation(flow))] if verbose else [line]


def explanation(flow: Flow) -> Iterator[str]:
    """Sentences that answer "why": what happened, by which rules, what to do."""
    reason = drop_reason(flow.reason)
    if flow.reason:
        yield f"reason: {reason.name}: {reason.meaning}"
    if flow.reason in _DEFAULT_DENY:
        # The rule of a default deny is nobody's: it names the policies that isolate the endpoint.
        for origin in flow.rules:
            yield f"isolated by: {printable(str(origin))}"
    else:
        yield from _layer_rules("network", Layer.NETWORK, flow.network_verdict, flow.network_rules, flow)
        yield from _layer_rules("mesh", Layer.MESH, flow.mesh_verdict, flow.mesh_rules, flow)
    if flow.rejudged:
        yield "the flow was open before; policy or an identity has changed since"
    if flow.uid is not None:
        yield f"sent by: uid {flow.uid}" + (f", cgroup {flow.cgroup_id}" if flow.cgroup_id else "")
    if flow.reason:
        yield f"fix: {reason.fix}"


def _layer_rules(name: str, layer: Layer, verdict: str, origins: tuple[Origin, ...], flow: Flow) -> Iterator[str]:
    if flow.layer not in (None, layer) and flow.reason:
        return
    for origin in origins:
        yield f"{name} {verdict or 'rule'}: {printable(str(origin))}"


def _drop(flow: Flow) -> str:
    return (
        f"xx drop ({drop_reason(flow.reason).text}) flow {_hash(flow)} to endpoint "
        f"{flow.endpoint_id if flow.direction is Direction.INGRESS else 0}, ifindex {flow.ifindex}, "
        f"file {_HOOKS[flow.direction]}, , identity {_identities(flow)}: {_tuple(flow)}"
    )


def _verdict(flow: Flow) -> str:
    remote = flow.source if flow.direction is Direction.INGRESS else flow.destination
    action = {FlowVerdict.DENIED: "deny", FlowVerdict.AUDIT: "audit"}.get(flow.verdict, "allow")
    return (
        f"Policy verdict log: flow {_hash(flow)} local EP ID {flow.endpoint_id}, "
        f"remote ID {identity_name(remote.identity)}, proto {flow.protocol}, {flow.direction.name.lower()}, "
        f"action {action}, auth: disabled, match {flow.match_type.text}, {_tuple(flow)}"
    )


def _trace(flow: Flow) -> str:
    target = f"endpoint {flow.endpoint_id}" if flow.direction is Direction.INGRESS else "stack"
    state = {True: "reply", False: "new", None: "unknown"}[flow.reply]
    where = f"state {state} ifindex {flow.ifindex}"
    return f"-> {target} flow {_hash(flow)}, identity {_identities(flow)} {where}: {_tuple(flow)}"


def _identities(flow: Flow) -> str:
    return f"{identity_name(flow.source.identity)}->{identity_name(flow.destination.identity)}"


def _tuple(flow: Flow) -> str:
    """``10.0.1.10:41112 -> 10.0.2.11:80 tcp SYN``."""
    source, destination = flow.source.address, flow.destination.address
    if source is None or destination is None:
        return f"ethertype 0x{flow.ethertype:04x}"
    if flow.protocol in (1, 58):
        return f"{source} -> {destination} {'icmp' if flow.protocol == 1 else 'icmpv6'} {icmp_name(flow)}"
    left, right = (f"[{a}]" if a.version == 6 else str(a) for a in (source, destination))
    line = f"{left}:{flow.source.port} -> {right}:{flow.destination.port} {flow.protocol_name.lower()}"
    return f"{line} {', '.join(tcp_flag_names(flow.tcp_flags))}".rstrip() if flow.protocol == 6 else line


def _hash(flow: Flow) -> str:
    """The same for both ends and directions of a flow, so that lines of one flow can be found by it."""
    ends = sorted((str(peer.address), peer.port) for peer in (flow.source, flow.destination))
    return f"0x{zlib.crc32(repr((ends, flow.protocol)).encode()):x}"
