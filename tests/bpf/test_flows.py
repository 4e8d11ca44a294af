"""Connection tracking: what an entry lets through, what it does not, and what happens without one."""

from __future__ import annotations

import pytest
from conftest import ALLOW, DENY, NODE4, PEER4, PEER6, POD4, POD6, Pod
from harness import ACK, DENY_ALL, FIN, RST, SYN, UDP, Harness, Layer, entry, ip, ping, sctp, tcp, udp, udp_header

from meshbridge import abi
from meshbridge.abi import DropReason, EventType, PolicyVerdict

ADDRESSES = pytest.mark.parametrize(("pod_ip", "peer_ip"), [(POD4, PEER4), (POD6, PEER6)], ids=["v4", "v6"])
CLIENT, SERVER = 40000, 80


@ADDRESSES
def test_replies_of_an_allowed_flow_pass_where_policy_would_not_let_them_in(
    pod: Pod, pod_ip: str, peer_ip: str
) -> None:
    pod.change(ingress=DENY)
    assert pod.send(tcp(pod_ip, peer_ip, CLIENT, 443)).passed
    assert pod.receive(tcp(peer_ip, pod_ip, 443, CLIENT, SYN | ACK)).passed
    assert pod.receive(tcp(peer_ip, pod_ip, 443, CLIENT, ACK, b"data")).passed
    assert not pod.receive(tcp(peer_ip, pod_ip, 443, CLIENT + 1, ACK)).passed


@ADDRESSES
def test_udp_and_ping_replies_pass(pod: Pod, pod_ip: str, peer_ip: str) -> None:
    pod.change(ingress=DENY)
    assert not pod.receive(udp(peer_ip, pod_ip, 53, CLIENT)).passed
    assert not pod.receive(ping(peer_ip, pod_ip, reply=True)).passed
    assert pod.send(udp(pod_ip, peer_ip, CLIENT, 53)).passed
    assert pod.send(ping(pod_ip, peer_ip)).passed
    assert pod.receive(udp(peer_ip, pod_ip, 53, CLIENT)).passed
    assert pod.receive(ping(peer_ip, pod_ip, reply=True)).passed
    assert not pod.receive(ping(peer_ip, pod_ip, identifier=8, reply=True)).passed
    assert not pod.receive(ping(peer_ip, pod_ip)).passed, "a request is not a reply"
    assert not pod.receive(sctp(peer_ip, pod_ip, 53, CLIENT)).passed


def test_a_reply_is_traced_once_and_a_flow_told_once(pod: Pod) -> None:
    first = pod.receive(tcp(PEER4, POD4, CLIENT, SERVER)).event
    assert (first.type, first.is_reply, first.source_identity) == (EventType.EVENT_VERDICT, 0, 500)
    reply = pod.send(tcp(POD4, PEER4, SERVER, CLIENT, SYN | ACK)).event
    assert (reply.type, reply.is_reply, reply.destination_identity) == (EventType.EVENT_TRACE, 1, 500)
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK)).events == ()
    assert pod.send(tcp(POD4, PEER4, SERVER, CLIENT, ACK)).events == ()


def test_a_denied_packet_makes_no_entry(pod: Pod) -> None:
    pod.change(ingress=DENY, egress=DENY)
    for packet in (tcp(PEER4, POD4, 1, 2), udp(PEER4, POD4, 1, 2), ping(PEER4, POD4), tcp(PEER4, POD4, 1, 2, ACK)):
        assert not pod.receive(packet).passed
    for packet in (tcp(POD4, PEER4, 1, 2), udp(POD4, PEER4, 1, 2), ping(POD4, PEER4), tcp(POD4, PEER4, 1, 2, ACK)):
        assert not pod.send(packet).passed
    assert pod.flows() == 0


def test_egress_of_one_pod_never_vouches_for_ingress_of_another_on_the_node(kernel: Harness, pod: Pod) -> None:
    other = kernel.interfaces[1]
    kernel.endpoint(other, [PEER4], sets=(DENY, DENY, ALLOW, ALLOW), identity=500)
    packet = tcp(POD4, PEER4, CLIENT, SERVER)
    assert pod.send(packet).passed
    assert not kernel.run(other, "to_pod", packet).passed
    assert not kernel.run(other, "to_pod", tcp(POD4, PEER4, CLIENT, SERVER, ACK)).passed
    kernel.change(other, sets=(ALLOW,) * 4, revision=2)
    assert kernel.run(other, "to_pod", packet).passed
    assert kernel.run(other, "from_pod", tcp(PEER4, POD4, SERVER, CLIENT, SYN | ACK)).passed
    assert pod.receive(tcp(PEER4, POD4, SERVER, CLIENT, SYN | ACK)).passed


