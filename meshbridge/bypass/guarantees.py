"""What a bypassed port loses: every guarantee the mesh gave there, whether it is kept, weakened or lost, and by what.

An address is weaker than a certificate, so whatever rested on a certificate is at best weakened. What only a request
shows (a method, a token) nobody sees on such a port: rules that need it refuse instead of guessing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from meshbridge.policy.baseline import Guard
from meshbridge.policy.mesh import (
    HTTP_ONLY,
    IDENTITY,
    Action,
    Attribute,
    AuthorizationPolicy,
    AuthorizationRule,
    Condition,
    MtlsMode,
    RequestAuthentication,
)
from meshbridge.policy.model import Origin


class GuaranteeKind(StrEnum):
    """What the mesh gave; the names are stable (JSON)."""

    PEER_CERTIFICATE = "peer-certificate"
    SERVER_CERTIFICATE = "server-certificate"
    ENCRYPTION = "encryption"
    AUTHORIZATION = "authorization"
    CUSTOM = "custom-check"
    JWT = "jwt"
    TELEMETRY = "telemetry"
    REGISTRY_ONLY = "registry-only"
    REFUSED_POLICY = "refused-policy"


class Fate(StrEnum):
    KEPT = "kept"
    WEAKENED = "weakened"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Guarantee:
    """One guarantee: what it was, what became of it, what stands in for it, and the rule it came from."""

    kind: GuaranteeKind
    what: str
    fate: Fate
    stands_in: str
    origin: Origin | None = None


NONE = "nothing"
_L4_UNCERTAIN = HTTP_ONLY | {Attribute.SNI, Attribute.REMOTE_IP_BLOCKS}
_FLOW_EVENTS = "MeshBridge's flow events: addresses, ports, verdicts; no requests, no traces"


def inbound_guarantees(
    guard: Guard, tokens: Iterable[RequestAuthentication], port: int, *, node_encryption: str = ""
) -> tuple[Guarantee, ...]:
    """Every guarantee of an inbound port that Envoy no longer sees.

    Args:
        guard: The mesh policies of the pod.
        tokens: The RequestAuthentications that select it.
        node_encryption: What is said to encrypt between nodes instead (WireGuard, IPsec); "" where nothing is.
    """
    found: list[Guarantee] = []
    mode, origin = guard.mtls.at(port)
    if mode is MtlsMode.STRICT:
        text = "only clients with a certificate of the mesh (STRICT)"
        by_address = "the kernel lets in mesh workloads only, by address, which is weaker"
        found.append(Guarantee(GuaranteeKind.PEER_CERTIFICATE, text, Fate.WEAKENED, by_address, origin))
    elif mode is not MtlsMode.DISABLE:
        text = "clients with a certificate were known by it (PERMISSIVE)"
        found.append(Guarantee(GuaranteeKind.PEER_CERTIFICATE, text, Fate.WEAKENED, "identity by address", origin))
    if mode is not MtlsMode.DISABLE:
        found.append(_encryption(node_encryption))
    found += [
        _authorization(policy, rule)
        for policy in guard.policies
        for rule in policy.rules
        if may_concern(rule, port) and not policy.dry_run
    ]
    found += [_empty(policy) for policy in guard.policies if policy.action is Action.ALLOW and not policy.rules]
    found += [
        Guarantee(
            GuaranteeKind.JWT, f"tokens of {rule.issuer} were checked", Fate.LOST,
            "nothing; a request without a token was let in before, too", rule.origin,
        )
        for authentication in tokens
        for rule in authentication.rules
    ]  # fmt: skip
    found += [
        Guarantee(
            GuaranteeKind.REFUSED_POLICY, f"{refusal.document} is not understood", Fate.KEPT,
            "the port is closed until the policy is mended", refusal.origin,
        )
        for refusal in guard.refusals
    ]  # fmt: skip
    found.append(
        Guarantee(GuaranteeKind.TELEMETRY, "Envoy's metrics, access log and traces", Fate.WEAKENED, _FLOW_EVENTS)
    )
    return tuple(found)


def outbound_guarantees(
    *, destination_drops: bool, registry_only: bool | None = None, node_encryption: str = ""
) -> tuple[Guarantee, ...]:
    """Every guarantee of what a pod sends past its own Envoy.

    Args:
        destination_drops: Some known destination refuses this source on these ports.
        registry_only: outboundTrafficPolicy REGISTRY_ONLY; None: not known.
    """
    found = [
        Guarantee(
            GuaranteeKind.SERVER_CERTIFICATE, "the server's certificate named its service account", Fate.WEAKENED,
            "identity by address",
        ),
        _encryption(node_encryption),
        Guarantee(GuaranteeKind.TELEMETRY, "Envoy's metrics, access log and traces", Fate.WEAKENED, _FLOW_EVENTS),
    ]  # fmt: skip
    if destination_drops:
        text = "destinations' policies decided by the client's certificate"
        stands_in = "what destinations refuse is dropped at the source, by address, and where it arrives"
        found.append(Guarantee(GuaranteeKind.AUTHORIZATION, text, Fate.WEAKENED, stands_in))
    text = "only hosts of the registry were reachable"
    if registry_only:
        by_address = "the kernel, by address; ports of hosts that only DNS knows stay open"
        found.append(Guarantee(GuaranteeKind.REGISTRY_ONLY, text, Fate.WEAKENED, by_address))
    elif registry_only is None:
        text = f"{text}, if the mesh is REGISTRY_ONLY"
        found.append(Guarantee(GuaranteeKind.REGISTRY_ONLY, text, Fate.LOST, NONE))
    return tuple(found)


def _encryption(node_encryption: str) -> Guarantee:
    """Lost in any case: what somebody's object says of the network between nodes is no encryption that was seen."""
    return Guarantee(GuaranteeKind.ENCRYPTION, "mutual TLS", Fate.LOST, node_encryption or NONE)


