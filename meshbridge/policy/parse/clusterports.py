"""Destination ports of the cluster-wide kinds, as raw data into ``PortMatch``: ``protocols``, and ``ports`` before it.

Spec: CILIUM.md §c; network-policy-api, ClusterNetworkPolicyProtocol (v1alpha2) and AdminNetworkPolicyPort (v1alpha1).
"""

from __future__ import annotations

from meshbridge.policy.model import PortMatch
from meshbridge.policy.parse.ports import LAST_PORT, PROTOCOLS, port_name
from meshbridge.policy.parse.reader import Reader

_BY_FIELD = {name.lower(): number for name, number in PROTOCOLS.items()}


def cluster_protocols(at: Reader) -> tuple[PortMatch, ...]:
    """One element of ``protocols``: ports of one protocol, or a container port's name in any."""
    name, value = _only(at, *_BY_FIELD, "destinationNamedPort")
    if name == "destinationNamedPort":
        return _named(value)
    _, port = _only(value, "destinationPort")
    form, number = _only(port, "number", "range")
    if form == "number":
        first = last = number.integer(1, LAST_PORT)
    else:
        first, last = _range(number, number.fields("start", "end"))
        if first == last:
            number.refuse(f"starts and ends at {first}", f"write number: {first}")
    return (PortMatch(_BY_FIELD[name], first, last),)


def cluster_ports(at: Reader) -> tuple[PortMatch, ...]:
    """One element of ``ports``."""
    name, value = _only(at, "portNumber", "portRange", "namedPort")
    if name == "namedPort":
        return _named(value)
    if name == "portRange":
        fields = value.fields("protocol", "start", "end")
        first, last = _range(value, fields)
    else:
        fields = value.fields("protocol", "port")
        if "port" not in fields:
            value.refuse("has no port", f"write port: 1..{LAST_PORT}")
        first = last = fields["port"].integer(1, LAST_PORT)
    protocol = fields["protocol"].text(PROTOCOLS) if "protocol" in fields else "TCP"
    return (PortMatch(PROTOCOLS[protocol], first, last),)


def _only(at: Reader, *known: str) -> tuple[str, Reader]:
    """The one field a mapping has."""
    fields = at.fields(*known)
    if len(fields) != 1:
        at.refuse(f"has {len(fields)} fields where one is meant", f"write one of: {', '.join(known)}")
    return next(iter(fields.items()))


def _named(at: Reader) -> tuple[PortMatch, ...]:
    name = port_name(at, at.text())
    return tuple(PortMatch(protocol, name=name) for protocol in PROTOCOLS.values())


def _range(at: Reader, fields: dict[str, Reader]) -> tuple[int, int]:
    for required in ("start", "end"):
        if required not in fields:
            at.refuse(f"has no {required}", "write start and end")
    first, last = (fields[name].integer(1, LAST_PORT) for name in ("start", "end"))
    if last < first:
        at.refuse(f"end {last} is less than start {first}", "swap them")
    return first, last