def test_the_state_of_a_pod_does_not_outlive_it(kernel: Harness, pod: Pod) -> None:
    assert pod.send(tcp(POD4, PEER4, CLIENT, SERVER)).passed
    kernel.endpoint(pod.ifindex, [POD4], sets=(DENY, DENY, ALLOW, ALLOW), identity=301)
    assert not pod.receive(tcp(PEER4, POD4, SERVER, CLIENT, SYN | ACK)).passed


def test_an_open_connection_is_cut_when_policy_turns_to_deny(pod: Pod) -> None:
    pod.receive(tcp(PEER4, POD4, CLIENT, SERVER))
    pod.send(tcp(POD4, PEER4, SERVER, CLIENT, SYN | ACK))
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK)).passed
    pod.change(ingress=DENY)
    outcome = pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK, b"data"))
    assert (outcome.passed, outcome.reason, outcome.event.rejudged) == (False, DropReason.DROP_POLICY, 1)


def test_a_cut_connection_does_not_come_back_by_open_egress(pod: Pod) -> None:
    pod.receive(tcp(PEER4, POD4, CLIENT, SERVER))
    pod.send(tcp(POD4, PEER4, SERVER, CLIENT, SYN | ACK))
    pod.change(ingress=DENY)
    for _ in range(3):
        assert not pod.send(tcp(POD4, PEER4, SERVER, CLIENT, ACK, b"what the server still has to say")).passed
        assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK, b"data")).passed
        assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, FIN | ACK)).passed
        assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, SYN)).passed
        assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, SYN | ACK)).passed


def test_a_cut_connection_goes_on_when_policy_allows_it_again(pod: Pod) -> None:
    pod.receive(tcp(PEER4, POD4, CLIENT, SERVER))
    pod.change(ingress=DENY)
    assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK)).passed
    pod.change(ingress=ALLOW)
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK)).passed
    assert pod.send(tcp(POD4, PEER4, SERVER, CLIENT, ACK)).passed


def test_a_cut_connection_may_be_opened_anew_from_the_other_side(pod: Pod) -> None:
    pod.receive(tcp(PEER4, POD4, CLIENT, SERVER))
    pod.change(ingress=DENY)
    assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK)).passed
    assert pod.send(tcp(POD4, PEER4, SERVER, CLIENT, SYN)).passed
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, SYN | ACK)).passed
    assert pod.send(tcp(POD4, PEER4, SERVER, CLIENT, ACK)).passed
    assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, SYN)).passed


def test_a_reply_is_judged_again_by_the_flow_it_belongs_to(pod: Pod) -> None:
    pod.send(tcp(POD4, PEER4, CLIENT, 443))
    pod.change(ingress=DENY)
    assert pod.receive(tcp(PEER4, POD4, 443, CLIENT, SYN | ACK)).passed
    pod.change(ingress=ALLOW, egress=DENY)
    outcome = pod.receive(tcp(PEER4, POD4, 443, CLIENT, ACK))
    assert (outcome.passed, outcome.event.rejudged) == (False, 1)
    assert not pod.send(tcp(POD4, PEER4, CLIENT, 443, ACK)).passed


def test_a_flow_is_judged_again_with_the_identity_its_peer_has_now(kernel: Harness, pod: Pod) -> None:
    kernel.policy_set(3, Layer({(500, 0, 0, 17): entry()}, default=PolicyVerdict.POLICY_DENY))
    pod.change(ingress=3)
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER)).passed
    kernel.peer(PEER4, 501)
    pod.change(ingress=3)
    outcome = pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK))
    assert (outcome.passed, outcome.event.source_identity) == (False, 501)


def test_a_udp_flow_that_was_cut_opens_no_way_back_for_it(pod: Pod) -> None:
    pod.receive(udp(PEER4, POD4, CLIENT, SERVER))
    pod.change(ingress=DENY)
    assert not pod.receive(udp(PEER4, POD4, CLIENT, SERVER)).passed
    assert pod.send(udp(POD4, PEER4, SERVER, CLIENT)).passed, "egress allows it by itself"
    assert not pod.receive(udp(PEER4, POD4, CLIENT, SERVER)).passed


def test_a_syn_is_always_judged(pod: Pod) -> None:
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER)).passed
    pod.kernel.policy_set(ALLOW, DENY_ALL)  # under the same revision, as if the agent were still writing
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK)).passed
    assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, SYN)).passed
    assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK)).passed, "from then on its packets are judged again"
    assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, SYN | FIN)).passed
    assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, SYN | RST)).passed


