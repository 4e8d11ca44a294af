"""What each client should hold, and the delta protocol's bookkeeping of what it does hold.

Nothing here awaits or opens: ``DeltaSession`` is the protocol as a state machine, fed with requests and asked for the
next response, so that any sequence of snapshots, subscriptions, ACKs, NACKs and reconnects can be tested as values.

Spec: xDS protocol, "Incremental xDS"; envoy.service.discovery.v3.DeltaDiscoveryRequest and -Response.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from google.protobuf.any_pb2 import Any as AnyMessage

from meshbridge.errors import MeshBridgeError

PREFIX: Final = "type.googleapis.com/"
CLUSTER: Final = PREFIX + "envoy.config.cluster.v3.Cluster"
LOAD_ASSIGNMENT: Final = PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENER: Final = PREFIX + "envoy.config.listener.v3.Listener"
ROUTE: Final = PREFIX + "envoy.config.route.v3.RouteConfiguration"
SECRET: Final = PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"
EXTENSION_CONFIG: Final = PREFIX + "envoy.config.core.v3.TypedExtensionConfig"
POLICY: Final = PREFIX + "meshbridge.agent.v1.Policy"
ADDRESS: Final = PREFIX + "meshbridge.agent.v1.Address"
MESH: Final = PREFIX + "meshbridge.agent.v1.Mesh"
SERVICE: Final = PREFIX + "meshbridge.agent.v1.Service"
ENDPOINT: Final = PREFIX + "meshbridge.agent.v1.Endpoint"
PROBLEM: Final = PREFIX + "meshbridge.agent.v1.Problem"
REVISION: Final = PREFIX + "meshbridge.agent.v1.Revision"

WILDCARD = "*"
MAX_RESPONSE_BYTES = 1 << 20  # well below gRPC's 4 MB, and small enough that a slow client is asked again soon
MAX_NAMES = 100_000
MAX_NAME_LENGTH = 2_048
MAX_NACK_TEXT = 500
RESOURCE_OVERHEAD_BYTES = 96

ABSENT = ""  # the version of a resource that a client knows not to exist
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
class Resource:
    """One serialised message. Equal versions mean equal bodies, also across restarts of the controller."""

    version: str
    body: bytes

    @classmethod
    def of(cls, body: bytes) -> Resource:
        return cls(hashlib.blake2b(body, digest_size=8).hexdigest(), body)


Resources = Mapping[str, Resource]
_NOTHING: Final[Resources] = {}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything one client should hold: by type URL, by name. Unchanged types share their mapping with the last one,
    which is how a session sees without looking that there is nothing to send."""

    types: Mapping[str, Resources] = field(hash=False)

    def of(self, type_url: str) -> Resources:
        return self.types.get(type_url, _NOTHING)


@dataclass(frozen=True, slots=True)
class Nack:
    """A client could not use what it was sent; it keeps what it had."""

    type_url: str
    names: tuple[str, ...]
    message: str


@dataclass(frozen=True, slots=True)
class _Sent:
    version: str
    before: str | None  # what a NACK returns `held` to


@dataclass(slots=True)
class _Subscription:
    wildcard: bool = False
    names: set[str] = field(default_factory=set)
    held: dict[str, str] = field(default_factory=dict)  # what the client has once it has read what is in flight
    refused: dict[str, str] = field(default_factory=dict)  # refused by itself: not sent again in this version
    alone: set[str] = field(default_factory=set)  # refused in company: sent again, each in its own response
    nonce: str = ""  # of the response in flight
    in_flight: dict[str, _Sent] = field(default_factory=dict)
    answered: bool = False
    settled: Resources | None = None  # the resources that nothing was left to send of

    def outdated(self, resources: Resources) -> list[str]:
        """The names whose version, or absence, the client does not know yet and has not refused."""
        held, refused = self.held, self.refused
        if self.wildcard:
            names = [name for name, resource in resources.items() if held.get(name) != resource.version]
            names += [name for name, version in held.items() if name not in resources and version != ABSENT]
            explicit = [name for name in self.names if name not in resources and name not in held]
        else:
            names, explicit = [], list(self.names)
        names += [name for name in explicit if held.get(name) != _version(resources, name)]
        return [name for name in names if refused.get(name) != _version(resources, name)] if refused else names

    def pending(self, resources: Resources, part: _Part) -> list[str]:
        """The names to send, in order of name, those to be sent alone first."""
        if self.settled is resources:
            return []
        names = self.outdated(resources)
        if not names:
            self.settled = resources
        if part is not _Part.BOTH:
            names = [name for name in names if (name not in resources) is (part is _Part.REMOVALS)]
        return sorted(names, key=lambda name: (name not in self.alone, name))


def _version(resources: Resources, name: str) -> str:
    resource = resources.get(name)
    return ABSENT if resource is None else resource.version


