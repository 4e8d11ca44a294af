"""Resources by name, and the responses that lead from one table of them to another, made once for all who need them."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryResponse
from google.protobuf.any_pb2 import Any as AnyMessage

MAX_RESPONSE_BYTES: Final = 1 << 18
"""Well below gRPC's 4 MB. A thousand agents that come at once have as many in flight: 256 MB, and not 1 GB."""
RESOURCE_OVERHEAD_BYTES: Final = 96
KEPT_BYTES: Final = 1 << 18
"""Responses of a transition no bigger than this are kept with its table, those of a bigger one while they are sent."""

ABSENT: Final = ""  # the version of a resource that a client knows not to exist


@dataclass(frozen=True, slots=True)
class Resource:
    """One serialised message. Equal versions mean equal bodies, also across restarts of the controller."""

    version: str
    body: bytes

    @classmethod
    def of(cls, body: bytes) -> Resource:
        return cls(hashlib.blake2b(body, digest_size=8).hexdigest(), body)


Resources = Mapping[str, Resource]


class Table(dict[str, Resource]):
    """Resources that many clients hold, never changed once handed out.

    Cost: what differs from another table is looked for once, however many clients go from that one to this one, and
    not at all when this one was made from that one.
    """

    __slots__ = ("__weakref__", "_differing", "_transitions")

    def __init__(self, resources: Mapping[str, Resource] | Iterable[tuple[str, Resource]] = ()) -> None:
        super().__init__(resources)
        self._differing: dict[int, tuple[weakref.ref[Table], frozenset[str]]] = {}
        self._transitions: dict[tuple[int, str], tuple[weakref.ref[Table], Transition | weakref.ref[Transition]]] = {}

    def changed(self, changes: Mapping[str, Resource | None]) -> Table:
        """A table that is like this one but for these resources; None: it has none of that name."""
        table = Table(self)
        for name, resource in changes.items():
            if resource is not None:
                table[name] = resource
            else:
                table.pop(name, None)
        names = frozenset(name for name in changes if table.get(name) != self.get(name))
        table._differing[id(self)] = weakref.ref(self), names
        return table

    def differing_from(self, other: Table) -> frozenset[str]:
        """The names that are in one of the two only, or with another version."""
        if other is self:
            return frozenset()
        known = self._differing.get(id(other))
        if known is not None and known[0]() is other:
            return known[1]
        for key in [key for key, (of, _) in self._differing.items() if of() is None]:
            del self._differing[key]
        found = differing(other, self)
        self._differing[id(other)] = weakref.ref(other), found
        return found

    def transition_from(self, other: Table, type_url: str) -> Transition:
        """The responses after which whoever holds ``other`` holds this."""
        key = id(other), type_url
        known = self._transitions.get(key)
        if known is not None and known[0]() is other:
            kept = known[1]() if isinstance(known[1], weakref.ref) else known[1]
            if kept is not None:
                return kept
        for old in [old for old, (of, _) in self._transitions.items() if of() is None]:
            del self._transitions[old]
        made = Transition(type_url, _split(type_url, self, sorted(self.differing_from(other))))
        small = sum(step.size_bytes for step in made.steps) <= KEPT_BYTES
        self._transitions[key] = weakref.ref(other), made if small else weakref.ref(made)
        return made


NOTHING: Final = Table()


def differing(one: Resources, other: Resources) -> frozenset[str]:
    """The names that are in one of the two only, or with another version."""
    found = {name for name, resource in other.items() if (o := one.get(name)) is not resource and o != resource}
    found.update(one.keys() - other.keys())
    return frozenset(found)


@dataclass(slots=True)
class Step:
    """One response without its nonce: the version of each resource in it, ABSENT for those that are gone."""

    type_url: str
    versions: Mapping[str, str]
    resources: Resources
    size_bytes: int
    _content: bytes = b""

    def content(self) -> bytes:
        """The response as it is sent, but for its nonce; encoded once."""
        if not self._content:
            self._content = encode(self.type_url, self.versions, self.resources)
        return self._content


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Transition:
    """The responses that lead from one table to another, in order."""

    type_url: str
    steps: tuple[Step, ...] = ()


def encode(type_url: str, versions: Mapping[str, str], resources: Resources) -> bytes:
    """A response that brings these resources in these versions, or, where ABSENT, removes them."""
    response = DeltaDiscoveryResponse(type_url=type_url)
    for name, version in versions.items():
        if version == ABSENT:
            response.removed_resources.append(name)
        else:
            body = AnyMessage(type_url=type_url, value=resources[name].body)
            response.resources.add(name=name, version=version, resource=body)
    return bytes(response.SerializeToString())


def size_of(type_url: str, name: str, resource: Resource | None) -> int:
    """About how much of a response a resource takes."""
    return RESOURCE_OVERHEAD_BYTES + len(type_url) + len(name) + (len(resource.body) if resource is not None else 0)


def _split(type_url: str, target: Table, names: Iterable[str]) -> tuple[Step, ...]:
    steps: list[Step] = []
    versions: dict[str, str] = {}
    size = 0
    for name in names:
        resource = target.get(name)
        more = size_of(type_url, name, resource)
        if versions and size + more > MAX_RESPONSE_BYTES:
            steps.append(_step(type_url, versions, target, size))
            versions, size = {}, 0
        versions[name] = resource.version if resource is not None else ABSENT
        size += more
    if versions:
        steps.append(_step(type_url, versions, target, size))
    return tuple(steps)


def _step(type_url: str, versions: dict[str, str], target: Table, size_bytes: int) -> Step:
    """Holds what it brings and not the table: a table's own transitions must not keep it alive."""
    brought = {name: target[name] for name, version in versions.items() if version != ABSENT}
    return Step(type_url, versions, brought, size_bytes)
