"""BypassPolicy and ClusterBypassPolicy: which bypasses may be, what may be lost by them, and what happens otherwise.

They are our own kinds (``meshbridge.io/v1alpha1``); docs/bypass-policies.md is their reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Final

from meshbridge.bypass.guarantees import Guarantee, GuaranteeKind
from meshbridge.bypass.sets import PORTS, IntSet, addresses, union
from meshbridge.bypass.state import RouteKind, Span
from meshbridge.identity.model import IpFamily, IpNetwork, Peer
from meshbridge.policy.model import ANY, Anything, Direction, Document, Origin, Refusal
from meshbridge.policy.parse.labels import kubernetes_requirements
from meshbridge.policy.parse.parsed import origin_of, spec_of
from meshbridge.policy.parse.reader import Invalid, Reader, shown
from meshbridge.policy.selectors import IS_POD, LabelSource, Requirement, Selector, in_namespace

GROUP: Final = "meshbridge.io"
NAMESPACED: Final = "BypassPolicy"
CLUSTERWIDE: Final = "ClusterBypassPolicy"
KINDS: Final = frozenset({(GROUP, NAMESPACED), (GROUP, CLUSTERWIDE)})
_LONGEST_PORT: Final = 5


class Loss(StrEnum):
    """What a bypass may cost, as a policy accepts it; every guarantee that can be lost is one of these."""

    TELEMETRY = "telemetry"
    ENCRYPTION = "encryption"
    IDENTITY = "identity"
    L7 = "l7"
    REGISTRY_ONLY = "registry-only"


LOSSES: Final[Mapping[GuaranteeKind, Loss]] = {
    GuaranteeKind.PEER_CERTIFICATE: Loss.IDENTITY,
    GuaranteeKind.SERVER_CERTIFICATE: Loss.IDENTITY,
    GuaranteeKind.ENCRYPTION: Loss.ENCRYPTION,
    GuaranteeKind.AUTHORIZATION: Loss.L7,
    GuaranteeKind.CUSTOM: Loss.L7,
    GuaranteeKind.JWT: Loss.L7,
    GuaranteeKind.TELEMETRY: Loss.TELEMETRY,
    GuaranteeKind.REGISTRY_ONLY: Loss.REGISTRY_ONLY,
    GuaranteeKind.REFUSED_POLICY: Loss.L7,
}
"""Under which name a lost guarantee has to be accepted."""

ROUTES: Final[Mapping[str, RouteKind]] = {
    "excludeInboundPorts": RouteKind.EXCLUDE_INBOUND_PORTS,
    "includeInboundPorts": RouteKind.INCLUDE_INBOUND_PORTS,
    "excludeOutboundPorts": RouteKind.EXCLUDE_OUTBOUND_PORTS,
    "includeOutboundPorts": RouteKind.INCLUDE_OUTBOUND_PORTS,
    "excludeOutboundIPRanges": RouteKind.EXCLUDE_OUTBOUND_RANGES,
    "includeOutboundIPRanges": RouteKind.INCLUDE_OUTBOUND_RANGES,
    "excludeInterfaces": RouteKind.EXCLUDE_INTERFACES,
    "interceptionModeNone": RouteKind.MODE_NONE,
    "ipv6": RouteKind.IPV6,
    "ambientBypassInboundCapture": RouteKind.AMBIENT,
}
"""The routes a policy can allow. Missing or foreign rules are no route: nobody asked for them."""


class Mode(IntEnum):
    """Whether the compensation drops, or lets pass and counts; the higher is the stricter."""

    AUDIT = 0
    ENFORCE = 1


class Otherwise(IntEnum):
    """What happens to a bypass that is not allowed, or loses what nobody accepted; the higher is the stricter.

    All three are compensated: ``WARN`` is said to whoever applies the pod, ``DENY`` refuses the pod at admission.
    """

    COMPENSATE = 0
    WARN = 1
    DENY = 2


class Mending(IntEnum):
    """Who applies what mends half a bypass; the higher is the stricter."""

    APPLY = 0
    """The controller, where the bypass is allowed and nothing is lost that nobody accepted."""
    ADVISE = 1


@dataclass(frozen=True, slots=True)
class AllowedRoute:
    """A route round the sidecar that may be: ``networks`` are destinations, and mean nothing inbound."""

    direction: Direction
    kinds: Anything | frozenset[RouteKind] = ANY
    ports: IntSet = PORTS
    networks: Anything | tuple[IpNetwork, ...] = ANY

    def allows(self, span: Span, ports: IntSet) -> bool:
        """Whether these ports of a bypass take this route, to the last flow."""
        if span.direction is not self.direction or ports - self.ports:
            return False
        if not isinstance(self.kinds, Anything) and span.route.kind not in self.kinds:
            return False
        if self.direction is Direction.INGRESS or isinstance(self.networks, Anything):
            return True
        return not span.box.destination - addresses(*(n for n in self.networks if IpFamily.of(n) is span.family))


EVERY_ROUTE: Final = tuple(AllowedRoute(direction) for direction in Direction)


@dataclass(frozen=True, slots=True)
class BypassPolicy:
    """One policy. ``require_node_encryption``: lost encryption is accepted only where something is said to encrypt
    between nodes. ``until`` ends what it accepts, and an audit, but not what it allows; ``proof``: the agent is to
    probe. ``uid`` and ``generation`` are the API server's; what a file says has none."""

    origin: Origin
    subject: Selector
    mode: Mode = Mode.ENFORCE
    routes: tuple[AllowedRoute, ...] = EVERY_ROUTE
    accept: frozenset[Loss] = frozenset()
    until: datetime | None = None
    reason: str = ""
    otherwise: Otherwise = Otherwise.WARN
    proof: bool = False
    fix: Mending = Mending.ADVISE
    readiness_gate: bool = False
    require_node_encryption: bool = False
    refusal: Refusal | None = field(default=None, compare=False)
    uid: str = ""
    generation: int = 0

    def accepted(self, now: datetime, *, encrypted: bool = True) -> frozenset[Loss]:
        """``encrypted``: something is said to encrypt what the pod exchanges with other nodes."""
        if self.is_expired(now):
            return frozenset()
        return self.accept - {Loss.ENCRYPTION} if self.require_node_encryption and not encrypted else self.accept

    def mode_at(self, now: datetime) -> Mode:
        """``ENFORCE`` once it has expired: what nobody accepts any more is not left open either."""
        return Mode.ENFORCE if self.is_expired(now) else self.mode

    def is_expired(self, now: datetime) -> bool:
        return self.until is not None and now >= self.until


