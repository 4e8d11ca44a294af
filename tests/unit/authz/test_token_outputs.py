"""Where no jwt_authn stands behind us: tokens of keys that were fetched, and what becomes of the request's headers."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from test_check_decisions import builder, request
from test_token_verifier import EC_KEY, ISSUER, ORIGIN, jwk, token

from meshbridge.authz.judge import Judge
from meshbridge.authz.keysets import KeySets
from meshbridge.authz.outputs import MAX_VALUE_BYTES, outputs_of
from meshbridge.authz.request import OWNED, OWNS_TOKENS
from meshbridge.authz.tokens import Verified
from meshbridge.authz.view import CurrentView
from meshbridge.policy.mesh import JwtLocation, JwtRule

RULE = JwtRule(
    ISSUER, ORIGIN, output_payload_to_header="x-payload",
    output_claims_to_headers=(("x-sub", "sub"), ("x-role", "nested.role"), ("x-list", "list"), ("x-on", "on"),
                              ("x-n", "n"), ("x-none", "none"), ("x-odd", "odd"), ("x-long", "long")),
)  # fmt: skip
CLAIMS = {"sub": "me", "nested": {"role": "admin"}, "list": ["a"], "on": True, "n": 7, "odd": "a\nb",
          "long": "x" * (MAX_VALUE_BYTES + 1)}  # fmt: skip
HEADER = JwtLocation(header="authorization", prefix="Bearer ")
VERIFIED = Verified(CLAIMS, RULE, HEADER, "cGF5bG9hZA")


def test_claims_and_payload_go_where_the_rule_says() -> None:
    sets, removes = outputs_of([RULE], VERIFIED)
    listed = base64.urlsafe_b64encode(b'["a"]').decode().rstrip("=")
    assert dict(sets) == {
        "x-payload": "cGF5bG9hZA", "x-sub": "me", "x-role": "admin", "x-list": listed, "x-on": "true", "x-n": "7",
    }  # fmt: skip
    assert removes == ("authorization", "x-long", "x-none", "x-odd")


@pytest.mark.parametrize(
    ("rule", "location", "removed"),
    [
        (replace(RULE, forward_original_token=True), HEADER, False),
        (RULE, JwtLocation(header="x-token"), True),
        (RULE, JwtLocation(parameter="token"), False),
    ],
    ids=["it is to be forwarded", "another header", "a parameter stays in the path"],
)
def test_the_token_itself_is_removed(rule: JwtRule, location: JwtLocation, removed: bool) -> None:
    _, removes = outputs_of([rule], replace(VERIFIED, rule=rule, location=location))
    assert (location.header in removes) is removed


def test_without_a_token_a_client_cannot_write_the_headers_itself() -> None:
    sets, removes = outputs_of([RULE], None)
    assert sets == ()
    assert {"x-payload", "x-sub"} <= set(removes)
    assert "authorization" not in removes


POLICIES = f"""
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: jwt, namespace: finance}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  jwtRules:
  - issuer: "{ISSUER}"
    jwksUri: "https://keys.example/set"
    outputClaimToHeaders: [{{header: X-Sub, claim: sub}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: tokens, namespace: finance}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  rules: [{{from: [{{source: {{requestPrincipals: ["*"]}}}}]}}]
"""


def answer(
    text: str | None,
    *,
    fetched: bool = True,
    owns: bool = True,
    policies: str = POLICIES,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> CheckResponse:
    current = CurrentView()
    current.set(builder(policies).view(1))
    view = current.get()
    assert view is not None
    key_sets = KeySets(lambda: view.key_sources, lambda _: json.dumps({"keys": [jwk(EC_KEY, "a")]}))
    if fetched:
        key_sets.refresh()
    headers = {**headers, "authorization": f"Bearer {text}"} if text else dict(headers)
    asked = CheckRequest.FromString(request(headers=headers))
    if owns:
        asked.attributes.context_extensions[OWNS_TOKENS] = OWNED
    return CheckResponse.FromString(Judge(current, key_sets).check(asked.SerializeToString()))


def valid(**claims: Any) -> str:
    return token(exp=int(time.time()) + 60, **claims)


def test_a_token_of_fetched_keys_is_verified_and_its_claims_forwarded() -> None:
    found = answer(valid())
    assert found.status.code == 0
    assert [(option.header.key, option.header.value) for option in found.ok_response.headers] == [("x-sub", "me")]
    assert list(found.ok_response.headers_to_remove) == ["authorization"]


BY_HEADER = POLICIES.replace(
    'from: [{source: {requestPrincipals: ["*"]}}]', 'when: [{key: "request.headers[x-sub]", values: [admin, me]}]'
)


@pytest.mark.parametrize(
    ("subject", "written", "passes"),
    [(None, "admin", False), ("me", None, True), ("me", "admin", True), ("nobody", "admin", False)],
)
@pytest.mark.parametrize("owns", [True, False], ids=["ours alone", "jwt_authn stands behind us"])
def test_policies_see_the_headers_that_tokens_fill_and_not_what_the_client_wrote_there(
    subject: str | None, written: str | None, passes: bool, owns: bool
) -> None:
    found = answer(
        valid(sub=subject) if subject else None,
        owns=owns,
        policies=BY_HEADER,
        headers={"x-sub": written} if written else {},
    )
    assert (found.status.code == 0) is passes


def test_a_token_whose_keys_are_not_there_is_refused_with_401_and_said_why() -> None:
    found = answer(valid(), fetched=False)
    assert found.denied_response.status.code == 401
    assert "has not been fetched yet" in found.denied_response.body


def test_no_token_is_no_error_but_has_no_claims() -> None:
    assert answer(None).denied_response.status.code == 403


def test_where_jwt_authn_stands_behind_us_the_request_is_left_to_it() -> None:
    found = answer(valid(), owns=False)
    assert found.status.code == 0
    assert not found.ok_response.headers
    assert not found.ok_response.headers_to_remove
