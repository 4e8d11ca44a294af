"""Which interface is whose: after a restart, by route, and when a device's number is used again."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from meshbridge.agent.endpoints import Endpoints, Hooked, find_interfaces, sources_of
from meshbridge.agent.view import LocalPod
from meshbridge.datapath.links import Link, NodeNetwork
from meshbridge.identity.model import IpAddress, Workload

A, B = ip_address("10.0.0.1"), ip_address("10.0.0.2")
VETH7, VETH8 = Link(7, "veth7"), Link(8, "veth8")


def pod(name: str, address: IpAddress, **fields: object) -> LocalPod:
    return LocalPod(Workload("shop", name, f"uid-{name}", "n", (address,), **fields))  # type: ignore[arg-type]


def network(routes: dict[IpAddress, int], *links: Link) -> NodeNetwork:
    return NodeNetwork({link.ifindex: link for link in links}, frozenset(), routes)


def found(
    pods: list[LocalPod], endpoints: Endpoints, seen: NodeNetwork, pinned: dict[int, frozenset[IpAddress]] | None = None
) -> list[tuple[str, int, bool]]:
    by_uid = {p.workload.uid: p for p in pods}
    return [
        (uid, link.ifindex, resumed) for uid, link, resumed in find_interfaces(by_uid, endpoints, seen, pinned or {})
    ]


def test_a_pod_is_found_by_the_route_to_its_address() -> None:
    assert found([pod("a", A)], Endpoints(), network({A: 7}, VETH7)) == [("uid-a", 7, False)]


def test_an_interface_that_outlived_the_agent_is_its_pods_still() -> None:
    endpoints = Endpoints(hooked={7: Hooked(7, "veth7", 3, 100)})
    assert found([pod("a", A)], endpoints, network({A: 7}, VETH7), {7: frozenset({A})}) == [("uid-a", 7, True)]


def test_an_interface_that_carried_another_address_is_not_resumed() -> None:
    endpoints = Endpoints(hooked={7: Hooked(7, "veth7", 3, 100)})
    assert found([pod("a", A)], endpoints, network({A: 7}, VETH7), {7: frozenset({B})}) == [("uid-a", 7, False)]


def test_an_interface_of_one_pod_is_not_given_to_another() -> None:
    endpoints = Endpoints(hooked={7: Hooked(7, "veth7", 3, 100, "uid-a")})
    assert found([pod("b", B)], endpoints, network({B: 7}, VETH7)) == []


def test_an_interface_whose_pod_is_gone_is_the_next_ones_of_that_address() -> None:
    """The device of the new pod came before the news of the old one's end, and was taken for the old one's."""
    endpoints, old, new = Endpoints(), pod("a", A), pod("b", A)
    assert endpoints.abandoned({"uid-a"}) == frozenset()
    first = endpoints.take(VETH7, "uid-a", None)
    assert endpoints.abandoned({"uid-a"}) == frozenset()
    assert endpoints.abandoned({"uid-b"}) == {7}
    pods = {"uid-b": new}
    assert [(uid, link) for uid, link, _ in find_interfaces(pods, endpoints, network({A: 7}, VETH7), {}, {7})] == [
        ("uid-b", VETH7)
    ]
    assert endpoints.take(VETH7, "uid-b", None).incarnation > first.incarnation
    assert old.workload.addresses == new.workload.addresses


def test_an_interface_announced_for_a_pod_that_is_not_told_of_yet_is_not_abandoned() -> None:
    endpoints = Endpoints()
    endpoints.take(VETH7, "uid-b", None)
    assert endpoints.abandoned({"uid-a"}) == frozenset()
    assert endpoints.abandoned({"uid-a", "uid-b"}) == frozenset()
    assert endpoints.abandoned({"uid-a"}) == {7}


def test_two_pods_with_one_address_get_one_interface_between_them() -> None:
    assert found([pod("a", A), pod("b", A)], Endpoints(), network({A: 7}, VETH7)) == [("uid-a", 7, False)]


def test_pods_that_are_gone_or_on_the_hosts_network_get_none() -> None:
    pods = [pod("a", A, phase="Succeeded"), pod("b", B, host_network=True)]
    assert found(pods, Endpoints(), network({A: 7, B: 8}, VETH7, VETH8)) == []


def test_a_pod_that_has_its_interface_is_not_looked_for() -> None:
    endpoints = Endpoints(hooked={8: Hooked(8, "veth8", 3, 100, "uid-a")})
    assert found([pod("a", A)], endpoints, network({A: 7}, VETH7, VETH8)) == []


def test_the_same_pod_keeps_its_incarnation_and_another_gets_a_new_one() -> None:
    endpoints = Endpoints(highest_id=5, highest_incarnation=100)
    first = endpoints.take(VETH7, "uid-a", None)
    assert endpoints.take(VETH7, "uid-a", b"123456") == Hooked(7, "veth7", 6, 101, "uid-a", b"123456")
    second = endpoints.take(VETH7, "uid-b", None)
    assert second.incarnation > first.incarnation
    assert second.id > first.id


def test_a_new_device_with_an_old_number_is_not_the_old_one() -> None:
    endpoints = Endpoints()
    first = endpoints.take(VETH7, "uid-a", None)
    endpoints.release([7])
    assert endpoints.take(VETH7, "uid-a", None).incarnation > first.incarnation


def test_an_annotation_gives_no_pod_the_address_of_another() -> None:
    virtual = ip_address("10.9.9.9")
    asking = replace(pod("a", A), extra_addresses=(B, virtual, A))
    assert sources_of(asking, {A, B}.__contains__) == {A, virtual}
