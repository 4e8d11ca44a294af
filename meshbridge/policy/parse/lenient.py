"""Reading objects of which only some fields are asked for: what is absent is empty, a wrong type is refused."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

from meshbridge.identity.model import IpAddress
from meshbridge.policy.parse.reader import Reader, shown


def child(at: Reader, name: str) -> Reader:
    path = f"{at.path}.{name}" if at.path else name
    if at.value is None:
        return Reader(None, path)
    if not isinstance(at.value, dict):
        at.refuse(f"expected a mapping, found {shown(at.value)}", "see the kind's reference")
    return Reader(at.value.get(name), path)


def children(at: Reader, name: str) -> list[Reader]:
    found = child(at, name)
    return found.items() if found.value is not None else []


def text(at: Reader, name: str) -> str:
    found = child(at, name)
    return found.text() if found.value is not None else ""


def strings(at: Reader, name: str) -> dict[str, str]:
    found = child(at, name)
    return {key: item.text() for key, item in found.mapping().items()} if found.value is not None else {}


def address(at: Reader) -> IpAddress:
    """One form for one address: IPv4 where it is v4-mapped; a zone means something on one node only."""
    try:
        found = ip_address(at.text())
    except ValueError:
        at.refuse(f"{shown(at.value)} is no address", "write an IPv4 or IPv6 address")
    if not isinstance(found, IPv6Address):
        return found
    if found.scope_id is not None:
        at.refuse(f"{shown(at.value)} has a zone", "write the address without it")
    return found.ipv4_mapped or found
