"""Every policy kind that is read: the API server asks us about it, and an invalid one is named by its field."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshbridge.kube.objects import POLICY_KINDS
from meshbridge.webhook.admission import INVALID, read_request, validate
from meshbridge.webhook.surroundings import Surroundings

CONFIGURATION = Path(__file__).parents[3] / "deploy/webhook/validating.yaml"
NOW = datetime(2026, 11, 24, tzinfo=UTC)
PEER: dict[str, Any] = {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": 7}]}]}
TIER: dict[str, Any] = {
    "tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
    "ingress": [{"action": "Nonsense", "from": [{"namespaces": {}}]}],
}  # fmt: skip

# kind → an object that its own API server's schema could let through, and the field we name
INVALID_ONES: dict[tuple[str, str], tuple[dict[str, Any], str]] = {
    ("networking.k8s.io", "NetworkPolicy"): (PEER, "spec.ingress[0].from[0].podSelector"),
    ("policy.networking.k8s.io", "ClusterNetworkPolicy"): (TIER, "spec.ingress[0].action"),
    ("policy.networking.k8s.io", "AdminNetworkPolicy"): (
        {k: v for k, v in TIER.items() if k != "tier"}, "spec.ingress[0].action"),
    ("policy.networking.k8s.io", "BaselineAdminNetworkPolicy"): (
        {k: v for k, v in TIER.items() if k not in ("tier", "priority")}, "spec.ingress[0].action"),
    ("cilium.io", "CiliumNetworkPolicy"): (
        {"endpointSelector": {}, "ingress": [{"fromNonsense": []}]}, "spec.ingress[0].fromNonsense"),
    ("cilium.io", "CiliumClusterwideNetworkPolicy"): (
        {"endpointSelector": {}, "egress": [{"toCIDR": ["x"]}]}, "spec.egress[0].toCIDR[0]"),
    ("cilium.io", "CiliumCIDRGroup"): ({"externalCIDRs": ["x"]}, "spec.externalCIDRs[0]"),
    ("security.istio.io", "AuthorizationPolicy"): (
        {"rules": [{"to": [{"operation": {"verbs": ["GET"]}}]}]}, "spec.rules[0].to[0].operation.verbs"),
    ("security.istio.io", "PeerAuthentication"): ({"mtls": {"mode": "SOMETIMES"}}, "spec.mtls.mode"),
    ("security.istio.io", "RequestAuthentication"): ({"jwtRules": [{"issuer": 7}]}, "spec.jwtRules[0].issuer"),
    ("meshbridge.io", "BypassPolicy"): ({"mode": "off"}, "spec.mode"),
    ("meshbridge.io", "ClusterBypassPolicy"): ({"accept": ["everything"], "reason": "r"}, "spec.accept[0]"),
}  # fmt: skip


def plural(kind: str) -> str:
    return f"{kind.lower()[:-1]}ies" if kind.endswith("y") else f"{kind.lower()}s"


def test_every_policy_kind_has_a_case() -> None:
    assert set(INVALID_ONES) == POLICY_KINDS


@pytest.mark.parametrize(("group", "kind"), sorted(POLICY_KINDS))
def test_the_api_server_asks_about_it(group: str, kind: str) -> None:
    rules = [rule for hook in yaml.safe_load(CONFIGURATION.read_text())["webhooks"] for rule in hook["rules"]]
    asked = [rule for rule in rules if group in rule["apiGroups"] and plural(kind) in rule["resources"]]
    assert asked
    assert all({"CREATE", "UPDATE"} <= set(rule["operations"]) for rule in asked)


@pytest.mark.parametrize(("group", "kind"), sorted(POLICY_KINDS))
def test_an_invalid_one_is_refused_by_its_field_or_its_author_warned_of_it(group: str, kind: str) -> None:
    spec, path = INVALID_ONES[group, kind]
    given = {
        "apiVersion": f"{group}/v1",
        "kind": kind,
        "metadata": {"name": "default", "namespace": "shop"},
        "spec": spec,
    }
    review = {
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {"uid": "u", "operation": "CREATE", "namespace": "shop", "object": given},
    }  # fmt: skip
    refused = validate(read_request(review), Surroundings(), NOW, deny_refused=True)
    assert (refused.code, [cause["field"] for cause in refused.fields]) == (INVALID, [path]), refused
    told = validate(read_request(review), Surroundings(), NOW)
    if group == "meshbridge.io":
        assert told.denied
    else:
        assert not told.denied
        assert any(path in warning for warning in told.warnings)
