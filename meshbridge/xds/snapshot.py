"""What each client should hold, and the delta protocol's bookkeeping of what it does hold.

Nothing here awaits or opens: ``DeltaSession`` is the protocol as a state machine, fed with requests and asked for the
next response, so that any sequence of snapshots, subscriptions, ACKs, NACKs and reconnects can be tested as values.

Spec: xDS protocol, "Incremental xDS"; envoy.service.discovery.v3.DeltaDiscoveryRequest and -Response.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse

from meshbridge.errors import MeshBridgeError
from meshbridge.xds.tables import (
    ABSENT,
    MAX_RESPONSE_BYTES,
    NOTHING,
    Resources,
    Step,
    Table,
    differing,
    encode,
    size_of,
)
from meshbridge.xds.tables import Resource as Resource
from meshbridge.xds.types import (
    ADDRESS,
    CLUSTER,
    ENDPOINT,
    EXTENSION_CONFIG,
    LISTENER,
    LOAD_ASSIGNMENT,
    MESH,
    POLICY,
    PROBLEM,
    REVISION,
    ROUTE,
    SECRET,
    SERVICE,
)

WILDCARD = "*"
MAX_NAMES = 100_000
MAX_NAME_LENGTH = 2_048
MAX_NACK_TEXT = 500

UNSURE = "?"  # no resource has it: the client may hold anything, and has to be told


class _Part(Enum):
    UPSERTS = 1
    REMOVALS = 2
    BOTH = 3


# Make before break: a cluster exists before a listener names it and goes after none does; an agent's Revision is last.
_PHASES: Final = (
    (CLUSTER, _Part.UPSERTS),
    (LOAD_ASSIGNMENT, _Part.UPSERTS),
    (LISTENER, _Part.BOTH),
    (ROUTE, _Part.BOTH),
    (SECRET, _Part.BOTH),
    (EXTENSION_CONFIG, _Part.BOTH),
    (LOAD_ASSIGNMENT, _Part.REMOVALS),
    (CLUSTER, _Part.REMOVALS),
    (POLICY, _Part.BOTH),
    (ADDRESS, _Part.BOTH),
    (SERVICE, _Part.BOTH),
    (MESH, _Part.BOTH),
    (ENDPOINT, _Part.BOTH),
    (PROBLEM, _Part.BOTH),
    (REVISION, _Part.BOTH),
)
KNOWN_TYPES: Final = frozenset(type_url for type_url, _ in _PHASES)


class ProtocolError(MeshBridgeError):
    """A client broke the delta protocol; its stream has to end."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything one client should hold: by type URL, by name. Unchanged types share their mapping with the last one,
    which is how a session sees without looking that there is nothing to send."""

    types: Mapping[str, Resources] = field(hash=False)

    def of(self, type_url: str) -> Resources:
        return self.types.get(type_url, NOTHING)


@dataclass(frozen=True, slots=True)
class Nack:
    """A client could not use what it was sent; it keeps what it had."""

    type_url: str
    names: tuple[str, ...]
    message: str


@dataclass(frozen=True, slots=True)
class Response:
    """A response as it is sent."""

    type_url: str
    content: bytes

    @classmethod
    def of(cls, type_url: str, content: bytes, nonce: str) -> Response:
        """``content`` is an encoded response without a nonce, shared with others; fields of a message may be added."""
        return cls(type_url, content + DeltaDiscoveryResponse(nonce=nonce).SerializeToString())

    def decoded(self) -> DeltaDiscoveryResponse:
        return DeltaDiscoveryResponse.FromString(self.content)


class _Held:
    """The versions a client has: those of a table, and where it differs from that one (None: not had).

    So a thousand clients that have the same cost no more than one.
    """

    __slots__ = ("base", "over")

    def __init__(self, versions: Mapping[str, str]) -> None:
        self.base: Table = NOTHING
        self.over: dict[str, str | None] = dict(versions)

    def get(self, name: str) -> str | None:
        if name in self.over:
            return self.over[name]
        resource = self.base.get(name)
        return None if resource is None else resource.version

    def put(self, name: str, version: str | None) -> None:
        resource = self.base.get(name)
        if version == (None if resource is None else resource.version):
            self.over.pop(name, None)
        else:
            self.over[name] = version

    def rebase(self, table: Table, differing: Iterable[str]) -> None:
        """The same as before, said as what differs from ``table``, which is at no other names than these."""
        self.base, self.over = table, {name: self.get(name) for name in differing}

    def keep_only(self, names: Iterable[str]) -> None:
        self.over = {name: version for name in names if (version := self.get(name)) is not None}
        self.base = NOTHING

    def names(self) -> set[str]:
        return {name for name in self.base.keys() | self.over.keys() if self.get(name) is not None}


@dataclass(slots=True)
class _Flight:
    """A response that is not answered yet: the versions in it, and what a NACK returns the client to."""

    versions: Mapping[str, str]
    base: Table
    before: dict[str, str | None] = field(default_factory=dict)

    def was(self, name: str) -> str | None:
        if name in self.before:
            return self.before[name]
        resource = self.base.get(name)
        return None if resource is None else resource.version


@dataclass(slots=True)
class _Subscription:
    held: _Held  # what the client has once it has read what is in flight
    wildcard: bool = False
    names: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)  # refused by itself: not sent again in this version
    reasons: dict[str, str] = field(default_factory=dict)  # why, for each that is in `refused`
    alone: set[str] = field(default_factory=set)  # refused in company: sent again, each in its own response
    nonce: str = ""  # of the response in flight
    in_flight: _Flight | None = None
    answered: bool = False
    settled: Resources | None = None  # the resources that nothing was left to send of
    steps: tuple[Step, ...] = ()  # what is left to send of a transition from the table that is held
    sent: tuple[Step, ...] = ()
    target: Table | None = None  # where it leads

    def pending(self, resources: Resources, part: _Part) -> list[str]:
        """The names to send, in order of name, those to be sent alone first."""
        if self.settled is resources:
            return []
        outdated = self._outdated(resources)
        if self.wildcard and not self.names and isinstance(resources, Table):
            self.held.rebase(resources, outdated)
        refused = self.refused
        names = [n for n in outdated if refused.get(n) != _version(resources, n)] if refused else outdated
        if not names:
            self.settled = resources
        if part is not _Part.BOTH:
            names = [name for name in names if (name not in resources) is (part is _Part.REMOVALS)]
        return sorted(names, key=lambda name: (name not in self.alone, name))

    def _outdated(self, resources: Resources) -> list[str]:
        """The names whose version, or absence, the client does not know yet."""
        held, found = self.held, []
        for name in self._candidates(resources):
            has, wanted = held.get(name), _version(resources, name)
            if has != wanted and (has is not None or wanted != ABSENT or name in self.names):
                found.append(name)
        return found

    def _candidates(self, resources: Resources) -> Iterable[str]:
        if not self.wildcard:
            return self.names
        base = self.held.base
        differs = resources.differing_from(base) if isinstance(resources, Table) else differing(base, resources)
        return differs.union(self.held.over, self.names)

    def begin_shared(self, type_url: str, resources: Resources, part: _Part) -> bool:
        """Whether the client is to be sent what leads from one table to another, like others are."""
        if self.steps:
            return True
        plain = self.wildcard and not (self.names or self.held.over or self.refused or self.alone or self.nonce)
        if not plain or part is not _Part.BOTH or not isinstance(resources, Table) or self.settled is resources:
            return False
        steps = resources.transition_from(self.held.base, type_url).steps
        if not steps:
            self.held.base = self.settled = resources
            return False
        self.steps, self.sent, self.target = steps, (), resources
        return True

    def next_shared(self) -> Step:
        """The next response of the transition, which is counted as sent. At its end the client holds the target."""
        step, *rest = self.steps
        self.in_flight = _Flight(step.versions, self.held.base)
        self.sent, self.steps = (*self.sent, step), tuple(rest)
        if not self.steps and self.target is not None:
            self.held.base = self.settled = self.target
            self.target, self.sent = None, ()
        return step

    def forgive(self, name: str) -> None:
        """It may be sent again, whatever its version."""
        self.refused.pop(name, None)
        self.reasons.pop(name, None)

    def leave_shared(self) -> None:
        """The rest of a transition is not sent; what was sent of it is held."""
        for step in self.sent:
            for name, version in step.versions.items():
                self.held.put(name, version or None)
        self.steps, self.sent, self.target = (), (), None


def _version(resources: Resources, name: str) -> str:
    resource = resources.get(name)
    return ABSENT if resource is None else resource.version


class DeltaSession:
    """One delta stream: give it every request, and send what ``next_response`` returns until it returns None.

    At most one response per type is unacknowledged, and each is computed from the newest snapshot when it can be sent:
    a slow client skips the states between. A refused response of several resources is sent again one by one, so that
    a bad resource never keeps a good one away; a resource refused by itself waits until it changes.

    Cost: unchanged types cost nothing. Of a changed ``Table`` a session looks at what differs from the one its client
    has, which is looked for and encoded once for all sessions that go the same way; of what such a way consists is
    sent to its end, though the snapshot may be another by then. Any other mapping is looked at resource by resource.
    A client that has all of a table takes no memory for it here.
    """

    def __init__(self) -> None:
        self._subscriptions: dict[str, _Subscription] = {}
        self._sent = 0

    def receive(self, request: DeltaDiscoveryRequest) -> Nack | None:
        """Take in a request; the returned Nack, if any, is for the log.

        Raises:
            ProtocolError: unknown type, too many or too long names.
        """
        type_url = request.type_url
        if type_url not in KNOWN_TYPES:
            raise ProtocolError(
                f"unknown type {type_url[:200]!r}", where="delta request", fix="ask for a type served here"
            )
        subscription = self._subscriptions.get(type_url)
        if subscription is None:
            subscription = self._subscriptions[type_url] = _Subscription(
                wildcard=not request.resource_names_subscribe, held=_Held(request.initial_resource_versions)
            )
        nack = self._acknowledge(subscription, request) if request.response_nonce else None
        self._subscribe(subscription, request)
        return nack

    @property
    def is_waiting(self) -> bool:
        """Whether the client has a response to answer."""
        return any(subscription.nonce for subscription in self._subscriptions.values())

    def refusals(self, snapshot: Snapshot) -> Mapping[tuple[str, str], str]:
        """By type and name what of ``snapshot`` the client has refused and does not hold, and why."""
        return {
            (type_url, name): subscription.reasons.get(name, "")
            for type_url, subscription in self._subscriptions.items()
            for name, version in subscription.refused.items()
            if version == _version(snapshot.of(type_url), name) != subscription.held.get(name)
        }

    def next_response(self, snapshot: Snapshot) -> Response | None:
        """The next thing to send towards ``snapshot``; None while there is nothing, or an ACK has to come first."""
        for type_url, part in _PHASES:
            subscription = self._subscriptions.get(type_url)
            if subscription is None:
                continue
            resources = snapshot.of(type_url)
            if subscription.begin_shared(type_url, resources, part):
                if subscription.nonce:
                    return None
                return self._made(subscription, type_url, subscription.next_shared().content())
            names = subscription.pending(resources, part)
            unanswered = subscription.wildcard and not subscription.answered and part is not _Part.REMOVALS
            if not names and not unanswered:
                continue
            if subscription.nonce:
                return None  # nothing later may overtake this type
            return self._respond(type_url, subscription, resources, names)
        return None

    def _acknowledge(self, subscription: _Subscription, request: DeltaDiscoveryRequest) -> Nack | None:
        if request.response_nonce != subscription.nonce or subscription.in_flight is None:
            return None  # answers a response of an earlier stream
        flight, subscription.in_flight, subscription.nonce = subscription.in_flight, None, ""
        if not request.HasField("error_detail"):
            subscription.alone.difference_update(flight.versions)
            return None
        subscription.leave_shared()
        reason = request.error_detail.message[:MAX_NACK_TEXT]
        for name, version in flight.versions.items():
            if len(flight.versions) == 1:
                subscription.refused[name], subscription.reasons[name] = version, reason
                subscription.alone.discard(name)
            else:
                subscription.alone.add(name)
            subscription.held.put(name, flight.was(name))
        subscription.settled = None
        return Nack(request.type_url, tuple(sorted(flight.versions)), reason)

    def _subscribe(self, subscription: _Subscription, request: DeltaDiscoveryRequest) -> None:
        if not request.resource_names_subscribe and not request.resource_names_unsubscribe:
            return
        subscription.leave_shared()
        first = not subscription.answered and bool(request.initial_resource_versions)
        for name in request.resource_names_subscribe:
            if len(name) > MAX_NAME_LENGTH:
                raise ProtocolError(f"a resource name of {len(name)} characters", where=f"{request.type_url} request")
            if name == WILDCARD:
                subscription.wildcard = True
                continue
            subscription.names.add(name)
            if not first:
                self._tell_again(subscription, name)  # whoever subscribes again wants it sent again
        for name in request.resource_names_unsubscribe:
            if name == WILDCARD:
                subscription.wildcard = False
                in_flight = subscription.in_flight.versions if subscription.in_flight is not None else {}
                for dropped in subscription.held.names().union(in_flight) - subscription.names:
                    self._forget(subscription, dropped)
                subscription.held.keep_only(subscription.names)
            elif name in subscription.names:
                subscription.names.discard(name)
                if subscription.wildcard:
                    self._tell_again(subscription, name)
                else:
                    self._forget(subscription, name)
        if len(subscription.names) > MAX_NAMES:
            raise ProtocolError(f"more than {MAX_NAMES} resource names", where=f"{request.type_url} request")
        subscription.settled = None

    def _tell_again(self, subscription: _Subscription, name: str) -> None:
        subscription.held.put(name, UNSURE)
        subscription.forgive(name)
        if subscription.in_flight is not None and name in subscription.in_flight.versions:
            subscription.in_flight.before[name] = UNSURE

    def _forget(self, subscription: _Subscription, name: str) -> None:
        """The client drops what it no longer subscribes to."""
        subscription.held.put(name, None)
        subscription.forgive(name)
        if subscription.in_flight is not None and name in subscription.in_flight.versions:
            subscription.in_flight.before[name] = None

    def _respond(self, type_url: str, subscription: _Subscription, resources: Resources, names: list[str]) -> Response:
        versions: dict[str, str] = {}
        flight = subscription.in_flight = _Flight(versions, NOTHING)
        size = 0
        for name in names:
            resource = resources.get(name)
            size += size_of(type_url, name, resource)
            lonely = name in subscription.alone
            if versions and (lonely or size > MAX_RESPONSE_BYTES):
                break
            versions[name] = resource.version if resource is not None else ABSENT
            flight.before[name] = subscription.held.get(name)
            subscription.forgive(name)
            known_absent = resource is None and name in subscription.names
            subscription.held.put(name, resource.version if resource is not None else ABSENT if known_absent else None)
            if lonely:
                break
        return self._made(subscription, type_url, encode(type_url, versions, resources))

    def _made(self, subscription: _Subscription, type_url: str, content: bytes) -> Response:
        self._sent += 1
        subscription.nonce, subscription.answered = str(self._sent), True
        return Response.of(type_url, content, subscription.nonce)
