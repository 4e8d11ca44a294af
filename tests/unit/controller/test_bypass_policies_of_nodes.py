"""Which BypassPolicies a node is sent, and what is said of one that cannot be read."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from meshbridge.agent.view import NodeView
from meshbridge.bypass.bypasspolicy import Mode
from meshbridge.controller.cluster import Cluster
from meshbridge.controller.controller import Controller
from meshbridge.policy.model import Document, Source
from meshbridge.protos.agent_pb2 import Policy
from meshbridge.xds import types as xds
from meshbridge.xds.auth import node_caller
from meshbridge.xds.client import MESSAGES, Update
from meshbridge.xds.secrets import SecretStore, load_or_create_authority

NOW = datetime(2027, 1, 1, tzinfo=UTC)
VERSION = "meshbridge.io/v1alpha1"


def bypass_policy(spec: dict[str, Any], name: str = "p", namespace: str = "shop") -> Document:
    kind = "BypassPolicy" if namespace else "ClusterBypassPolicy"
    data = {"apiVersion": VERSION, "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec}
    return Document(kind, VERSION, namespace, name, data, Source("p.yaml", {"": 1, "spec.mode": 7}))


def pod(name: str, node: str, number: int, **labels: str) -> Document:
    data = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "labels": labels},
        "spec": {"nodeName": node, "containers": [{"name": "app"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": f"10.0.0.{number}"}]},
    }  # fmt: skip
    return Document("Pod", "v1", "shop", name, data)


PODS = (pod("api", "one", 1, app="api"), pod("db", "two", 2, app="db"))
SENT: dict[str, tuple[Document, set[str]]] = {
    "to the node of a pod it selects": (bypass_policy({"selector": {"matchLabels": {"app": "api"}}}), {"one"}),
    "to every node of its namespace's pods without a selector": (bypass_policy({}), {"one", "two"}),
    "to nobody where it selects nobody": (bypass_policy({"selector": {"matchLabels": {"app": "x"}}}), set()),
    "to nobody when it stands in another namespace": (bypass_policy({}, namespace="pay"), set()),
    "of the whole cluster": (bypass_policy({"selector": {"matchLabels": {"app": "db"}}}, namespace=""), {"two"}),
    "refused, where it may select": (
        bypass_policy({"selector": {"matchLabels": {"app": "api"}}, "mode": "off"}), {"one"},
    ),
    "refused with a selector that cannot be read, to its whole namespace": (
        bypass_policy({"selector": 3}), {"one", "two"},
    ),
}  # fmt: skip


def cluster(*documents: Document) -> Cluster:
    found = Cluster()
    found.apply({document.key: (document,) for document in (*PODS, *documents)})
    return found


@pytest.mark.parametrize(("policy", "nodes"), SENT.values(), ids=SENT.keys())
def test_a_bypass_policy_is_sent(policy: Document, nodes: set[str]) -> None:
    found = cluster(policy)
    assert {node for node in ("one", "two") if found.policies_on(node)} == nodes
    found.apply({policy.key: ()})
    assert not any(found.policies_on(node) for node in ("one", "two"))


def test_a_change_of_one_concerns_the_nodes_it_selects_and_no_sidecar() -> None:
    found = cluster()
    policy = bypass_policy({"selector": {"matchLabels": {"app": "api"}}})
    touched = found.apply({policy.key: (policy,)})
    assert touched.nodes == {"one"}
    assert not touched.sidecars


def test_one_that_is_refused_is_a_problem_with_file_and_line() -> None:
    (problem,) = cluster(bypass_policy({"mode": "off"})).problems
    assert (problem.file, problem.line, problem.reason) == ("p.yaml", 7, "refused")
    assert problem.text.startswith("p.yaml:7: BypassPolicy shop/p spec.mode")


def test_the_agent_reads_what_the_controller_sends(tmp_path: Path) -> None:
    controller = Controller(SecretStore(load_or_create_authority(tmp_path, "cluster.local", NOW)), lambda: NOW)
    policy = bypass_policy({"mode": "audit"})
    controller.apply({document.key: (document,) for document in (*PODS, policy)}, frozenset())
    snapshot = controller.open(node_caller("one"), lambda: None).snapshot
    assert snapshot is not None
    sent: dict[str, Any] = {name: Policy.FromString(found.body) for name, found in snapshot.types[xds.POLICY].items()}
    messages: dict[str, dict[str, Any]] = {type_url: {} for type_url in MESSAGES}
    view = NodeView()
    view.apply(Update(1, {**messages, xds.POLICY: sent}, {}))
    assert [(p.origin.policy, p.mode) for p in view.bypass_policies.values()] == [("shop/p", Mode.AUDIT)]
    assert not view.policies
    view.apply(Update(2, dict(messages), {xds.POLICY: frozenset({"meshbridge.io/BypassPolicy/shop/p"})}))
    assert not view.bypass_policies
