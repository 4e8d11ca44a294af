"""From the kernel's event to the record people read."""

from __future__ import annotations

import time
from ipaddress import ip_address

from meshbridge import abi
from meshbridge.agent.names import Names
from meshbridge.agent.view import Holder
from meshbridge.identity.model import Entity, Peer
from meshbridge.observe.flow import FlowKind, FlowVerdict, LostBy, MatchType
from meshbridge.policy.model import Direction, Layer, Origin

WEB, API = ip_address("10.0.0.1"), ip_address("fd00::2")
ISOLATING = (Origin("CiliumNetworkPolicy", "shop", "api", "spec.ingress[0]", "p.yaml", 9),)


def names() -> Names:
    known = Names("node-1")
    web = Peer("shop", {"app": "web"}, service_account="web")
    known.holders = {abi.address_bytes(WEB): Holder(web, "web-1", "node-2")}
    known.identities = {1: Peer(entities=frozenset({Entity.HOST})), 300: web}
    return known


def event(**fields: object) -> abi.FlowEvent:
    defaults: dict[str, object] = {
        "time_ns": time.clock_gettime_ns(time.CLOCK_MONOTONIC), "endpoint_id": 5, "ifindex": 7, "source_identity": 300,
        "destination_identity": 301, "source": abi.address_bytes(WEB), "destination": abi.address_bytes(API),
        "source_port": 41112, "destination_port": 80, "type": abi.EventType.EVENT_DROP, "reason": 133, "protocol": 6,
        "tcp_flags": 2, "family": 0, "uid": 0xFFFFFFFF, "is_reply": 2,
        "network_verdict": abi.PolicyVerdict.POLICY_DENY,
    }  # fmt: skip
    return abi.FlowEvent(**(defaults | fields))  # type: ignore[arg-type]


def test_a_drop_names_peers_rules_layer_and_time() -> None:
    known = names()
    (flow,) = known.flows(event(network_rule_id=known.rules.number(ISOLATING)))
    assert (flow.kind, flow.verdict, flow.reason, flow.layer) == (
        FlowKind.DROP,
        FlowVerdict.DROPPED,
        133,
        Layer.NETWORK,
    )
    assert (flow.source.namespace, flow.source.pod, flow.source.port) == ("shop", "web-1", 41112)
    assert flow.source.labels == (
        "k8s:app=web", "k8s:io.cilium.k8s.policy.serviceaccount=web", "k8s:io.kubernetes.pod.namespace=shop",
    )  # fmt: skip
    assert (flow.destination.address, flow.destination.pod, flow.destination.port) == (API, "", 80)
    assert flow.network_rules == ISOLATING
    assert (flow.reply, flow.uid, flow.direction) == (None, None, Direction.INGRESS)
    assert abs(flow.time_ns - time.time_ns()) < 10**9


def test_losses_are_told_before_the_event_that_carries_them() -> None:
    lost, flow = names().flows(event(lost=17))
    assert (lost.kind, lost.lost, lost.lost_by) == (FlowKind.LOST, 17, LostBy.KERNEL)
    assert flow.lost == 0


def test_an_event_of_losses_only_is_one_record() -> None:
    assert [f.lost for f in names().flows(event(type=abi.EventType.EVENT_LOST, lost=3))] == [3]


def test_a_services_address_is_shown_with_the_services_name() -> None:
    known = names()
    world = frozenset({Entity.WORLD, Entity.WORLD_IPV6})
    known.identities = {**known.identities, 301: Peer(entities=world, service="shop/api, shop/old")}
    (flow,) = known.flows(event())
    assert {"service:shop/api", "service:shop/old"} < set(flow.destination.labels)
    assert flow.destination.pod == ""


def test_what_the_kernel_took_an_address_for_counts() -> None:
    (flow,) = names().flows(event(source_identity=1))
    assert (flow.source.identity, flow.source.entities) == (1, ("host",))


def test_a_verdict_of_both_layers() -> None:
    (flow,) = names().flows(
        event(type=abi.EventType.EVENT_VERDICT, reason=0, match_type=2, is_reply=0, rejudged=1,
              network_verdict=abi.PolicyVerdict.POLICY_ALLOW, mesh_verdict=abi.PolicyVerdict.POLICY_NEEDS_L7)
    )  # fmt: skip
    assert (flow.verdict, flow.match_type, flow.reply, flow.layer) == (
        FlowVerdict.ALLOWED,
        MatchType.L3_L4,
        False,
        None,
    )
    assert (flow.network_verdict, flow.mesh_verdict, flow.rejudged) == ("allow", "needs-l7", True)


def test_audited_is_not_dropped() -> None:
    (flow,) = names().flows(event(type=abi.EventType.EVENT_VERDICT, audit=1))
    assert flow.verdict is FlowVerdict.AUDIT


def test_a_frame_that_is_not_ip_has_no_addresses() -> None:
    (flow,) = names().flows(event(family=255, ethertype=0x8100, reason=182, network_verdict=0))
    assert (flow.source.address, flow.ethertype, flow.layer) == (None, 0x8100, None)


def test_numbers_of_another_run_or_version_are_shown_not_refused() -> None:
    (flow,) = names().flows(event(network_rule_id=999, match_type=77, direction=9, source_identity=4242))
    assert (flow.network_rules, flow.match_type) == ((), MatchType.NONE)
    assert list(names().flows(event(type=200))) == []
