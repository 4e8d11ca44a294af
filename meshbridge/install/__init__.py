"""MeshBridge into a cluster, out of it, and what may stand in the way."""
