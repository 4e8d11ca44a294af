"""What a node reports of its pods' exclusions, as a message and back; whoever reads it trusts nothing of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from meshbridge.identity.model import IpFamily, TcpPorts
from meshbridge.protos import agent_pb2, reports_pb2
from meshbridge.xds.messages import MAX_RANGES, MessageError, excluded_of

MAX_PODS: Final = 4_096
MAX_GROUPS: Final = 256
MAX_UID_LENGTH: Final = 512

Exclusions = Mapping[str, tuple[TcpPorts, ...]]
"""The ports on which pods' Envoys are passed by, by UID."""


def exclusion_groups(exclusions: Exclusions) -> list[reports_pb2.PodExclusions]:
    """As they are sent. What is beyond the limits is left out: such a pod is as one that was not seen."""
    groups: dict[tuple[TcpPorts, ...], list[str]] = {}
    for uid, excluded in sorted(exclusions.items())[:MAX_PODS]:
        if len(excluded) <= MAX_RANGES and len(uid) <= MAX_UID_LENGTH:
            groups.setdefault(excluded, []).append(uid)
    return [
        reports_pb2.PodExclusions(uids=uids, excluded=ports_messages(excluded))
        for excluded, uids in list(groups.items())[:MAX_GROUPS]
    ]


def exclusions_of(groups: Collection[reports_pb2.PodExclusions], where: str) -> Exclusions:
    """What a report says of exclusions.

    Raises:
        MessageError: too much of anything, a pod in two groups, ports that are none, unsorted or overlapping.
    """
    found: dict[str, tuple[TcpPorts, ...]] = {}
    if len(groups) > MAX_GROUPS or sum(len(group.uids) for group in groups) > MAX_PODS:
        raise MessageError(f"more than {MAX_GROUPS} groups or {MAX_PODS} pods", where=where)
    for group in groups:
        excluded = excluded_of(group.excluded, where)
        for uid in group.uids:
            if uid in found or not 0 < len(uid) <= MAX_UID_LENGTH:
                raise MessageError(f"the UID {uid[:80]!r} is empty, too long, or there twice", where=where)
            found[uid] = excluded
    return found


def ports_messages(excluded: Iterable[TcpPorts]) -> list[agent_pb2.TcpPorts]:
    """The ports as they are sent."""
    return [agent_pb2.TcpPorts(ipv6=p.family is IpFamily.IPV6, first=p.first, last=p.last) for p in excluded]
