"""What the agent makes of the controller's updates."""

from __future__ import annotations

import json
from ipaddress import ip_address
from typing import Any

import pytest

from meshbridge.abi import address_bytes
from meshbridge.agent.view import Announced, Changes, NodeView
from meshbridge.controller.messages import address_message, endpoint_message
from meshbridge.identity.model import Peer, Workload
from meshbridge.protos import agent_pb2
from meshbridge.xds import types as xds
from meshbridge.xds.client import MESSAGES, Update

WEB = Peer("shop", {"app": "web"}, service_account="web")
POD = Workload("shop", "web", "uid-1", "n", (ip_address("10.0.0.1"),), {"app": "web"})


def update(revision: int = 1, removed: dict[str, set[str]] | None = None, **changed: dict[str, Any]) -> Update:
    types = {
        "address": xds.ADDRESS,
        "endpoint": xds.ENDPOINT,
        "policy": xds.POLICY,
        "mesh": xds.MESH,
        "problem": xds.PROBLEM,
    }
    messages: dict[str, dict[str, Any]] = {type_url: {} for type_url in MESSAGES}
    messages |= {types[name]: found for name, found in changed.items()}
    gone = {type_url: frozenset(names) for type_url, names in (removed or {}).items()}
    return Update(revision, messages, gone)


def policy(name: str = "p", text: bytes | None = None, **spec: Any) -> agent_pb2.Policy:
    data = {
        "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"endpointSelector": {}, "ingress": [{"fromEndpoints": [{}]}], **spec},
    }  # fmt: skip
    return agent_pb2.Policy(
        api_version="cilium.io/v2", kind="CiliumNetworkPolicy", namespace="shop", name=name, file="p.yaml",
        json=text if text is not None else json.dumps(data).encode(), lines={"spec": 4, "spec.ingress[0]": 7},
    )  # fmt: skip


def test_holders_are_known_by_address_and_equal_peers_are_one_object() -> None:
    view = NodeView()
    first, second = ip_address("10.0.0.1"), ip_address("fd00::1")
    changes = view.apply(
        update(address={str(a): address_message(a, WEB, name="web", node="n") for a in (first, second)})
    )
    assert changes.addresses == {address_bytes(first), address_bytes(second)}
    holders = [view.holders[address_bytes(address)] for address in (first, second)]
    assert holders[0].peer is holders[1].peer
    assert (holders[0].name, holders[0].peer.labels) == ("web", {"app": "web"})


def test_an_update_is_used_up() -> None:
    taken = update(address={"10.0.0.1": address_message(ip_address("10.0.0.1"), WEB)}, policy={"p": policy()})
    NodeView().apply(taken)
    assert not any(taken.changed.values())


def test_what_is_removed_is_gone() -> None:
    view = NodeView()
    address = {"10.0.0.1": address_message(ip_address("10.0.0.1"), WEB)}
    problem = {"x": agent_pb2.Problem(text="bad")}
    view.apply(
        update(address=address, policy={"p": policy()}, endpoint={"uid-1": endpoint_message(POD)}, problem=problem)
    )
    changes = view.apply(
        update(2, {xds.ADDRESS: {"10.0.0.1"}, xds.POLICY: {"p"}, xds.ENDPOINT: {"uid-1"}, xds.PROBLEM: {"x"}})
    )
    assert (view.holders, view.policies, view.pods, view.problems) == ({}, {}, {}, {})
    assert changes.addresses == {address_bytes(ip_address("10.0.0.1"))}
    assert [parsed.document.name for parsed in changes.policies] == ["p"]


def test_a_changed_policy_is_told_as_it_was_and_as_it_is() -> None:
    view = NodeView()
    view.apply(update(policy={"p": policy()}))
    changes = view.apply(update(2, policy={"p": policy(ingressDeny=[{"fromEntities": ["world"]}])}))
    assert [len(parsed.network) for parsed in changes.policies] == [1, 2]
    assert not changes.everything


