"""Exported compensation, read again, drops what the kernel's entries drop on bypassed ports, and nothing elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from compensation_cases import PORTS, WORLDS, World
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbridge.bypass.compensated import Omission
from meshbridge.bypass.export import MESH_LABEL, Dialect, export
from meshbridge.bypass.inventory import Inventory, inventory
from meshbridge.cli.export import command
from meshbridge.identity.model import Entity, IpFamily, Peer, Workload
from meshbridge.kube.objects import read_objects
from meshbridge.policy.capture import Capture, PortClass, PortClasses
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.model import Direction, Document, Verdict
from meshbridge.policy.policyset import PolicySet

V4, TCP = IpFamily.IPV4, 6


def pod(key: str, address: str, excluded: Iterable[int] = (), *, proxy: bool = True, account: str = "default") -> Any:
    namespace, _, name = key.partition("/")
    listed = ",".join(map(str, excluded))
    containers: list[dict[str, Any]] = [{"name": "app", "ports": [{"containerPort": port} for port in PORTS]}]
    containers += [{"name": "istio-proxy"}] if proxy else []
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name, "namespace": namespace,
            "labels": {"app": name, **({MESH_LABEL: "istio"} if proxy else {})},
            "annotations": {"traffic.sidecar.istio.io/excludeInboundPorts": listed} if listed else {},
        },
        "spec": {"serviceAccountName": account, "containers": containers},
        "status": {"podIP": address},
    }  # fmt: skip


CLIENTS = [
    pod("shop/web", "10.1.0.1"),
    pod("shop/worker", "10.1.0.3", account="worker"),
    pod("pay/ledger", "10.2.0.1"),
    pod("pay/plain", "10.2.0.2", proxy=False),
    pod("lab/mouse", "10.4.0.1"),
]
OTHERS = {
    "node": Peer(entities=frozenset({Entity.REMOTE_NODE})),
    "world": Peer(entities=frozenset({Entity.WORLD, Entity.WORLD_IPV4})),
    "own node": Peer(entities=frozenset({Entity.HOST})),
}


def cluster(raw: list[Any], excluded: Iterable[int]) -> Inventory:
    items = {"apiVersion": "v1", "kind": "List", "items": [pod("shop/api", "10.1.0.2", excluded), *CLIENTS, *raw]}
    return inventory(read_objects(json.dumps(items).encode(), "all.json").documents)


def documents(objects: list[Any]) -> list[Document]:
    return [
        Document(o["kind"], o["apiVersion"], o["metadata"].get("namespace", ""), o["metadata"]["name"], o)
        for o in json.loads(json.dumps(objects))
    ]


def peers(found: Inventory) -> dict[str, Peer]:
    return {**{w.key: w.peer() for w in found.workloads if w.name != "api"}, **OTHERS}


def server(found: Inventory) -> Workload:
    return next(w for w in found.workloads if w.name == "api")


def compensated(found: Inventory, excluded: Iterable[int]) -> dict[tuple[str, int], bool]:
    """Whether the kernel's own entries drop a source, on each excluded port."""
    classes = PortClasses.of(PortClass.CAPTURED, dict.fromkeys(excluded, PortClass.EXCLUDED))
    return _drops(found, found.policies, Capture(dict.fromkeys(IpFamily, classes)), excluded, mesh=True)


def _drops(
    found: Inventory, policies: PolicySet, capture: Capture, ports: Iterable[int], *, mesh: bool
) -> dict[tuple[str, int], bool]:
    named = dict(enumerate(peers(found), 256))
    identities = {number: peers(found)[name] for number, name in named.items()}
    policy = Compiler(identities).endpoint(server(found), policies, capture)
    drops = {}
    for number, name in named.items():
        for port in ports:
            decision = evaluate(policy.map(Direction.INGRESS, V4), number, TCP, port)
            drops[name, port] = (decision.mesh if mesh else decision.network).verdict is Verdict.DENY
    return drops


def unsaid_ports(omissions: list[Omission], excluded: Iterable[int]) -> set[int]:
    found: set[int] = set()
    for omission in omissions:
        if omission.pod.startswith("shop/api"):
            named = {int(number) for number in re.findall(r"\b(\d+)\b", omission.pod.partition(" TCP ")[2])}
            found |= named or set(excluded)
            assert re.search(r"TCP ([\d,-]+)$", omission.pod) or not named
    return found


EXCLUDED = st.sets(st.sampled_from(PORTS), min_size=1).map(sorted)


