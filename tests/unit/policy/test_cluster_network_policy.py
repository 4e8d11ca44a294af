"""ClusterNetworkPolicy, AdminNetworkPolicy and BaselineAdminNetworkPolicy. Rows follow CILIUM.md §c."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import network_allows
from policycast import (
    AGENT,
    API,
    CONTESTED,
    ICMP_ECHO,
    LEDGER,
    NODE,
    PRIVATE,
    REMOTE,
    WEB,
    WORLD,
    allowed,
    decide,
    policies,
)
from policygen import outsiders, random_pods, random_tiers
from test_compiler_oracle import DIRECTIONS, documents_of, numbered, random_flow, verdict_at, workload_of

from meshbridge.identity.model import IpFamily, Workload
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import Compiler
from meshbridge.policy.explain import explain_layer
from meshbridge.policy.l7 import Request, decide_request
from meshbridge.policy.model import Direction, Tier, Verdict
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.precedence import DropReason, Strength, TooManySteps, precedence

PODS = {"web": WEB, "ledger": LEDGER, "agent": AGENT}
EVERYBODY: dict[str, Workload | str] = {**PODS, "node": NODE, "remote": REMOTE, "world": WORLD, "private": PRIVATE}

ISOLATED = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: np, namespace: shop}, spec: %s}"
DENY_ALL = ISOLATED % "{podSelector: {}, policyTypes: [Ingress, Egress]}"
ALLOW_WEB = ISOLATED % "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}"
DENY_ONLY = (
    "{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: c, namespace: shop}, spec: "
    "{endpointSelector: {}, enableDefaultDeny: {ingress: false}, ingress: [{fromEndpoints: [{}]}]}}"
)

ALL, OWN, TEAM_B, WEBS = (
    "{namespaces: {}}",
    '{namespaces: {matchLabels: {"kubernetes.io/metadata.name": shop}}}',
    "{namespaces: {matchLabels: {team: b}}}",
    "{pods: {podSelector: {matchLabels: {app: web}}}}",
)


def tier(name: str, ingress: str = "", *, egress: str = "", priority: int = 1, policy: str = "cnp") -> str:
    lists = "".join(f", {key}: [{rules}]" for key, rules in (("ingress", ingress), ("egress", egress)) if rules)
    head = f"apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {{name: {policy}}}"
    return f"{{{head}, spec: {{tier: {name}, priority: {priority}, subject: {{namespaces: {{}}}}{lists}}}}}"


def rule(action: str, *peers: str, more: str = "") -> str:
    return f"{{action: {action}, from: [{', '.join(peers)}]{more}}}"


def to(action: str, *peers: str, more: str = "") -> str:
    return rule(action, *peers, more=more).replace("from:", "to:")


INGRESS = {
    "no policy at all": ([], {"web", "ledger", "agent"}),
    "a deny in Admin is final": ([tier("Admin", rule("Deny", TEAM_B))], {"web", "agent"}),
    "an accept in Admin beats a deny-all": ([tier("Admin", rule("Accept", TEAM_B)), DENY_ALL], {"ledger"}),
    "a policy with rules isolates nobody": ([tier("Admin", rule("Accept", TEAM_B))], {"web", "ledger", "agent"}),
    "the first of two rules decides": (
        [tier("Admin", rule("Accept", ALL) + ", " + rule("Deny", ALL)), DENY_ALL], {"web", "ledger", "agent"}),
    "the lower priority number decides": (
        [tier("Admin", rule("Deny", ALL), priority=5), tier("Admin", rule("Accept", TEAM_B), priority=4, policy="z")],
        {"ledger"}),
    "of equal priorities the name decides": (
        [tier("Admin", rule("Deny", TEAM_B), policy="b"), tier("Admin", rule("Accept", ALL), policy="a")],
        {"web", "ledger", "agent"}),
    "what passes is left to the NetworkPolicies": (
        [tier("Admin", rule("Pass", ALL) + ", " + rule("Deny", ALL)), ALLOW_WEB], {"web"}),
    "what passes where no NetworkPolicy is, is allowed": (
        [tier("Admin", rule("Pass", TEAM_B) + ", " + rule("Deny", ALL))], {"ledger"}),
    "what passes where no NetworkPolicy is, comes to Baseline": (
        [tier("Admin", rule("Pass", ALL) + ", " + rule("Deny", ALL)), tier("Baseline", rule("Deny", OWN), policy="b")],
        {"ledger", "agent"}),
    "what does not pass goes on in the tier": (
        [tier("Admin", rule("Pass", TEAM_B) + ", " + rule("Accept", ALL)), DENY_ALL], {"web", "agent"}),
    "a pass skips the other policies of its tier": (
        [tier("Admin", rule("Pass", TEAM_B)), tier("Admin", rule("Deny", ALL), priority=2, policy="d")], {"ledger"}),
    "Baseline decides where no NetworkPolicy selects": ([tier("Baseline", rule("Deny", TEAM_B))], {"web", "agent"}),
    "a NetworkPolicy switches Baseline off": ([tier("Baseline", rule("Accept", ALL)), ALLOW_WEB], {"web"}),
    "a rule without default deny leaves what it does not match to Baseline": (
        [tier("Baseline", rule("Deny", ALL)), DENY_ONLY], {"web"}),
    "a pass in Baseline allows": ([tier("Baseline", rule("Pass", TEAM_B) + ", " + rule("Deny", ALL))], {"ledger"}),
    "pods of every namespace": ([tier("Admin", rule("Deny", WEBS))], {"ledger", "agent"}),
    "a peer of an unknown kind accepts nobody": (
        [tier("Admin", rule("Accept", "{tenants: {}}", ALL)), DENY_ALL], set()),
    "a peer of no kind accepts nobody": ([tier("Admin", rule("Accept", "{}")), DENY_ALL], set()),
    "a deny with a peer of an unknown kind denies everybody": (
        [tier("Admin", rule("Deny", "{tenants: {}}", TEAM_B))], set()),
    "a pass with a peer of an unknown kind denies everybody": ([tier("Admin", rule("Pass", "{tenants: {}}"))], set()),
    "networks are unknown on ingress": ([tier("Admin", rule("Deny", "{networks: [192.0.2.0/24]}"))], set()),
}  # fmt: skip


@pytest.mark.parametrize(("objects", "expected"), INGRESS.values(), ids=INGRESS.keys())
def test_who_reaches_the_pod(objects: list[str], expected: set[str]) -> None:
    found = policies("\n---\n".join(objects))
    assert not found.refusals, found.refusals
    assert {name for name, source in PODS.items() if allowed(found, source, API)} == expected


EGRESS = {
    "networks match pods, nodes and the world": (to("Deny", "{networks: [10.0.0.0/8]}"), {"node", "remote", "world"}),
    "0.0.0.0/0 is everybody": (to("Deny", "{networks: [0.0.0.0/0]}"), set()),
    "pods pass before the networks": (
        to("Pass", ALL) + ", " + to("Deny", "{networks: [0.0.0.0/0]}"), {"web", "ledger", "agent"}),
    "every node": (to("Deny", "{nodes: {}}"), {"web", "ledger", "agent", "world", "private"}),
    "nodes by label": (to("Deny", "{nodes: {matchLabels: {zone: a}}}"), {*EVERYBODY} - {"node"}),
    "nodes without a label": (
        to("Deny", "{nodes: {matchExpressions: [{key: zone, operator: DoesNotExist}]}}"), {*EVERYBODY} - {"remote"}),
    "domain names accept nobody": (
        to("Accept", "{domainNames: [example.com]}") + ", " + to("Deny", "{networks: [0.0.0.0/0]}"), set()),
    "a domain name beside networks leaves those": (
        to("Accept", "{domainNames: [example.com]}", "{networks: [203.0.113.0/24]}") + ", "
        + to("Deny", "{networks: [0.0.0.0/0]}"), {"world"}),
}  # fmt: skip


@pytest.mark.parametrize(("rules", "expected"), EGRESS.values(), ids=EGRESS.keys())
def test_whom_the_pod_reaches(rules: str, expected: set[str]) -> None:
    found = policies(tier("Admin", egress=rules))
    assert not found.refusals, found.refusals
    reached = {name for name, peer in EVERYBODY.items() if allowed(found, API, peer, at=Direction.EGRESS)}
    assert reached == expected


ASKED = {("TCP", 53), ("UDP", 53), ("SCTP", 53), ("TCP", 8080), ICMP_ECHO}
PORTS = {
    "no port is all, ICMP too": ("", ASKED),
    "a number": ("protocols: [{tcp: {destinationPort: {number: 53}}}]", {("TCP", 53)}),
    "a range": ("protocols: [{udp: {destinationPort: {range: {start: 1, end: 60}}}}]", {("UDP", 53)}),
    "SCTP": ("protocols: [{sctp: {destinationPort: {number: 53}}}]", {("SCTP", 53)}),
    "a name is of any protocol": ("protocols: [{destinationNamedPort: dns}]", {("UDP", 53)}),
    "a name nobody has": ("protocols: [{destinationNamedPort: nothing}]", set()),
    "two protocols": (
        "protocols: [{destinationNamedPort: http}, {sctp: {destinationPort: {number: 53}}}]",
        {("TCP", 8080), ("SCTP", 53)}),
    "ports: TCP unless said otherwise": ("ports: [{portNumber: {port: 53}}]", {("TCP", 53)}),
    "ports: a range": ("ports: [{portRange: {protocol: UDP, start: 53, end: 53}}]", {("UDP", 53)}),
    "ports: a name": ("ports: [{namedPort: http}]", {("TCP", 8080)}),
}  # fmt: skip


@pytest.mark.parametrize(("ports", "expected"), PORTS.values(), ids=PORTS.keys())
def test_which_ports_a_deny_closes(ports: str, expected: set[tuple[str, int]]) -> None:
    found = policies(tier("Admin", rule("Deny", ALL, more=f", {ports}" if ports else "")))
    assert not found.refusals, found.refusals
    assert {port for port in ASKED if not allowed(found, WEB, API, port)} == expected


FORERUNNERS = """
apiVersion: policy.networking.k8s.io/v1alpha1
kind: AdminNetworkPolicy
metadata: {name: a}
spec:
  priority: 10
  subject: {namespaces: {}}
  ingress:
  - {name: from the ledger, action: Allow, from: [{namespaces: {matchLabels: {team: b}}}]}
  - {action: Pass, from: [{namespaces: {matchLabels: {team: a}}}]}
  - {action: Deny, from: [{namespaces: {}}]}
