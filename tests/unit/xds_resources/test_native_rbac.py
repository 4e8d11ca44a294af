"""AuthorizationPolicy as Envoy's own RBAC: what make conformance holds against a real Envoy, in the small."""

from __future__ import annotations

from typing import Any

import pytest
from envoy_data_plane.envoy.config.rbac.v3 import Permission, Principal, RbacAction

from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import DEFAULT_MESH, AuthorizationPolicy
from meshbridge.policy.model import Document
from meshbridge.policy.policyset import PolicySet
from meshbridge.xds.rbac import http_rbac, rbac_rules, tcp_rbac

METHODS = {"to": [{"operation": {"methods": ["GET"]}}]}
METHODS_AND_PORTS = {"to": [{"operation": {"methods": ["GET"], "ports": ["80"]}}]}
FROM = {"from": [{"source": {"namespaces": ["shop"]}}]}


def policies(*specs: dict[str, Any], dry_run: bool = False) -> tuple[AuthorizationPolicy, ...]:
    annotations = {"istio.io/dry-run": "true"} if dry_run else {}
    documents = [
        Document(
            "AuthorizationPolicy", "security.istio.io/v1", "shop", f"p{number}",
            {"metadata": {"name": f"p{number}", "namespace": "shop", "annotations": annotations}, "spec": spec},
        )
        for number, spec in enumerate(specs)
    ]  # fmt: skip
    found = PolicySet.of(documents)
    assert not found.refusals
    return found.authorization


def actions(found: tuple[AuthorizationPolicy, ...], form: AppProtocol) -> dict[str, int]:
    return {rbac.action.name or "": len(rbac.policies) for rbac in rbac_rules(found, DEFAULT_MESH, form)}


FILTERS: dict[str, tuple[list[dict[str, Any]], AppProtocol, dict[str, int]]] = {
    "DENY stands before ALLOW": (
        [{"rules": [FROM]}, {"action": "DENY", "rules": [FROM, METHODS]}], AppProtocol.HTTP, {"DENY": 2, "ALLOW": 1}),
    "an ALLOW without rules denies": ([{}], AppProtocol.HTTP, {"ALLOW": 0}),
    "an ALLOW whose rules need HTTP denies all TCP": ([{"rules": [METHODS]}], AppProtocol.TCP, {"ALLOW": 0}),
    "a rule that needs HTTP goes whole": ([{"rules": [METHODS_AND_PORTS, FROM]}], AppProtocol.TCP, {"ALLOW": 1}),
    "a DENY that needs HTTP stays on TCP": ([{"action": "DENY", "rules": [METHODS]}], AppProtocol.TCP, {"DENY": 1}),
    "AUDIT judges nothing": ([{"action": "AUDIT", "rules": [FROM]}], AppProtocol.HTTP, {}),
}  # fmt: skip


@pytest.mark.parametrize(("specs", "form", "expected"), FILTERS.values(), ids=FILTERS.keys())
def test_which_filters_there_are(specs: list[dict[str, Any]], form: AppProtocol, expected: dict[str, int]) -> None:
    found = actions(policies(*specs), form)
    assert found == expected
    assert list(found) == list(expected)


def test_dry_run_judges_nothing() -> None:
    found = policies({"rules": [FROM]}, dry_run=True)
    assert not http_rbac(found, DEFAULT_MESH)
    assert not tcp_rbac(found, DEFAULT_MESH, "x")


def test_a_deny_that_needs_http_gets_wider_on_tcp() -> None:
    """What only HTTP answers is left out: one is then about everything, the other about a port."""
    (rbac,) = rbac_rules(
        policies({"action": "DENY", "rules": [METHODS, METHODS_AND_PORTS]}), DEFAULT_MESH, AppProtocol.TCP
    )
    assert rbac.action is RbacAction.DENY
    first, second = rbac.policies.values()
    assert first.permissions == [Permission(any=True)]
    assert first.principals == [Principal(any=True)]
    assert second.permissions[0].and_rules is not None
    assert second.permissions[0].and_rules.rules == [Permission(destination_port=80)]


def test_path_templates_are_envoys_own() -> None:
    rule = {"to": [{"operation": {"paths": ["/api/{*}/x/{**}"]}}]}
    (rbac,) = rbac_rules(policies({"rules": [rule]}), DEFAULT_MESH, AppProtocol.HTTP)
    assert b"/api/*/x/**" in bytes(rbac)
    assert b"UriTemplateMatchConfig" in bytes(rbac)
