"""The mesh's policies as values: AuthorizationPolicy, PeerAuthentication, RequestAuthentication.

A rule is kept as it was written, a formula over conditions. Two readers evaluate it: the kernel's compiler in three
values on what a packet shows (``lowering.py``), the ext_authz server in two on the whole request (``l7.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from ipaddress import ip_network
from typing import Any, Final

from meshbridge.identity.model import DEFAULT_CLUSTER, DEFAULT_TRUST_DOMAIN, IpNetwork, Peer, ProxyClass
from meshbridge.policy.model import Origin
from meshbridge.policy.selectors import EVERYBODY, Selector

GATEWAY_LABEL = "gateway.networking.k8s.io/gateway-name"
OUR_PROVIDER: Final = "meshbridge"
"""The name under which the mesh knows our ext_authz server."""

GATEWAY_API = "gateway.networking.k8s.io"
WAYPOINT_CLASS = "istio-waypoint"


class ProviderKind(StrEnum):
    """What an extension provider is to a CUSTOM policy."""

    GRPC = "envoyExtAuthzGrpc"
    HTTP = "envoyExtAuthzHttp"
    UNUSABLE = "unusable"


class PathNormalization(StrEnum):
    """What Envoy does to a path before anybody judges it; each does what those before it do."""

    NONE = "NONE"
    BASE = "BASE"
    MERGE_SLASHES = "MERGE_SLASHES"
    DECODE_AND_MERGE_SLASHES = "DECODE_AND_MERGE_SLASHES"


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """What the mesh's own configuration says; the same for every workload.

    ``providers`` are the CUSTOM providers the mesh defines, None where nobody has said: then any name may be one.
    ``trusted_proxies`` are those before a gateway whose x-forwarded-for counts. ``interception`` is how sidecars
    capture where a pod does not say. ``own_sidecars``: MeshBridge configures the sidecars, not istiod; they know
    addresses, and no registry.
    """

    root_namespace: str = "istio-system"
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    trust_domain_aliases: tuple[str, ...] = ()
    cluster: str = DEFAULT_CLUSTER
    providers: tuple[tuple[str, ProviderKind], ...] | None = None
    path_normalization: PathNormalization = PathNormalization.BASE
    registry_only: bool = False
    auto_mtls: bool = True
    trusted_proxies: int = 0
    interception: str = "REDIRECT"
    own_sidecars: bool = False

    def provider(self, name: str) -> ProviderKind | None:
        """What a provider is; None where nobody has said which there are."""
        if name == OUR_PROVIDER:
            return ProviderKind.GRPC
        return None if self.providers is None else dict(self.providers).get(name, ProviderKind.UNUSABLE)

    def asks(self, name: str) -> bool:
        """Whether sidecars ask this provider themselves: Istio's do, ours have no filter for anybody else's."""
        return not self.own_sidecars and self.provider(name) in (ProviderKind.GRPC, ProviderKind.HTTP)


DEFAULT_MESH: Final = MeshSettings()
"""Istio's defaults."""


class Action(StrEnum):
    ALLOW = "ALLOW"
    DENY = "DENY"
    AUDIT = "AUDIT"
    CUSTOM = "CUSTOM"


class Attribute(StrEnum):
    """What a condition asks about; the names are Istio's."""

    PRINCIPALS = "source.principal"
    NAMESPACES = "source.namespace"
    SERVICE_ACCOUNTS = "source.serviceAccount"
    TRUST_DOMAINS = "source.trustDomain"
    IP_BLOCKS = "source.ip"
    REMOTE_IP_BLOCKS = "remote.ip"
    REQUEST_PRINCIPALS = "request.auth.principal"
    AUDIENCES = "request.auth.audiences"
    PRESENTER = "request.auth.presenter"
    CLAIM = "request.auth.claims"
    HEADER = "request.headers"
    METHODS = "methods"
    HOSTS = "hosts"
    PATHS = "paths"
    PORTS = "destination.port"
    DESTINATION_IP = "destination.ip"
    SNI = "connection.sni"
    METADATA = "experimental.envoy.filters"


IDENTITY = frozenset({Attribute.PRINCIPALS, Attribute.NAMESPACES, Attribute.SERVICE_ACCOUNTS, Attribute.TRUST_DOMAINS})
"""What only a verified certificate answers."""

