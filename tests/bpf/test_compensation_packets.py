"""Property 2 on the real kernel programs: random policies and exclusions, real packets, Envoy read literally."""

from __future__ import annotations

from dataclasses import replace

from compensation_cases import ADDRESSES, CLIENTS, NODE, PORTS, PROBE_PORT, SERVER, WORLDS, World
from harness import FROM_POD, SYN, TO_POD, Harness, Layer, entry, tcp
from hypothesis import HealthCheck, given, settings

from meshbridge import abi
from meshbridge.identity.model import IpFamily, TcpPorts
from meshbridge.policy import model
from meshbridge.policy.capture import Capture, OutboundBypass, PortClass
from meshbridge.policy.compile import Compiler
from meshbridge.policy.model import Direction, PolicyMap, Verdict

V4 = IpFamily.IPV4
VERDICTS = {
    Verdict.ALLOW: abi.PolicyVerdict.POLICY_ALLOW,
    Verdict.DENY: abi.PolicyVerdict.POLICY_DENY,
    Verdict.NEEDS_L7: abi.PolicyVerdict.POLICY_NEEDS_L7,
}
INGRESS_SET, EGRESS_SET, OPEN_SET = 41, 42, 43
OTHER_INTERFACE = 9999


def layer(policy_map: PolicyMap, which: model.Layer) -> Layer:
    default = policy_map.default(which)
    return Layer(
        {
            (key.identity, key.protocol, key.port, key.prefix): entry(
                VERDICTS[value.verdict],
                precedence=value.precedence,
                deny_reason=value.deny_reason,
                flags=abi.PolicyFlags.POLICY_F_AUDIT if value.audit else 0,
            )
            for key, value in policy_map.entries.items()
            if key.layer is which
        },
        default=int(VERDICTS[default.verdict]),
        deny_reason=default.deny_reason,
    )


def write(kernel: Harness, set_id: int, policy_map: PolicyMap) -> None:
    kernel.policy_set(set_id, layer(policy_map, model.Layer.NETWORK), layer(policy_map, model.Layer.MESH))


def know_everybody(kernel: Harness, world: World) -> None:
    for address, held in world.numbering().addresses.items():
        kernel.peer(address, held.identity, forwarded=held.forwarded)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORLDS)
def test_kernel_passes_on_excluded_ports_only_what_envoy_would_have_let_in(loaded: Harness, world: World) -> None:
    loaded.clear()
    numbering = world.numbering()
    policy = Compiler(numbering.identities).endpoint(SERVER, world.policies, world.capture)
    loaded.policy_set(OPEN_SET)
    write(loaded, INGRESS_SET, policy.map(Direction.INGRESS, V4))
    know_everybody(loaded, world)
    pod = loaded.interfaces[0]
    own = str(SERVER.addresses[0])
    loaded.endpoint(pod, [own], sets=(INGRESS_SET, INGRESS_SET, OPEN_SET, OPEN_SET))
    for port in (port for port in PORTS if world.classes[port] is PortClass.EXCLUDED):
        for number, address in enumerate((*ADDRESSES, NODE)):
            local = address == NODE and number < len(ADDRESSES)
            packet = tcp(address, own, 40000 + number, port, SYN)
            outcome = loaded.run(pod, TO_POD, packet, ingress_ifindex=0 if local else OTHER_INTERFACE)
            if not (local and port == PROBE_PORT):
                assert not outcome.passed or world.always_admitted(address, port), (address, port)
            if not outcome.passed:
                assert outcome.reason == abi.DropReason.DROP_COMPENSATION


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORLDS)
def test_kernel_drops_at_the_source_only_what_the_destination_drops(loaded: Harness, world: World) -> None:
    loaded.clear()
    numbering = world.numbering()
    client = CLIENTS[0]
    own, server = str(client.addresses[0]), str(SERVER.addresses[0])
    server_number = numbering.addresses[SERVER.addresses[0]].identity
    compiler = Compiler(numbering.identities, {server_number: world.capture.inbound})
    sending = compiler.endpoint(client, world.policies, Capture(outbound={V4: (OutboundBypass(0, 65535),)}))
    receiving = compiler.endpoint(SERVER, world.policies, world.capture)
    loaded.policy_set(OPEN_SET)
    write(loaded, INGRESS_SET, receiving.map(Direction.INGRESS, V4))
    write(loaded, EGRESS_SET, sending.map(Direction.EGRESS, V4))
    know_everybody(loaded, world)
    from_pod, to_pod = loaded.interfaces[:2]
    loaded.endpoint(from_pod, [own], sets=(OPEN_SET, OPEN_SET, EGRESS_SET, EGRESS_SET))
    loaded.endpoint(to_pod, [server], sets=(INGRESS_SET, INGRESS_SET, OPEN_SET, OPEN_SET))
    for port in PORTS:
        packet = tcp(own, server, 41000, port, SYN)
        sent = loaded.run(from_pod, FROM_POD, packet)
        arrived = loaded.run(to_pod, TO_POD, packet, ingress_ifindex=from_pod)
        assert sent.passed == arrived.passed, port
        if not sent.passed:
            assert sent.reason == abi.DropReason.DROP_COMPENSATION


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORLDS)
def test_kernel_passes_and_tells_under_audit_what_it_drops_without(loaded: Harness, world: World) -> None:
    numbering = world.numbering()
    audited = tuple(TcpPorts(V4, port, port) for port in PORTS[:2])
    own, pod = str(SERVER.addresses[0]), loaded.interfaces[0]
    told: dict[bool, dict[tuple[str, int], int]] = {}
    for audit in (False, True):
        loaded.clear()
        capture = replace(world.capture, audited=audited if audit else ())
        policy = Compiler(numbering.identities).endpoint(SERVER, world.policies, capture)
        loaded.policy_set(OPEN_SET)
        write(loaded, INGRESS_SET, policy.map(Direction.INGRESS, V4))
        know_everybody(loaded, world)
        loaded.endpoint(pod, [own], sets=(INGRESS_SET, INGRESS_SET, OPEN_SET, OPEN_SET))
        told[audit] = {}
        for port in PORTS:
            for number, address in enumerate(ADDRESSES):
                packet = tcp(address, own, 42000 + number, port, SYN)
                outcome = loaded.run(pod, TO_POD, packet, ingress_ifindex=OTHER_INTERFACE)
                event = outcome.event
                if audit and event.audit:
                    assert outcome.passed, (address, port)
                    assert event.type == abi.EventType.EVENT_VERDICT
                    assert event.reason == abi.DropReason.DROP_COMPENSATION
                    told[audit][address, port] = event.mesh_verdict
                elif not outcome.passed and port in PORTS[:2] and world.classes[port] is PortClass.EXCLUDED:
                    told[audit][address, port] = event.mesh_verdict
    assert told[True] == told[False]
