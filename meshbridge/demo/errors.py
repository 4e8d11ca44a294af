"""What can go wrong in the sample mesh itself, as opposed to in what it shows."""

from __future__ import annotations

from meshbridge.errors import MeshBridgeError


class DemoError(MeshBridgeError):
    """The sample mesh cannot do what was asked."""


class InjectionError(DemoError):
    """A pod that Istio's injector would refuse, or whose istio-init would fail."""
