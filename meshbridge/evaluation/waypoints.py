"""What a waypoint makes of requests to ambient pods behind it.

A waypoint is asked for requests to Services, by clients in ambient; its policies are those attached to it, to its
class, and to the Service.

Spec: istio, ``istio.io/use-waypoint``; ISTIO.md §a, "Selection".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from meshbridge.evaluation.mesh import Facts, mesh_verdict_on
from meshbridge.identity.model import Workload
from meshbridge.policy.baseline import Guard, MeshVerdict
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import (
    GATEWAY_API,
    WAYPOINT_CLASS,
    AuthorizationPolicy,
    EffectiveMtls,
    JwtRule,
    MeshSettings,
    RequestAuthentication,
    TargetRef,
)
from meshbridge.policy.model import Verdict
from meshbridge.policy.parse.cluster import Service
from meshbridge.policy.policyset import PolicySet

USE_WAYPOINT: Final = "istio.io/use-waypoint"
USE_WAYPOINT_NAMESPACE: Final = "istio.io/use-waypoint-namespace"

_Attached = TypeVar("_Attached", AuthorizationPolicy, RequestAuthentication)


@dataclass(frozen=True, slots=True)
class Waypoint:
    """A waypoint by the name of its Gateway, which is the name of its service account, too."""

    namespace: str
    name: str

    def principal(self, mesh: MeshSettings) -> str:
        """Whom ztunnel at the destination sees in place of the client."""
        return f"spiffe://{mesh.trust_domain}/ns/{self.namespace}/sa/{self.name}"


def waypoint_of(pod: Workload) -> Waypoint | None:
    """The waypoint that a pod or its namespace names; ``none`` names none."""
    for labels in (pod.labels, pod.namespace_labels):
        name = labels.get(USE_WAYPOINT)
        if name is not None:
            return None if name == "none" else Waypoint(labels.get(USE_WAYPOINT_NAMESPACE, pod.namespace), name)
    return None


def waypoint_guard(
    waypoint: Waypoint, services: Iterable[Service], policies: PolicySet
) -> tuple[Guard, tuple[JwtRule, ...]]:
    """The policies at a waypoint for requests to some Services, and the tokens it takes."""
    behind = frozenset((service.namespace, service.name) for service in services)
    mesh = policies.mesh
    jwt_rules = tuple(
        rule for policy in _attached(policies.request_authentication, waypoint, behind, mesh) for rule in policy.rules
    )
    authorization = tuple(_attached(policies.authorization, waypoint, behind, mesh))
    return Guard(authorization, EffectiveMtls(), (), mesh), jwt_rules


def verdict_through(
    waypoint: Waypoint, reached: Iterable[tuple[Service, int]], policies: PolicySet, ztunnel: Guard, facts: Facts,
    protocol: AppProtocol,
) -> MeshVerdict:  # fmt: skip
    """The verdict at the waypoint, by the Service's port, and then at the destination's ztunnel, as from the waypoint.

    Args:
        reached: the Services that lead to the destination, and by which port of theirs; at least one.
        ztunnel: what guards the destination.
        protocol: what the waypoint takes the Service's port for.
    """
    meant = list(reached)
    guard, jwt_rules = waypoint_guard(waypoint, (service for service, _ in meant), policies)
    first = mesh_verdict_on(guard, jwt_rules, replace(facts, port=meant[0][1]), protocol)
    forwarded = replace(facts.question, principal=waypoint.principal(policies.mesh))
    return _both(first, mesh_verdict_on(ztunnel, (), replace(facts, question=forwarded, source=None), AppProtocol.TCP))


def _both(first: MeshVerdict, second: MeshVerdict) -> MeshVerdict:
    """What two judges in a row say: the stricter, and all who leave it open."""
    if first.verdict is second.verdict is Verdict.NEEDS_L7:
        return replace(first, origins=tuple(sorted({*first.origins, *second.origins})))
    return min(first, second, key=lambda found: found.verdict)


def _attached(
    policies: Iterable[_Attached], waypoint: Waypoint, behind: frozenset[tuple[str, str]], mesh: MeshSettings
) -> Iterable[_Attached]:
    def is_at(policy: _Attached, target: TargetRef) -> bool:
        match target.group, target.kind:
            case "", "Service":
                return (policy.namespace, target.name) in behind
            case group, "Gateway" if group == GATEWAY_API:
                return (policy.namespace, target.name) == (waypoint.namespace, waypoint.name)
            case group, "GatewayClass" if group == GATEWAY_API:
                return policy.namespace == mesh.root_namespace and target.name == WAYPOINT_CLASS
        return False

    return (policy for policy in policies if any(is_at(policy, target) for target in policy.targets))
