"""From a CheckRequest's bytes to the answer's: policy, identity, tokens, and every way to fail closed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
import yaml
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from meshbridge.authz.assemble import ViewBuilder
from meshbridge.authz.judge import MAX_WAITING, REREAD_S, Judge
from meshbridge.authz.view import CurrentView, NodeView
from meshbridge.identity.model import Entity, Peer, ProxyClass, Workload
from meshbridge.policy.model import Document, Source

CLIENT_NAME = "spiffe://cluster.local/ns/finance/sa/client"

POLICIES = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: l7-jwt, namespace: finance}
spec:
  selector: {matchLabels: {app: server}}
  action: ALLOW
  rules:
  - to: [{operation: {methods: [POST], paths: [/api/v1/process]}}]
    when: [{key: "request.auth.claims[scope]", values: [transactions]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-admin, namespace: finance}
spec:
  selector: {matchLabels: {app: server}}
  action: DENY
  rules: [{to: [{operation: {paths: [/admin*]}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: tcp-clients, namespace: finance}
spec:
  selector: {matchLabels: {app: database}}
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/finance/sa/client]}}]}]
"""


def documents(text: str) -> list[Document]:
    return [
        Document(
            item["kind"],
            item["apiVersion"],
            item["metadata"]["namespace"],
            item["metadata"]["name"],
            item,
            Source("policies.yaml"),
        )
        for item in yaml.safe_load_all(text)
    ]


def pod(name: str, address: str, account: str = "default", **changes: Any) -> Workload:
    return Workload(
        "finance",
        name,
        f"uid-{name}",
        "node-a",
        (ip_address(address),),
        labels={"app": name},
        service_account=account,
        proxy=ProxyClass.SIDECAR,
        **changes,
    )


def peer(account: str) -> Peer:
    return Peer("finance", service_account=account, proxy=ProxyClass.SIDECAR)


def builder(policies: str = POLICIES) -> ViewBuilder:
    made = ViewBuilder()
    for workload in (pod("server", "10.0.0.1"), pod("database", "10.0.0.4"), pod("free", "10.0.0.5")):
        made.put_workload(workload.uid, workload)
    made.put_holder("10.0.0.2", ip_address("10.0.0.2"), peer("client"))
    made.put_holder("10.0.0.3", ip_address("10.0.0.3"), peer("thief"))
    made.put_holder("10.0.0.9", ip_address("10.0.0.9"), Peer(entities=frozenset({Entity.REMOTE_NODE})))
    for document in documents(policies):
        made.put_document(document.name, document)
    return made


@pytest.fixture
def current() -> CurrentView:
    found = CurrentView()
    found.set(builder().view(1))
    return found


def request(
    *,
    source: str = "10.0.0.2",
    destination: str = "10.0.0.1",
    principal: str = CLIENT_NAME,
    method: str = "POST",
    path: str = "/api/v1/process",
    claims: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    http: bool = True,
    request_id: str = "",
) -> bytes:
    message = CheckRequest()
    attributes = message.attributes
    attributes.source.address.socket_address.address = source
    attributes.source.address.socket_address.port_value = 40000
    attributes.source.principal = principal
    attributes.destination.address.socket_address.address = destination
    attributes.destination.address.socket_address.port_value = 8080
    if http:
        attributes.request.http.method = method
        attributes.request.http.path = path
        attributes.request.http.host = "server"
        attributes.request.http.id = request_id
        attributes.request.http.headers.update(headers or {})
    if claims is not None:
        attributes.metadata_context.filter_metadata["envoy.filters.http.jwt_authn"].update({"payload": dict(claims)})
    encoded: bytes = message.SerializeToString()
    return encoded


GOOD = {"iss": "me", "sub": "x", "scope": "transactions"}


def ask(current: CurrentView, **changes: Any) -> CheckResponse:
    return CheckResponse.FromString(Judge(current).check(request(**changes)))


def header(response: CheckResponse, name: str) -> str | None:
    options = response.ok_response.response_headers_to_add or response.denied_response.headers
    return next((option.header.value for option in options if option.header.key == name), None)


