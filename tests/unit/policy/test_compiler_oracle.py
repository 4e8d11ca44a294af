"""The compiler against the literal evaluator, on random clusters and policies: properties 1, 3 and 4 of the design."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import ASKED, EGRESS, INGRESS, Asked, Flow, Holder, mesh_allows, network_allows
from policygen import PORTS, outsiders, random_pods, random_policies

from meshbridge.identity.model import ContainerPort, Entity, IpAddress, IpFamily, Peer, ProxyClass, Workload
from meshbridge.identity.numbering import Numbering, number_peers
from meshbridge.policy.capture import AppProtocol, Capture, PortClass, PortClasses
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.frontends import Backend, FrontendPort, with_frontends
from meshbridge.policy.model import Direction, Document, PolicyMap, Verdict
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.precedence import DropReason

DIRECTIONS = {INGRESS: Direction.INGRESS, EGRESS: Direction.EGRESS}
CHECKED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**63 - 1)


def documents_of(objects: Iterable[dict[str, Any]]) -> list[Document]:
    return [
        Document(
            each["kind"], each["apiVersion"], each["metadata"].get("namespace", ""), each["metadata"]["name"], each
        )
        for each in objects
    ]


def peer_of(holder: Holder, names: frozenset[str] = frozenset()) -> Peer:
    if not holder.is_pod:
        return Peer(labels=holder.labels, entities=frozenset(Entity(entity) for entity in holder.entities))
    return workload_of([holder]).peer() if not names else replace(
        workload_of([holder]).peer(),
        ports=frozenset(ContainerPort(*port) for port in holder.ports if port[0] in names),
    )  # fmt: skip


def workload_of(holders: list[Holder]) -> Workload:
    first = holders[0]
    return Workload(
        first.namespace, f"pod-{first.address}", str(first.address), "one", tuple(h.address for h in holders),
        first.labels, first.namespace_labels, {}, first.service_account,
        tuple(ContainerPort(*port) for port in first.ports),
        proxy=ProxyClass.SIDECAR if first.sidecar else ProxyClass.NONE,
    )  # fmt: skip


def numbered(holders: list[Holder], policies: PolicySet) -> Numbering:
    names = policies.referenced_port_names()
    at: dict[IpAddress, Peer] = {holder.address: peer_of(holder, names) for holder in holders}
    return number_peers(at, policies.referenced_networks())


def verdict_at(policy_map: PolicyMap, numbering: Numbering, flow: Flow) -> Verdict:
    identity = numbering.addresses[flow.peer.address].identity
    return evaluate(policy_map, identity, flow.protocol, flow.port, localhost=flow.localhost).verdict


def random_flow(rng: random.Random, endpoint: Holder, everybody: list[Holder]) -> Flow:
    peers = [holder for holder in everybody if holder.address.version == endpoint.address.version]
    peer = rng.choice([holder for holder in peers if holder.address != endpoint.address])
    direction = rng.choice((INGRESS, EGRESS))
    protocol = rng.choice((6, 6, 6, 17, 132, 1 if endpoint.address.version == 4 else 58))
    if protocol in (1, 58):
        port = rng.choice((8, 0) if protocol == 1 else (128, 1))
    else:
        port = rng.choice(PORTS) + rng.choice((0, 0, 0, 1, 3, 500))
    return Flow(endpoint, peer, direction, protocol, port, direction == INGRESS and "host" in peer.entities)


def random_tcp_flow(rng: random.Random, pods: list[Holder], everybody: list[Holder]) -> Flow:
    flow = random_flow(rng, rng.choice(pods), everybody)
    return replace(flow, direction=INGRESS, protocol=6, port=rng.choice(PORTS))


@CHECKED
@given(SEEDS)
def test_network_policies_mean_what_the_texts_say(seed: int) -> None:
    rng = random.Random(seed)
    pods = random_pods(rng, 5)
    everybody = pods + outsiders()
    objects = random_policies(rng)
    policies = PolicySet.of(documents_of(objects))
    numbering = numbered(everybody, policies)
    compiler = Compiler(numbering.identities)
    for _ in range(30):
        flow = random_flow(rng, rng.choice(pods), everybody)
        policy = compiler.endpoint(workload_of([flow.endpoint]), policies, Capture.none())
        policy_map = policy.map(DIRECTIONS[flow.direction], IpFamily.of(flow.endpoint.address))
        passes = verdict_at(policy_map, numbering, flow) is not Verdict.DENY
        assert passes is network_allows(objects, flow), (flow, objects)


@CHECKED
@given(SEEDS)
def test_a_service_passes_where_every_pod_behind_it_would(seed: int) -> None:
    """The source sees a Service's address and port; the texts mean the pod behind it, at the pod's own port."""
    rng = random.Random(seed)
    pods = [pod for pod in random_pods(rng, 5) if pod.address.version == 4]
    everybody = pods + outsiders()
    objects = random_policies(rng)
    policies = PolicySet.of(documents_of(objects))
    numbering = numbered(everybody, policies)
    number = numbering.highest + 1
    service = replace(peer_of(outsiders()[-2]), service="shop/api")
    compiler = Compiler({**numbering.identities, number: service})
    for _ in range(20):
        backends = [(rng.choice(pods), rng.choice(PORTS)) for _ in range(rng.randint(1, 3))]
        protocol, endpoint = rng.choice((6, 17)), rng.choice(pods)
        behind = tuple(Backend(numbering.addresses[pod.address].identity, port) for pod, port in backends)
        policy = compiler.endpoint(workload_of([endpoint]), policies, Capture.none())
        egress = policy.map(Direction.EGRESS, IpFamily.IPV4)
        answered = with_frontends(egress, {number: [FrontendPort(protocol, 80, behind)]})
        expected = [network_allows(objects, Flow(endpoint, pod, EGRESS, protocol, port)) for pod, port in backends]
        decision = evaluate(answered, number, protocol, 80)
        assert decision.passes is all(expected), (endpoint, backends, objects)
        if any(expected) and not all(expected):
            assert decision.deny_reason == DropReason.SERVICE_BACKENDS_DIFFER
        unknown = with_frontends(egress, {number: [FrontendPort(protocol, 80, ())]})
        if evaluate(unknown, number, protocol, 80).passes:
            anybody = [Flow(endpoint, peer, EGRESS, protocol, rng.choice(PORTS)) for peer in everybody]
            assert all(network_allows(objects, flow) for flow in anybody if flow.peer.address.version == 4), objects


def answers(objects: list[dict[str, Any]], flow: Flow, protocol: AppProtocol) -> set[bool]:
    """Everything Envoy may answer to what this source may ask."""
    own = (flow.endpoint.address,)
    forms = {AppProtocol.AUTO: (True, False), AppProtocol.HTTP: (True,), AppProtocol.TCP: (False,)}[protocol]
    return {mesh_allows(objects, flow, asked, own) for asked in ASKED if asked.http in forms}


@CHECKED
@given(SEEDS)
def test_the_early_deny_is_sound(seed: int) -> None:
    """Property 1: where the kernel drops for the mesh, Envoy would have refused whatever this source had asked."""
    rng = random.Random(seed)
    pods = random_pods(rng, 4)
    everybody = pods + outsiders()
    objects = random_policies(rng, network=0, mesh=4)
    protocols = {port: rng.choice(list(AppProtocol)) for port in PORTS}
    policies = PolicySet.of(documents_of(objects))
    numbering = numbered(everybody, policies)
    compiler = Compiler(numbering.identities)
    for _ in range(6):
        flow = random_tcp_flow(rng, pods, everybody)
        policy = compiler.endpoint(workload_of([flow.endpoint]), policies, Capture.sidecar(protocols=protocols))
        policy_map = policy.map(Direction.INGRESS, IpFamily.of(flow.endpoint.address))
        verdict = verdict_at(policy_map, numbering, flow)
        possible = answers(objects, flow, protocols[flow.port])
        if verdict is Verdict.DENY:
            assert possible == {False}, (flow, objects)
        if verdict is Verdict.ALLOW:
            assert possible == {True}, (flow, objects)


@CHECKED
@given(SEEDS)
def test_what_addresses_and_ports_decide_is_decided_in_the_kernel(seed: int) -> None:
    """The early deny is not sound by never denying: policies of addresses and ports leave nothing to Envoy."""
    rng = random.Random(seed)
    pods = random_pods(rng, 4)
    everybody = pods + outsiders()
    objects = random_policies(rng, network=0, mesh=4, l4_only=True)
    policies = PolicySet.of(documents_of(objects))
    numbering = numbered(everybody, policies)
    compiler = Compiler(numbering.identities)
    for _ in range(10):
        flow = random_tcp_flow(rng, pods, everybody)
        policy = compiler.endpoint(workload_of([flow.endpoint]), policies, Capture.sidecar())
        verdict = verdict_at(policy.map(Direction.INGRESS, IpFamily.of(flow.endpoint.address)), numbering, flow)
        expected = mesh_allows(objects, flow, Asked(), (flow.endpoint.address,))
        assert verdict is (Verdict.ALLOW if expected else Verdict.DENY), (flow, objects)


EXCLUDED = Capture(dict.fromkeys(IpFamily, PortClasses.of(PortClass.EXCLUDED)))


@CHECKED
@given(SEEDS)
def test_compensation_only_subtracts(seed: int) -> None:
    """Property 2: on an excluded port nobody gets through whom Envoy might have refused."""
    rng = random.Random(seed)
    pods = random_pods(rng, 4)
    everybody = pods + outsiders()
    objects = random_policies(rng, network=0, mesh=4)
    policies = PolicySet.of(documents_of(objects))
    numbering = numbered(everybody, policies)
    compiler = Compiler(numbering.identities)
    for _ in range(6):
        flow = random_tcp_flow(rng, pods, everybody)
        policy = compiler.endpoint(workload_of([flow.endpoint]), policies, EXCLUDED)
        verdict = verdict_at(policy.map(Direction.INGRESS, IpFamily.of(flow.endpoint.address)), numbering, flow)
        peer = flow.peer
        name = f"cluster.local/ns/{peer.namespace}/sa/{peer.service_account}" if peer.is_pod else ""
        possible = {
            mesh_allows(objects, flow, replace(asked, principal=name), (flow.endpoint.address,)) for asked in ASKED
        }
        if verdict is Verdict.ALLOW:
            assert possible == {True}, (flow, objects)


@CHECKED
@given(SEEDS, st.randoms(use_true_random=False))
def test_objects_in_another_order_compile_to_the_same_maps(seed: int, order: random.Random) -> None:
    """Property 3."""
    rng = random.Random(seed)
    pods = random_pods(rng, 4)
    objects = random_policies(rng, network=5, mesh=4)
    maps = []
    for arranged in (objects, order.sample(objects, len(objects))):
        policies = PolicySet.of(documents_of(arranged))
        numbering = numbered(order.sample(pods, len(pods)) + outsiders(), policies)
        compiler = Compiler(numbering.identities)
        maps.append([compiler.endpoint(workload_of([pod]), policies, Capture.sidecar()).maps for pod in pods])
    assert maps[0] == maps[1]


@CHECKED
@given(SEEDS)
def test_a_spoilt_object_never_opens_what_it_guarded(seed: int) -> None:
    """Property 4: what passes after an object is spoilt has passed before."""
    rng = random.Random(seed)
    pods = random_pods(rng, 4)
    everybody = pods + outsiders()
    objects = random_policies(rng, network=4, mesh=0)
    if not objects:
        return
    victim = rng.choice(objects)
    spoilt = [dict(each, notAField=1) if each is victim else each for each in objects]
    spoilt = [_spoil_spec(each) if "notAField" in each else each for each in spoilt]
    before, after = (PolicySet.of(documents_of(each)) for each in (objects, spoilt))
    assert any(refusal.document.name == victim["metadata"]["name"] for refusal in after.refusals)
    sets = {}
    for name, policies in (("before", before), ("after", after)):
        numbering = numbered(everybody, policies)
        sets[name] = (policies, numbering, Compiler(numbering.identities))
    for _ in range(20):
        flow = random_flow(rng, rng.choice(pods), everybody)
        passes = {}
        for name, (policies, numbering, compiler) in sets.items():
            policy = compiler.endpoint(workload_of([flow.endpoint]), policies, Capture.none())
            policy_map = policy.map(DIRECTIONS[flow.direction], IpFamily.of(flow.endpoint.address))
            passes[name] = verdict_at(policy_map, numbering, flow) is not Verdict.DENY
        assert passes["before"] or not passes["after"], (flow, victim)


def _spoil_spec(policy: dict[str, Any]) -> dict[str, Any]:
    clean = {key: value for key, value in policy.items() if key != "notAField"}
    if "spec" in clean:
        clean["spec"] = dict(clean["spec"], notAField=1)
    else:
        clean["specs"] = [dict(clean["specs"][0], notAField=1), *clean["specs"][1:]]
    return clean
