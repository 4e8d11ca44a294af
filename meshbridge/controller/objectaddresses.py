"""Addresses in objects as they are written, for what the model leaves out or could not read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Final

from meshbridge.identity.model import IpAddress, Workload
from meshbridge.policy.model import Document

_TERMINAL_PHASES: Final = frozenset({"Succeeded", "Failed"})


def gateway_addresses(document: Document) -> list[IpAddress]:
    """The first address of each pod CIDR of a node, by which its pods see the node itself."""
    spec: Any = document.data.get("spec")
    if not isinstance(spec, Mapping):
        return []
    texts = spec.get("podCIDRs")
    candidates = [*texts] if isinstance(texts, list) else []
    found: list[IpAddress] = []
    for text in (*candidates, spec.get("podCIDR")):
        try:
            network = ip_network(text, strict=False) if isinstance(text, str) else None
        except ValueError:
            continue
        if network is not None and network.num_addresses > 2:
            found.append(_plain(network.network_address + 1))
    return found


def readable_addresses(document: Document) -> tuple[IpAddress, ...]:
    """The addresses a pod's status names, as far as they can be read; none of a pod that holds none of its own."""
    spec, status = document.data.get("spec"), document.data.get("status")
    phase = status.get("phase") if isinstance(status, Mapping) else None
    if not isinstance(status, Mapping) or (isinstance(phase, str) and phase in _TERMINAL_PHASES):
        return ()
    if isinstance(spec, Mapping) and spec.get("hostNetwork"):
        return ()
    items = status.get("podIPs")
    texts = [item.get("ip") for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []
    found: dict[IpAddress, None] = {}
    for text in (*texts, status.get("podIP")):
        with suppress(ValueError):
            if isinstance(text, str):
                found[_plain(ip_address(text))] = None
    return tuple(found)


def readable_workload(document: Document) -> Workload | None:
    """Of a pod that cannot be read, as much as its node has to know to close it; None when no node runs it."""
    spec = document.data.get("spec")
    node = spec.get("nodeName") if isinstance(spec, Mapping) else None
    addresses = readable_addresses(document)
    if not addresses or not isinstance(node, str) or not node:
        return None
    uid = document.uid or f"{document.namespace}/{document.name}"
    return Workload(document.namespace, document.name, uid, node, addresses)


def _plain(address: IpAddress) -> IpAddress:
    """One form for one address: IPv4 where it is v4-mapped, and without a zone."""
    return address if isinstance(address, IPv4Address) else address.ipv4_mapped or IPv6Address(int(address))
