"""Destination ports of the network kinds, as raw data into ``PortMatch``."""

from __future__ import annotations

import re

from meshbridge.policy.model import ANY, Anything, Document, Notice, PortMatch
from meshbridge.policy.parse.reader import Reader, shown

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
ICMP, ICMPV6 = 1, 58
LAST_PORT = 65535

_MAX_CILIUM_PORTS = 40
_NUMBER = re.compile(r"[0-9_]+")
_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")
_ICMPV4_TYPES = {
    "EchoReply": 0,
    "DestinationUnreachable": 3,
    "Redirect": 5,
    "Echo": 8,
    "EchoRequest": 8,
    "RouterAdvertisement": 9,
    "RouterSelection": 10,
    "TimeExceeded": 11,
    "ParameterProblem": 12,
    "Timestamp": 13,
    "TimestampReply": 14,
    "Photuris": 40,
    "ExtendedEchoRequest": 42,
    "ExtendedEchoReply": 43,
}
_ICMPV6_TYPES = {
    "DestinationUnreachable": 1,
    "PacketTooBig": 2,
    "TimeExceeded": 3,
    "ParameterProblem": 4,
    "EchoRequest": 128,
    "EchoReply": 129,
    "MulticastListenerQuery": 130,
    "MulticastListenerReport": 131,
    "MulticastListenerDone": 132,
    "RouterSolicitation": 133,
    "RouterAdvertisement": 134,
    "NeighborSolicitation": 135,
    "NeighborAdvertisement": 136,
    "RedirectMessage": 137,
    "RouterRenumbering": 138,
    "ICMPNodeInformationQuery": 139,
    "ICMPNodeInformationResponse": 140,
    "InverseNeighborDiscoverySolicitation": 141,
    "InverseNeighborDiscoveryAdvertisement": 142,
    "HomeAgentAddressDiscoveryRequest": 144,
    "HomeAgentAddressDiscoveryReply": 145,
    "MobilePrefixSolicitation": 146,
    "MobilePrefixAdvertisement": 147,
    "DuplicateAddressRequestCodeSuffix": 157,
    "DuplicateAddressConfirmationCodeSuffix": 158,
    "ExtendedEchoRequest": 160,
    "ExtendedEchoReply": 161,
}


def cilium_ports(at: Reader, document: Document, notices: list[Notice]) -> tuple[PortMatch, ...]:
    """``toPorts[].ports``: an empty list is no port at all; ANY is TCP, UDP and SCTP, never ICMP, also on port 0.

    Spec: CILIUM.md §a, "toPorts"; where they differ, Cilium's engine (docs/adr/0130).
    """
    items = at.items()
    if len(items) > _MAX_CILIUM_PORTS:
        at.refuse(f"{len(items)} ports are more than {_MAX_CILIUM_PORTS}", "write several rules")
    found: list[PortMatch] = []
    for item in items:
        fields = item.fields("port", "endPort", "protocol")
        protocol = fields["protocol"].text([*PROTOCOLS, "ANY"]) if "protocol" in fields else "ANY"
        if "port" not in fields:
            item.refuse("has no port", 'write port: "8080", or "0" for all')
        end = fields.get("endPort")
        text = fields["port"].text()
        if not _NUMBER.fullmatch(text):
            if end is not None:
                end.integer(0, LAST_PORT)
                notices.append(Notice(document, "endPort has no effect with a named port", end.path, code="MB0507"))
            name = port_name(fields["port"], text.lower())
            found += [PortMatch(number, name=name) for number in _numbers(protocol)]
            continue
        first = _port_number(fields["port"], text)
        last = end.integer(0, LAST_PORT) if end is not None else 0
        if first == 0:
            if last:
                item.refuse("port 0 means every port and takes no endPort", "delete endPort")
            found += [PortMatch(number) for number in _numbers(protocol)]
            continue
        if end is not None and last and last < first:
            text = f"endPort {last} is less than port {first} and has no effect"
            notices.append(Notice(document, text, end.path, code="MB0507"))
            last = 0
        found += [PortMatch(number, first, last or first) for number in _numbers(protocol)]
    return tuple(found)


def icmp_types(at: Reader) -> tuple[PortMatch, ...]:
    """One element of ``icmps``: an empty list is no type at all."""
    fields = at.fields("fields")
    items = fields["fields"].items() if "fields" in fields else []
    if len(items) > _MAX_CILIUM_PORTS:
        at.refuse(f"{len(items)} types are more than {_MAX_CILIUM_PORTS}", "write several rules")
    found = []
    for item in items:
        parts = item.fields("family", "type")
        family = parts["family"].text(["IPv4", "IPv6"]) if "family" in parts else "IPv4"
        if "type" not in parts:
            item.refuse("has no type", "write type: 8 or type: EchoRequest")
        names = _ICMPV4_TYPES if family == "IPv4" else _ICMPV6_TYPES
        value = parts["type"].value
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 3:
            number = Reader(int(value), parts["type"].path).integer(0, 255)
        else:
            number = names[parts["type"].text(names)] if isinstance(value, str) else parts["type"].integer(0, 255)
        found.append(PortMatch(ICMP if family == "IPv4" else ICMPV6, number, number))
    return tuple(found)


def kubernetes_ports(at: Reader) -> Anything | tuple[PortMatch, ...]:
    """``NetworkPolicyPort``s: an empty list is every port of every protocol, ICMP included.

    Spec: CILIUM.md §b.
    """
    items = at.items()
    found = []
    for item in items:
        fields = item.fields("protocol", "port", "endPort")
        protocol = PROTOCOLS[fields["protocol"].text(PROTOCOLS) if "protocol" in fields else "TCP"]
        port, end = fields.get("port"), fields.get("endPort")
        if port is None:
            if end is not None:
                end.refuse("endPort without port", "write port")
            found.append(PortMatch(protocol))
        elif isinstance(port.value, str):
            if end is not None:
                end.refuse("endPort with a named port", "write the port as a number")
            found.append(PortMatch(protocol, name=port_name(port, port.value)))
        else:
            first = port.integer(1, LAST_PORT)
            last = end.integer(1, LAST_PORT) if end is not None else first
            if last < first:
                item.refuse(f"endPort {last} is less than port {first}", "swap them")
            found.append(PortMatch(protocol, first, last))
    return tuple(found) if items else ANY


def _numbers(protocol: str) -> list[int]:
    return list(PROTOCOLS.values()) if protocol == "ANY" else [PROTOCOLS[protocol]]


def _port_number(at: Reader, text: str) -> int:
    """A number as Go reads it: octal after a leading zero, and underscores between digits."""
    try:
        number = int(text, 8 if len(text) > 1 and text.startswith("0") else 10) if len(text) < 20 else LAST_PORT + 1
    except ValueError:
        at.refuse(f"port {shown(text)} is no number", f"use 0..{LAST_PORT}")
    if number > LAST_PORT:
        at.refuse(f"port {shown(text)} is out of range", f"use 0..{LAST_PORT}")
    return number


def port_name(at: Reader, name: str) -> str:
    """The name of a container port.

    Raises:
        Invalid: No container port can have it.
    """
    if not _NAME.fullmatch(name):
        at.refuse(f"{shown(name)} is neither a port nor a port name", f"use 1..{LAST_PORT} or a container port's name")
    return name
