"""Counters of the authz server, for /metrics on loopback."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

DECISIONS = Counter("meshbridge_authz_decisions", "Checks answered.", ["verdict", "reason", "policy"])
BINDINGS = Counter("meshbridge_authz_identity_checks", "Certificates compared with their address.", ["result"])
FAILURES = Counter("meshbridge_authz_failures", "Checks denied because of a fault of our own.")
LATENCY = Histogram(
    "meshbridge_authz_check_seconds",
    "Time to answer a Check, transport excluded.",
    buckets=(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
)
REVISION = Gauge("meshbridge_authz_revision", "The controller's revision that decisions are made by.")
KEY_SETS = Counter("meshbridge_authz_key_sets", "Fetches of key sets that policies name by address.", ["result"])
READY = Gauge("meshbridge_authz_ready", "1 from the first revision until the server drains.")
