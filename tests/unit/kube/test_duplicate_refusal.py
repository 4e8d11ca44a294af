"""A policy defined twice is refused with the reach of both readings."""

from __future__ import annotations

from pathlib import Path

from meshbridge.identity.model import Peer
from meshbridge.kube.manifests import Manifests
from meshbridge.policy.model import Direction, Layer, Verdict
from meshbridge.policy.policyset import PolicySet

NETWORK = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: p, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: APP}}
  ingress: [{toPorts: [{ports: [{port: "80"}]}]}]
"""
DENYING = NETWORK.replace("ingress:", "egressDeny:")
MESH = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {selector: {matchLabels: {app: APP}}, rules: [{}]}
"""


def policies(directory: Path, first: str, second: str) -> PolicySet:
    (directory / "a.yaml").write_text(first)
    (directory / "b.yaml").write_text(second)
    manifests = Manifests([directory])
    manifests.refresh(0, 1e12, manifests.listing())
    return PolicySet.of(document for documents in manifests.documents.values() for document in documents)


def pod(app: str) -> Peer:
    return Peer(namespace="shop", labels={"app": app}, service_account="default")


def test_whom_either_selects_is_isolated_and_may_be_reached_by_nobody(tmp_path: Path) -> None:
    found = policies(tmp_path, NETWORK.replace("APP", "one"), NETWORK.replace("APP", "two"))
    for app in ("one", "two"):
        (rule,) = found.selecting(pod(app)).network
        assert (rule.direction, rule.default_deny, rule.peers) == (Direction.INGRESS, True, ())
    assert found.selecting(pod("three")).network == ()
    assert all("defined more than once" in str(refusal) for refusal in found.refusals)


def test_a_direction_one_of_them_denies_in_is_denied(tmp_path: Path) -> None:
    found = policies(tmp_path, NETWORK.replace("APP", "one"), DENYING.replace("APP", "one"))
    verdicts = {rule.direction: rule.verdict for rule in found.selecting(pod("one")).network}
    assert verdicts == {Direction.INGRESS: Verdict.ALLOW, Direction.EGRESS: Verdict.DENY}


def test_a_mesh_policy_is_left_to_envoy(tmp_path: Path) -> None:
    found = policies(tmp_path, MESH.replace("APP", "one"), MESH.replace("APP", "two"))
    for app in ("one", "two"):
        selecting = found.selecting(pod(app))
        assert selecting.authorization == ()
        assert [refusal.layer for refusal in selecting.refusals] == [Layer.MESH]
