"""Egress towards the frontends of Services, whose address the kernel sees before it is translated.

Egress policy means the backend (a pod, at its own port). Which one a flow will get is not known at the source, so a
frontend passes only where every ready backend would.

Spec: DESIGN §5, "Services".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from meshbridge.policy.evaluate import Decision, evaluate
from meshbridge.policy.model import Layer, Origin, PolicyEntry, PolicyKey, PolicyMap, Verdict
from meshbridge.policy.ports import PREFIX_PORT
from meshbridge.policy.precedence import DropReason

_ABOVE_ALL: Final = 0xFFFFFFFF
"""The frontend's own port means nothing to a policy, so no rule may decide by it."""


@dataclass(frozen=True, slots=True, order=True)
class Backend:
    """A ready backend of a Service port: the pod's identity and its own port."""

    identity: int
    port: int


@dataclass(frozen=True, slots=True)
class FrontendPort:
    """A port of a Service's address. Without backends nothing answers, so nothing is to be judged."""

    protocol: int
    port: int
    backends: tuple[Backend, ...]


def with_frontends(policy_map: PolicyMap, frontends: Mapping[int, Iterable[FrontendPort]]) -> PolicyMap:
    """An egress map that also answers for Services, by the identity number of each one's address.

    ``policy_map`` itself is returned where it restricts nothing. A port none of whose backends may be reached drops for
    their reason, one with some for ``service backends differ``.
    """
    unrestricted = all(policy_map.default(layer).verdict is Verdict.ALLOW for layer in Layer)
    if not frontends or (unrestricted and not policy_map.entries):
        return policy_map
    entries = dict(policy_map.entries)
    for number, ports in frontends.items():
        for port in ports:
            decisions = [
                evaluate(policy_map, backend.identity, port.protocol, backend.port) for backend in set(port.backends)
            ]
            key = PolicyKey(number, Layer.NETWORK, port.protocol, port.port, PREFIX_PORT)
            entries[key] = _entry(decisions)
    return PolicyMap(dict(sorted(entries.items())), policy_map.network_default, policy_map.mesh_default)


def _entry(decisions: list[Decision]) -> PolicyEntry:
    denied = [decision for decision in decisions if not decision.passes]
    origins = _origins(denied or decisions)
    if not denied:
        return PolicyEntry(Verdict.ALLOW, _ABOVE_ALL, origins)
    reasons = {decision.deny_reason for decision in denied}
    differ = len(denied) < len(decisions) or len(reasons) > 1
    reason = DropReason.SERVICE_BACKENDS_DIFFER if differ else reasons.pop()
    return PolicyEntry(Verdict.DENY, _ABOVE_ALL, origins, reason)


def _origins(decisions: Iterable[Decision]) -> tuple[Origin, ...]:
    return tuple(sorted({origin for decision in decisions for origin in decision.deciding.origins}))