CASES = {
    "scope as text": ({"claims": GOOD}, 0),
    "scope in a list": ({"claims": {**GOOD, "scope": ["x", "transactions"]}}, 0),
    "a query string": ({"claims": GOOD, "path": "/api/v1/process?x=1"}, 0),
    "another scope": ({"claims": {**GOOD, "scope": "other"}}, 403),
    "no token": ({}, 403),
    "GET": ({"claims": GOOD, "method": "GET"}, 403),
    "another path": ({"claims": GOOD, "path": "/api/v1/other"}, 403),
    "a denied path": ({"claims": GOOD, "path": "/admin/x"}, 403),
    "a pod no policy selects": ({"destination": "10.0.0.5"}, 0),
    "a node's address with a certificate": ({"claims": GOOD, "source": "10.0.0.9"}, 0),
    "an unknown address with a certificate": ({"claims": GOOD, "source": "192.0.2.1"}, 0),
    "plaintext": ({"claims": GOOD, "principal": ""}, 0),
    "another's certificate": ({"claims": GOOD, "source": "10.0.0.3"}, 403),
    "a destination that is no pod here": ({"claims": GOOD, "destination": "10.0.0.77"}, 503),
    "TCP by an allowed principal": ({"destination": "10.0.0.4", "http": False}, 0),
    "TCP in plaintext": ({"destination": "10.0.0.4", "http": False, "principal": ""}, 403),
    "TCP where every ALLOW rule needs HTTP": ({"http": False}, 403),
}


def test_doubts_never_hold_all_threads(current: CurrentView, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, answered, go_on = threading.Semaphore(0), threading.Semaphore(0), threading.Event()

    def newer_than(view: NodeView, timeout_s: float) -> NodeView:
        waiting.release()
        assert go_on.wait(10)
        return view

    def doubt(number: int) -> None:
        judge.check(request(destination=f"10.1.0.{number}"))
        answered.release()

    judge = Judge(current)
    monkeypatch.setattr(current, "newer_than", newer_than)
    threads = [threading.Thread(target=doubt, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    try:
        assert all(waiting.acquire(timeout=5) for _ in range(MAX_WAITING))
        assert all(answered.acquire(timeout=5) for _ in range(10 - MAX_WAITING))
        assert not waiting.acquire(blocking=False)
    finally:
        go_on.set()
        for thread in threads:
            thread.join()


def test_pods_of_one_uid_are_not_judged_by_each_others_policies() -> None:
    made = builder()
    for name, address in (("server", "10.0.0.1"), ("free", "10.0.0.5")):
        made.put_workload(f"uid-{name}", replace(pod(name, address), uid="copied"))
    current = CurrentView()
    current.set(made.view(1))
    judge = Judge(current)
    for destination, code in (("10.0.0.5", 0), ("10.0.0.1", 403), ("10.0.0.5", 0)):
        answer = CheckResponse.FromString(judge.check(request(destination=destination, method="GET")))
        assert answer.denied_response.status.code == code


HTTP_RULES = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: reads-only, namespace: finance}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEntities: [ENTITY]
    toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{method: GET}]}}]
