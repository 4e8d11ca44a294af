"""What each node and sidecar is given while objects come, change and go."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshbridge.controller.controller import Controller
from meshbridge.identity.model import ContainerPort, Entity
from meshbridge.kube.manifests import Key
from meshbridge.kube.problems import ProblemReason
from meshbridge.policy.model import Document, Source
from meshbridge.policy.policyset import PolicySet
from meshbridge.protos import agent_pb2
from meshbridge.xds import messages
from meshbridge.xds import types as xds
from meshbridge.xds.auth import Caller, node_caller, pod_caller
from meshbridge.xds.secrets import SVID_LIFETIME, SecretStore, load_or_create_authority
from meshbridge.xds.select import mtls_destinations
from meshbridge.xds.server import Feed

NOW = datetime(2026, 11, 24, 7, 0, tzinfo=UTC)
API = {
    "Pod": "v1",
    "Namespace": "v1",
    "Node": "v1",
    "Service": "v1",
    "ConfigMap": "v1",
    "CiliumNetworkPolicy": "cilium.io/v2",
    "CiliumClusterwideNetworkPolicy": "cilium.io/v2",
    "ClusterNetworkPolicy": "policy.networking.k8s.io/v1alpha2",
    "AuthorizationPolicy": "security.istio.io/v1",
    "PeerAuthentication": "security.istio.io/v1",
}


def document(kind: str, name: str, namespace: str = "", uid: str = "", **data: Any) -> Document:
    metadata = {"name": name, "labels": data.pop("labels", {}), "annotations": data.pop("annotations", {})}
    return Document(kind, API[kind], namespace, name, {"metadata": metadata, **data}, Source("f.yaml", {"": 1}), uid)


def pod(
    name: str,
    ip: str,
    node: str = "node-a",
    *,
    namespace: str = "shop",
    app: str = "web",
    phase: str = "Running",
    **more: Any,
) -> Document:
    containers = [{"name": "app"}, {"name": "istio-proxy"}]
    return document(
        "Pod",
        name,
        namespace,
        more.pop("uid", f"uid-{name}"),
        labels={"app": app, "hash": name},
        spec={"nodeName": node, "serviceAccountName": "sa", "containers": containers, **more.pop("spec", {})},
        status={"phase": phase, "podIPs": [{"ip": ip}]},
        **more,
    )


def cnp(name: str, app: str, peer: Mapping[str, str], namespace: str = "shop") -> Document:
    spec = {"endpointSelector": {"matchLabels": {"app": app}}, "ingress": [{"fromEndpoints": [{"matchLabels": peer}]}]}
    return document("CiliumNetworkPolicy", name, namespace, spec=spec)


class World:
    """A controller whose documents are put in by hand."""

    def __init__(self, state: Path) -> None:
        self.now = NOW
        secrets = SecretStore(load_or_create_authority(state, "cluster.local", NOW))
        self.controller = Controller(secrets, lambda: self.now)
        self.woken: list[Caller] = []
        self.feeds: dict[Caller, Feed] = {}
        self.controller.apply({}, frozenset())

    def connect(self, caller: Caller) -> Feed:
        self.feeds[caller] = feed = self.controller.open(caller, lambda: self.woken.append(caller))
        return feed

    def put(self, *documents: Document) -> None:
        self.apply({d.key: (d,) for d in documents})

    def drop(self, *documents: Document) -> None:
        self.apply({d.key: () for d in documents})

    def apply(self, changes: Mapping[Key, tuple[Document, ...]]) -> None:
        self.woken.clear()
        self.controller.apply(changes, frozenset())
        asyncio.run(self.controller.refresh_sidecars())

    def names(self, feed: Feed, type_url: str) -> set[str]:
        assert feed.snapshot is not None
        return set(feed.snapshot.of(type_url))

    def address(self, feed: Feed, ip: str) -> messages.AddressHolder:
        assert feed.snapshot is not None
        return messages.holder_of(agent_pb2.Address.FromString(feed.snapshot.of(xds.ADDRESS)[ip].body))

    def revision(self, feed: Feed) -> int:
        assert feed.snapshot is not None
        return agent_pb2.Revision.FromString(feed.snapshot.of(xds.REVISION)["revision"].body).number


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


A, B = node_caller("node-a"), node_caller("node-b")


def test_a_node_gets_its_endpoints_the_policies_that_select_them_and_every_address(world: World) -> None:
    a, b = world.connect(A), world.connect(B)
    world.put(pod("web-0", "10.0.0.1"), pod("db-0", "10.0.0.2", "node-b", app="db"))
    world.put(cnp("for-web", "web", {"app": "db"}), cnp("for-db", "db", {"app": "web"}), cnp("other", "nobody", {}))
    assert world.names(a, xds.ENDPOINT) == {"uid-web-0"}
    assert world.names(b, xds.ENDPOINT) == {"uid-db-0"}
    assert world.names(a, xds.POLICY) == {"cilium.io/CiliumNetworkPolicy/shop/for-web"}
    assert world.names(b, xds.POLICY) == {"cilium.io/CiliumNetworkPolicy/shop/for-db"}
    assert world.names(a, xds.ADDRESS) == world.names(b, xds.ADDRESS) == {"10.0.0.1", "10.0.0.2"}


def test_pods_whose_manifests_name_no_uid_are_told_apart(world: World) -> None:
    a = world.connect(A)
    world.put(pod("web-0", "10.0.0.1", uid=""), pod("db-0", "10.0.0.2", uid="", app="db"))
    assert a.snapshot is not None
    sent = [agent_pb2.Endpoint.FromString(item.body) for item in a.snapshot.of(xds.ENDPOINT).values()]
    assert sorted(endpoint.uid for endpoint in sent) == ["shop/db-0", "shop/web-0"]
    assert world.names(a, xds.ENDPOINT) == {"shop/db-0", "shop/web-0"}
    taking = mtls_destinations(tuple(world.controller.cluster.workloads), (), PolicySet())
    assert [str(destination.address) for destination in taking] == ["10.0.0.1", "10.0.0.2"]


def test_only_nodes_whose_content_changed_get_a_revision(world: World) -> None:
    world.connect(A)
    world.connect(B)
    world.put(pod("web-0", "10.0.0.1"), pod("db-0", "10.0.0.2", "node-b", app="db"))
    policy = cnp("for-web", "web", {"app": "db"})
    world.put(policy)
    assert set(world.woken) == {A}
    world.put(policy)
    assert world.woken == []
    world.put(cnp("elsewhere", "web", {}, namespace="other"))
    assert world.woken == []


def test_revisions_grow_and_outlive_a_restart(world: World, tmp_path: Path) -> None:
    a = world.connect(A)
    numbers = [world.revision(a)]
    for number in range(3):
        world.put(pod("web-0", f"10.0.0.{number}"))
        numbers.append(world.revision(a))
    assert numbers == sorted(set(numbers))
    restarted = World(tmp_path)
    restarted.now = NOW + timedelta(seconds=1)
    assert restarted.revision(restarted.connect(A)) > numbers[-1]


def test_labels_are_trimmed_to_what_the_nodes_policies_tell_apart(world: World) -> None:
    a, b = world.connect(A), world.connect(B)
    namespace = document("Namespace", "shop", labels={"team": "x", "env": "prod"})
    world.put(namespace, pod("web-0", "10.0.0.1"), pod("db-0", "10.0.0.2", "node-b", app="db"))
    assert world.address(a, "10.0.0.2").peer.labels == {}
    world.put(cnp("p", "web", {"hash": "z", "k8s:io.cilium.k8s.namespace.labels.team": "x"}))
    holder = world.address(a, "10.0.0.2")
    assert (holder.peer.labels, holder.peer.namespace_labels) == ({"app": "db", "hash": "db-0"}, {"team": "x"})
    assert (holder.name, holder.uid, holder.node) == ("db-0", "uid-db-0", "node-b")
    assert world.address(b, "10.0.0.2").peer.labels == {}
    world.drop(cnp("p", "web", {}))
    assert world.address(a, "10.0.0.2").peer.labels == {}


def test_a_policy_with_a_new_label_key_reaches_addresses_sent_before(world: World) -> None:
    a = world.connect(A)
    world.put(pod("web-0", "10.0.0.1"), pod("db-0", "10.0.0.2", "node-b", app="db"), cnp("p", "web", {"app": "db"}))
    assert world.address(a, "10.0.0.2").peer.labels == {"app": "db"}
    world.put(cnp("q", "web", {"hash": "x"}))
    assert world.address(a, "10.0.0.2").peer.labels == {"app": "db", "hash": "db-0"}
    world.drop(cnp("q", "web", {}))
    assert world.address(a, "10.0.0.2").peer.labels == {"app": "db"}


def test_container_ports_are_sent_by_name_where_an_egress_policy_names_them(world: World) -> None:
    a = world.connect(A)
    ports = [{"name": "http", "containerPort": 8080}, {"name": "admin", "containerPort": 9}]
    world.put(pod("web-0", "10.0.0.1"), pod("db-0", "10.0.0.2", spec={"containers": [{"name": "app", "ports": ports}]}))
    assert world.address(a, "10.0.0.2").peer.ports == frozenset()
    egress = [{"toEndpoints": [{}], "toPorts": [{"ports": [{"port": "http", "protocol": "TCP"}]}]}]
    world.put(document("CiliumNetworkPolicy", "p", "shop", spec={"endpointSelector": {}, "egress": egress}))
    assert world.address(a, "10.0.0.2").peer.ports == {ContainerPort("http", 8080)}


GONE = {
    "terminal phase": pod("web-0", "10.0.0.1", phase="Succeeded"),
    "failed": pod("web-0", "10.0.0.1", phase="Failed"),
    "another address": pod("web-0", "10.0.0.9"),
}


@pytest.mark.parametrize("after", GONE.values(), ids=GONE.keys())
def test_a_pod_lets_go_of_its_address(world: World, after: Document) -> None:
    a = world.connect(A)
    world.put(pod("web-0", "10.0.0.1"))
    world.put(after)
    assert "10.0.0.1" not in world.names(a, xds.ADDRESS)


def test_an_address_of_two_live_pods_has_nobodys_labels_until_one_lets_go(world: World) -> None:
    a = world.connect(A)
    world.put(cnp("p", "web", {"app": "db"}), pod("web-0", "10.0.0.1"), pod("db-0", "10.0.0.1", "node-b", app="db"))
    contested = world.address(a, "10.0.0.1").peer
    assert (contested.is_pod, contested.entities) == (False, {Entity.UNMANAGED})
    (problem,) = world.controller.problems
    assert problem.reason is ProblemReason.CONFLICT
    assert "10.0.0.1 is held by pod shop/db-0 and pod shop/web-0" in problem.text
    world.put(pod("db-0", "10.0.0.1", "node-b", app="db", phase="Failed"))
    assert world.address(a, "10.0.0.1").name == "web-0"
    assert world.controller.problems == ()


def test_host_network_pods_are_no_endpoints(world: World) -> None:
    a = world.connect(A)
    world.put(pod("host", "172.16.0.1", spec={"hostNetwork": True}))
    assert world.names(a, xds.ENDPOINT) == set()
    assert world.names(a, xds.ADDRESS) == set()


def test_a_node_is_told_of_a_pod_with_its_policies_before_it_has_an_address(world: World) -> None:
    a, b = world.connect(A), world.connect(B)
    world.put(
        document("Pod", "new", "shop", labels={"app": "new"}, spec={"nodeName": "node-a"}),
        document("Pod", "unscheduled", "shop", labels={"app": "new"}, spec={}),
        cnp("for-new", "new", {"app": "db"}),
    )
    assert world.names(a, xds.ENDPOINT) == {"shop/new"}
    assert len(world.names(a, xds.POLICY)) == 1
    assert world.names(a, xds.ADDRESS) == set()
    assert world.names(b, xds.ENDPOINT) == world.names(b, xds.POLICY) == set()


def test_node_addresses_and_the_gateways_of_pod_ranges_are_nodes(world: World) -> None:
    a = world.connect(A)
    status = {"addresses": [{"type": "InternalIP", "address": "172.16.0.2"}, {"type": "Hostname", "address": "b"}]}
    spec = {"podCIDRs": ["10.244.2.0/24", "fd00:2::/64", "nonsense", 5]}
    world.put(document("Node", "node-b", spec=spec, status=status))
    assert world.names(a, xds.ADDRESS) == {"172.16.0.2", "10.244.2.1", "fd00:2::1"}
    holder = world.address(a, "10.244.2.1")
    assert (holder.node, holder.peer.entities, holder.name) == ("node-b", {Entity.REMOTE_NODE}, "")
    world.drop(document("Node", "node-b"))
    assert world.names(a, xds.ADDRESS) == set()


def test_a_nodes_labels_travel_as_far_as_policies_ask_for_them(world: World) -> None:
    a = world.connect(A)
    status = {"addresses": [{"type": "InternalIP", "address": "172.16.0.2"}]}
    world.put(pod("web-0", "10.0.0.1"), document("Node", "node-b", status=status, labels={"zone": "a", "arch": "x"}))
    assert world.address(a, "172.16.0.2").peer.labels == {}
    selector = {"matchExpressions": [{"key": "zone", "operator": "Exists"}]}
    spec = {
        "tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
        "egress": [{"action": "Deny", "to": [{"nodes": selector}]}],
    }  # fmt: skip
    world.put(document("ClusterNetworkPolicy", "c", namespace="", spec=spec))
    assert world.address(a, "172.16.0.2").peer.labels == {"zone": "a"}
    world.put(document("Node", "node-b", status=status, labels={"zone": "b"}))
    assert world.address(a, "172.16.0.2").peer.labels == {"zone": "b"}


def test_equal_priorities_of_two_policies_are_a_problem_of_both_until_one_changes(world: World) -> None:
    def guard(name: str, priority: int) -> Document:
        rule = {"action": "Deny", "from": [{"namespaces": {}}]}
        spec = {"tier": "Admin", "priority": priority, "subject": {"namespaces": {}}, "ingress": [rule]}
        return document("ClusterNetworkPolicy", name, spec=spec)

    world.put(guard("a", 1), guard("b", 1))
    texts = sorted(problem.text for problem in world.controller.problems)
    assert [text.partition(":")[0] for text in texts] == ["f.yaml", "f.yaml"]
    assert "ClusterNetworkPolicy a spec.priority: has the tier and priority of ClusterNetworkPolicy b" in texts[0]
    world.put(guard("b", 2))
    assert not world.controller.problems


def test_labels_of_a_namespace_reach_its_pods_whichever_came_first(world: World) -> None:
    a = world.connect(A)
    world.put(pod("web-0", "10.0.0.1"))
    clusterwide = document(
        "CiliumClusterwideNetworkPolicy",
        "c",
        spec={
            "endpointSelector": {"matchLabels": {"k8s:io.cilium.k8s.namespace.labels.team": "x"}},
            "ingress": [{"fromEntities": ["cluster"]}],
        },
    )
    world.put(clusterwide)
    assert world.names(a, xds.POLICY) == set()
    world.put(document("Namespace", "shop", labels={"team": "x"}))
    assert world.names(a, xds.POLICY) == {"cilium.io/CiliumClusterwideNetworkPolicy//c"}
    world.drop(document("Namespace", "shop"))
    assert world.names(a, xds.POLICY) == set()


def test_a_refused_policy_travels_to_whom_it_may_select_and_is_named(world: World) -> None:
    a, b = world.connect(A), world.connect(B)
    world.put(pod("web-0", "10.0.0.1"), pod("db-0", "10.0.0.2", "node-b", namespace="data", app="db"))
    world.put(
        document("CiliumNetworkPolicy", "bad", "shop", spec={"endpointSelector": {}, "ingress": [{"nonsense": 1}]})
    )
    assert world.names(a, xds.POLICY) == {"cilium.io/CiliumNetworkPolicy/shop/bad"}
    assert world.names(b, xds.POLICY) == set()
    (problem,) = world.controller.problems
    assert (problem.reason, problem.file) == (ProblemReason.REFUSED, "f.yaml")
    assert len(world.names(b, xds.PROBLEM)) == 1


def test_policies_of_the_root_namespace_reach_every_node(world: World) -> None:
    a = world.connect(A)
    world.put(pod("web-0", "10.0.0.1"), document("AuthorizationPolicy", "deny-all", "istio-system", spec={}))
    assert world.names(a, xds.POLICY) == {"security.istio.io/AuthorizationPolicy/istio-system/deny-all"}
    world.put(
        document("ConfigMap", "istio", "istio-system", data={"mesh": "rootNamespace: mesh-root\ntrustDomain: td"})
    )
    assert world.names(a, xds.POLICY) == set()
    assert world.address(a, "10.0.0.1").peer.trust_domain == "td"
    assert a.snapshot is not None
    mesh = messages.mesh_of(agent_pb2.Mesh.FromString(a.snapshot.of(xds.MESH)["mesh"].body))
    assert (mesh.root_namespace, mesh.trust_domain) == ("mesh-root", "td")


def test_mesh_settings_that_cannot_be_read_leave_those_before(world: World) -> None:
    a = world.connect(A)
    world.put(document("ConfigMap", "istio", "istio-system", data={"mesh": "rootNamespace: mesh-root"}))
    before = world.revision(a)
    world.put(document("ConfigMap", "istio", "istio-system", data={"mesh": "rootNamespace: [a"}))
    assert world.controller.cluster.mesh.root_namespace == "mesh-root"
    assert [problem.reason for problem in world.controller.problems] == [ProblemReason.REFUSED]
    assert world.revision(a) > before


def test_nobody_is_told_anything_before_the_documents_were_read(tmp_path: Path) -> None:
    controller = Controller(SecretStore(load_or_create_authority(tmp_path, "cluster.local", NOW)), lambda: NOW)
    feed = controller.open(A, lambda: None)
    assert feed.snapshot is None
    controller.apply({}, frozenset())
    assert feed.snapshot is not None


WEB = pod_caller("node-a", "shop", "web-0", "sa", "uid-web-0")


def test_an_envoy_gets_its_listeners_clusters_and_own_certificate(world: World) -> None:
    envoy = world.connect(WEB)
    assert envoy.snapshot is None, "its pod is not known yet"
    world.put(pod("web-0", "10.0.0.1"))
    assert world.names(envoy, xds.LISTENER) == {"inbound", "outbound"}
    assert world.names(envoy, xds.SECRET) == {"default", "ROOTCA"}
    assert world.names(envoy, xds.POLICY) == set()


def test_an_envoy_is_updated_only_when_its_configuration_changes(world: World) -> None:
    envoy = world.connect(WEB)
    world.put(pod("web-0", "10.0.0.1"))
    assert envoy.snapshot is not None
    before = envoy.snapshot
    world.put(pod("plain", "10.0.0.5", spec={"containers": [{"name": "app"}]}))
    assert envoy.snapshot is before
    mtls = document("PeerAuthentication", "strict", "shop", spec={"mtls": {"mode": "STRICT"}})
    world.put(mtls)
    assert envoy.snapshot is not before
    assert envoy.snapshot.of(xds.SECRET) is before.of(xds.SECRET)


def test_certificates_are_renewed_over_the_same_stream(world: World) -> None:
    envoy = world.connect(WEB)
    world.put(pod("web-0", "10.0.0.1"))
    assert envoy.snapshot is not None
    before = envoy.snapshot
    world.now += SVID_LIFETIME / 2
    asyncio.run(world.controller.refresh_sidecars())
    assert envoy.snapshot.of(xds.SECRET)["default"] != before.of(xds.SECRET)["default"]
    assert envoy.snapshot.of(xds.LISTENER) is before.of(xds.LISTENER)


NOT_ITS_OWN = {
    "another service account": pod_caller("node-a", "shop", "web-0", "admin", "uid-web-0"),
    "another UID": pod_caller("node-a", "shop", "web-0", "sa", "uid-of-an-earlier-pod"),
    "a pod that does not exist": pod_caller("node-a", "shop", "ghost", "sa", "uid-ghost"),
}


@pytest.mark.parametrize("caller", NOT_ITS_OWN.values(), ids=NOT_ITS_OWN.keys())
def test_a_pod_gets_nothing_that_is_not_its_own(world: World, caller: Caller) -> None:
    world.put(pod("web-0", "10.0.0.1"))
    assert world.connect(caller).snapshot is None


def test_the_stream_of_a_pod_that_is_gone_or_replaced_ends(world: World) -> None:
    first = world.connect(WEB)
    world.put(pod("web-0", "10.0.0.1"))
    world.put(pod("web-0", "10.0.0.1", uid="uid-of-the-next"))
    assert "is gone" in first.refusal
    next_one = world.connect(pod_caller("node-a", "shop", "web-0", "sa", "uid-of-the-next"))
    assert next_one.refusal == ""
    world.drop(pod("web-0", "10.0.0.1"))
    assert "is gone" in next_one.refusal


def test_a_pod_that_cannot_be_read_does_not_pass_for_the_world(world: World) -> None:
    a = world.connect(A)
    refused = pod("web-0", "10.0.0.1", spec={"serviceAccountName": "x/ns/finance/sa/client"})
    world.put(refused)
    assert world.address(a, "10.0.0.1").peer.entities == {Entity.UNMANAGED}
    world.put(pod("web-0", "10.0.0.1"))
    assert world.address(a, "10.0.0.1").peer.namespace == "shop"
    world.put(refused)
    world.drop(refused)
    assert world.names(a, xds.ADDRESS) == set()
    on_node = pod("web-1", "192.168.0.1", spec={"serviceAccountName": "x/y", "hostNetwork": True})
    world.put(on_node, pod("web-2", "10.0.0.2", phase="Failed", spec={"serviceAccountName": "x/y"}))
    assert world.names(a, xds.ADDRESS) == set()


def test_a_gateway_of_a_mapped_pod_range_is_named_as_nodes_read_it(world: World) -> None:
    a = world.connect(A)
    world.put(document("Node", "node-a", spec={"podCIDR": "::ffff:10.244.0.0/120"}))
    assert world.names(a, xds.ADDRESS) == {"10.244.0.1"}


def test_a_service_that_claims_a_pods_address_is_named(world: World) -> None:
    spec = {"externalIPs": ["10.0.0.1", "203.0.113.5"], "selector": {"app": "db"}, "ports": [{"port": 80}]}
    world.put(pod("web-0", "10.0.0.1"), document("Service", "evil", "shop", spec=spec))
    (problem,) = world.controller.problems
    assert "Service shop/evil claims 10.0.0.1, which is pod shop/web-0's" in problem.text
    world.drop(pod("web-0", "10.0.0.1"))
    assert not world.controller.problems


def test_extra_addresses_of_a_pod_are_sent_and_wrong_ones_named(world: World) -> None:
    a = world.connect(A)
    world.put(pod("web-0", "10.0.0.1", annotations={"meshbridge.io/extra-addresses": "10.9.9.9, nonsense"}))
    assert a.snapshot is not None
    endpoint = agent_pb2.Endpoint.FromString(a.snapshot.of(xds.ENDPOINT)["uid-web-0"].body)
    assert list(endpoint.extra_addresses) == [bytes([10, 9, 9, 9])]
    assert "'nonsense' is no address" in world.controller.problems[0].text


DOCUMENTS = [
    document("Namespace", "shop", labels={"team": "x"}),
    document("Namespace", "shop", labels={"team": "y"}),
    pod("web-0", "10.0.0.1"),
    pod("web-0", "10.0.0.2", app="db"),
    pod("web-0", "10.0.0.1", "node-b", phase="Failed"),
    pod("db-0", "10.0.0.1", "node-b", app="db"),
    pod("db-0", "10.0.0.3", "node-a", namespace="data", app="db"),
    cnp("p", "web", {"app": "db"}),
    cnp("p", "db", {"hash": "1", "k8s:io.cilium.k8s.namespace.labels.team": "x"}),
    cnp("q", "web", {"app": "db"}, namespace="data"),
    document("AuthorizationPolicy", "deny", "istio-system", spec={}),
    document("AuthorizationPolicy", "deny", "shop", spec={"rules": 5}),
    document("Node", "node-b", spec={"podCIDR": "10.0.0.0/24"}),
    document("ConfigMap", "istio", "istio-system", data={"mesh": "rootNamespace: shop"}),
]
STEPS = st.lists(st.tuples(st.sampled_from(DOCUMENTS), st.booleans()), max_size=20)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, st.randoms())
def test_a_chain_of_changes_ends_as_the_same_documents_from_scratch(
    tmp_path: Path, steps: list[tuple[Document, bool]], rng: random.Random
) -> None:
    gradual = World(tmp_path)
    feeds = [gradual.connect(A), gradual.connect(B)]
    final: dict[Key, tuple[Document, ...]] = {}
    for item, present in steps:
        gradual.apply({item.key: (item,) if present else ()})
        final[item.key] = (item,) if present else ()
    scratch = World(tmp_path)
    items = [(key, documents) for key, documents in final.items() if documents]
    scratch.apply(dict(rng.sample(items, len(items))))
    for caller, feed in zip((A, B), feeds, strict=True):
        expected = scratch.connect(caller).snapshot
        assert feed.snapshot is not None
        assert expected is not None
        for type_url in (xds.POLICY, xds.ADDRESS, xds.ENDPOINT, xds.MESH, xds.PROBLEM):
            assert dict(feed.snapshot.of(type_url)) == dict(expected.of(type_url))
