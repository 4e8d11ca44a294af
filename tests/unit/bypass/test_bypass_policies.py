"""BypassPolicy: what is accepted, by whom, until when; and of several, the stricter."""

from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path

import pytest
from bypass_policy_cases import REFUSED
from click.testing import CliRunner, Result

from meshbridge.bypass.bypasspolicy import LOSSES, BypassPolicies, Mode, Otherwise, Ruling, parse_bypass_policy
from meshbridge.bypass.classify import universe
from meshbridge.bypass.guarantees import Fate, Guarantee, GuaranteeKind
from meshbridge.bypass.sets import IntSet, addresses
from meshbridge.bypass.state import Route, RouteKind, Span
from meshbridge.cli.bypass import command
from meshbridge.identity.model import IpFamily, Peer
from meshbridge.kube.objects import read_objects
from meshbridge.policy.capture import PortClass
from meshbridge.policy.model import Direction, Document

NOW = datetime(2026, 11, 24, tzinfo=UTC)
API = Peer("finance", {"app": "api"}, namespace_labels={"team": "pay"})
ENCRYPTION = Guarantee(GuaranteeKind.ENCRYPTION, "mutual TLS", Fate.LOST, "nothing")
TOKENS = Guarantee(GuaranteeKind.JWT, "tokens were checked", Fate.LOST, "nothing")
LOST = (ENCRYPTION, TOKENS)


def policy(spec: str, name: str = "one", kind: str = "BypassPolicy") -> Document:
    namespace = "" if kind == "ClusterBypassPolicy" else ", namespace: finance"
    text = f"""
apiVersion: meshbridge.io/v1alpha1
kind: {kind}
metadata: {{name: {name}{namespace}}}
spec: {spec}
"""
    (document,) = read_objects(text.encode(), f"{name}.yaml").documents
    return document


def span(direction: Direction = Direction.INGRESS, kind: RouteKind = RouteKind.EXCLUDE_INBOUND_PORTS,
         to: str = "0.0.0.0/0") -> Span:  # fmt: skip
    box = universe(direction, IpFamily.IPV4)._replace(destination=addresses(ip_network(to)))
    return Span(direction, IpFamily.IPV4, box, PortClass.EXCLUDED, Route(kind))


def ruling(*policies: Document, at: Span | None = None, ports: IntSet | None = None,
           lost: tuple[Guarantee, ...] = LOST) -> Ruling:  # fmt: skip
    return BypassPolicies.of(policies, NOW).ruling(API, at or span(), ports or IntSet.of(8080), lost)


def test_without_a_policy_every_loss_is_accepted_by_nobody_and_the_pod_is_warned_about() -> None:
    assert ruling() == Ruling(unaccepted=LOST, otherwise=Otherwise.WARN)


def test_without_a_loss_there_is_nothing_to_object_to() -> None:
    assert ruling(lost=()).otherwise is None


ACCEPTS = {
    "both losses": ("{accept: [encryption, l7], reason: r}", ()),
    "one of them": ("{accept: [encryption], reason: r}", (TOKENS,)),
    "none": ("{}", LOST),
    "none any more": ("{accept: [encryption, l7], reason: r, until: 2026-11-24T00:00:00Z}", LOST),
    "a second before its end": ("{accept: [encryption, l7], reason: r, until: 2026-11-24T01:00:01+01:00}", ()),
    "another pod's": ("{selector: {matchLabels: {app: web}}, accept: [encryption, l7], reason: r}", LOST),
    "by an expression": (
        "{accept: [encryption, l7], reason: r, selector: {matchExpressions: [{key: app, operator: Exists}]}}",
        (),
    ),
}


@pytest.mark.parametrize(("spec", "unaccepted"), ACCEPTS.values(), ids=ACCEPTS.keys())
def test_what_is_accepted(spec: str, unaccepted: tuple[Guarantee, ...]) -> None:
    found = ruling(policy(spec))
    assert found.unaccepted == unaccepted
    assert found.otherwise is (Otherwise.WARN if unaccepted else None)


