"""Where CUSTOM policies of two providers meet at one workload, which makes Istio deny everything there.

Spec: istio, pilot/pkg/security/authz/builder: more than one provider.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from meshbridge.identity.model import Peer
from meshbridge.policy.mesh import Action, AuthorizationPolicy, MeshSettings, selects
from meshbridge.policy.selectors import Selector


@dataclass(frozen=True, slots=True)
class Meeting:
    """Another provider's policy that selects pods of the same. ``certain``: whichever pods there will be, or are."""

    other: AuthorizationPolicy
    certain: bool


def meetings(
    policy: AuthorizationPolicy, others: Iterable[AuthorizationPolicy], pods: Iterable[Peer], mesh: MeshSettings
) -> Iterator[Meeting]:
    """Where ``policy`` meets policies of other providers.

    Certain where one selector picks whatever the other does, or a pod is there that both pick. Policies for gateways
    and waypoints alone are left out.
    """
    pods = tuple(pods)
    for other in others:
        if not _may_meet(policy, other, mesh):
            continue
        one, two = set(policy.selector.requirements), set(other.selector.requirements)
        if one <= two or two <= one:
            yield Meeting(other, certain=True)
        elif not Selector.of(one | two).contradiction():
            both = any(selects(policy, pod, mesh) and selects(other, pod, mesh) for pod in pods)
            yield Meeting(other, certain=both)


def _may_meet(policy: AuthorizationPolicy, other: AuthorizationPolicy, mesh: MeshSettings) -> bool:
    if other.action is not Action.CUSTOM or other.provider == policy.provider or other.targets or policy.targets:
        return False
    return mesh.root_namespace in (policy.namespace, other.namespace) or policy.namespace == other.namespace