HTTP_ONLY = frozenset(
    {
        Attribute.REQUEST_PRINCIPALS,
        Attribute.AUDIENCES,
        Attribute.PRESENTER,
        Attribute.CLAIM,
        Attribute.HEADER,
        Attribute.METHODS,
        Attribute.HOSTS,
        Attribute.PATHS,
    }
)
"""What a TCP connection does not have. On a TCP filter chain an ALLOW rule with one of these is dropped, a DENY rule
loses the condition and gets wider (ISTIO.md §a, "HTTP-only on TCP")."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One attribute: some of ``values`` (none written: any) and none of ``not_values``.

    ``key`` is the header's name, the claim's path (several names of a nested claim follow each other), or the filter
    whose metadata is asked for and the key in it, which nobody but Envoy ever knows.
    """

    attribute: Attribute
    values: tuple[str, ...] = ()
    not_values: tuple[str, ...] = ()
    key: tuple[str, ...] = ()


@lru_cache(maxsize=4096)
def network_of(value: str) -> IpNetwork:
    """The CIDR in a condition's value, which the parser has already checked."""
    return ip_network(value)


Clause = tuple[Condition, ...]
"""Conditions that must all hold; an empty clause always does."""


@dataclass(frozen=True, slots=True)
class AuthorizationRule:
    """Matches when one clause of ``sources``, one of ``operations`` and all of ``conditions`` do.

    ``from`` or ``to`` that was not written is one empty clause.
    """

    origin: Origin
    sources: tuple[Clause, ...] = ((),)
    operations: tuple[Clause, ...] = ((),)
    conditions: Clause = ()

    @property
    def all_conditions(self) -> tuple[Condition, ...]:
        """Every condition in it, wherever it stands."""
        clauses = (*self.sources, *self.operations, self.conditions)
        return tuple(condition for clause in clauses for condition in clause)


@dataclass(frozen=True, slots=True)
class TargetRef:
    """What a policy is attached to in place of a selector: a Gateway, a GatewayClass, a Service or a ServiceEntry."""

    group: str
    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class AuthorizationPolicy:
    """``selector`` has no namespace in it: whether it reaches beyond its own depends on the root namespace.

    With ``targets`` it concerns gateways and waypoints only. ``dry_run`` of a CUSTOM policy is not harmless: pilot has
    Envoy enforce its rules as a DENY.
    """

    namespace: str
    name: str
    action: Action
    rules: tuple[AuthorizationRule, ...]
    origin: Origin
    selector: Selector = EVERYBODY
    provider: str = ""
    dry_run: bool = False
    targets: tuple[TargetRef, ...] = ()


class MtlsMode(StrEnum):
    UNSET = "UNSET"
    DISABLE = "DISABLE"
    PERMISSIVE = "PERMISSIVE"
    STRICT = "STRICT"


@dataclass(frozen=True, slots=True)
class PeerAuthentication:
    """``selector`` None: it concerns the namespace, or the mesh when it stands in the root namespace.

    ``for_bypass``: a fix of ours made it, so that clients send plaintext to ports that the server's Envoy does not see;
    it says nothing of who was to be let in there.
    """

    namespace: str
    name: str
    mode: MtlsMode
    origin: Origin
    selector: Selector | None = None
    port_modes: Mapping[int, MtlsMode] = field(default_factory=dict, hash=False)
    created: str = ""
    for_bypass: bool = False


