"""Connections that were seen, as one more source of which client uses which port of which server.

They come from an agent's own flows, or as lines of ``meshbridge observe -o json``: text from outside, so everything in
it is bounded, and what is no such line is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_address
from typing import Any, Final

from meshbridge.errors import MeshBridgeError
from meshbridge.identity.model import IpAddress

MAX_LINE_BYTES: Final = 1 << 16
MAX_LINES: Final = 1_000_000
MAX_FLOWS: Final = 50_000
"""Of different kinds."""
_MAX_NAME: Final = 253
_NO_FLOWS: Final = ("lost_events", "agent_event")


class ObservedError(MeshBridgeError):
    """A line is none that ``meshbridge observe -o json`` prints."""


@dataclass(frozen=True, slots=True)
class ObservedFlow:
    """A TCP connection that a client pod opened, as it was on the wire: never what its Envoy was asked for.

    ``server`` is empty where the address is no pod's, as a Service's. ``uid`` is the user who sent it, None: not seen.
    """

    time_ns: int
    client: str
    server: str
    address: IpAddress
    port: int
    uid: int | None = None


def latest(flows: Iterable[ObservedFlow], most: int = MAX_FLOWS) -> tuple[ObservedFlow, ...]:
    """Of those between the same two ends, on the same port and by the same user, the last.

    Raises:
        ObservedError: there are more than ``most`` of different kinds.
    """
    found: dict[tuple[object, ...], ObservedFlow] = {}
    for flow in flows:
        key = (flow.client, flow.server, flow.address, flow.port, flow.uid)
        known = found.get(key)
        if known is None or flow.time_ns > known.time_ns:
            found[key] = flow
        if len(found) > most:
            raise ObservedError(
                f"there are more than {most} different connections", where="observed flows",
                fix="choose some: 'meshbridge observe' has filters",
            )  # fmt: skip
    return tuple(found.values())


def parse_observed(lines: Iterable[bytes]) -> tuple[ObservedFlow, ...]:
    """The connections among these lines: new ones over TCP, from pods.

    Raises:
        ObservedError: a line is not of that form, is too long, or is one too many.
    """
    return latest(flow for number, line in enumerate(lines, 1) if (flow := _parse(line, number)) is not None)


def _parse(line: bytes, number: int) -> ObservedFlow | None:
    where = f"observed flows, line {number}"
    if number > MAX_LINES:
        raise ObservedError(f"there are more than {MAX_LINES} lines", where=where, fix="give fewer, the newest")
    if len(line) > MAX_LINE_BYTES:
        raise ObservedError(f"it has more than {MAX_LINE_BYTES} bytes", where=where, fix=_FIX)
    if not line.strip():
        return None
    try:
        record = json.loads(line)
        if any(key in record for key in _NO_FLOWS):
            return None
        return _flow(record["flow"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ObservedError(
            "it is not a flow as 'meshbridge observe -o json' prints it", where=where, fix=_FIX
        ) from error


_FIX: Final = "give what 'meshbridge observe -o json' prints, as it is"


def _flow(record: Mapping[str, Any]) -> ObservedFlow | None:
    client, server = _pod(record["source"]), _pod(record["destination"])
    l4 = record.get("l4")
    tcp = l4.get("TCP") if l4 is not None else None
    if tcp is None or not client or not _opens(record, tcp):
        return None
    port, ours = tcp["destination_port"], record.get("meshbridge") or {}
    uid = ours.get("uid") if record["traffic_direction"] == "EGRESS" else None
    if type(port) is not int or not 0 < port <= 65535 or not (uid is None or type(uid) is int):
        raise ValueError
    time_ns = int(datetime.fromisoformat(record["time"]).timestamp() * 1e9)
    return ObservedFlow(time_ns, client, server, ip_address(_text(record["IP"]["destination"])), port, uid)


def _opens(record: Mapping[str, Any], tcp: Mapping[str, Any]) -> bool:
    flags = tcp.get("flags") or {}
    if record.get("is_reply") is True or flags.get("ACK"):
        return False
    return bool(flags.get("SYN"))


def _pod(record: Mapping[str, Any]) -> str:
    namespace, name = _text(record.get("namespace", "")), _text(record.get("pod_name", ""))
    return f"{namespace}/{name}" if namespace and name else ""


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_NAME:
        raise TypeError
    return value
