"""Numbers the compiler shares with bpf/abi.h, and how tiers, priorities and verdicts become one precedence.

The kernel takes the highest precedence of all entries a packet matches, so the whole order of the policy language has
to be in this number: tier, then the step in it, then deny over allow over "needs L7" over "would need L7 but nobody
judges" over "isolated".
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from meshbridge.errors import MeshBridgeError
from meshbridge.policy.model import Tier

ANYONE: Final = 0
"""IDENTITY_ANY: whoever the peer is."""

_STEPS: Final = 1 << 16
"""Steps for each number of a tier; a tier may use those of the numbers between it and the next."""


class DropReason(IntEnum):
    """Those of ``enum drop_reason`` that a compiled policy gives; tests/unit/policy compares them with bpf/abi.h."""

    NONE = 0
    POLICY = 133
    POLICY_DENY = 181
    MESH_POLICY = 220
    MESH_POLICY_DENY = 221
    NO_L7_JUDGE = 222
    SERVICE_BACKENDS_DIFFER = 223
    COMPENSATION = 229
    NO_SERVICE_BACKENDS = 230


class Strength(IntEnum):
    """Order inside one step of a tier. ISOLATED is the implicit deny where it has to be written down."""

    ISOLATED = 0x08
    UNJUDGED = 0x10
    NEEDS_L7 = 0x20
    ALLOW = 0x40
    DENY = 0x80


class TooManySteps(MeshBridgeError):
    """More rules in order than a precedence can tell apart; nothing is compiled then."""


def precedence(tier: Tier, step: int, strength: Strength) -> int:
    """32 bits: lower tiers and steps rank higher, then ``strength``.

    Raises:
        TooManySteps: The step would rank with another tier: 6.5 million in ADMIN, 327,680 in BASELINE.
    """
    if step > _LAST_STEP[tier]:
        raise TooManySteps(
            f"more than {_LAST_STEP[tier]} steps in tier {tier.name}",
            where="the policies of one endpoint",
            fix="merge rules of ClusterNetworkPolicies",
        )
    return (((Tier.DEFAULT - tier + 1) * _STEPS - 1 - step) << 8) | strength


_LAST_STEP: Final = {
    tier: (min((each for each in Tier if each > tier), default=tier + 1) - tier) * _STEPS - 1 for tier in Tier
}


class MeshRank(IntEnum):
    """Precedence in the mesh layer, whose entries are disjoint but for these four steps."""

    EVERYWHERE = 1
    SOME_PORTS = 2
    PEER = 3
    PEER_SOME_PORTS = 4