@settings(max_examples=120, deadline=None)
@given(WORLDS, EXCLUDED)
def test_cilium_reads_back_as_the_kernels_own_verdicts_and_isolates_nothing(world: World, excluded: list[int]) -> None:
    found = cluster(world.raw, excluded)
    objects, omissions = export(found, Dialect.CILIUM)
    policies = PolicySet.of(documents(objects))
    assert not policies.refusals
    kernel = compensated(found, excluded)
    exported = _drops(found, policies, Capture.none(), PORTS, mesh=False)
    left_out = unsaid_ports(omissions, excluded)
    for (name, port), drops in exported.items():
        if port not in excluded:
            assert not drops
        elif port not in left_out:
            assert drops is kernel[name, port], (name, port)


@settings(max_examples=120, deadline=None)
@given(WORLDS, EXCLUDED)
def test_a_cluster_network_policy_drops_the_same_pods(world: World, excluded: list[int]) -> None:
    found = cluster(world.raw, excluded)
    objects, omissions = export(found, Dialect.CLUSTER_NETWORK_POLICY)
    policies = PolicySet.of(documents(objects))
    assert not policies.refusals
    assert all(rule["action"] == "Deny" for o in objects for rule in o["spec"]["ingress"])
    kernel = compensated(found, excluded)
    exported = _drops(found, policies, Capture.none(), PORTS, mesh=False)
    left_out = unsaid_ports([o for o in omissions if "nodes and the world" not in str(o)], excluded)
    for (name, port), drops in exported.items():
        if port not in excluded:
            assert not drops
        elif port not in left_out:
            assert drops is (kernel[name, port] and name not in OTHERS), (name, port)


def calico_drops(objects: list[Any], subject: Workload, source: Peer, port: int) -> bool:
    """The tier's policies by Calico's documentation: the first rule that matches, and at the end the tier's Pass."""
    for policy in objects:
        if policy["kind"] != "GlobalNetworkPolicy" or not _calico_selects(policy["spec"]["selector"], subject.peer()):
            continue
        for rule in policy["spec"]["ingress"]:
            ports = [str(p).partition(":") for p in rule["destination"]["ports"]]
            hits = any(int(first) <= port <= int(last or first) for first, _, last in ports)
            selector = rule.get("source", {}).get("selector")
            if hits and (selector is None or (source.is_pod and _calico_selects(selector, source))):
                if rule["action"] == "Deny":
                    return True
                break
    return False


def _calico_selects(selector: str, peer: Peer) -> bool:
    labels = {**peer.labels, "projectcalico.org/namespace": peer.namespace or "",
              "projectcalico.org/serviceaccount": peer.service_account}  # fmt: skip
    for term in selector.split(" && "):
        if match := re.fullmatch(r"(\S+) == '([^']*)'", term):
            holds = labels.get(match[1]) == match[2]
        else:
            match = re.fullmatch(r"(\S+) (in|not in) \{([^}]*)\}", term)
            assert match, term
            inside = labels.get(match[1], "") in [name.strip(" '") for name in match[3].split(",")]
            holds = inside is (match[2] == "in")
        if not holds:
            return False
    return True


@settings(max_examples=120, deadline=None)
@given(WORLDS, EXCLUDED)
def test_calico_drops_the_same_but_for_the_own_node(world: World, excluded: list[int]) -> None:
    found = cluster(world.raw, excluded)
    objects, omissions = export(found, Dialect.CALICO)
    kernel = compensated(found, excluded)
    left_out = unsaid_ports([o for o in omissions if "own node" not in str(o)], excluded)
    for name, peer in peers(found).items():
        for port in PORTS:
            drops = calico_drops(objects, server(found), peer, port)
            if port not in excluded:
                assert not drops
            elif port not in left_out and name != "own node":
                assert drops is kernel[name, port], (name, port)


STRICT = {
    "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
    "metadata": {"name": "default", "namespace": "shop"}, "spec": {"mtls": {"mode": "STRICT"}},
}  # fmt: skip


def allow(source: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "shop"},
        "spec": {"action": "ALLOW", "rules": [{"from": [{"source": source}]}]},
    }  # fmt: skip


def test_a_namespace_and_an_account_of_another_are_written_as_what_is_denied() -> None:
    raw = [allow({"principals": ["cluster.local/ns/pay/*", "cluster.local/ns/shop/sa/worker"]})]
    found = cluster(raw, [8080])
    (policy,), omissions = export(found, Dialect.CILIUM)
    assert omissions == []
    assert policy["spec"]["enableDefaultDeny"] == {"ingress": False, "egress": False}
    exported = _drops(found, PolicySet.of(documents([policy])), Capture.none(), [8080], mesh=False)
    assert sorted(name for (name, _), drops in exported.items() if not drops) == ["pay/ledger", "shop/worker"]


