"""What can go wrong while measuring."""

from __future__ import annotations

from meshbridge.errors import MeshBridgeError


class BenchError(MeshBridgeError):
    """A measurement could not be made; what was measured before it stands."""