@dataclass(frozen=True, slots=True)
class JwtLocation:
    """Where a token is looked for: a header with a prefix to cut off, a query parameter, or a cookie."""

    header: str = ""
    prefix: str = ""
    parameter: str = ""
    cookie: str = ""


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where a key set is fetched: at ``uri``, or where the discovery document at ``uri`` says."""

    uri: str
    discovers: bool
    timeout_s: float


@dataclass(frozen=True, slots=True)
class JwtRule:
    """Tokens of one issuer, or of any where it is empty. ``jwks`` is the key set as JSON text.

    Without ``jwks`` it is fetched from ``jwks_uri``, or else from where the issuer says. No ``locations`` means
    ``authorization: Bearer`` and the query parameter ``access_token``. ``space_delimited`` are claims whose words
    policies ask for, besides scope and permission.
    """

    issuer: str
    origin: Origin
    jwks: str = ""
    jwks_uri: str = ""
    audiences: tuple[str, ...] = ()
    locations: tuple[JwtLocation, ...] = ()
    output_payload_to_header: str = ""
    output_claims_to_headers: tuple[tuple[str, str], ...] = ()
    forward_original_token: bool = False
    timeout_s: float = 5.0
    space_delimited: tuple[str, ...] = ()

    @property
    def key_source(self) -> KeySource | None:
        """Where its keys are fetched; None: they stand in the rule, or nothing says where they are."""
        if self.jwks:
            return None
        if self.jwks_uri:
            return KeySource(self.jwks_uri, False, self.timeout_s)
        if not self.issuer.startswith(("https://", "http://")):
            return None
        return KeySource(f"{self.issuer.removesuffix('/')}/.well-known/openid-configuration", True, self.timeout_s)

    def as_policies_see(self, claims: Claims) -> Claims:
        """Claims that are lists of words in one text as lists, as jwt_authn leaves them for policies."""
        texts = {name: value for name in self.space_delimited if isinstance(value := claims.get(name), str)}
        return {**claims, **{name: value.split(" ") for name, value in texts.items()}} if texts else claims


@dataclass(frozen=True, slots=True)
class RequestAuthentication:
    """Valid tokens tell who asks, an invalid one refuses the request, none at all refuses nothing."""

    namespace: str
    name: str
    rules: tuple[JwtRule, ...]
    origin: Origin
    selector: Selector = EVERYBODY
    targets: tuple[TargetRef, ...] = ()


def selects(policy: AuthorizationPolicy | RequestAuthentication, peer: Peer, mesh: MeshSettings) -> bool:
    """Whether a workload is selected: in the policy's own namespace, or in any by a policy of the root namespace.

    A gateway is selected by a target of its name, or by labels; a waypoint by targets alone, a sidecar by labels alone.
    What is attached to a Service concerns a waypoint only for requests to that Service, so it does not select it here.

    Spec: ISTIO.md §a, "Selection"; istio, pilot/pkg/model/policyattachment.go.
    """
    if policy.namespace not in (mesh.root_namespace, peer.namespace):
        return False
    if not policy.targets:
        return peer.proxy is not ProxyClass.WAYPOINT and policy.selector.matches(peer)
    gateway = peer.labels.get(GATEWAY_LABEL)
    return gateway is not None and any(_is_target(target, gateway, policy, peer, mesh) for target in policy.targets)


def _is_target(
    target: TargetRef,
    gateway: str,
    policy: AuthorizationPolicy | RequestAuthentication,
    peer: Peer,
    mesh: MeshSettings,
) -> bool:
    if target.group != GATEWAY_API:
        return False
    if target.kind == "GatewayClass":
        is_root = policy.namespace == mesh.root_namespace
        return is_root and peer.proxy is ProxyClass.WAYPOINT and target.name == WAYPOINT_CLASS
    return target.kind == "Gateway" and target.name == gateway and policy.namespace == peer.namespace


Scopes = tuple[PeerAuthentication | None, PeerAuthentication | None, PeerAuthentication | None]
"""The one that counts of the mesh, of a namespace and of a workload."""


def scopes_of(policies: tuple[PeerAuthentication, ...], peer: Peer, mesh: MeshSettings) -> Scopes:
    """Of each scope the oldest, of those of one age the first by name; selectors in the root namespace are ignored.

    Spec: ISTIO.md §b.
    """
    own = peer.namespace if peer.namespace != mesh.root_namespace else None
    scopes: list[PeerAuthentication | None] = [None, None, None]
    for policy in sorted(policies, key=lambda p: (p.created or "9", p.namespace, p.name), reverse=True):
        if policy.selector is None and policy.namespace == mesh.root_namespace:
            scopes[0] = policy
        elif policy.selector is None and policy.namespace == own:
            scopes[1] = policy
        elif policy.selector is not None and policy.namespace == own and policy.selector.matches(peer):
            scopes[2] = policy
    return scopes[0], scopes[1], scopes[2]


def effective_mtls(policies: tuple[PeerAuthentication, ...], peer: Peer, mesh: MeshSettings) -> EffectiveMtls:
    """The mode of each port at a sidecar: workload over namespace over mesh; UNSET inherits.

    Spec: ISTIO.md §b.
    """
    mode, origin = MtlsMode.PERMISSIVE, None
    ports: dict[int, tuple[MtlsMode, Origin]] = {}
    for policy in scopes_of(policies, peer, mesh):
        if policy is None:
            continue
        if policy.mode is not MtlsMode.UNSET:
            mode, origin = policy.mode, policy.origin
        if policy.selector is not None:
            written = policy.port_modes.items()
            ports = {port: (at_port, policy.origin) for port, at_port in written if at_port is not MtlsMode.UNSET}
    return EffectiveMtls(mode, origin, ports)


@dataclass(frozen=True, slots=True)
class EffectiveMtls:
    """What a workload's inbound listener demands; ``ports`` are the exceptions to ``mode``."""

    mode: MtlsMode = MtlsMode.PERMISSIVE
    origin: Origin | None = None
    ports: Mapping[int, tuple[MtlsMode, Origin]] = field(default_factory=dict, hash=False)

    def at(self, port: int) -> tuple[MtlsMode, Origin | None]:
        """The mode of one workload port, and the policy that set it; None when it is the default."""
        return self.ports.get(port, (self.mode, self.origin))


Claims = Mapping[str, Any]
"""The payload of a verified token."""