@ADDRESSES
def test_ingress_is_not_opened_by_flags_or_chosen_ports(pod: Pod, pod_ip: str, peer_ip: str) -> None:
    pod.change(ingress=DENY)
    for source_port in (80, 443, 40000, 65535):
        for flags in (ACK, RST, RST | ACK, FIN, SYN | ACK, 0, 0xFF & ~SYN):
            for port in (SERVER, CLIENT):
                assert not pod.receive(tcp(peer_ip, pod_ip, source_port, port, flags, b"data")).passed
        assert not pod.receive(udp(peer_ip, pod_ip, source_port, CLIENT)).passed
        assert not pod.receive(sctp(peer_ip, pod_ip, source_port, CLIENT)).passed
    assert pod.flows() == 0


def test_a_connection_whose_entry_was_lost_goes_on_when_its_opener_speaks(pod: Pod) -> None:
    """Evicted, or older than the programs: the client's port says who opened it."""
    pod.change(ingress=DENY)
    assert not pod.receive(tcp(PEER4, POD4, 443, CLIENT, ACK, b"download")).passed
    assert pod.send(tcp(POD4, PEER4, CLIENT, 443, ACK)).passed
    assert pod.receive(tcp(PEER4, POD4, 443, CLIENT, ACK, b"download")).passed
    pod.change(ingress=ALLOW, egress=DENY)
    pod.kernel.maps.conntrack.remove(pod.incarnation)
    pod.change(flow_table=pod.kernel.maps.conntrack.create(pod.incarnation))
    assert not pod.send(tcp(POD4, PEER4, SERVER, CLIENT, ACK, b"answer")).passed
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK)).passed
    assert pod.send(tcp(POD4, PEER4, SERVER, CLIENT, ACK, b"answer")).passed


def test_egress_is_not_opened_by_chosen_ports(pod: Pod) -> None:
    """Open ingress does not let a pod send what looks like answers."""
    pod.change(egress=DENY)
    for flags in (ACK, RST, SYN | ACK, 0):
        assert not pod.send(tcp(POD4, PEER4, 443, CLIENT, flags, b"a secret")).passed
    assert pod.flows() == 0


def test_without_an_entry_a_server_does_not_pass_for_the_client_of_its_client(pod: Pod) -> None:
    """What a connection that ingress denies would look like when the programs are attached after it was opened."""
    pod.change(ingress=DENY)
    assert not pod.send(tcp(POD4, PEER4, SERVER, CLIENT, ACK, b"data")).passed
    assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK, b"data")).passed
    assert not pod.send(tcp(POD4, PEER4, SERVER, SERVER, ACK, b"data")).passed
    assert pod.flows() == 0


def test_a_connection_allowed_both_ways_needs_no_client_port(pod: Pod) -> None:
    assert pod.send(tcp(POD4, PEER4, 1000, 1001, ACK)).passed
    assert pod.receive(tcp(PEER4, POD4, 2000, 2001, SYN | ACK)).passed


SILENCES = {
    "unanswered TCP": (tcp(PEER4, POD4, CLIENT, SERVER), None, 119, 121),
    "answered TCP": (tcp(PEER4, POD4, CLIENT, SERVER), tcp(POD4, PEER4, SERVER, CLIENT, SYN | ACK), 21599, 21601),
    "half-closed TCP": (tcp(PEER4, POD4, CLIENT, SERVER), tcp(POD4, PEER4, SERVER, CLIENT, FIN | ACK), 21599, 21601),
    "reset TCP": (tcp(PEER4, POD4, CLIENT, SERVER), tcp(POD4, PEER4, SERVER, CLIENT, RST), 59, 61),
    "unanswered UDP": (udp(PEER4, POD4, CLIENT, SERVER), None, 59, 61),
    "answered UDP": (udp(PEER4, POD4, CLIENT, SERVER), udp(POD4, PEER4, SERVER, CLIENT), 179, 181),
    "ping": (ping(PEER4, POD4), ping(POD4, PEER4, reply=True), 29, 31),
    "a protocol without ports": (ip(PEER4, POD4, 47, bytes(8)), None, 599, 601),
}


@pytest.mark.parametrize(("opening", "answer", "alive_s", "over_s"), SILENCES.values(), ids=SILENCES.keys())
def test_a_silent_flow_ends(pod: Pod, opening: bytes, answer: bytes | None, alive_s: int, over_s: int) -> None:
    assert pod.receive(opening).passed
    if answer:
        assert pod.send(answer).passed
    back = answer or {6: tcp(POD4, PEER4, SERVER, CLIENT, ACK), 17: udp(POD4, PEER4, SERVER, CLIENT)}.get(
        opening[23], ip(POD4, PEER4, 47, bytes(8))
    )
    pod.change(egress=DENY)
    pod.change(sets=(ALLOW, ALLOW, DENY, DENY), revision=1)  # the entry counts as judged under this policy
    pod.kernel.age(pod.incarnation, alive_s)
    pod.kernel.age(pod.incarnation, 0)
    assert pod.send(back).passed
    if answer is None:  # the packet just sent was the first answer
        return
    pod.kernel.age(pod.incarnation, over_s)
    pod.kernel.policy_set(ALLOW, DENY_ALL)
    assert not pod.send(back).passed