def may_concern(rule: AuthorizationRule, port: int) -> bool:
    """Whether a rule can match on a port at all: its port conditions leave it open."""
    common = all(_port_holds(condition, port) for condition in rule.conditions)
    return common and any(all(_port_holds(condition, port) for condition in clause) for clause in rule.operations)


def _port_holds(condition: Condition, port: int) -> bool:
    if condition.attribute is not Attribute.PORTS:
        return True
    number = str(port)
    return (not condition.values or number in condition.values) and number not in condition.not_values


def _empty(policy: AuthorizationPolicy) -> Guarantee:
    text = f"{policy.origin} allows nothing"
    return Guarantee(GuaranteeKind.AUTHORIZATION, text, Fate.KEPT, "the kernel drops everything", policy.origin)


def _authorization(policy: AuthorizationPolicy, rule: AuthorizationRule) -> Guarantee:
    asked = {condition.attribute for condition in rule.all_conditions}
    unseen = sorted(attribute.value for attribute in asked & _L4_UNCERTAIN)
    identity = sorted(attribute.value for attribute in asked & IDENTITY)
    text = str(rule.origin)
    kind = GuaranteeKind.AUTHORIZATION
    if policy.action is Action.CUSTOM:
        refused = "refused: its provider is not asked on this port"
        return Guarantee(GuaranteeKind.CUSTOM, text, Fate.LOST, refused, rule.origin)
    if policy.action is Action.AUDIT:
        return Guarantee(GuaranteeKind.TELEMETRY, f"{text} (AUDIT)", Fate.LOST, NONE, rule.origin)
    if unseen and policy.action is Action.ALLOW:
        refused = f"refused: nobody sees {', '.join(unseen)} on this port, so what only this rule allows is dropped"
        return Guarantee(kind, text, Fate.LOST, refused, rule.origin)
    if unseen:
        wider = f"wider: the kernel denies whatever {', '.join(unseen)} may be"
        return Guarantee(kind, text, Fate.KEPT, wider, rule.origin)
    if identity:
        return Guarantee(kind, text, Fate.WEAKENED, f"the kernel, {', '.join(identity)} by address", rule.origin)
    return Guarantee(kind, text, Fate.KEPT, "the kernel", rule.origin)