@dataclass(frozen=True, slots=True)
class Ruling:
    """What the policies make of one bypass.

    ``allowed`` False: policies select the pod and none allows the route. ``unaccepted`` are the guarantees lost that
    nobody accepted; ``otherwise`` says what therefore happens, None: nothing is to be objected to. ``fix``: the
    controller is to apply what mends connections that break because of it.
    """

    mode: Mode = Mode.ENFORCE
    allowed: bool = True
    unaccepted: tuple[Guarantee, ...] = ()
    otherwise: Otherwise | None = None
    policies: tuple[Origin, ...] = ()
    notes: tuple[str, ...] = ()
    proof: bool = False
    fix: bool = False


@dataclass(frozen=True, slots=True)
class BypassPolicies:
    """Every BypassPolicy there is, and the time by which they are read."""

    policies: tuple[BypassPolicy, ...]
    now: datetime

    @classmethod
    def of(cls, documents: Iterable[Document], now: datetime) -> BypassPolicies:
        """Those among ``documents``, in an order that does not depend on theirs."""
        found = (parse_bypass_policy(document) for document in documents if is_bypass_policy(document))
        return cls(tuple(sorted(found, key=lambda policy: policy.origin)), now)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(policy.refusal for policy in self.policies if policy.refusal is not None)

    @property
    def next_change(self) -> datetime | None:
        """When they next mean something else by themselves, as one expires; None: never."""
        return min((p.until for p in self.policies if p.until is not None and p.until > self.now), default=None)

    @property
    def asks_for_proof(self) -> bool:
        return any(policy.proof for policy in self.policies)

    def selecting(self, peer: Peer) -> tuple[BypassPolicy, ...]:
        """Those that select a pod, or were refused and may select it."""
        return tuple(policy for policy in self.policies if policy.subject.matches(peer))

    def ruling(
        self, peer: Peer, span: Span, ports: IntSet, lost: Iterable[Guarantee], *, encrypted: bool = False
    ) -> Ruling:
        """What they make of these ports of a bypass of one pod; ``lost`` is what it loses there.

        ``encrypted``: something is said to encrypt between the pod's node and all others.

        Of policies that allow the same route the stricter holds in every respect: what all of them accept is accepted,
        what one of them enforces is enforced.
        """
        missing = tuple(lost)
        selecting = self.selecting(peer)
        if not selecting:
            return Ruling(unaccepted=missing, otherwise=Otherwise.WARN if missing else None)
        allowing = tuple(policy for policy in selecting if any(r.allows(span, ports) for r in policy.routes))
        deciding = allowing or selecting
        by_each = [policy.accepted(self.now, encrypted=encrypted) for policy in deciding]
        accepted = frozenset.intersection(*by_each) if allowing else ()
        unaccepted = tuple(guarantee for guarantee in missing if LOSSES[guarantee.kind] not in accepted)
        refused = any(policy.refusal is not None for policy in selecting)
        may_audit = bool(allowing) and not refused and span.route.kind in ROUTES.values()
        objects = bool(unaccepted) or not allowing or refused
        return Ruling(
            mode=max(policy.mode_at(self.now) for policy in allowing) if may_audit else Mode.ENFORCE,
            allowed=bool(allowing),
            unaccepted=missing if refused else unaccepted,
            otherwise=max(policy.otherwise for policy in (selecting if refused else deciding)) if objects else None,
            policies=tuple(policy.origin for policy in deciding),
            notes=tuple(self._notes(selecting, allowing, encrypted=encrypted)),
            proof=any(policy.proof for policy in deciding),
            fix=not objects and all(policy.fix is Mending.APPLY for policy in deciding),
        )

    def _notes(
        self, selecting: Iterable[BypassPolicy], allowing: tuple[BypassPolicy, ...], *, encrypted: bool
    ) -> Iterable[str]:
        for policy in selecting:
            if policy.refusal is not None:
                yield f"{policy.origin} is not understood, so nothing is accepted here until it is mended"
        for policy in allowing:
            if policy.is_expired(self.now) and policy.accept:
                losses = ", ".join(sorted(policy.accept))
                yield f"{policy.origin} accepted {losses} until {policy.until:%Y-%m-%dT%H:%M:%SZ}, which is over"
        for policy in allowing:
            if policy.require_node_encryption and not encrypted and not policy.is_expired(self.now):
                text = (
                    "the lost encryption is accepted only where something encrypts between nodes, and nothing says so"
                )
                yield f"{policy.origin}: {text} for the pod's node and all others"
        for name, values in (
            ("mode", {policy.mode_at(self.now).name.lower() for policy in allowing}),
            ("accept", {"+".join(sorted(policy.accepted(self.now))) or "nothing" for policy in allowing}),
            ("otherwise", {policy.otherwise.name.lower() for policy in allowing}),
            ("fix", {policy.fix.name.lower() for policy in allowing}),
        ):
            if len(values) > 1:
                names = " and ".join(str(policy.origin) for policy in allowing)
                yield f"{names} contradict each other on {name} ({', '.join(sorted(values))}): the stricter holds"