def test_rules_keep_their_file_and_line_and_the_text_is_let_go() -> None:
    view = NodeView()
    view.apply(update(policy={"p": policy()}))
    (parsed,) = view.policies.values()
    assert str(parsed.network[0].origin) == "CiliumNetworkPolicy shop/p spec.ingress[0] (p.yaml:7)"
    assert parsed.document.data == {}


def test_a_refused_policy_keeps_the_lines_its_sentence_needs() -> None:
    view = NodeView()
    view.apply(update(policy={"p": policy(ingress=[{"fromNowhere": []}])}))
    assert "p.yaml:7" in str(view.policy_set().refusals[0])


HOSTILE = {
    "policy that is no JSON": {"policy": {"p": policy(text=b"\xff\xfe{")}},
    "policy nested too deep": {"policy": {"p": policy(text=b"[" * 100_000)}},
    "policy that is a list": {"policy": {"p": policy(text=b"[1]")}},
    "address of three bytes": {"address": {"10.0.0.1": agent_pb2.Address(address=b"abc")}},
    "address under another name": {"address": {"10.0.0.2": address_message(ip_address("10.0.0.1"), WEB)}},
    "unknown entity": {"address": {"10.0.0.1": agent_pb2.Address(address=b"abcd", entities=["galaxy"])}},
    "unknown proxy": {"endpoint": {"u": agent_pb2.Endpoint(uid="u", proxy="turbo")}},
}