def test_an_acceptance_that_is_over_is_said_to_be() -> None:
    (note,) = ruling(policy("{accept: [l7], reason: r, until: 2026-01-31T12:00:00Z}")).notes
    assert note == "BypassPolicy finance/one (one.yaml:2) accepted l7 until 2026-01-31T12:00:00Z, which is over"


ROUTES = {
    "every route": ("", span(), IntSet.of(8080), True),
    "no route": ("routes: []", span(), IntSet.of(8080), False),
    "its port": ("routes: [{direction: inbound, ports: [8080]}]", span(), IntSet.of(8080), True),
    "a range": ('routes: [{direction: inbound, ports: ["8000-8999"]}]', span(), IntSet.of(8080), True),
    "a part of its ports": ("routes: [{direction: inbound, ports: [8080]}]", span(), IntSet.of(8080, 8081), False),
    "the other direction": ("routes: [{direction: outbound}]", span(), IntSet.of(8080), False),
    "its kind": ("routes: [{direction: inbound, kinds: [excludeInboundPorts]}]", span(), IntSet.of(8080), True),
    "another kind": ("routes: [{direction: inbound, kinds: [ipv6]}]", span(), IntSet.of(8080), False),
    "rules that vanished are no route anybody asked for": (
        "routes: [{direction: inbound, kinds: [excludeInboundPorts, includeInboundPorts, interceptionModeNone]}]",
        span(kind=RouteKind.RULES_MISSING), IntSet.of(8080), False,
    ),
    "inside its destinations": (
        "routes: [{direction: outbound, destinations: [10.0.0.0/8]}]",
        span(Direction.EGRESS, RouteKind.EXCLUDE_OUTBOUND_RANGES, "10.1.0.0/16"), IntSet.of(443), True,
    ),
    "beyond its destinations": (
        "routes: [{direction: outbound, destinations: [10.0.0.0/8]}]",
        span(Direction.EGRESS, RouteKind.EXCLUDE_OUTBOUND_PORTS), IntSet.of(443), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("routes", "at", "ports", "allowed"), ROUTES.values(), ids=ROUTES.keys())
def test_which_routes_may_be(routes: str, at: Span, ports: IntSet, allowed: bool) -> None:
    found = ruling(policy(f"{{otherwise: deny, {routes}}}"), at=at, ports=ports, lost=())
    assert found.allowed is allowed
    assert found.otherwise is (None if allowed else Otherwise.DENY)


def test_a_policy_that_speaks_of_another_route_changes_nothing_here() -> None:
    other = policy("{routes: [{direction: outbound}], otherwise: deny}", "other")
    mine = policy("{routes: [{direction: inbound}], accept: [encryption, l7], reason: r, mode: audit}", "mine")
    found = ruling(other, mine)
    assert (found.otherwise, found.unaccepted, found.mode, found.notes) == (None, (), Mode.AUDIT, ())


def test_of_two_that_contradict_the_stricter_holds_in_every_respect_and_that_is_said() -> None:
    strict = policy("{accept: [l7], reason: r, otherwise: deny}", "strict")
    loose = policy("{accept: [l7, encryption], reason: r, otherwise: compensate, mode: audit}", "loose")
    found = ruling(strict, loose)
    assert found == ruling(loose, strict)
    assert (found.mode, found.otherwise, found.unaccepted) == (Mode.ENFORCE, Otherwise.DENY, (ENCRYPTION,))
    assert [note.partition(" contradict each other on ")[2].partition(" ")[0] for note in found.notes] == [
        "mode", "accept", "otherwise",
    ]  # fmt: skip


def test_a_clusterwide_policy_selects_by_the_labels_of_namespaces() -> None:
    def spec(team: str) -> Document:
        text = f"{{namespaceSelector: {{matchLabels: {{team: {team}}}}}, accept: [l7, encryption], reason: r}}"
        return policy(text, kind="ClusterBypassPolicy")

    assert ruling(spec("pay")).unaccepted == ()
    assert ruling(spec("web")).policies == ()


@pytest.mark.parametrize(("spec", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_policy_is_named_accepts_nothing_and_denies(spec: str, says: str) -> None:
    document = policy(spec)
    found = BypassPolicies.of([document], NOW)
    (refusal,) = found.refusals
    assert says in str(refusal)
    judged = found.ruling(API, span(), IntSet.of(8080), LOST)
    assert (judged.allowed, judged.unaccepted, judged.otherwise) == (False, LOST, Otherwise.DENY)
    assert "is not understood" in judged.notes[0]


def test_a_refused_policy_takes_away_what_another_accepts() -> None:
    good = policy("{accept: [l7, encryption], reason: r, mode: audit}", "good")
    found = ruling(good, policy("{mode: off}", "bad"))
    assert (found.mode, found.unaccepted, found.otherwise) == (Mode.ENFORCE, LOST, Otherwise.DENY)


def test_a_refused_policy_stays_with_those_it_selects() -> None:
    refused = parse_bypass_policy(policy("{selector: {matchLabels: {app: web}}, mode: off}"))
    assert refused.refusal is not None
    assert not refused.subject.matches(API)


def test_every_guarantee_that_can_be_lost_can_be_accepted() -> None:
    assert LOSSES.keys() == set(GuaranteeKind)


DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: api, namespace: finance}
spec:
  template:
    metadata:
      labels: {app: api}
      annotations: {traffic.sidecar.istio.io/excludeInboundPorts: "8080"}
    spec: {containers: [{name: app, ports: [{containerPort: 8080}]}]}
---
"""


def plan(tmp_path: Path, *texts: str) -> Result:
    (tmp_path / "all.yaml").write_text("---\n".join(texts))
    return CliRunner().invoke(command, ["plan", "-f", str(tmp_path)])


def policy_text(spec: str) -> str:
    return f"""
apiVersion: meshbridge.io/v1alpha1
kind: BypassPolicy
metadata: {{name: scrape, namespace: finance}}
spec: {spec}
"""


def test_plan_exits_4_while_something_is_lost_that_nobody_accepted(tmp_path: Path) -> None:
    result = plan(tmp_path, DEPLOYMENT)
    assert result.exit_code == 4
    assert "finance/api ingress TCP 8080: compensated, with a warning: loses encryption" in result.output


def test_plan_says_who_accepted_and_exits_0(tmp_path: Path) -> None:
    result = plan(tmp_path, DEPLOYMENT, policy_text("{accept: [encryption], reason: internal}"))
    assert result.exit_code == 0
    assert "finance/api ingress TCP 8080: accepted by scrape" in result.output


def test_plan_says_that_a_pod_will_be_refused(tmp_path: Path) -> None:
    result = plan(tmp_path, DEPLOYMENT, policy_text("{routes: [{direction: outbound}], otherwise: deny}"))
    assert result.exit_code == 4
    assert "finance/api ingress TCP 8080: refused at admission: no route of scrape is this" in result.output


def test_a_template_is_left_out_where_its_pods_are_given(tmp_path: Path) -> None:
    pod = """
apiVersion: v1
kind: Pod
metadata:
  name: api-7d9f
  namespace: finance
  labels: {app: api, pod-template-hash: 7d9f}
  annotations: {traffic.sidecar.istio.io/excludeInboundPorts: "8080"}
spec: {containers: [{name: app, ports: [{containerPort: 8080}]}, {name: istio-proxy}]}
status: {podIP: 10.0.0.1}
"""
    output = plan(tmp_path, DEPLOYMENT, pod).output
    assert "finance/api-7d9f" in output
    assert "finance/api " not in output
