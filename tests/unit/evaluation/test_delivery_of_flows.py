"""``delivery`` of an answer: what the two ends' sidecars make of a connection, whatever policies say of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_flow_questions import STRICT
from test_what_sidecars_send import BY_HAND, DISABLED, OFF, ONLY, SCRAPED, WORLD, ask, rule

from meshbridge.policy.mesh import DEFAULT_MESH

OWN = replace(DEFAULT_MESH, own_sidecars=True)
HEADLESS = SCRAPED.replace("10.96.0.2", "None").replace("http-metrics", "tcp-metrics")
WEB = "cluster.local/ns/shop/sa/web"
API = "10.1.0.2"
NO_POLICY = """
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: none, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}}
"""

DELIVERED: dict[str, tuple[str, Any, dict[str, Any], str | None]] = {
    "both ends see it": ("", DEFAULT_MESH, {}, "mtls"),
    "a policy that drops it is not asked": (NO_POLICY, DEFAULT_MESH, {}, "mtls"),
    "to a port that the destination excludes, by its Service": (SCRAPED, DEFAULT_MESH, {"port": 9090}, "broken"),
    "by its own address": (SCRAPED, DEFAULT_MESH, {"dst": API, "port": 9090}, "plaintext"),
    "by its own address and a Service's name": (
        SCRAPED, DEFAULT_MESH, {"dst": API, "port": 9090, "http": {"host": "scraped"}}, "broken"),
    "by its own address, from sidecars of ours": (SCRAPED, OWN, {"dst": API, "port": 9090}, "broken"),
    "by its own address, in a headless Service": (HEADLESS, DEFAULT_MESH, {"dst": API, "port": 9090}, "broken"),
    "by its own address to what demands mutual TLS": (STRICT, DEFAULT_MESH, {"dst": API}, "broken"),
    "the same, from sidecars of ours": (STRICT, OWN, {"dst": API}, "mtls"),
    "where a DestinationRule switches TLS off": (
        SCRAPED + rule("scraped", OFF), DEFAULT_MESH, {"port": 9090}, "plaintext"),
    "where PeerAuthentication does": (SCRAPED + DISABLED, DEFAULT_MESH, {"port": 9090}, "plaintext"),
    "where mutual TLS is not automatic": ("", BY_HAND, {}, "plaintext"),
    "plaintext by DestinationRule to what demands mutual TLS": (STRICT + rule("api", OFF), DEFAULT_MESH, {}, "broken"),
    "TLS of another kind is not decided": (rule("api", "{tls: {mode: SIMPLE}}"), DEFAULT_MESH, {}, None),
    "past the source's sidecar to what demands mutual TLS": (
        STRICT, DEFAULT_MESH, {"src": "shop/api", "dst": "shop/web", "port": 6379}, "broken"),
    "past it to what takes both": ("", DEFAULT_MESH, {"src": "shop/api", "dst": "shop/web", "port": 6379}, "plaintext"),
    "from a pod without a sidecar": ("", DEFAULT_MESH, {"src": "ops/plain"}, "plaintext"),
    "from it to what demands mutual TLS nobody can tell": (STRICT, DEFAULT_MESH, {"src": "ops/plain"}, None),
    "but of plaintext": (STRICT, DEFAULT_MESH, {"src": "ops/plain", "peer_principal": None}, "broken"),
    "the question's name is mutual TLS": ("", DEFAULT_MESH, {"src": "ops/plain", "peer_principal": WEB}, "mtls"),
    "to a pod without a sidecar": (SCRAPED, DEFAULT_MESH, {"dst": "ops/plain", "port": 7000}, "plaintext"),
    "from the world": ("", DEFAULT_MESH, {"src": "entity:world"}, "plaintext"),
    "to the world nobody can tell": ("", DEFAULT_MESH, WORLD, None),
    "to the world where only the registry goes": ("", ONLY, WORLD, "broken"),
    "not of UDP": ("", DEFAULT_MESH, {"protocol": "UDP"}, None),
}  # fmt: skip


@pytest.mark.parametrize(("text", "mesh", "flow", "expected"), DELIVERED.values(), ids=DELIVERED.keys())
def test_the_delivery(text: str, mesh: Any, flow: dict[str, Any], expected: str | None) -> None:
    answer = ask(text, mesh, **flow)
    assert answer["delivery"] == expected, answer
    assert answer["verdict"] == "DENY" or expected != "broken"