NO_BYPASS_POLICIES: Final = BypassPolicies((), datetime.min.replace(tzinfo=UTC))


def is_bypass_policy(document: Document) -> bool:
    return (document.api_version.rpartition("/")[0], document.kind) in KINDS


def parse_bypass_policy(document: Document) -> BypassPolicy:
    """One policy. A refused one allows no route, accepts nothing and denies: nothing is loosened by what is not read.

    It stands for every pod it may select: its selector where that much was understood, else its namespace.
    """
    try:
        if document.fault:
            raise Invalid("", document.fault, "keep one definition")
        policy = _policy(document)
    except Exception as raised:
        error = Invalid.of(raised)
        refusal = Refusal(document, error.reason, error.path, error.fix)
        subject = _reach(document)
        policy = BypassPolicy(refusal.origin, subject, routes=(), otherwise=Otherwise.DENY, refusal=refusal)
    return replace(policy, uid=document.uid, generation=generation_of(document))


def generation_of(document: Document) -> int:
    """Which writing of its spec an object is, as the API server counts; 0 where nobody does."""
    metadata = document.data.get("metadata")
    generation = metadata.get("generation") if isinstance(metadata, Mapping) else None
    return generation if type(generation) is int and 0 <= generation < 1 << 63 else 0


def _policy(document: Document) -> BypassPolicy:
    clusterwide = document.kind == CLUSTERWIDE
    known = (
        "selector", "mode", "routes", "accept", "until", "reason", "otherwise", "proof", "readinessGate", "fix",
        "requireNodeEncryption",
    )  # fmt: skip
    spec = Reader(spec_of(document), "spec").fields(*known, *(("namespaceSelector",) if clusterwide else ()))
    until = _until(spec["until"]) if "until" in spec else None
    accept = frozenset(Loss(item.text(list(Loss))) for item in spec["accept"].items()) if "accept" in spec else None
    reason = spec["reason"].text() if "reason" in spec else ""
    if accept and not reason:
        Reader(None, "spec.reason").refuse("a loss is accepted without a reason", "write why, for whoever reads it")
    if until is not None and not accept:
        spec["until"].refuse("ends the acceptance of losses, and none is accepted", "write accept, or delete until")
    proof = spec["proof"].boolean() if "proof" in spec else False
    gate = spec["readinessGate"].boolean() if "readinessGate" in spec else False
    if gate and not proof:
        spec["readinessGate"].refuse("waits for a proof, and none is asked for", "write proof: true")
    encryption = "requireNodeEncryption" in spec and spec["requireNodeEncryption"].boolean()
    if encryption and Loss.ENCRYPTION not in (accept or ()):
        spec["requireNodeEncryption"].refuse(
            "is a condition of accepting lost encryption, which is not accepted",
            "add encryption to accept, or delete it",
        )
    return BypassPolicy(
        origin_of(document, ""),
        Selector.of(_subject(spec, document)),
        Mode[spec["mode"].text([mode.name.lower() for mode in Mode]).upper()] if "mode" in spec else Mode.ENFORCE,
        tuple(_route(item) for item in spec["routes"].items()) if "routes" in spec else EVERY_ROUTE,
        accept or frozenset(),
        until,
        reason,
        _otherwise(spec["otherwise"]) if "otherwise" in spec else Otherwise.WARN,
        proof,
        Mending[spec["fix"].text([choice.name.lower() for choice in Mending]).upper()]
        if "fix" in spec
        else Mending.ADVISE,
        readiness_gate=gate,
        require_node_encryption=encryption,
    )


