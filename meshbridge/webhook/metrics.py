"""Counters of the webhook, for /metrics on loopback."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REVIEWS = Counter("meshbridge_webhook_reviews", "Admissions answered.", ["path", "outcome"])
REFUSED = Counter("meshbridge_webhook_refused_requests", "Requests that were no AdmissionReview.", ["code"])
LATENCY = Histogram(
    "meshbridge_webhook_review_seconds",
    "Time to answer an admission, transport excluded.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
EXPIRY = Gauge("meshbridge_webhook_certificate_expiry_seconds", "When the serving certificate ends, in Unix time.")
