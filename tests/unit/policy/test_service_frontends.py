"""Egress to a Service's address: it passes where every ready backend would, by the backends' own ports."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from policycast import API, LEDGER, PRIVATE, WEB, numbered, policies

from meshbridge.identity.model import IpFamily, Workload
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import compile_endpoint
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.frontends import Backend, FrontendPort, with_frontends
from meshbridge.policy.model import Direction
from meshbridge.policy.precedence import DropReason

SERVICE = 5000


def egress(rules: str) -> str:
    return f"""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: p, namespace: shop}}
spec: {{endpointSelector: {{matchLabels: {{app: web}}}}, {rules}}}
"""


TO_API = "egress: [{toEndpoints: [{matchLabels: {app: api}}], toPorts: [{ports: [{port: '8080'}]}]}]"
CASES: dict[str, tuple[str, list[tuple[Workload, int]], int]] = {
    "every backend is allowed": (TO_API, [(API, 8080)], 0),
    "the backend's port counts, not the frontend's": (TO_API.replace("8080", "80"), [(API, 8080)], DropReason.POLICY),
    "one backend is allowed and another is not": (
        TO_API, [(API, 8080), (LEDGER, 8080)], DropReason.SERVICE_BACKENDS_DIFFER),
    "no backend is allowed": (TO_API, [(LEDGER, 8080)], DropReason.POLICY),
    "the world is no Service, though its address is nobody's": (
        "egress: [{toEntities: [world]}]", [(API, 8080)], DropReason.POLICY),
    "a deny of the frontend's port is none of the backend's": (
        "egress: [{toEntities: [all]}], egressDeny: [{toPorts: [{ports: [{port: '80'}]}]}]", [(API, 8080)], 0),
    "a deny of the backend": (
        "egress: [{toEntities: [all]}], egressDeny: [{toEndpoints: [{matchLabels: {app: api}}]}]",
        [(API, 8080)], DropReason.POLICY_DENY),
    "nobody is known to answer": (TO_API, [], DropReason.NO_SERVICE_BACKENDS),
    "nobody is known to answer, and the world is allowed": (
        "egress: [{toEntities: [world]}]", [], DropReason.NO_SERVICE_BACKENDS),
    "nobody is known to answer, and some are denied": (
        "egress: [{toEntities: [all]}], egressDeny: [{toEndpoints: [{matchLabels: {app: api}}]}]",
        [], DropReason.NO_SERVICE_BACKENDS),
    "nobody is known to answer, and one port of anybody is allowed": (
        "egress: [{toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]", [], DropReason.NO_SERVICE_BACKENDS),
}  # fmt: skip


@pytest.mark.parametrize(("rules", "backends", "reason"), CASES.values(), ids=CASES.keys())
def test_a_service_frontend(rules: str, backends: list[tuple[Workload, int]], reason: int) -> None:
    found = policies(egress(rules))
    numbering = numbered(found)
    base = compile_endpoint(WEB, found, numbering.identities, Capture.none()).map(Direction.EGRESS, IpFamily.IPV4)
    ready = tuple(Backend(numbering.addresses[pod.addresses[0]].identity, port) for pod, port in backends)
    answered = with_frontends(base, {SERVICE: [FrontendPort(6, 80, ready)]})
    decision = evaluate(answered, SERVICE, 6, 80)
    assert (decision.passes, decision.deny_reason) == (reason == 0, reason)
    for address in (API.addresses[0], LEDGER.addresses[0]):
        identity = numbering.addresses[address].identity
        assert evaluate(answered, identity, 6, 8080) == evaluate(base, identity, 6, 8080)


ANYBODY = {
    "every egress is allowed": "egress: [{}]",
    "every egress of the protocol": "egress: [{ports: [{protocol: TCP}]}]",
}


@pytest.mark.parametrize("rules", ANYBODY.values(), ids=ANYBODY.keys())
def test_whoever_may_reach_anybody_needs_no_known_backend(rules: str) -> None:
    policy = f"""
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: p, namespace: shop}}
spec: {{podSelector: {{}}, policyTypes: [Egress], {rules}}}
"""
    found = policies(policy)
    base = compile_endpoint(WEB, found, numbered(found).identities, Capture.none()).map(Direction.EGRESS, IpFamily.IPV4)
    answered = with_frontends(base, {SERVICE: [FrontendPort(6, 80, ())]})
    assert evaluate(answered, SERVICE, 6, 80).passes


ALL_BUT = "egress: [{toEntities: [all]}], egressDeny: "
OUTSIDE: dict[str, tuple[str, int, int]] = {
    "a deny of its CIDR": (ALL_BUT + "[{toCIDR: [10.9.9.0/24]}]", DropReason.POLICY_DENY, 0),
    "a deny of the world": (ALL_BUT + "[{toEntities: [world]}]", DropReason.POLICY_DENY, 0),
    "a deny of its port": (
        ALL_BUT + "[{toCIDR: [10.9.9.0/24], toPorts: [{ports: [{port: '80'}]}]}]", DropReason.POLICY_DENY, 0),
    "a deny of another port": (ALL_BUT + "[{toCIDR: [10.9.9.0/24], toPorts: [{ports: [{port: '81'}]}]}]", 0, 0),
    "a deny of another CIDR": (ALL_BUT + "[{toCIDR: [203.0.113.0/24]}]", 0, 0),
    "nothing allows its CIDR, but the backends are allowed": (TO_API, 0, 0),
    "an allow of its CIDR allows no backend": (
        "egress: [{toCIDR: [10.9.9.0/24]}]", DropReason.POLICY, DropReason.POLICY),
}  # fmt: skip


@pytest.mark.parametrize(("rules", "outside", "cluster_ip"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_an_outside_address_of_a_service_is_what_a_deny_says_of_it_as_well(
    rules: str, outside: int, cluster_ip: int
) -> None:
    found = policies(egress(rules))
    numbering = numbered(found)
    base = compile_endpoint(WEB, found, numbering.identities, Capture.none()).map(Direction.EGRESS, IpFamily.IPV4)
    api, number = (numbering.addresses[a].identity for a in (API.addresses[0], ip_address(PRIVATE)))
    for is_outside, reason in ((True, outside), (False, cluster_ip)):
        answered = with_frontends(base, {number: [FrontendPort(6, 80, (Backend(api, 8080),), is_outside)]})
        assert evaluate(answered, number, 6, 80).deny_reason == reason


def test_what_the_map_says_anyway_is_not_written_again() -> None:
    found = policies(egress(TO_API))
    numbering = numbered(found)
    base = compile_endpoint(WEB, found, numbering.identities, Capture.none()).map(Direction.EGRESS, IpFamily.IPV4)
    ledger = numbering.addresses[LEDGER.addresses[0]].identity
    denied = {SERVICE + n: [FrontendPort(6, 80, (Backend(ledger, 80),))] for n in range(5)}
    assert with_frontends(base, denied) is base


def test_a_map_that_restricts_nothing_stays_as_it_is() -> None:
    found = policies("")
    base = compile_endpoint(WEB, found, numbered(found).identities, Capture.none()).map(Direction.EGRESS, IpFamily.IPV4)
    assert with_frontends(base, {SERVICE: [FrontendPort(6, 80, (Backend(1, 2),))]}) is base