def test_a_pod_only_evicts_its_own_flows(kernel: Harness, pod: Pod) -> None:
    other = kernel.interfaces[1]
    theirs = kernel.endpoint(other, [PEER4], sets=(ALLOW,) * 4)
    assert kernel.run(other, "to_pod", udp(POD4, PEER4, 1, 2)).passed
    for port in range(6000):
        pod.kernel.verdict(pod.ifindex, "from_pod", udp(POD4, "10.9.9.9", 1024 + port, 53))
    assert pod.flows() <= 4096
    assert len(kernel.flows(theirs)) == 1


def test_revisions_and_rules_are_kept_in_the_entry(kernel: Harness, pod: Pod) -> None:
    kernel.policy_set(ALLOW, Layer({(500, 6, SERVER, 16): entry(rule_id=77)}))
    pod.receive(tcp(PEER4, POD4, CLIENT, SERVER), ingress_ifindex=0)
    (key, value), *rest = kernel.flows(pod.incarnation).items()
    assert not rest
    assert (key.direction, key.source_port, key.destination_port) == (0, CLIENT, SERVER)
    assert (value.revision, value.peer_identity, value.rule_id, value.flags) == (1, 500, 77, 0)


def test_a_forwarded_opener_is_remembered_for_the_replies(kernel: Harness, pod: Pod) -> None:
    """The reply to a masqueraded peer shows a node's address; judged again, it is still the masqueraded peer's flow."""
    kernel.policy_set(3, Layer({(600, 0, 0, 17): entry()}, default=PolicyVerdict.POLICY_DENY))
    pod.change(ingress=3)
    assert pod.receive(tcp(NODE4, POD4, CLIENT, SERVER)).passed
    (value,) = kernel.flows(pod.incarnation).values()
    assert value.flags == abi.ConntrackFlags.CONNTRACK_F_FORWARDED
    pod.change(ingress=3)
    assert pod.send(tcp(POD4, NODE4, SERVER, CLIENT, SYN | ACK)).passed
    kernel.policy_set(4, Layer({(1, 0, 0, 17): entry()}, default=PolicyVerdict.POLICY_DENY))
    pod.change(ingress=4)
    assert not pod.send(tcp(POD4, NODE4, SERVER, CLIENT, ACK)).passed


def test_a_flow_whose_udp_length_lies_is_no_flow(pod: Pod) -> None:
    assert not pod.receive(ip(PEER4, POD4, UDP, udp_header(1, 2, 100))).passed
    assert pod.flows() == 0


def test_open_flows_of_an_address_that_is_taken_away_end_with_the_next_revision(kernel: Harness, pod: Pod) -> None:
    assert pod.send(tcp(POD4, PEER4, CLIENT, SERVER)).passed
    kernel.maps.endpoint_addresses.delete(
        abi.EndpointAddressKey(ifindex=pod.ifindex, address=abi.V4_MAPPED + b"\n\0\0\5")
    )
    pod.change(egress=ALLOW)
    assert pod.send(tcp(POD4, PEER4, CLIENT, SERVER, ACK)).reason == DropReason.DROP_INVALID_SOURCE_IP
    assert pod.receive(tcp(PEER4, POD4, SERVER, CLIENT, ACK)).reason == DropReason.DROP_UNKNOWN_L3_TARGET


def test_a_connection_closed_by_one_side_lives_on_and_by_both_does_not(pod: Pod) -> None:
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER)).passed
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, FIN | ACK)).passed
    pod.kernel.policy_set(ALLOW, DENY_ALL)
    pod.kernel.age(pod.incarnation, 100)
    assert pod.send(tcp(POD4, PEER4, SERVER, CLIENT, ACK, b"a slow answer")).passed
    pod.kernel.age(pod.incarnation, 3600)
    assert pod.send(tcp(POD4, PEER4, SERVER, CLIENT, FIN | ACK)).passed
    pod.kernel.age(pod.incarnation, 59)
    assert pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK)).passed
    pod.kernel.age(pod.incarnation, 61)
    assert not pod.receive(tcp(PEER4, POD4, CLIENT, SERVER, ACK)).passed