def test_what_users_deny_behind_an_exported_policy_stays_denied() -> None:
    theirs = {
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": {"name": "u"},
        "spec": {
            "tier": "Admin", "priority": 1000, "subject": {"namespaces": {}},
            "ingress": [{
                "action": "Deny",
                "from": [{"namespaces": {"matchLabels": {"kubernetes.io/metadata.name": "pay"}}}],
            }],
        },
    }  # fmt: skip
    found = cluster([allow({"namespaces": ["pay"]})], [8080])
    objects, _ = export(found, Dialect.CLUSTER_NETWORK_POLICY)
    assert objects
    drops = _drops(found, PolicySet.of(documents([*objects, theirs])), Capture.none(), [8080], mesh=False)
    assert drops["pay/ledger", 8080]


NOT_SAID = {
    "an address": (allow({"ipBlocks": ["10.0.0.0/8"]}), Dialect.CILIUM, "asks for source.ip"),
    "a pattern": (allow({"namespaces": ["pay*"]}), Dialect.CILIUM, "'pay*' is a pattern inside a name"),
    "a pattern of principals": (allow({"principals": ["cluster.local/ns/pa*"]}), Dialect.CILIUM, "pattern"),
    "an account": (
        allow({"serviceAccounts": ["pay/default"]}), Dialect.CLUSTER_NETWORK_POLICY, "service accounts (default)",
    ),
    "the world": (STRICT, Dialect.CLUSTER_NETWORK_POLICY, "nodes and the world are not dropped"),
    "the own node": (STRICT, Dialect.CALICO, "own node are not dropped"),
}  # fmt: skip


@pytest.mark.parametrize(("policy", "dialect", "says"), NOT_SAID.values(), ids=NOT_SAID.keys())
def test_what_a_dialect_cannot_say_is_named(policy: Any, dialect: Dialect, says: str) -> None:
    _, omissions = export(cluster([policy], [8080]), dialect)
    assert any(says in str(omission) and "shop/api" in str(omission) for omission in omissions)


def test_pods_that_no_label_tells_apart_are_left_out_where_only_one_is_excluded() -> None:
    twin = pod("shop/api-2", "10.1.0.9")
    twin["metadata"]["labels"]["app"] = "api"
    objects, (omission,) = export(cluster([STRICT, twin], [8080]), Dialect.CILIUM)
    assert objects == []
    assert "no label tells it from shop/api-2" in str(omission)


def test_a_rule_reaches_no_pod_that_other_policies_let_others_in_at() -> None:
    twin = pod("shop/api-2", "10.1.0.9", [8080])
    twin["metadata"]["labels"] |= {"app": "api", "version": "v2"}
    lab = allow({"namespaces": ["lab"]})
    lab["metadata"]["name"] = "lab"
    lab["spec"]["selector"] = {"matchLabels": {"version": "v2"}}
    objects, (omission,) = export(cluster([allow({"namespaces": ["pay"]}), lab, twin], [8080]), Dialect.CILIUM)
    assert "no label tells it from shop/api-2, which lets others in" in str(omission)
    assert omission.pod == "shop/api"
    assert [o["spec"]["endpointSelector"]["matchLabels"].get("k8s:version") for o in objects] == ["v2"]


def test_a_proxy_that_no_label_shows_is_named() -> None:
    bare = pod("shop/bare", "10.1.0.9")
    del bare["metadata"]["labels"][MESH_LABEL]
    _, omissions = export(cluster([STRICT, bare], [8080]), Dialect.CILIUM)
    assert any(omission.pod == "shop/bare" for omission in omissions)


def test_nothing_is_written_while_something_is_missing_unless_asked(tmp_path: Any) -> None:
    items = [pod("shop/api", "10.1.0.2", [8080]), STRICT]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(items))
    refused = CliRunner().invoke(command, ["--as", "calico", "-f", str(tmp_path)])
    assert refused.exit_code == 3
    assert "kind:" not in refused.output
    partial = CliRunner().invoke(command, ["--as", "calico", "--partial", "-f", str(tmp_path)])
    assert partial.exit_code == 3
    assert "kind: GlobalNetworkPolicy" in partial.output
    whole = CliRunner().invoke(command, ["-f", str(tmp_path)])
    assert whole.exit_code == 0
    assert next(yaml.safe_load_all(whole.output))["kind"] == "CiliumClusterwideNetworkPolicy"
