"""A defect in a parser refuses the object that trips it, on the safe side, and nothing else."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from meshbridge.bypass import bypasspolicy
from meshbridge.policy import parse as parsers
from meshbridge.policy.model import Direction, Document, Verdict
from meshbridge.policy.parse import Parsed, networkpolicy, parse, workloads

NETWORK = {
    "NetworkPolicy": ("networking.k8s.io/v1", False),
    "CiliumNetworkPolicy": ("cilium.io/v2", True),
    "CiliumClusterwideNetworkPolicy": ("cilium.io/v2", True),
    "ClusterNetworkPolicy": ("policy.networking.k8s.io/v1alpha2", True),
    "AdminNetworkPolicy": ("policy.networking.k8s.io/v1alpha1", True),
    "BaselineAdminNetworkPolicy": ("policy.networking.k8s.io/v1alpha1", True),
}
MESH = ("AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication")


def fail(*_: object, **__: object) -> NoReturn:
    raise KeyError("a defect")


def document(kind: str, api_version: str, spec: Any = None) -> Document:
    clusterwide = kind.startswith("Cluster") or "Clusterwide" in kind or "Admin" in kind
    return Document(kind, api_version, "" if clusterwide else "shop", "odd", {"spec": spec or {}})


def refused(parsed: Parsed) -> str:
    (refusal,) = parsed.refusals
    assert "cannot be read: KeyError: 'a defect'" in str(refusal)
    assert "report it with the object" in refusal.fix
    return str(refusal)


@pytest.mark.parametrize("kind", NETWORK)
def test_a_network_policy_isolates_and_denies_whomever_it_could(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api_version, may_deny = NETWORK[kind]
    monkeypatch.setitem(parsers.POLICY_KINDS, (api_version.partition("/")[0], kind), fail)  # type: ignore[misc]
    parsed = parse(document(kind, api_version))
    refused(parsed)
    assert {rule.direction for rule in parsed.network} == set(Direction)
    assert {rule.verdict for rule in parsed.network} == {Verdict.DENY if may_deny else Verdict.ALLOW}
    assert all(rule.peers == () for rule in parsed.network) is not may_deny


@pytest.mark.parametrize("kind", MESH)
def test_a_mesh_policy_is_left_to_envoy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parsers.POLICY_KINDS, ("security.istio.io", kind), fail)  # type: ignore[misc]
    parsed = parse(document(kind, "security.istio.io/v1"))
    refused(parsed)
    (refusal,) = parsed.refusals
    assert (refusal.directions, refusal.may_deny, len(refusal.selectors)) == (frozenset(Direction), True, 1)


def test_what_could_be_read_of_it_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networkpolicy, "_rules", fail)
    spec = {"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"]}
    parsed = parse(document("NetworkPolicy", "networking.k8s.io/v1", spec))
    refused(parsed)
    (rule,) = parsed.network
    assert rule.direction is Direction.EGRESS
    assert "web" in str(rule.subject)


@pytest.mark.parametrize("kind", ["Pod", "Service", "Node", "Namespace"])
def test_an_object_of_the_cluster_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "_read", fail)
    parsed = parse(document(kind, "v1"))
    refused(parsed)
    assert not parsed.objects


def test_a_bypass_policy_allows_nothing_for_the_whole_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bypasspolicy, "_policy", fail)
    policy = bypasspolicy.parse_bypass_policy(document("BypassPolicy", "meshbridge.io/v1alpha1"))
    assert policy.refusal is not None
    assert (policy.routes, policy.accept, policy.otherwise) == ((), frozenset(), bypasspolicy.Otherwise.DENY)
