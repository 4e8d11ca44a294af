"""What nodes are told of Services: their addresses, and the pods and ports behind each of theirs."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbridge.controller.cluster import Cluster
from meshbridge.policy.model import Document
from meshbridge.protos import agent_pb2
from meshbridge.xds.messages import ServiceFrontends, service_of
from meshbridge.xds.snapshot import Resources


def document(kind: str, name: str, spec: dict[str, Any], status: dict[str, Any], **labels: str) -> Document:
    metadata = {"name": name, "namespace": "shop", "labels": labels}
    data = {"apiVersion": "v1", "kind": kind, "metadata": metadata, "spec": spec, "status": status}
    return Document(kind, "v1", "shop", name, data, uid=f"uid-{name}")


def pod(name: str, app: str, *ips: str, phase: str = "Running", http: int = 0, host_network: bool = False) -> Document:
    ports = [{"name": "http", "containerPort": http}] if http else []
    spec = {"nodeName": "a", "hostNetwork": host_network, "containers": [{"name": "app", "ports": ports}]}
    return document("Pod", name, spec, {"phase": phase, "podIPs": [{"ip": ip} for ip in ips]}, app=app)


def service(
    name: str = "api", app: str = "api", target: Any = 8080, status: dict[str, Any] | None = None, **spec: Any
) -> Document:
    given = {
        "clusterIPs": ["10.96.0.1"],
        "selector": {"app": app},
        "ports": [{"port": 80, "targetPort": target}],
    }
    return document("Service", name, given | spec, status or {})


def cluster(*documents: Document) -> Cluster:
    made = Cluster()
    made.apply({each.key: (each,) for each in documents})
    return made


def told(of: Cluster) -> dict[str, ServiceFrontends]:
    return read(of.service_book.resources)


def read(resources: Resources) -> dict[str, ServiceFrontends]:
    return {name: service_of(agent_pb2.Service.FromString(found.body)) for name, found in resources.items()}


API1, API2 = pod("api-1", "api", "10.1.0.1", "fd00::1"), pod("api-2", "api", "10.1.0.2")
BACKENDS: dict[str, tuple[list[Document], set[tuple[str, int]]]] = {
    "the pods it selects, in both families": (
        [service(), API1, API2, pod("db", "db", "10.1.0.9")],
        {("10.1.0.1", 8080), ("fd00::1", 8080), ("10.1.0.2", 8080)}),
    "a named port is each pod's own": (
        [service(target="http"), pod("v1", "api", "10.1.0.1", http=81), pod("v2", "api", "10.1.0.2", http=82)],
        {("10.1.0.1", 81), ("10.1.0.2", 82)}),
    "a pod without the named port is none of its backends": ([service(target="http"), API2], set()),
    "no targetPort is the same port": ([service(target=None), API2], {("10.1.0.2", 80)}),
    "a pod on the host's network answers at its node's address": (
        [service(), pod("api-h", "api", "172.16.0.1", host_network=True)], {("172.16.0.1", 8080)}),
    "a pod that starts counts": ([service(), pod("new", "api", "10.1.0.3", phase="Pending")], {("10.1.0.3", 8080)}),
    "a pod that ended does not": ([service(), pod("job", "api", "10.1.0.3", phase="Succeeded")], set()),
    "without a selector nobody is known": ([service(selector=None), API1], set()),
    "an empty selector picks nobody": ([service(selector={}), API1], set()),
}  # fmt: skip


@pytest.mark.parametrize(("documents", "expected"), BACKENDS.values(), ids=BACKENDS.keys())
def test_who_answers_behind_a_service(documents: list[Document], expected: set[tuple[str, int]]) -> None:
    (port,) = told(cluster(*documents))["shop/api"].ports
    assert (port.protocol, port.port) == (6, 80)
    assert {(str(address), number) for address, number in port.backends} == expected


def balanced(**ingress: str) -> dict[str, Any]:
    return {"loadBalancer": {"ingress": [ingress]}}


ADDRESSES: dict[str, tuple[Document, list[str], list[str]]] = {
    "both families": (service(clusterIPs=["10.96.0.1", "fd96::1"]), ["10.96.0.1", "fd96::1"], []),
    "external IPs": (service(externalIPs=["203.0.113.5"]), ["10.96.0.1"], ["203.0.113.5"]),
    "a load balancer's": (service(status=balanced(ip="203.0.113.6")), ["10.96.0.1"], ["203.0.113.6"]),
    "not a load balancer's that the node does not translate": (
        service(status=balanced(ip="203.0.113.6", ipMode="Proxy")), ["10.96.0.1"], []),
    "a load balancer known by name": (service(status=balanced(hostname="lb.example")), ["10.96.0.1"], []),
}  # fmt: skip


@pytest.mark.parametrize(("given", "own", "outside"), ADDRESSES.values(), ids=ADDRESSES.keys())
def test_the_addresses_of_a_service(given: Document, own: list[str], outside: list[str]) -> None:
    known = told(cluster(given))["shop/api"]
    assert (known.addresses, known.outside_addresses) == (
        tuple(map(ip_address, own)), tuple(map(ip_address, outside)))  # fmt: skip


SILENT = {
    "headless": service(clusterIPs=["None"]),
    "a name elsewhere": service(type="ExternalName", externalName="db.example", externalIPs=["203.0.113.5"]),
    "without any address yet": service(clusterIPs=[]),
}


@pytest.mark.parametrize("given", SILENT.values(), ids=SILENT.keys())
def test_a_service_without_addresses_is_not_told(given: Document) -> None:
    assert told(cluster(given, API1)) == {}


def test_a_port_of_no_known_protocol_is_left_out_and_the_others_stay() -> None:
    ports = [{"port": 80}, {"port": 81, "protocol": "GOPHER"}]
    assert [port.port for port in told(cluster(service(ports=ports)))["shop/api"].ports] == [80]


@pytest.mark.parametrize("target", [70_000, -1, True, [80]])
def test_a_target_that_is_no_port_refuses_the_service_and_says_so(target: Any) -> None:
    made = cluster(service(target=target))
    assert told(made) == {}
    assert "is no port" in next(iter(made.problems)).text


def test_nothing_new_is_the_same_mapping() -> None:
    made = cluster(service(), API1)
    before = made.service_book.resources
    made.apply({API1.key: (API1,)})
    other = pod("db", "db", "10.1.0.9")
    made.apply({other.key: (other,)})
    assert made.service_book.resources is before


STATES = st.dictionaries(
    st.sampled_from(["api", "db", "api-1", "api-2"]),
    st.tuples(st.sampled_from(["api", "db"]), st.sampled_from(["10.1.0.1", "10.1.0.2"]), st.sampled_from([0, 81])),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STATES, min_size=2, max_size=4))
def test_a_chain_of_changes_ends_where_a_fresh_cluster_ends(states: list[dict[str, tuple[str, str, int]]]) -> None:
    kept = Cluster()
    known: set[Any] = set()
    for state in states:
        documents = [
            pod(name, app, ip, http=number) if "-" in name else service(name, app, "http" if number else 8080)
            for name, (app, ip, number) in state.items()
        ]
        now = {each.key: (each,) for each in documents}
        kept.apply({key: now.get(key, ()) for key in known | now.keys()})
        known |= now.keys()
        fresh = cluster(*documents)
        assert kept.service_book.resources == fresh.service_book.resources