---
apiVersion: policy.networking.k8s.io/v1alpha1
kind: BaselineAdminNetworkPolicy
metadata: {name: default}
spec:
  subject: {namespaces: {}}
  ingress:
  - {action: Deny, from: [{pods: {namespaceSelector: {}, podSelector: {}}}], ports: [{portNumber: {protocol: TCP, port: 53}}]}
"""  # noqa: E501


def test_the_forerunners_mean_the_same() -> None:
    found = policies(FORERUNNERS)
    assert not found.refusals, found.refusals
    assert allowed(found, LEDGER, API, ("TCP", 53))
    assert not allowed(found, AGENT, API)
    assert not allowed(found, WEB, API, ("TCP", 53))
    assert allowed(found, WEB, API, ("TCP", 8080))


def test_the_baseline_of_old_comes_after_those_with_a_priority() -> None:
    found = policies(FORERUNNERS.partition("---")[2] + "---\n" + tier("Baseline", rule("Accept", ALL), priority=1000))
    assert allowed(found, WEB, API, ("TCP", 53))


def test_ends_are_independent() -> None:
    found = policies(tier("Admin", egress=to("Accept", ALL)) + "\n---\n" + DENY_ALL)
    assert allowed(found, WEB, API, at=Direction.EGRESS)
    assert not allowed(found, WEB, API)


def test_the_own_node_gets_in_whatever_a_tier_says_of_pods() -> None:
    found = policies("\n---\n".join([tier("Admin", rule("Pass", ALL) + ", " + rule("Deny", ALL)), DENY_ALL]))
    assert allowed(found, NODE, API)


def test_a_host_network_pod_is_selected_by_no_tier() -> None:
    found = policies(tier("Admin", rule("Deny", ALL)))
    assert found.selecting(replace(API, host_network=True)).network == ()


def test_whose_labels_nobody_knows_gets_past_no_rule_by_labels() -> None:
    """It may be one of those that pass, and what they pass to may deny."""
    found = policies(
        "\n---\n".join([tier("Admin", egress=to("Pass", TEAM_B) + ", " + to("Accept", "{networks: [10.0.0.0/8]}"))])
    )
    assert allowed(found, API, PRIVATE, at=Direction.EGRESS)
    assert not allowed(found, API, CONTESTED, at=Direction.EGRESS)


def test_the_reason_names_tier_rule_and_line() -> None:
    found = policies(tier("Admin", rule("Deny", TEAM_B), policy="guard"))
    (origin,) = decide(found, LEDGER, API, ("TCP", 80)).network.origins
    assert str(origin) == "ClusterNetworkPolicy guard spec.ingress[0] in the Admin tier (policy.yaml:1)"


def test_what_passes_is_attributed_to_what_decides_it() -> None:
    text = "\n---\n".join([tier("Admin", rule("Pass", ALL) + ", " + rule("Deny", ALL)), ALLOW_WEB])
    found = policies(text)
    assert [origin.kind for origin in decide(found, WEB, API, ("TCP", 80)).network.origins] == ["NetworkPolicy"]
    denied = decide(found, LEDGER, API, ("TCP", 80)).network
    assert (denied.deny_reason, [origin.kind for origin in denied.origins]) == (DropReason.POLICY, ["NetworkPolicy"])
    assert "isolated by NetworkPolicy shop/np" in explain_layer(denied)
    unguarded = policies(tier("Admin", rule("Pass", ALL) + ", " + rule("Deny", ALL)))
    assert [o.rule for o in decide(unguarded, WEB, API, ("TCP", 80)).network.origins] == ["spec.ingress[0]"]


NOBODY = "{namespaces: {matchExpressions: [{key: a, operator: Exists}, {key: a, operator: DoesNotExist}]}}"
NOTICES = {
    "an unknown kind of peer": (tier("Admin", rule("Accept", "{tenants: {}}")), "the Accept rule matches nothing"),
    "an unknown kind of peer in a deny": (tier("Admin", rule("Pass", "{}")), "the Pass rule denies everybody"),
    "domain names": (tier("Admin", egress=to("Accept", "{domainNames: [a.b]}")), "these names accept nothing"),
    "a selector of nobody": (
        tier("Admin", rule("Deny", NOBODY)),
        "selects nothing"),
    "equal priorities": (
        tier("Admin", rule("Deny", ALL), policy="a") + "\n---\n" + tier("Admin", rule("Accept", ALL), policy="b"),
        "has the tier and priority of ClusterNetworkPolicy b"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), NOTICES.values(), ids=NOTICES.keys())
def test_what_is_hardly_meant_is_said(text: str, words: str) -> None:
    assert any(words in str(notice) for notice in policies(text).notices), policies(text).notices


QUIET = {
    "another tier": (tier("Admin", rule("Deny", ALL), policy="a"), tier("Baseline", rule("Deny", ALL), policy="b")),
    "another priority": (
        tier("Admin", rule("Deny", ALL), policy="a"), tier("Admin", rule("Deny", ALL), policy="b", priority=2)),
    "another direction": (
        tier("Admin", rule("Deny", ALL), policy="a"), tier("Admin", egress=to("Deny", ALL), policy="b")),
}  # fmt: skip


@pytest.mark.parametrize("texts", QUIET.values(), ids=QUIET.keys())
def test_priorities_that_do_not_meet_are_not_noticed(texts: tuple[str, str]) -> None:
    assert policies("\n---\n".join(texts)).notices == ()


def test_a_precedence_never_reaches_into_another_tier() -> None:
    order = [precedence(t, step, s) for t in sorted(Tier) for step in (0, 1, 65_535) for s in sorted(Strength)[::-1]]
    assert order == sorted(order, reverse=True)
    assert max(order) < 2**32
    assert precedence(Tier.ADMIN, 6_553_599, Strength.ISOLATED) > precedence(Tier.NORMAL, 0, Strength.DENY)
    with pytest.raises(TooManySteps):
        precedence(Tier.ADMIN, 6_553_600, Strength.DENY)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**63 - 1))
def test_tiers_decide_in_the_order_of_the_texts(seed: int) -> None:
    rng = random.Random(seed)
    pods = random_pods(rng, 4)
    everybody = pods + outsiders()
    objects = random_tiers(rng)
    found = PolicySet.of(documents_of(objects))
    numbering = numbered(everybody, found)
    compiler = Compiler(numbering.identities)
    for _ in range(30):
        flow = random_flow(rng, rng.choice(pods), everybody)
        policy = compiler.endpoint(workload_of([flow.endpoint]), found, Capture.none())
        policy_map = policy.map(DIRECTIONS[flow.direction], IpFamily.of(flow.endpoint.address))
        passes = verdict_at(policy_map, numbering, flow) is not Verdict.DENY
        assert passes is network_allows(objects, flow), (flow, objects)


HTTP = (
    "{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: h, namespace: shop}, spec: "
    "{endpointSelector: {}, ingress: [{fromEndpoints: [{}], toPorts: "
    "[{ports: [{port: '8080', protocol: TCP}], rules: {http: [{method: GET}]}}]}]}}"
)
REQUESTS = {
    "the HTTP rule alone": ([HTTP], {"GET"}),
    "an accept in Admin is not asked": ([HTTP, tier("Admin", rule("Accept", OWN))], {"GET", "POST"}),
    "what passes is asked": ([HTTP, tier("Admin", rule("Pass", OWN) + ", " + rule("Accept", ALL))], {"GET"}),
    "what Baseline accepts is asked": ([HTTP, tier("Baseline", rule("Accept", ALL))], {"GET"}),
}


@pytest.mark.parametrize(("objects", "expected"), REQUESTS.values(), ids=REQUESTS.keys())
def test_which_requests_pass(objects: list[str], expected: set[str]) -> None:
    found = policies("\n---\n".join(objects))
    request = Request(source=WEB.addresses[0], port=8080, method="", path="/", host="api", peer=WEB.peer())
    asked = {method: decide_request(API, found, replace(request, method=method)).allowed for method in ("GET", "POST")}
    assert {method for method, allows in asked.items() if allows} == expected
