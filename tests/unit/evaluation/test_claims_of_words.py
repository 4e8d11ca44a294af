"""Claims that hold several words, which a RequestAuthentication says policies ask for one by one."""

from __future__ import annotations

import json

import pytest

from meshbridge.evaluation.batch import answer_lines
from meshbridge.evaluation.cluster import Cluster
from meshbridge.kube.objects import read_objects

CLUSTER = """
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, labels: {app: api}}
spec: {containers: [{name: app}, {name: istio-proxy}]}
status: {podIP: 10.1.0.1}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: shop}
spec:
  jwtRules: [{issuer: "https://good", spaceDelimitedClaims: [roles]}, {issuer: "https://other"}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: admins, namespace: shop}
spec: {rules: [{when: [{key: "request.auth.claims[roles]", values: [admin]}]}]}
"""
CLAIMS = {
    "one of the words": ({"iss": "https://good", "roles": "user admin"}, "ALLOW"),
    "none of the words": ({"iss": "https://good", "roles": "user administrator"}, "DENY"),
    "of an issuer whose words are not parted": ({"iss": "https://other", "roles": "user admin"}, "DENY"),
    "of nobody in particular": ({"roles": "user admin"}, "ALLOW"),
}


@pytest.mark.parametrize(("claims", "verdict"), CLAIMS.values(), ids=CLAIMS.keys())
def test_words_of_a_claim(claims: dict[str, str], verdict: str) -> None:
    cluster = Cluster(read_objects(CLUSTER.encode(), "a.yaml").documents)
    http = {"method": "GET", "path": "/", "host": "api", "headers": {}}
    flow = {"src": "10.2.0.1", "dst": "shop/api", "port": 80, "claims": claims, "http": http, "app_protocol": "http"}
    (line,) = answer_lines(cluster, [json.dumps(flow).encode()])
    assert line.record["mesh"] == verdict, line.record
