"""The typed policy model: what every policy kind is parsed into and every consumer reads.

"any" and "nothing" are different values everywhere (``ANY`` is an instance, nothing is an empty tuple): most known
policy traps are a confusion of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Final

from meshbridge.identity.model import Entity, IpFamily, IpNetwork
from meshbridge.policy.selectors import PeerSelector, Reference, Selector


class Verdict(IntEnum):
    """Kleene's strong three values, ordered so that AND is ``min`` and OR is ``max``."""

    DENY = 0
    NEEDS_L7 = 1
    ALLOW = 2

    def __invert__(self) -> Verdict:
        return Verdict(2 - self)


class Direction(IntEnum):
    """Seen from the endpoint; numbers as in bpf/abi.h."""

    INGRESS = 0
    EGRESS = 1


class Layer(IntEnum):
    """Which family of policies; a packet has to pass both. Numbers as in bpf/abi.h, ``enum policy_layer``."""

    NETWORK = 0
    MESH = 1


class Judge(StrEnum):
    """Who gives the answer a NEEDS_L7 leaves open."""

    ENVOY = "envoy"
    EXT_AUTHZ = "ext_authz"


@dataclass(frozen=True, slots=True)
class Source:
    """Where an object was read: a file and the line of each path in it (``spec.ingress[0]``); empty: the API server."""

    file: str = ""
    lines: Mapping[str, int] = field(default_factory=dict, hash=False, compare=False)

    def line(self, path: str) -> int:
        """The line of ``path`` or of the nearest parent that has one; 0 when the object came from no file."""
        while path and path not in self.lines:
            cut = max(path.rfind("."), path.rfind("["))
            path = path[:cut] if cut > 0 else ""
        return self.lines.get(path, 0)


@dataclass(frozen=True, slots=True)
class Document:
    """One Kubernetes object as it was written; the last place where raw dicts are allowed.

    A document with a ``fault`` (its source defines the object twice) is refused for that reason, whatever it says.
    """

    kind: str
    api_version: str
    namespace: str
    name: str
    data: Mapping[str, Any] = field(hash=False)
    source: Source = Source()
    uid: str = ""
    fault: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes it the same object: API group, kind, namespace, name."""
        return (self.api_version.rpartition("/")[0], self.kind, self.namespace, self.name)

    def __str__(self) -> str:
        place = f" ({self.source.file}:{self.source.line('')})" if self.source.file else ""
        return f"{self.kind} {f'{self.namespace}/' if self.namespace else ''}{self.name}{place}"


REFUSED: Final = "refused"
"""In place of a rule: what follows from an object that is not understood."""


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """The rule a verdict comes from; what ``monitor``, ``explain`` and every drop show.

    ``tier`` is set where the kind alone does not say that it comes before or after all others.
    """

    kind: str
    namespace: str
    name: str
    rule: str = ""
    file: str = ""
    line: int = 0
    tier: str = ""

    @property
    def policy(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name

    def __str__(self) -> str:
        rule = f" {self.rule}" if self.rule else ""
        tier = f" in the {self.tier} tier" if self.tier else ""
        place = f" ({self.file}:{self.line})" if self.file else ""
        return f"{self.kind} {self.policy}{rule}{tier}{place}"

    def record(self) -> dict[str, Any]:
        """It as plain data for JSON, without the tier; the keys are stable."""
        return {
            "kind": self.kind,
            "namespace": self.namespace,
            "name": self.name,
            "rule": self.rule,
            "file": self.file,
            "line": self.line,
        }


class Anything:
    """The whole universe of a dimension."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "ANY"

    def __reduce__(self) -> str:
        return "ANY"


ANY: Final = Anything()


@dataclass(frozen=True, slots=True)
class PortMatch:
    """Destination ports, seen at the pod. ``protocol`` 0 is any; ``first``..``last`` inclusive, 0..65535 is every port.

    ``name`` is a container port name, resolved per destination pod; then first and last are not used.
    For ICMP (1) and ICMPv6 (58) the port is the type.
    """

    protocol: int = 0
    first: int = 0
    last: int = 65535
    name: str = ""


class Tier(IntEnum):
    """First match by tier, then priority; numbers as in Cilium."""

    ADMIN = 100
    NORMAL = 200
    BASELINE = 250
    DEFAULT = 255