def _subject(spec: Mapping[str, Reader], document: Document) -> list[Requirement]:
    found = [IS_POD if document.kind == CLUSTERWIDE else in_namespace(document.namespace)]
    if "selector" in spec:
        found += kubernetes_requirements(spec["selector"])
    if "namespaceSelector" in spec:
        found += kubernetes_requirements(spec["namespaceSelector"], LabelSource.NAMESPACE_LABEL)
    return found


def _reach(document: Document) -> Selector:
    """Whom a refused policy may select."""
    written = document.data.get("spec")
    fields = written if isinstance(written, Mapping) else {}
    spec = {name: Reader(fields[name], f"spec.{name}") for name in ("selector", "namespaceSelector") if name in fields}
    try:
        return Selector.of(_subject(spec, document))
    except Exception:
        return Selector.of(_subject({}, document))


def _otherwise(at: Reader) -> Otherwise:
    return Otherwise[at.text([choice.name.lower() for choice in Otherwise]).upper()]


def _until(at: Reader) -> datetime:
    text = at.text()
    try:
        until = datetime.fromisoformat(text)
        moment = until.astimezone(UTC)
    except (ValueError, OverflowError):
        at.refuse(f"{shown(text)} is no time", "write it as RFC 3339, e.g. 2027-06-30T00:00:00Z")
    if until.tzinfo is None:
        at.refuse(f"{shown(text)} has no time zone", "end it with Z")
    return moment


def _route(at: Reader) -> AllowedRoute:
    fields = at.fields("direction", "kinds", "ports", "destinations")
    if "direction" not in fields:
        at.refuse("has no direction", "write direction: inbound or outbound")
    outbound = fields["direction"].text(("inbound", "outbound")) == "outbound"
    if "destinations" in fields and not outbound:
        fields["destinations"].refuse("belongs to outbound routes", "delete it, or write direction: outbound")
    kinds: Anything | frozenset[RouteKind] = ANY
    if "kinds" in fields:
        kinds = frozenset(ROUTES[item.text(list(ROUTES))] for item in fields["kinds"].items(1))
    return AllowedRoute(
        Direction.EGRESS if outbound else Direction.INGRESS,
        kinds,
        union(_ports(item) for item in fields["ports"].items(1)) if "ports" in fields else PORTS,
        tuple(item.network(bare_address=True) for item in fields["destinations"].items(1))
        if "destinations" in fields
        else ANY,
    )


def _ports(at: Reader) -> IntSet:
    """A port, or ``first-last``."""
    if isinstance(at.value, int) and not isinstance(at.value, bool):
        return IntSet.of(at.integer(1, 65535))
    first, dash, last = at.text().partition("-")
    texts = (first, last if dash else first)
    numbers = [int(text) for text in texts if text.isascii() and text.isdigit() and len(text) <= _LONGEST_PORT]
    if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1] <= 65535:
        at.refuse(f"{shown(at.value)} is no port and no range", 'write 8080 or "9000-9099"')
    return IntSet.of((numbers[0], numbers[1]))
