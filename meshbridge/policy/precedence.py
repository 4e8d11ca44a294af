"""Numbers the compiler shares with bpf/abi.h, and how tiers, priorities and verdicts become one precedence.

The kernel takes the highest precedence of all entries a packet matches, so the whole order of the policy language has
to be in this number: tier, then priority, then deny over allow over "needs L7" over "would need L7 but nobody judges".
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from meshbridge.policy.model import Tier

ANYONE: Final = 0
"""IDENTITY_ANY: whoever the peer is."""

MAX_PRIORITY: Final = 0xFFFF


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
    """Order inside one tier and priority."""

    UNJUDGED = 0x10
    NEEDS_L7 = 0x20
    ALLOW = 0x40
    DENY = 0x80


def precedence(tier: Tier, priority: int, strength: Strength) -> int:
    """32 bits: lower tiers and priorities rank higher, then ``strength``."""
    return (Tier.DEFAULT - tier) << 24 | (MAX_PRIORITY - priority) << 8 | strength


class MeshRank(IntEnum):
    """Precedence in the mesh layer, whose entries are disjoint but for these four steps."""

    EVERYWHERE = 1
    SOME_PORTS = 2
    PEER = 3
    PEER_SOME_PORTS = 4