@dataclass(frozen=True, slots=True)
class HttpMatch:
    """One element of a CiliumNetworkPolicy's ``rules.http``: every field that is set must match.

    ``method``, ``path`` and ``host`` are regular expressions that must match as a whole; ``headers`` are
    (lower-case name, required value or None when presence is enough).
    """

    method: str = ""
    path: str = ""
    host: str = ""
    headers: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkRule:
    """One rule of the network family, whatever kind it was written in.

    ``peers`` is ANY, or a tuple of which one must match: an empty tuple is nobody. ``ports`` likewise. A rule with
    ``default_deny`` isolates what ``subject`` selects in ``direction``, also when it allows nobody. ``http`` not empty:
    the verdict is NEEDS_L7, judged by ext_authz.

    In the tiers ADMIN and BASELINE the first match decides: by ``priority``, then ``order`` within the object. What a
    rule that ``passes`` covers leaves its tier undecided there, so it has no verdict of its own.

    ``references`` are further peers, as it was parsed; in a ``PolicySet`` they are among ``peers``.
    """

    subject: Selector
    direction: Direction
    verdict: Verdict
    peers: Anything | tuple[PeerSelector, ...]
    ports: Anything | tuple[PortMatch, ...]
    origin: Origin
    default_deny: bool = True
    tier: Tier = Tier.NORMAL
    priority: int = 0
    http: tuple[HttpMatch, ...] = ()
    order: int = 0
    passes: bool = False
    references: tuple[Reference, ...] = ()


class Severity(StrEnum):
    """How much attention something wants that is in force as it was written."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about a valid object that its author probably did not mean; it changes no verdict.

    ``code`` is the finding that ``meshbridge analyze`` makes of it, a key of ``analysis.codes.CODES``.
    """

    document: Document
    text: str
    path: str = ""
    severity: Severity = Severity.WARNING
    code: str = ""

    def __str__(self) -> str:
        return _sentence(self.document, self.path, self.text, "")


@dataclass(frozen=True, slots=True)
class Refusal:
    """An object that is not understood, and what therefore holds: see DESIGN, property 4.

    ``selectors`` are the endpoints it may select and ``directions`` what it names; ``layer`` is its family. An object
    that says of itself that it only allows cannot deny what another one allows: then ``may_deny`` is false.
    """

    document: Document
    reason: str
    path: str = ""
    fix: str = ""
    layer: Layer = Layer.NETWORK
    selectors: tuple[Selector, ...] = ()
    directions: frozenset[Direction] = frozenset(Direction)
    may_deny: bool = True

    @property
    def origin(self) -> Origin:
        """What drops that follow from the refusal are attributed to."""
        document = self.document
        line = document.source.line(self.path)
        return Origin(document.kind, document.namespace, document.name, REFUSED, document.source.file, line)

    def __str__(self) -> str:
        return _sentence(self.document, self.path, self.reason, self.fix)


def _sentence(document: Document, path: str, what: str, fix: str) -> str:
    source = document.source
    place = f"{source.file}:{source.line(path)}: " if source.file else ""
    name = f"{document.namespace}/{document.name}" if document.namespace else document.name
    return f"{place}{document.kind} {name}{f' {path}' if path else ''}: {what}{f'; {fix}' if fix else ''}"


@dataclass(frozen=True, slots=True, order=True)
class PolicyKey:
    """A kernel policy-map key without its set id; see bpf/abi.h, ``struct policy_key``.

    ``identity`` 0 is any peer. ``prefix`` 0..16 leading bits of ``port`` under ``protocol``; 17: any protocol.
    """

    identity: int
    layer: Layer
    protocol: int
    port: int
    prefix: int


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """What a matching packet gets. ``origins`` are every rule that says so, sorted; ``judge`` is set for NEEDS_L7."""

    verdict: Verdict
    precedence: int
    origins: tuple[Origin, ...]
    deny_reason: int = 0
    judge: Judge | None = None
    audit: bool = False


@dataclass(frozen=True, slots=True)
class LayerDefault:
    """What holds where no entry matches; ``origins`` are the policies that isolate the endpoint."""

    verdict: Verdict = Verdict.ALLOW
    origins: tuple[Origin, ...] = ()
    deny_reason: int = 0


ALLOWED: Final = LayerDefault()
"""A layer without isolation."""


@dataclass(frozen=True, slots=True)
class PolicyMap:
    """The whole answer for one endpoint, direction and address family: a value, equal when the verdicts are."""

    entries: Mapping[PolicyKey, PolicyEntry] = field(default_factory=dict, hash=False)
    network_default: LayerDefault = ALLOWED
    mesh_default: LayerDefault = ALLOWED

    def default(self, layer: Layer) -> LayerDefault:
        return self.network_default if layer is Layer.NETWORK else self.mesh_default


@dataclass(frozen=True, slots=True)
class EndpointPolicy:
    """A PolicyMap for each (direction, address family) of one endpoint."""

    maps: Mapping[tuple[Direction, IpFamily], PolicyMap] = field(hash=False)

    def map(self, direction: Direction, family: IpFamily) -> PolicyMap:
        return self.maps[direction, family]


__all__ = [
    "ALLOWED", "ANY", "Anything", "Direction", "Document", "EndpointPolicy", "Entity", "HttpMatch", "IpNetwork",
    "Judge", "Layer", "LayerDefault", "NetworkRule", "Notice", "Origin", "PolicyEntry", "PolicyKey", "PolicyMap",
    "PortMatch", "Refusal", "Severity", "Source", "Tier", "Verdict",
]  # fmt: skip
