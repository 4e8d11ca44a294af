"""What a CNI plugin's call means, whatever is in it."""

from __future__ import annotations

import json
from ipaddress import ip_address
from typing import Any

import pytest

from meshbridge.agent.cnicall import CallError, Code, Network, Verb, network_of, read_call, refusal, valid_containers

ARGS = b"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1"
RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
    "ips": [{"address": "10.0.0.1/24", "interface": 0}, {"address": "10.0.0.2/24", "interface": 1},
            {"address": "fd00::2/64"}],
}  # fmt: skip


def parts(verb: str = "ADD", args: bytes = ARGS, netns: bytes = b"/run/netns/x", **config: Any) -> list[bytes]:
    whole = {"cniVersion": "1.0.0", "name": "n", "type": "meshbridge-cni", "prevResult": RESULT, **config}
    return [verb.encode(), b"c1", netns, b"eth0", args, b"/opt/cni/bin", json.dumps(whole).encode()]


def code_of(given: list[bytes]) -> Code:
    with pytest.raises(CallError) as refused:
        network_of(read_call(given))
    return refused.value.code


def test_a_pod_is_known_by_its_arguments_and_its_addresses_by_the_chain() -> None:
    call = read_call(parts())
    assert (call.verb, call.pod, call.uid, call.container) == (Verb.ADD, "shop/web-0", "u-1", "c1")
    assert network_of(call) == Network((ip_address("10.0.0.2"), ip_address("fd00::2")), frozenset({"eth0"}))


def test_every_interface_inside_has_to_be_reached() -> None:
    inside = [*RESULT["interfaces"], {"name": "net1", "sandbox": "/run/netns/x"}]
    call = read_call(parts(prevResult={**RESULT, "interfaces": inside}))
    assert network_of(call).interfaces == {"eth0", "net1"}


REFUSED = {
    "not chained": (parts(prevResult=None), Code.CONFIG),
    "a result that is a list": (parts(prevResult=[1]), Code.DECODE),
    "addresses that are none": (parts(prevResult={"ips": [{"address": "x"}]}), Code.DECODE),
    "addresses that are texts": (parts(prevResult={"ips": ["10.0.0.1/24"]}), Code.DECODE),
    "too many addresses": (parts(prevResult={"ips": [{"address": "10.0.0.1/24"}] * 33}), Code.DECODE),
    "interfaces that are a text": (parts(prevResult={"interfaces": "eth0"}), Code.DECODE),
    "an unknown verb": (parts("FLUSH"), Code.VARIABLE),
    "a relative namespace": (parts(netns=b"x"), Code.VARIABLE),
    "no pod": (parts(args=b"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=;K8S_POD_UID=u"), Code.VARIABLE),
    "no UID": (parts(args=b"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0"), Code.VARIABLE),
    "arguments that are no text": (parts(args=b"\xff"), Code.VARIABLE),
    "an old version": (parts(cniVersion="0.2.0"), Code.VERSION),
    "a version that is a number": (parts(cniVersion=1), Code.VERSION),
    "no JSON": ([*parts()[:6], b"{"], Code.DECODE),
    "JSON without an end": ([*parts()[:6], b"[" * 100_000], Code.DECODE),
    "a list": ([*parts()[:6], b"[]"], Code.DECODE),
}


@pytest.mark.parametrize(("given", "code"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_met_is_refused_by_its_code(given: list[bytes], code: Code) -> None:
    assert code_of(given) is code


def test_a_deletion_needs_nothing_but_its_name() -> None:
    assert read_call(parts("DEL", b"", b"", prevResult=None)).verb is Verb.DEL


def test_garbage_is_what_is_not_named() -> None:
    named = {"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}
    assert valid_containers(read_call(parts("GC", **named))) == {"c1"}
    for wrong in (None, "c1", ["c1"]):
        with pytest.raises(CallError):
            valid_containers(read_call(parts("GC", **{"cni.dev/valid-attachments": wrong})))


def test_a_refusal_is_a_result_of_the_version_asked_for() -> None:
    frame = refusal(CallError(Code.CONFIG, "no\n" * 2_000), "0.4.0")
    found = json.loads(frame[8:])
    assert (found["cniVersion"], found["code"]) == ("0.4.0", 7)
    assert len(found["msg"]) <= 2_000