class DeltaSession:
    """One delta stream: give it every request, and send what ``next_response`` returns until it returns None.

    At most one response per type is unacknowledged, and each is computed from the newest snapshot when it can be sent:
    a slow client skips the states between. A refused response of several resources is sent again one by one, so that
    a bad resource never keeps a good one away; a resource refused by itself waits until it changes.

    Cost: a response looks at each resource of a changed type once; unchanged types cost nothing.
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
                wildcard=not request.resource_names_subscribe, held=dict(request.initial_resource_versions)
            )
        nack = self._acknowledge(subscription, request) if request.response_nonce else None
        self._subscribe(subscription, request)
        return nack

    def next_response(self, snapshot: Snapshot) -> DeltaDiscoveryResponse | None:
        """The next thing to send towards ``snapshot``; None while there is nothing, or an ACK has to come first."""
        for type_url, part in _PHASES:
            subscription = self._subscriptions.get(type_url)
            if subscription is None:
                continue
            resources = snapshot.of(type_url)
            names = subscription.pending(resources, part)
            unanswered = subscription.wildcard and not subscription.answered and part is not _Part.REMOVALS
            if not names and not unanswered:
                continue
            if subscription.nonce:
                return None  # nothing later may overtake this type
            return self._respond(type_url, subscription, resources, names)
        return None

    def holds(self, type_url: str) -> Mapping[str, str]:
        """What the client holds of a type, by name: versions it acknowledged or was sent and has not refused."""
        subscription = self._subscriptions.get(type_url)
        return {} if subscription is None else {n: v for n, v in subscription.held.items() if v not in (ABSENT, UNSURE)}

    def _acknowledge(self, subscription: _Subscription, request: DeltaDiscoveryRequest) -> Nack | None:
        if request.response_nonce != subscription.nonce:
            return None  # answers a response of an earlier stream
        sent, subscription.in_flight, subscription.nonce = subscription.in_flight, {}, ""
        if not request.HasField("error_detail"):
            subscription.alone.difference_update(sent)
            return None
        for name, was in sent.items():
            if len(sent) == 1:
                subscription.refused[name] = was.version
                subscription.alone.discard(name)
            else:
                subscription.alone.add(name)
            if was.before is None:
                subscription.held.pop(name, None)
            else:
                subscription.held[name] = was.before
        subscription.settled = None
        return Nack(request.type_url, tuple(sorted(sent)), request.error_detail.message[:MAX_NACK_TEXT])

    def _subscribe(self, subscription: _Subscription, request: DeltaDiscoveryRequest) -> None:
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
                for dropped in (subscription.held.keys() | subscription.in_flight) - subscription.names:
                    self._forget(subscription, dropped)
            elif name in subscription.names:
                subscription.names.discard(name)
                if subscription.wildcard:
                    self._tell_again(subscription, name)
                else:
                    self._forget(subscription, name)
        if len(subscription.names) > MAX_NAMES:
            raise ProtocolError(f"more than {MAX_NAMES} resource names", where=f"{request.type_url} request")
        if request.resource_names_subscribe or request.resource_names_unsubscribe:
            subscription.settled = None

    def _tell_again(self, subscription: _Subscription, name: str) -> None:
        subscription.held[name] = UNSURE
        subscription.refused.pop(name, None)
        if name in subscription.in_flight:
            subscription.in_flight[name] = _Sent(subscription.in_flight[name].version, UNSURE)

    def _forget(self, subscription: _Subscription, name: str) -> None:
        """The client drops what it no longer subscribes to."""
        subscription.held.pop(name, None)
        subscription.refused.pop(name, None)
        if name in subscription.in_flight:
            subscription.in_flight[name] = _Sent(subscription.in_flight[name].version, None)

    def _respond(
        self, type_url: str, subscription: _Subscription, resources: Resources, names: list[str]
    ) -> DeltaDiscoveryResponse:
        self._sent += 1
        response = DeltaDiscoveryResponse(type_url=type_url, nonce=str(self._sent))
        size = 0
        for name in names:
            resource = resources.get(name)
            size += RESOURCE_OVERHEAD_BYTES + len(type_url) + len(name) + (len(resource.body) if resource else 0)
            lonely = name in subscription.alone
            if subscription.in_flight and (lonely or size > MAX_RESPONSE_BYTES):
                break
            version = resource.version if resource else ABSENT
            subscription.in_flight[name] = _Sent(version, subscription.held.get(name))
            subscription.refused.pop(name, None)
            if resource is not None:
                response.resources.add(
                    name=name, version=version, resource=AnyMessage(type_url=type_url, value=resource.body)
                )
                subscription.held[name] = resource.version
            else:
                response.removed_resources.append(name)
                if name in subscription.names:
                    subscription.held[name] = ABSENT
                else:
                    subscription.held.pop(name, None)
            if lonely:
                break
        subscription.nonce, subscription.answered = response.nonce, True
        return response
