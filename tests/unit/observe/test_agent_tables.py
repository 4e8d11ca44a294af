"""Endpoint list and status, as people and programs read them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from meshbridge.observe.tables import endpoint_lines, endpoint_record, is_degraded, status_lines, status_record
from meshbridge.protos import observer_pb2 as pb

API = pb.EndpointState(
    id=512, namespace="shop", pod="api", uid="u1", identity=4712, labels=["k8s:b=2", "k8s:a=1"], state="ready",
    addresses=[ip_address("10.0.2.11").packed, ip_address("fd00::11").packed], ingress_enforced=True,
    ingress_policies=[pb.Rule(kind="CiliumNetworkPolicy", namespace="shop", name="p", file="f.yaml", line=3)],
    interface="veth1", attach_mode="tcx",
)  # fmt: skip
NEW = pb.EndpointState(
    id=9, namespace="shop", pod="new", identity=5, state="waiting-for-policy", message="no revision yet"
)
WELL = pb.Status(
    node="n1", version="0.1.0", revision_programmed=7, revision_received=7, controller_connected=True,
    endpoints_ready=2, endpoints_total=2, identities=12, addresses=40, policies=3, attach_mode="tcx",
    memory_resident_bytes=41_500_000,
    uptime_s=3723.4,
)  # fmt: skip


def test_endpoint_list_has_ciliums_columns_one_label_a_line_and_says_what_is_awaited() -> None:
    assert endpoint_lines([API, NEW]) == [
        "ENDPOINT   POLICY (ingress)   POLICY (egress)   IDENTITY   LABELS (source:key[=value])   "
        "IPv6       IPv4        STATUS",
        "           ENFORCEMENT        ENFORCEMENT",
        "9          Disabled           Disabled          init       no labels                     "
        "                       waiting-for-policy",
        "512        Enabled            Disabled          4712       k8s:a=1                       "
        "fd00::11   10.0.2.11   ready",
        "                                                           k8s:b=2",
        "",
        "endpoint 9 (shop/new): no revision yet",
    ]


def test_endpoint_list_without_endpoints_is_its_header() -> None:
    assert len(endpoint_lines([])) == 2


def test_endpoint_record_names_the_policies_with_file_and_line() -> None:
    record = endpoint_record("n1", API)
    assert record["policy"]["ingress"] == {"enforced": True, "policies": ["CiliumNetworkPolicy shop/p (f.yaml:3)"]}
    assert (record["ipv4"], record["ipv6"]) == (["10.0.2.11"], ["fd00::11"])


def test_status_of_a_node_where_all_is_well() -> None:
    assert status_lines(WELL) == [
        "Node:          n1 (meshbridge 0.1.0, up 1h02m03s)",
        "Status:        OK",
        "Controller:    connected",
        "Revision:      7",
        "Endpoints:     2/2 ready, attached by tcx",
        "Peers:         12 identities of 40 addresses",
        "Policies:      3",
        "Events lost:   0",
        "Memory:        41.5 MB resident",
    ]
    assert status_record(WELL)["degraded"] is False


def changed(**fields: object) -> pb.Status:
    status = pb.Status()
    status.CopyFrom(WELL)
    status.MergeFrom(pb.Status(**fields))  # type: ignore[arg-type]
    return status


DEGRADED = {
    "a refused object": changed(problems=["p.yaml:3: CiliumNetworkPolicy shop/p: unknown field"]),
    "a revision not programmed yet": changed(revision_received=8),
    "an endpoint that is not ready": changed(endpoints_total=3),
}


@pytest.mark.parametrize("status", DEGRADED.values(), ids=DEGRADED.keys())
def test_status_is_degraded_by(status: pb.Status) -> None:
    assert is_degraded(status)
    assert "Status:        Degraded" in status_lines(status)


def test_status_without_a_controller_says_what_holds() -> None:
    status = changed()
    status.controller_connected = False
    assert is_degraded(status)
    assert "Controller:    away; what was programmed stays enforced" in status_lines(status)


def test_problems_are_listed_and_cannot_forge_lines() -> None:
    assert status_lines(changed(problems=["bad\nname"]))[-1] == "  ! bad\\x0aname"