@pytest.mark.parametrize("changed", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_resource_that_means_nothing_keeps_the_revision_from_use_until_it_is_mended(
    changed: dict[str, dict[str, Any]],
) -> None:
    view = NodeView()
    view.apply(update(**{kind: dict(messages) for kind, messages in changed.items()}))
    assert len(view.unusable) == 1
    type_url, name = next(iter(view.unusable))
    view.apply(update(2, {type_url: {name}}))
    assert not view.unusable


def test_mesh_settings_touch_everything() -> None:
    view = NodeView()
    changes = view.apply(update(mesh={"mesh": agent_pb2.Mesh(root_namespace="root", trust_domain="td", cluster="c")}))
    assert changes.everything
    assert view.mesh.root_namespace == "root"


def endpoint(*addresses: str) -> agent_pb2.Endpoint:
    packed = [ip_address(address).packed for address in addresses]
    return agent_pb2.Endpoint(namespace="shop", name="web-0", uid="u", node="n", addresses=packed, proxy="none")


def told(view: NodeView) -> list[str]:
    return [str(address) for address in view.pods["u"].workload.addresses]


def test_an_announced_pod_has_its_addresses_until_the_controller_tells_which() -> None:
    view, one = NodeView(), ip_address("10.0.0.1")
    key = address_bytes(one)
    assert view.announce("u", Announced("shop/web-0", "c", (one,))).addresses == frozenset(), "nobody told of the pod"
    assert view.holder(key) is None
    assert key in view.apply(update(1, endpoint={"u": endpoint()})).addresses
    held = view.holder(key)
    assert told(view) == ["10.0.0.1"]
    assert held is not None
    assert held.name == "web-0"
    view.apply(update(2, endpoint={"u": endpoint()}))
    assert told(view) == ["10.0.0.1"], "told again, still without"
    assert key in view.apply(update(3, endpoint={"u": endpoint("10.0.0.2")})).addresses
    assert (told(view), view.holder(key), view.announced) == (["10.0.0.2"], None, {})


def test_an_announcement_counts_for_its_container_alone() -> None:
    view, one, two = NodeView(), ip_address("10.0.0.1"), ip_address("10.0.0.2")
    view.apply(update(1, endpoint={"u": endpoint()}))
    view.announce("u", Announced("shop/web-0", "old", (one,)))
    view.announce("u", Announced("shop/web-0", "new", (two,)))
    assert view.withdraw("u", "old") == Changes()
    assert told(view) == ["10.0.0.2"]
    assert address_bytes(two) in view.withdraw("u", "new").addresses
    assert told(view) == []


def test_a_pod_whose_sandbox_is_made_anew_has_its_new_address_at_once() -> None:
    view, old, new = NodeView(), ip_address("10.0.0.1"), ip_address("10.0.0.2")
    view.announce("u", Announced("shop/web-0", "first", (old,)))
    view.apply(update(1, endpoint={"u": endpoint("10.0.0.1")}))
    assert view.announced == {}
    view.announce("u", Announced("shop/web-0", "second", (new,)))
    assert told(view) == ["10.0.0.2"]
    view.apply(update(2, endpoint={"u": endpoint("10.0.0.1")}))
    assert told(view) == ["10.0.0.2"], "the kubelet has not written it yet"
    view.apply(update(3, endpoint={"u": endpoint("10.0.0.2")}))
    assert (told(view), view.announced) == (["10.0.0.2"], {})


def test_a_static_pod_is_known_by_its_mirror() -> None:
    view, one = NodeView(), ip_address("10.0.0.1")
    view.announce("hash", Announced("shop/web-0", "c", (one,)))
    assert view.adopt() == ({}, Changes())
    of_another = agent_pb2.Endpoint(namespace="shop", name="web-1", uid="v", node="n", proxy="none")
    mirror = agent_pb2.Endpoint(namespace="shop", name="web-0", uid="u", node="n", proxy="none")
    for pod in (of_another, mirror):
        pod.annotations["kubernetes.io/config.mirror"] = "hash"
    view.apply(update(1, endpoint={"v": of_another}))
    assert view.adopt() == ({}, Changes()), "whoever only says so"
    view.apply(update(2, removed={xds.ENDPOINT: {"v"}}, endpoint={"u": mirror}))
    adopted, changes = view.adopt()
    assert (adopted, told(view)) == ({"hash": "u"}, ["10.0.0.1"])
    assert address_bytes(one) in changes.addresses
    assert address_bytes(one) in view.withdraw("hash", "c").addresses, "DEL comes with the kubelet's UID"
    assert told(view) == []


def test_the_address_of_a_pod_whose_network_is_gone_is_nobodys() -> None:
    view, one = NodeView(), ip_address("10.0.0.1")
    key = address_bytes(one)

    def holder() -> str:
        found = view.holder(key)
        return found.name or ",".join(sorted(found.peer.entities)) if found else "nobody told of"

    def address(name: str) -> dict[str, Any]:
        return {"10.0.0.1": agent_pb2.Address(address=one.packed, namespace="shop", name=name, proxy="none")}

    view.announce("u", Announced("shop/web-0", "c", (one,)))
    view.apply(update(1, endpoint={"u": endpoint("10.0.0.1")}, address=address("web-0")))
    assert holder() == "web-0"
    assert view.withdraw("u", "another") == Changes()
    assert key in view.withdraw("u", "c").addresses
    assert holder() == "unmanaged"
    view.apply(update(2, address=address("web-0")))
    assert holder() == "unmanaged", "what is told is of before"
    view.apply(update(3, address=address("web-1")))
    assert holder() == "web-1"
    view.apply(update(4, removed={xds.ADDRESS: {"10.0.0.1"}}))
    view.apply(update(5, address=address("web-0")))
    assert holder() == "web-0"


def test_an_announcement_goes_with_its_pod() -> None:
    view, one = NodeView(), ip_address("10.0.0.1")
    view.apply(update(1, endpoint={"u": endpoint()}))
    view.announce("u", Announced("shop/web-0", "c", (one,)))
    view.apply(update(2, removed={xds.ENDPOINT: {"u"}}))
    assert (view.announced, view.holder(address_bytes(one)), view.pods) == ({}, None, {})


def test_an_announced_pod_hides_who_had_its_address_before() -> None:
    view, one = NodeView(), ip_address("10.0.0.1")
    before = agent_pb2.Address(address=one.packed, namespace="shop", name="old", proxy="none")
    view.apply(update(1, address={"10.0.0.1": before}, endpoint={"u": endpoint()}))
    view.announce("u", Announced("shop/web-0", "c", (one,)))
    held = view.holder(address_bytes(one))
    assert held is not None
    assert held.name == "web-0"
