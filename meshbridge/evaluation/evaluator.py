"""What happens to flows: each policy family, each sidecar, the kernel, and all of it together.

The kernel's share is what the agents would enforce: the same compiler, the same lookup, the same rules for numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from typing import Final

from meshbridge.bypass.halves import Delivered, Delivery
from meshbridge.bypass.state import INTERFACE
from meshbridge.evaluation.ambient import ztunnel_guard, ztunnel_mtls
from meshbridge.evaluation.cluster import Cluster, Party
from meshbridge.evaluation.deliveries import delivery_of
from meshbridge.evaluation.mesh import Facts, mesh_verdict_on, normalized_http
from meshbridge.evaluation.numbers import Numbers
from meshbridge.evaluation.question import Question
from meshbridge.evaluation.reasons import Reason, reasons_of
from meshbridge.evaluation.waypoints import verdict_through, waypoint_of
from meshbridge.identity.model import Entity, IpAddress, IpFamily, Peer, ProxyClass, Workload
from meshbridge.policy.baseline import Guard, MeshVerdict
from meshbridge.policy.capture import AppProtocol, Capture, PortClass
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import Decision, LayerDecision, Lookup
from meshbridge.policy.frontends import Backend, FrontendPort, with_frontends
from meshbridge.policy.l7 import Request, RequestJudge
from meshbridge.policy.lowering import guard_of
from meshbridge.policy.mesh import Attribute, EffectiveMtls, JwtRule, MtlsMode, scopes_of
from meshbridge.policy.model import Direction, Judge, Layer, PolicyMap, Verdict
from meshbridge.policy.parse.ports import PROTOCOLS
from meshbridge.policy.paths import normalized
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.precedence import DropReason

_TCP: Final = PROTOCOLS["TCP"]
_ICMPV6: Final = 58
UNSPECIFIED: Final = IPv4Address("0.0.0.0")
_OF_SOURCE_ADDRESS: Final = frozenset({Attribute.IP_BLOCKS, Attribute.REMOTE_IP_BLOCKS})
_UNRESTRICTED: Final = MeshVerdict(Verdict.ALLOW)
_SEEN: Final = {PortClass.CAPTURED: "captured", PortClass.EXCLUDED: "bypassed"}


@dataclass(frozen=True, slots=True)
class Answer:
    """``egress`` and ``ingress`` say whether the sidecar of that end sees the flow; None: there is none to see it.

    ``delivery`` is what the two ends' sidecars make of a connection, whatever policies say; None: nobody can tell.
    """

    network: Verdict
    mesh: Verdict
    egress: str | None
    ingress: str | None
    passes_kernel: bool
    verdict: Verdict
    reasons: tuple[Reason, ...] = ()
    delivery: Delivered | None = None


@dataclass(frozen=True, slots=True)
class Leg:
    """A question with its two ends found; for a Service, one of the pods behind it.

    ``source`` is the number the destination's node knows the source by, ``destination`` the other way round.
    """

    question: Question
    sender: Party
    receiver: Party
    family: IpFamily
    source: int
    destination: int
    port: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A question whose ends are found."""

    legs: tuple[Leg, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """What everybody on a flow's way says of it, and the answer that follows.

    ``egress`` and ``ingress`` are the kernel's at either end, None where no pod is. ``http`` is what the HTTP rules of
    network policies say once the kernel leaves the flow to them, ``mesh`` what Envoy would say of the port's policies.
    ``undelivered`` is why nothing of what the kernel passes is delivered, ``delivery`` what the two ends' sidecars do.
    """

    leg: Leg
    answer: Answer
    egress: Decision | None = None
    ingress: Decision | None = None
    port_class: PortClass = PortClass.UNGUARDED
    http: LayerDecision | None = None
    mesh: MeshVerdict = _UNRESTRICTED
    undelivered: Reason | None = None
    delivery: Delivery | None = None


@dataclass(frozen=True, slots=True)
class Guarded:
    """What guards pods' inbound traffic; equal pods share one. ``asks`` is what its conditions look at."""

    guard: Guard
    jwt_rules: tuple[JwtRule, ...]
    protocols: tuple[tuple[int, AppProtocol], ...]
    asks: frozenset[Attribute]

    def protocol(self, port: int) -> AppProtocol:
        return dict(self.protocols).get(port, AppProtocol.AUTO)


class Evaluator:
    """Answers questions about one cluster. All questions are prepared first: numbers are for those who take part.

    Cost: each pod that takes part is compiled once, each question is a few lookups and the mesh policies of one pod.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        networks = cluster.policies.referenced_networks()
        self._numbers = Numbers(cluster, networks)
        self._frontends: dict[int, tuple[FrontendPort, ...]] = {}
        self._backends: dict[tuple[int, int, int], list[tuple[Party, int]]] = {}
        self._compiler: Compiler | None = None
        self._selected: dict[int, PolicySet] = {}
        self._lookups: dict[tuple[int, Direction, IpFamily, str], Lookup] = {}
        self._by_map: dict[int, tuple[PolicyMap, Lookup]] = {}
        self._judges: dict[int, RequestJudge] = {}
        self._guards: dict[int, Guarded] = {}
        self._equal_guards: dict[tuple[object, ...], Guarded] = {}
        self._verdicts: dict[tuple[object, ...], MeshVerdict] = {}
        self._deliveries: dict[tuple[object, ...], Delivery | None] = {}

    def prepare(self, question: Question) -> Prepared:
        """Find the ends of a question.

        Raises:
            QuestionError: an end is nobody the files know.
        """
        sender = self._cluster.source(question)
        receiver = self._cluster.destination(question)
        family = _family(question, sender, receiver)
        source = self._numbers.of(sender, receiver.node, family)
        destination = self._numbers.of(receiver, sender.node, family)
        self._compiler = None
        if not receiver.services:
            return Prepared((Leg(question, sender, receiver, family, source, destination, question.port),))
        if destination not in self._frontends:
            self._tell(receiver, destination, family)
        behind = self._backends.get((destination, question.protocol, question.port), ())
        legs = [
            Leg(question, sender, pod, family, self._numbers.of(sender, pod.node, family), destination, port)
            for pod, port in behind
        ]
        return Prepared(tuple(legs) or (Leg(question, sender, receiver, family, source, destination, question.port),))

    def _tell(self, frontend: Party, number: int, family: IpFamily) -> None:
        """The pods behind each port of a Service's address, for the maps and for what comes after."""
        ports: dict[tuple[int, int], set[Backend]] = {}
        outside = any(frontend.address in service.outside_addresses for service in frontend.services)
        for service in frontend.services:
            pods = self._cluster.backends(service)
            listed = self._cluster.listed(service, family)
            for port in service.ports:
                protocol = PROTOCOLS.get(port.protocol)
                if protocol is None:
                    continue
                backends = ports.setdefault((protocol, port.port), set())
                for pod in pods:
                    target = port.target_at(pod.ports)
                    if target is not None:
                        address = next((a for a in pod.addresses if IpFamily.of(a) is family), None)
                        party = Party(pod.key, address, pod, pod.node)
                        backends.add(Backend(self._numbers.of(party, "", family), target))
                        self._backends.setdefault((number, protocol, port.port), []).append((party, target))
                for party in listed:
                    if isinstance(port.target, int):
                        backends.add(Backend(self._numbers.of(party, "", family), port.target))
                        self._backends.setdefault((number, protocol, port.port), []).append((party, port.target))
        self._frontends[number] = tuple(
            FrontendPort(protocol, port, tuple(sorted(backends)), outside)
            for (protocol, port), backends in sorted(ports.items())
        )

    def answer(self, prepared: Prepared) -> Answer:
        """What happens to the flow. Of the pods behind a Service the strictest answer holds, as any may be meant."""
        return self.trace(prepared).answer

    def trace(self, prepared: Prepared) -> Trace:
        """The answer, with what it comes from."""
        traces = [self._trace(leg) for leg in prepared.legs]
        return min(traces, key=lambda t: (t.answer.verdict, t.answer.passes_kernel, t.answer.network, t.answer.mesh))

    def _trace(self, leg: Leg) -> Trace:
        sender, receiver = leg.sender.endpoint, leg.receiver.endpoint
        tcp = leg.question.protocol == _TCP
        if sender is not None and sender is receiver:
            reason = Reason("a pod always reaches itself")
            return Trace(leg, Answer(Verdict.ALLOW, Verdict.ALLOW, None, None, True, Verdict.ALLOW, (reason,)))
        egress = ingress = None
        if sender is not None:
            lookup = self._lookup(sender, Direction.EGRESS, leg.family)
            egress = lookup.decide(leg.destination, leg.question.protocol, leg.question.port)
        port_class = PortClass.UNGUARDED
        if receiver is not None:
            localhost = Entity.HOST in self._numbers.peers[leg.source].entities
            interface = leg.question.interface or INTERFACE
            lookup = self._lookup(receiver, Direction.INGRESS, leg.family, interface)
            ingress = lookup.decide(leg.source, leg.question.protocol, leg.port, localhost=localhost)
            if tcp:
                port_class = self._cluster.capture(receiver, interface).inbound[leg.family].at(leg.port)
                if receiver.proxy is ProxyClass.GATEWAY:
                    port_class = PortClass.CAPTURED  # Envoy itself listens there
        decisions = [decision for decision in (egress, ingress) if decision is not None]
        network = Verdict.ALLOW
        if any(decision.network.verdict is Verdict.DENY for decision in decisions):
            network = Verdict.DENY
        asks_http = any(decision.network.verdict is Verdict.NEEDS_L7 for decision in decisions)
        passes = all(decision.passes for decision in decisions)
        http = None
        if asks_http and network is Verdict.ALLOW and receiver is not None:
            http = self._http_rules(leg, receiver)
            asks_http = http.verdict is Verdict.NEEDS_L7
            if http.verdict is Verdict.DENY:
                network = Verdict.DENY
                decisions.append(Decision(http, LayerDecision(Layer.MESH, Verdict.ALLOW, ())))
        mesh = _UNRESTRICTED
        if receiver is not None and port_class in (PortClass.CAPTURED, PortClass.EXCLUDED):
            mesh = self._mesh(leg, receiver)
        seen = self._seen_at_source(leg) if tcp and sender is not None else None
        delivery = self._delivery(leg, seen, port_class) if tcp else None
        broken = self._broken(leg, port_class, delivery) if passes else None
        if not passes or network is Verdict.DENY or broken is not None:
            verdict = Verdict.DENY
        else:
            verdict = Verdict.NEEDS_L7 if asks_http else Verdict.ALLOW
            if port_class is PortClass.CAPTURED:
                verdict = min(verdict, mesh.verdict)
        answer = Answer(
            network=network,
            mesh=mesh.verdict,
            egress=seen,
            ingress=_SEEN.get(port_class),
            passes_kernel=passes,
            verdict=verdict,
            reasons=reasons_of(verdict, decisions, mesh, port_class, broken),
            delivery=delivery.outcome if delivery is not None else None,
        )
        return Trace(leg, answer, egress, ingress, port_class, http, mesh, broken, delivery)

    def peer(self, number: int) -> Peer:
        """Who has an identity number, as policies see it."""
        return self._numbers.peers[number]

    def _seen_at_source(self, leg: Leg) -> str | None:
        workload = leg.sender.endpoint
        if workload is None or workload.proxy not in (ProxyClass.SIDECAR, ProxyClass.AMBIENT):
            return None
        question = leg.question
        span = self._cluster.capture_state(workload).span_at(
            Direction.EGRESS, leg.family, question.port, interface=question.interface or INTERFACE,
            uid=question.src_uid, address=question.destination_ip or leg.receiver.address, intended=True,
        )  # fmt: skip
        return "captured" if span is not None and span.port_class is PortClass.CAPTURED else "bypassed"

    def _broken(self, leg: Leg, port_class: PortClass, delivery: Delivery | None) -> Reason | None:
        """Why nothing of what the kernel passes is delivered; None where it is."""
        http, how = leg.question.http, self._cluster.policies.mesh.path_normalization
        path = http.path if http is not None and port_class is PortClass.CAPTURED else None
        if path is not None and normalized(path, how) is None:
            return Reason(f"Envoy answers 400 to a path that it cannot normalize ({how.value})")
        if delivery is None or delivery.outcome is not Delivered.BROKEN:
            return None
        return Reason(f"{delivery.why}; {delivery.fix}", delivery.origin)

    def _delivery(self, leg: Leg, seen: str | None, port_class: PortClass) -> Delivery | None:
        client, receiver, question = leg.sender.endpoint, leg.receiver.endpoint, leg.question
        key = (
            id(client), id(receiver) if receiver is not None else leg.receiver.address, leg.receiver.services,
            leg.port, question.destination, question.port, question.destination_ip, question.principal,
            question.http is not None and question.http.host is not None, seen, port_class,
        )  # fmt: skip
        if key not in self._deliveries:
            mode = self._guarded(receiver).guard.mtls.at(leg.port)[0] if receiver is not None else MtlsMode.PERMISSIVE
            captured = (seen == "captured", port_class is PortClass.CAPTURED)
            self._deliveries[key] = delivery_of(
                self._cluster.registry, question, client, leg.receiver, leg.port, captured, mode
            )
        return self._deliveries[key]

    def guarded(self, leg: Leg, receiver: Workload) -> tuple[Guarded, Facts, AppProtocol]:
        """What guards the receiver, what is known of the flow there, and what Envoy takes the port for."""
        guarded = self._guarded(receiver)
        question = leg.question
        destinations = (question.destination_ip,) if question.destination_ip is not None else receiver.addresses
        destinations = tuple(address for address in destinations if IpFamily.of(address) is leg.family)
        protocol = AppProtocol.TCP if receiver.proxy is ProxyClass.AMBIENT else question.app_protocol
        if protocol is None:
            protocol = guarded.protocol(leg.port)
        gateway = receiver.proxy is ProxyClass.GATEWAY
        return guarded, Facts(question, leg.port, leg.sender.address, destinations, gateway), protocol

    def _mesh(self, leg: Leg, receiver: Workload) -> MeshVerdict:
        guarded, facts, protocol = self.guarded(leg, receiver)
        question = leg.question
        client = leg.sender.endpoint
        if client is not None and client.proxy is receiver.proxy is ProxyClass.AMBIENT:
            waypoint, reached = waypoint_of(receiver), self._cluster.registry.leading_to(receiver, leg.port)
            if waypoint is not None and reached:
                said = question.app_protocol or guarded.protocol(leg.port)
                return verdict_through(waypoint, reached, self._cluster.policies, guarded.guard, facts, said)
        if question.claims is not None:
            return mesh_verdict_on(guarded.guard, guarded.jwt_rules, facts, protocol)
        by_address = not guarded.asks.isdisjoint(_OF_SOURCE_ADDRESS)
        key = (
            id(guarded), leg.port, protocol, facts.source if by_address else None,
            facts.destinations if Attribute.DESTINATION_IP in guarded.asks else (), question.principal,
            question.remote_ip, question.sni, question.token, question.http,
        )  # fmt: skip
        found = self._verdicts.get(key)
        if found is None:
            found = self._verdicts[key] = mesh_verdict_on(guarded.guard, guarded.jwt_rules, facts, protocol)
        return found

    def _http_rules(self, leg: Leg, receiver: Workload) -> LayerDecision:
        """What the HTTP rules of network policies say of the request; NEEDS_L7: too little of it is said."""
        http = leg.question.http
        if http is None or None in (http.method, http.path, http.host):
            return LayerDecision(Layer.NETWORK, Verdict.NEEDS_L7, (), judge=Judge.EXT_AUTHZ)
        judge = self._judges.get(id(receiver))
        if judge is None:
            judge = self._judges[id(receiver)] = RequestJudge.of(receiver, self._cluster.policies)
        http = normalized_http(http, self._cluster.policies.mesh) or http
        request = Request(
            source=leg.sender.address or UNSPECIFIED, port=leg.port, method=http.method or "", path=http.path or "",
            host=http.host or "", headers=http.joined, peer=self._numbers.peers[leg.source],
        )  # fmt: skip
        refusing = judge.http_rules_refuse(request)
        if refusing:
            return LayerDecision(Layer.NETWORK, Verdict.DENY, refusing, DropReason.POLICY_DENY)
        return LayerDecision(Layer.NETWORK, Verdict.ALLOW, ())

    def _guarded(self, workload: Workload) -> Guarded:
        found = self._guards.get(id(workload))
        if found is None:
            selected = self._selecting(workload)
            guard = guard_of(workload, selected)
            if workload.proxy is ProxyClass.AMBIENT:
                scopes = scopes_of(selected.peer_authentication, workload.peer(), guard.mesh)
                guard = replace(ztunnel_guard(guard), mtls=ztunnel_mtls(scopes))
            elif workload.proxy is ProxyClass.GATEWAY:
                guard = replace(guard, mtls=EffectiveMtls())  # its servers say what TLS they take
            found = self._guards[id(workload)] = self._shared(
                Guarded(
                    guard,
                    tuple(rule for policy in selected.request_authentication for rule in policy.rules),
                    tuple(sorted(self._cluster.protocols(workload).items())),
                    frozenset(condition.attribute for rule in guard.rules for condition in rule.all_conditions),
                )
            )
        return found

    def _shared(self, guarded: Guarded) -> Guarded:
        mtls = guarded.guard.mtls
        key = (guarded, tuple(sorted(mtls.ports.items())))  # which its hash and comparison leave out
        return self._equal_guards.setdefault(key, guarded)

    def _lookup(self, workload: Workload, direction: Direction, family: IpFamily, interface: str = INTERFACE) -> Lookup:
        if self._compiler is None:
            self._compiler = self._new_compiler()
        key = (id(workload), direction, family, interface)
        found = self._lookups.get(key)
        if found is None:
            policies, capture = self._cluster.policies, self._cluster.capture(workload, interface)
            selected = self._selecting(workload)
            policy_map = self._compiler.map(workload, policies, selected, capture, direction, family)
            known = self._by_map.get(id(policy_map))
            if known is None:
                answering = policy_map
                if direction is Direction.EGRESS:
                    answering = with_frontends(policy_map, self._frontends)
                known = self._by_map[id(policy_map)] = (policy_map, Lookup.of(answering))
            found = self._lookups[key] = known[1]
        return found

    def _selecting(self, workload: Workload) -> PolicySet:
        found = self._selected.get(id(workload))
        if found is None:
            found = self._selected[id(workload)] = self._cluster.policies.selecting(workload)
        return found

    def _new_compiler(self) -> Compiler:
        self._lookups.clear()
        self._by_map.clear()
        captured = Capture.sidecar().inbound
        sidecars = {n: captured for n, peer in self._numbers.peers.items() if peer.proxy is ProxyClass.SIDECAR}
        return Compiler(dict(self._numbers.peers), sidecars)


def _family(question: Question, sender: Party, receiver: Party) -> IpFamily:
    if question.protocol == _ICMPV6:
        return IpFamily.IPV6
    said: tuple[IpAddress | None, ...] = (
        question.destination_ip, question.source_ip,
        receiver.address if receiver.endpoint is None else None,
        sender.address if sender.endpoint is None else None,
        receiver.address, sender.address,
    )  # fmt: skip
    return next((IpFamily.of(address) for address in said if address is not None), IpFamily.IPV4)
