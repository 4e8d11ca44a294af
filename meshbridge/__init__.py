"""MeshBridge: one policy model, enforced in the kernel before Envoy and by Envoy where it needs L7."""

__version__ = "0.1.0"
