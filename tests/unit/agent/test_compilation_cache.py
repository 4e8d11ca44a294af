"""Compiling only what changed must end in what compiling everything ends in."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policygen import cluster_policy

from meshbridge.agent.compilation import Compilation
from meshbridge.agent.view import LocalPod
from meshbridge.datapath.policysets import RuleIds
from meshbridge.identity.model import ContainerPort, Entity, Peer, ProxyClass, Workload
from meshbridge.identity.numbering import number_peers
from meshbridge.policy.compile import Compiler
from meshbridge.policy.model import Direction, Document
from meshbridge.policy.parse import Parsed, parse
from meshbridge.policy.policyset import PolicySet

APPS = ("web", "api", "db")
LABELS = [{"app": app} for app in APPS]
PODS = {
    f"uid-{app}": LocalPod(
        Workload("shop", app, f"uid-{app}", "n", (ip_address(f"10.0.0.{n}"),), {"app": app},
                 ports=(ContainerPort("http", 8080 + n),), proxy=ProxyClass.SIDECAR if n else ProxyClass.NONE)
    )
    for n, app in enumerate(APPS)
}  # fmt: skip


def network(name: str, to: str, peers: dict[str, Any], port: str, direction: str) -> Document:
    rule = {("fromEndpoints" if direction == "ingress" else "toEndpoints"): [{"matchLabels": peers}],
            "toPorts": [{"ports": [{"port": port, "protocol": "TCP"}]}]}  # fmt: skip
    spec = {"endpointSelector": {"matchLabels": {"app": to}}, direction: [rule]}
    return Document(
        "CiliumNetworkPolicy", "cilium.io/v2", "shop", name, _data("cilium.io/v2", "CiliumNetworkPolicy", name, spec)
    )


def mesh(name: str, to: str, principal: str, port: str) -> Document:
    rule = {"from": [{"source": {"namespaces": [principal]}}], "to": [{"operation": {"ports": [port]}}]}
    spec = {"selector": {"matchLabels": {"app": to}}, "action": "DENY", "rules": [rule]}
    version = "security.istio.io/v1"
    return Document("AuthorizationPolicy", version, "shop", name, _data(version, "AuthorizationPolicy", name, spec))


def tiered(name: str, seed: int) -> Document:
    data = cluster_policy(random.Random(seed), name)
    return Document(data["kind"], data["apiVersion"], "", data["metadata"]["name"], data)


def _data(version: str, kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": "shop"}, "spec": spec}


NAMES = st.sampled_from(("p1", "p2"))
APP = st.sampled_from(APPS)
PORTS = st.sampled_from(("80", "http"))
DOCUMENTS = st.one_of(
    st.builds(network, NAMES, APP, st.sampled_from((*LABELS, {})), PORTS, st.sampled_from(("ingress", "egress"))),
    st.builds(mesh, NAMES, APP, st.sampled_from(("shop", "pay")), st.just("80")),
    st.builds(tiered, NAMES, st.integers(0, 2**31 - 1)),
)
HOLDERS = st.dictionaries(
    st.integers(1, 9).map(lambda n: ip_address(f"10.1.0.{n}")),
    st.one_of(
        st.builds(
            Peer,
            st.sampled_from(("shop", "pay")),
            st.sampled_from(LABELS),
            service_account=st.just("default"),
            proxy=st.sampled_from((ProxyClass.NONE, ProxyClass.SIDECAR)),
            ports=st.sampled_from((frozenset(), frozenset({ContainerPort("http", 8081)}))),
        ),
        st.builds(
            Peer,
            labels=st.sampled_from(({}, {"zone": "a"})),
            entities=st.sampled_from(
                [frozenset({each}) for each in (Entity.HOST, Entity.REMOTE_NODE, Entity.UNMANAGED)]
            ),
        ),
    ),
    max_size=4,
)
UIDS = st.sets(st.sampled_from(sorted(PODS)), min_size=1)
STEPS = st.one_of(
    st.tuples(st.just("documents"), st.lists(DOCUMENTS, max_size=3)),
    st.tuples(st.just("holders"), HOLDERS),
    st.tuples(st.just("pods"), UIDS),
)
"""One thing changes at a time, so that all else could be kept."""

PLAIN = {
    uid: replace(pod, workload=replace(pod.workload, proxy=ProxyClass.NONE)) for uid, pod in PODS.items()
}  # what of a sidecar's traffic bypasses it is judged by who the other side is


@settings(deadline=None, max_examples=200)
@given(
    st.lists(DOCUMENTS, min_size=1, max_size=4), st.sampled_from((PODS, PLAIN)), st.lists(STEPS, min_size=1, max_size=5)
)
def test_a_chain_of_updates_ends_where_a_compilation_from_scratch_ends(
    documents: list[Document], pods: dict[str, LocalPod], steps: list[Any]
) -> None:
    rules = RuleIds()
    kept = Compilation(rules)
    identities: dict[int, Peer] = {}
    before: dict[tuple[str, ...], Parsed] = {}
    state: dict[str, Any] = {"documents": documents, "holders": {}, "pods": set(pods)}
    for what, value in [("documents", documents), *steps]:
        state[what] = value
        now = {document.key: parse(document) for document in state["documents"]}
        now = {key: before[key] if before.get(key) == parsed else parsed for key, parsed in now.items()}
        changed = [p for key, p in now.items() if before.get(key) is not p]
        changed += [p for key, p in before.items() if now.get(key) is not p]
        # as the agent does between renumberings: identities come, and stay for a while
        identities = {**identities, **number_peers(state["holders"], known=identities).identities}
        policies = PolicySet.of_parsed(now.values())
        chosen = {uid: pods[uid] for uid in state["pods"]}
        kept.update(chosen, policies, identities, PolicySet.of_parsed(changed))
        before = now
        scratch = Compilation(rules)
        scratch.update(chosen, policies, identities)
        assert kept.compiled == scratch.compiled


def compilation() -> tuple[Compilation, PolicySet, dict[int, Peer]]:
    policies = PolicySet.of([network("p", "api", {"app": "web"}, "80", "ingress")])
    identities = dict(number_peers({ip_address("10.1.0.1"): Peer("shop", {"app": "web"})}).identities)
    kept = Compilation(RuleIds())
    assert kept.update(PLAIN, policies, identities) == 3
    return kept, policies, identities


def test_nothing_is_compiled_when_nothing_changed() -> None:
    kept, policies, identities = compilation()
    assert kept.update(PLAIN, policies, dict(identities), PolicySet()) == 0


def test_a_new_peer_that_no_policy_picks_compiles_nothing() -> None:
    kept, policies, identities = compilation()
    with_db = {**identities, 900: Peer("shop", {"app": "db"})}
    assert kept.update(PLAIN, policies, with_db, PolicySet()) == 0
    with_web = {**with_db, 901: Peer("shop", {"app": "web", "tier": "x"})}
    assert kept.update(PLAIN, policies, with_web, PolicySet()) == 1


def test_the_own_node_as_another_class_is_let_in_where_no_policy_picks_it() -> None:
    """A CIDR or a node label in some other pod's policy makes one of the node's own addresses."""
    kept, policies, identities = compilation()
    known = {**identities, 900: Peer(labels={"zone": "a"}, entities=frozenset({Entity.HOST}))}
    kept.update(PLAIN, policies, known, PolicySet())
    scratch = Compilation(kept.rules)
    scratch.update(PLAIN, policies, known)
    assert kept.compiled == scratch.compiled


def test_a_changed_policy_compiles_whom_it_selects() -> None:
    kept, _, identities = compilation()
    document = network("p", "api", {"app": "db"}, "80", "ingress")
    assert kept.update(PLAIN, PolicySet.of([document]), identities, PolicySet.of([document])) == 1


def test_a_pod_whose_ports_changed_is_compiled_again() -> None:
    kept, policies, identities = compilation()
    api = PLAIN["uid-api"]
    changed = replace(api, workload=replace(api.workload, ports=(ContainerPort("http", 9999),)))
    assert kept.update({**PLAIN, "uid-api": changed}, policies, identities, PolicySet()) == 1


def test_a_pod_with_a_fault_is_closed_whatever_policies_say() -> None:
    kept, policies, identities = compilation()
    faulty = {**PLAIN, "uid-api": replace(PLAIN["uid-api"], fault="two have its UID")}
    kept.update(faulty, policies, identities, PolicySet())
    assert kept.compiled["uid-api"].sets is None
    assert "two have its UID" in kept.compiled["uid-api"].fault
    kept.update(PLAIN, policies, identities, PolicySet())
    assert kept.compiled["uid-api"].sets is not None


def test_a_pod_that_cannot_be_compiled_closes_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Compiler.endpoint

    def failing(self: Compiler, workload: Workload, *arguments: Any) -> Any:
        if workload.name == "api":
            raise RecursionError("too deep")
        return real(self, workload, *arguments)

    monkeypatch.setattr(Compiler, "endpoint", failing)
    kept, policies, identities = compilation()
    assert kept.compiled["uid-api"].sets is None
    assert "too deep" in kept.compiled["uid-api"].fault
    assert kept.compiled["uid-web"].sets is not None
    monkeypatch.undo()
    assert kept.update(PLAIN, policies, identities, PolicySet()) == 1, "what failed is tried again"
    assert kept.compiled["uid-api"].isolating[Direction.INGRESS][0].name == "p"
