"""What the bench feeds to the product: clusters of a stated size, Envoys that differ in one filter, real packets."""

from __future__ import annotations

import json
from ipaddress import IPv4Address

import pytest

from meshbridge.bench import cluster, envoys, kernelstate
from meshbridge.bench.cluster import Place, Scale
from meshbridge.bench.errors import BenchError
from meshbridge.bench.kernelstate import Size
from meshbridge.bench.wrk import Result, parse_result
from meshbridge.kube.objects import read_objects
from meshbridge.policy.parse import parse

SCALE = Scale(endpoints=4, addresses=30, policies=12)


def test_population_has_the_size_it_says() -> None:
    places = [Place(f"app-{i}", "n", f"10.0.0.{i}", cluster.endpoint_labels(SCALE, i)) for i in range(4)]
    objects = cluster.population(SCALE, places, "10.0.1.1")
    kinds = [found["kind"] for found in objects]
    assert kinds.count("Pod") == 4 + 30
    assert kinds.count("CiliumNetworkPolicy") == 12
    addresses = [found["status"]["podIP"] for found in objects if found["kind"] == "Pod"]
    assert len(set(addresses)) == len(addresses)


def test_every_endpoint_is_selected_by_as_many_policies_and_every_policy_names_peers_that_exist() -> None:
    selected = [found["spec"]["endpointSelector"]["matchLabels"]["app"] for found in cluster.policies(SCALE)]
    assert {selected.count(app) for app in selected} == {12 // 4}
    peers = {place.labels["peer"] for place in cluster.peer_places(SCALE)}
    named = {
        found["spec"]["ingress"][0]["fromEndpoints"][0]["matchLabels"]["peer"] for found in cluster.policies(SCALE)
    }
    assert named == peers


def test_manifests_are_read_and_parsed_by_the_product_without_refusal() -> None:
    place = Place("server", "n", "10.0.0.1", {"app": "server"}, "server", envoys.INIT_ARGUMENTS)
    objects = [
        *cluster.base({"n": "10.0.1.1"}),
        *cluster.population(SCALE, [place], "10.0.1.1"),
        cluster.authorize("pay", {"app": "server"}, "cluster.local/ns/bench/sa/client", "GET", "/pay"),
        cluster.allow("out", {"app": "server"}, [{"peer": "p1"}], [1, 2], egress=True),
    ]
    documents = []
    for name, text in cluster.files(objects, "objects"):
        content = read_objects(text.encode(), name)
        assert not content.problems
        documents += content.documents
    assert len(documents) == len(objects)
    for document in documents:
        parsed = parse(document)
        assert not parsed.refusals, parsed.refusals
        assert not parsed.notices, parsed.notices


def http_filter_names(filters: list[envoys.Json]) -> list[str]:
    return [found["name"] for found in filters[-1]["typedConfig"]["httpFilters"]]


def test_variants_differ_in_the_judging_filter_only() -> None:
    ours = envoys.inbound_filters(None, judged=True)
    native = envoys.inbound_filters(envoys.native_rbac(), judged=True)
    neither = envoys.inbound_filters(None, judged=False)
    assert http_filter_names(ours) == ["envoy.filters.http.ext_authz", "envoy.filters.http.router"]
    assert http_filter_names(native) == ["envoy.filters.http.rbac", "envoy.filters.http.router"]
    assert http_filter_names(neither) == ["envoy.filters.http.router"]
    for filters in (ours, native, neither):
        del filters[-1]["typedConfig"]["httpFilters"]
    assert ours == native == neither


def test_configuration_is_json_and_asks_the_authz_server_only_where_there_is_one() -> None:
    certificates = envoys.issue((envoys.CLIENT_PRINCIPAL, envoys.SERVER_PRINCIPAL))
    without = json.dumps(envoys.server_config([], certificates, 7000, ""))
    assert "pipe" not in without
    assert '"/run/authz.sock"' in json.dumps(envoys.server_config([], certificates, 7000, "/run/authz.sock"))
    assert "BEGIN PRIVATE KEY" in json.dumps(envoys.client_config("10.0.0.1", 7000, certificates))


def test_opening_packets_are_distinct_flows_of_known_peers_to_allowed_ports() -> None:
    size = Size(entries=100, addresses=50)
    packets = list(kernelstate.openings(size, 500))
    assert len(set(packets)) == 500
    for packet in packets:
        assert len(packet) == 54
        peer = IPv4Address(packet[26:30])
        assert 0 <= int(peer) - kernelstate.PEER_BASE < 50
        assert IPv4Address(packet[30:34]) == kernelstate.POD
        port = int.from_bytes(packet[36:38], "big")
        assert kernelstate.FIRST_PORT <= port < kernelstate.FIRST_PORT + kernelstate.PORTS_PER_IDENTITY


WRK = 'Running 1s test\nwrk-result {"requests": 900, "duration_us": 1000100, "p50_us": 7, "p99_us": 90, "failed": %d}\n'


def test_result_of_wrk_is_read() -> None:
    assert parse_result(WRK % 0) == Result(900, 1_000_100, 7, 90, 0)


@pytest.mark.parametrize("output", [WRK % 3, "unable to connect\n", ""], ids=["failed", "no server", "nothing"])
def test_failed_requests_are_no_figure(output: str) -> None:
    with pytest.raises(BenchError):
        parse_result(output)