"""


@pytest.mark.parametrize(
    ("entity", "source"), [("world", "192.0.2.1"), ("host", "10.0.0.9"), ("remote-node", "10.0.1.9")]
)
def test_http_rules_are_asked_of_whoever_has_no_labels(entity: str, source: str) -> None:
    made = ViewBuilder(node="node-a")
    made.put_workload("uid-server", pod("server", "10.0.0.1"))
    for address, node in (("10.0.0.9", "node-a"), ("10.0.1.9", "node-b")):
        made.put_holder(address, ip_address(address), Peer(entities=frozenset({Entity.REMOTE_NODE})), node)
    for document in documents(HTTP_RULES.replace("ENTITY", entity)):
        made.put_document(document.name, document)
    current = CurrentView()
    current.set(made.view(1))
    assert ask(current, source=source, method="GET").status.code == 0
    assert ask(current, source=source, method="POST").denied_response.status.code == 403


@pytest.mark.parametrize(("changes", "status"), CASES.values(), ids=CASES.keys())
def test_decision(current: CurrentView, changes: dict[str, Any], status: int) -> None:
    response = ask(current, **changes)
    assert response.denied_response.status.code == status
    assert (response.status.code == 0) == (status == 0)


def test_answer_names_the_policy(current: CurrentView) -> None:
    assert header(ask(current, claims=GOOD), "x-meshbridge-policy") == "finance/l7-jwt"
    denied = ask(current, path="/admin/x")
    assert header(denied, "x-meshbridge-policy") == "finance/no-admin"
    assert header(denied, "x-meshbridge-reason") == "policy"
    assert denied.denied_response.body == "meshbridge: denied by AuthorizationPolicy finance/no-admin\n"


def test_refused_certificate_says_whose_address_it_came_from(current: CurrentView) -> None:
    response = ask(current, claims=GOOD, source="10.0.0.3")
    assert header(response, "x-meshbridge-reason") == "identity-differs"
    assert CLIENT_NAME in response.denied_response.body
    assert "10.0.0.3 is a pod of service account finance/thief" in response.denied_response.body


def test_log_has_one_line_with_the_rule_and_no_secret(current: CurrentView) -> None:
    with capture_logs() as lines:
        ask(
            current,
            claims={**GOOD, "email": "me@secret.test"},
            path="/api/v1/process?access_token=SECRET1",
            headers={"authorization": "Bearer SECRET2", "cookie": "SECRET3"},
        )
    [line] = lines
    assert line["event"] == "check.decided"
    assert (line["verdict"], line["policy"], line["pod"]) == ("allow", "finance/l7-jwt", "finance/server")
    assert "policies.yaml" in line["rule"]
    assert "secret" not in json.dumps(line).lower()


def test_log_line_stays_short_whatever_the_request_says(current: CurrentView) -> None:
    endless = "x" * 50_000
    with capture_logs() as lines:
        ask(current, principal=f"spiffe://cluster.local/ns/finance/sa/{endless}", method=endless, path=f"/{endless}",
            request_id=endless)  # fmt: skip
    [line] = lines
    assert len(json.dumps(line)) < 4_000


def test_nothing_is_allowed_before_the_first_revision() -> None:
    response = ask(CurrentView(), claims=GOOD, destination="10.0.0.5")
    assert response.denied_response.status.code == 503
    assert header(response, "x-meshbridge-reason") == "not-ready"


def test_fault_of_our_own_is_a_refusal_an_error_line_and_no_exception(
    current: CurrentView, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: NodeView, workload: Workload) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(NodeView, "judge_of", broken)
    with capture_logs() as lines:
        response = ask(current, claims=GOOD)
    assert response.status.code != 0
    assert response.denied_response.status.code == 503
    assert [line["log_level"] for line in lines] == ["error", "info"]
    assert "bug" not in response.denied_response.body


def test_refused_mesh_policy_denies_and_is_named() -> None:
    broken = POLICIES.replace("methods: [POST]", "methods: [POST], bogus: [x]")
    found = CurrentView()
    found.set(builder(broken).view(1))
    response = ask(found, claims=GOOD)
    assert response.denied_response.status.code == 403
    assert header(response, "x-meshbridge-policy") == "finance/l7-jwt"
    assert "is refused" in response.denied_response.body


def test_certificate_of_an_address_that_has_just_changed_hands_is_read_again(
    current: CurrentView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshbridge.authz.judge.REREAD_S", 10.0)  # a busy machine may be late

    def arrive() -> None:
        time.sleep(REREAD_S / 3)
        made = builder()
        made.put_holder("10.0.0.3", ip_address("10.0.0.3"), peer("client"))
        current.set(made.view(2))

    thread = threading.Thread(target=arrive)
    thread.start()
    response = ask(current, claims=GOOD, source="10.0.0.3")
    thread.join()
    assert response.status.code == 0


def test_pod_that_has_just_been_created_is_found_in_the_next_revision(
    current: CurrentView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshbridge.authz.judge.REREAD_S", 10.0)  # a busy machine may be late

    def arrive() -> None:
        time.sleep(REREAD_S / 3)
        made = builder()
        made.put_workload("uid-new", pod("new", "10.0.0.77"))
        current.set(made.view(2))

    thread = threading.Thread(target=arrive)
    thread.start()
    response = ask(current, destination="10.0.0.77")
    thread.join()
    assert response.status.code == 0


def test_the_same_doubt_holds_a_thread_only_once(current: CurrentView) -> None:
    judge = Judge(current)
    data = request(claims=GOOD, source="10.0.0.3")
    judge.check(data)
    started = time.monotonic()
    for _ in range(20):
        assert CheckResponse.FromString(judge.check(data)).status.code != 0
    assert time.monotonic() - started < 10 * REREAD_S


def test_address_of_two_live_pods_has_no_owner() -> None:
    made = builder()
    made.put_workload("uid-twin", pod("twin", "10.0.0.5"))
    found = CurrentView()
    found.set(made.view(1))
    assert ask(found, destination="10.0.0.5").denied_response.status.code == 503


def test_finished_pod_gives_its_address_to_the_next() -> None:
    made = builder()
    made.put_workload("uid-old", pod("server", "10.0.0.5", phase="Succeeded"))
    found = CurrentView()
    found.set(made.view(1))
    assert ask(found, destination="10.0.0.5").status.code == 0


VIEW = CurrentView()
VIEW.set(builder().view(1))
JUDGE = Judge(VIEW)


@given(st.binary(max_size=300))
def test_no_bytes_are_allowed_by_accident(data: bytes) -> None:
    assert CheckResponse.FromString(JUDGE.check(data)).status.code != 0


@given(st.data())
def test_no_damage_to_a_denied_request_gets_it_allowed(data: st.DataObject) -> None:
    """Unless it names another pod: that is another question."""
    message = bytearray(request(method="GET", source="10.0.0.3"))
    for _ in range(data.draw(st.integers(1, 6))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    if CheckResponse.FromString(JUDGE.check(bytes(message))).status.code == 0:
        damaged = CheckRequest.FromString(bytes(message)).attributes
        assert damaged.destination.address.socket_address.address != "10.0.0.1"
