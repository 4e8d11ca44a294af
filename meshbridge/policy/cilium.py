"""What of Cilium's own configuration decides what its policies mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from meshbridge.identity.model import DEFAULT_CLUSTER, Entity
from meshbridge.policy.model import ANY, Direction, NetworkRule, Origin, Verdict
from meshbridge.policy.selectors import IS_POD, EntityPeers, PeerSelector, Selector

CONFIG_NAMESPACE: Final = "kube-system"
CONFIG_NAME: Final = "cilium-config"
CILIUM_NODE: Final = ("cilium.io", "CiliumNode")
FELIX: Final = ("crd.projectcalico.org", "FelixConfiguration")
CNI_KINDS: Final = frozenset({CILIUM_NODE, FELIX})
"""No policies: what CNIs say of nodes, read for whether they encrypt between them (``bypass.encryption``)."""


class Enforcement(StrEnum):
    """When network policies are enforced; Cilium's ``enable-policy``."""

    DEFAULT = "default"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class CiliumSettings:
    """``origin`` is what drops are attributed to that follow from ``enforcement`` alone.

    ``pods`` and ``nodes`` say whether a CIDR in a Cilium policy matches their addresses. ``cluster`` is the name by
    which policies call the cluster itself.
    """

    enforcement: Enforcement = Enforcement.DEFAULT
    pods: bool = False
    nodes: bool = False
    cluster: str = DEFAULT_CLUSTER
    origin: Origin = Origin("ConfigMap", CONFIG_NAMESPACE, CONFIG_NAME)  # noqa: RUF009 - frozen


DEFAULT_SETTINGS: Final = CiliumSettings()

_EVERY_POD: Final = Selector.of([IS_POD])
_OWN_NODE: Final = EntityPeers(frozenset({Entity.HOST}))


def enforced(rules: Iterable[NetworkRule], settings: CiliumSettings) -> tuple[NetworkRule, ...]:
    """What is in force at a pod that ``rules`` select.

    ``always`` isolates it in both directions; its own node gets in only where some rule for ingress selects the pod.

    Spec: Cilium, pkg/policy/repository.go, computePolicyEnforcementAndRules.
    """
    rules = tuple(rules)
    match settings.enforcement:
        case Enforcement.NEVER:
            return ()
        case Enforcement.DEFAULT:
            return rules
        case Enforcement.ALWAYS:
            found = [_isolating(direction, settings.origin) for direction in Direction]
            if not any(rule.direction is Direction.INGRESS for rule in rules):
                found.append(_isolating(Direction.INGRESS, settings.origin, Verdict.DENY, (_OWN_NODE,)))
            return (*rules, *found)


def _isolating(
    direction: Direction, origin: Origin, verdict: Verdict = Verdict.ALLOW, peers: tuple[PeerSelector, ...] = ()
) -> NetworkRule:
    return NetworkRule(_EVERY_POD, direction, verdict, peers, ANY, origin)
