"""Why a flow passes or not, for a person: everybody on its way in order, and the rules that came close.

The verdicts are the evaluator's own; what is added are reasons, so that the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from meshbridge.bypass.halves import AUTOMATIC, Delivered, Delivery, Sending, Side, delivery
from meshbridge.bypass.state import INTERFACE
from meshbridge.evaluation.cluster import Cluster, Party
from meshbridge.evaluation.deliveries import sendings
from meshbridge.evaluation.evaluator import UNSPECIFIED, Evaluator, Leg, Trace
from meshbridge.evaluation.explanation_mesh import MeshFlow, mesh_verdict_without, near_mesh, undecided
from meshbridge.evaluation.explanation_network import Near, NetworkFlow, near_http, near_network, verdict_without
from meshbridge.evaluation.question import Question
from meshbridge.identity.model import Entity, IpAddress, ProxyClass, Workload
from meshbridge.policy.attributes import Request
from meshbridge.policy.baseline import Principal
from meshbridge.policy.capture import AppProtocol, PortClass
from meshbridge.policy.evaluate import LayerDecision
from meshbridge.policy.explain import phrase
from meshbridge.policy.lowering import own_principal
from meshbridge.policy.mesh import MtlsMode
from meshbridge.policy.model import Direction, Judge, Layer, Origin, Refusal, Verdict
from meshbridge.policy.parse.ports import PROTOCOLS
from meshbridge.policy.precedence import DropReason

MAX_NEAR: Final = 50
"""Of the rules that came close, no more are kept for one step."""

_TCP: Final = PROTOCOLS["TCP"]
_CLASSES: Final = {"captured": PortClass.CAPTURED, "bypassed": PortClass.EXCLUDED}


class Stage(StrEnum):
    """Who has a say, in the order in which a packet meets them."""

    EGRESS = "egress policy"
    REDIRECT = "redirect at the source"
    OUTBOUND = "outbound compensation"
    MTLS = "delivery by mutual TLS"
    INGRESS = "ingress policy"
    CAPTURE = "redirect at the destination"
    EARLY = "mesh policy in the kernel"
    HTTP_RULES = "HTTP rules in ext_authz"
    ENVOY = "mesh policy in Envoy"


@dataclass(frozen=True, slots=True)
class Step:
    """What one of them does. ``verdict`` None: it decides nothing; then ``outcome`` says what it does in a word.

    ``origins`` go on with ``text``: the rules that gave the verdict, or that isolate. ``near`` are rules that would
    change it, nearest first; None where nobody looked for any. ``open`` are rules it depends on, where nobody can tell
    whether they match. ``without`` is what a DENY would be if the rules that deny were not there.
    """

    stage: Stage
    text: str
    verdict: Verdict | None = None
    outcome: str = ""
    origins: tuple[Origin, ...] = ()
    near: tuple[Near, ...] | None = None
    open: tuple[Near, ...] = ()
    without: Verdict | None = None


@dataclass(frozen=True, slots=True)
class AsItself:
    """The verdict if the source presents what its proxy will: a certificate's name, or None for plaintext."""

    principal: str | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Explanation:
    """``verdict`` is the evaluator's; ``decided_by`` the step that stops the flow, None where none does.

    ``frontend`` is the Service's address that was asked about, None if none was; ``legs`` counts the pods behind it,
    and this explains the one that is treated most strictly. ``refusals`` are policies that concern the flow and are not
    in force as written.
    """

    source: Party
    destination: Party
    port: int
    steps: tuple[Step, ...]
    verdict: Verdict
    decided_by: Stage | None = None
    as_itself: AsItself | None = None
    frontend: Party | None = None
    legs: int = 1
    refusals: tuple[Refusal, ...] = ()


def explain_flow(cluster: Cluster, question: Question) -> Explanation:
    """Why the answer to a question is what it is.

    Raises:
        QuestionError: an end is nobody the cluster knows.
    """
    evaluator = Evaluator(cluster)
    prepared = evaluator.prepare(question)
    trace = evaluator.trace(prepared)
    explainer = _Explainer(cluster, evaluator, trace, prepared.legs)
    asked = cluster.destination(question)
    steps, delivered = explainer.steps(), explainer.delivery()
    stopping = (step.stage for step in steps if step.verdict is Verdict.DENY)
    as_itself = None
    if isinstance(question.principal, Principal) and delivered is not None and trace.answer.verdict is Verdict.NEEDS_L7:
        principal = explainer.presents(delivered)
        if not isinstance(principal, Principal):
            own = evaluator.prepare(replace(question, principal=principal))
            as_itself = AsItself(principal, evaluator.answer(own).verdict)
    return Explanation(
        source=trace.leg.sender,
        destination=trace.leg.receiver,
        port=trace.leg.port,
        steps=steps,
        verdict=trace.answer.verdict,
        decided_by=next(stopping, None),
        as_itself=as_itself,
        frontend=asked if asked.services else None,
        legs=len(prepared.legs),
        refusals=explainer.refusals(),
    )


class _Explainer:
    def __init__(self, cluster: Cluster, evaluator: Evaluator, trace: Trace, legs: tuple[Leg, ...]) -> None:
        self._cluster, self._evaluator, self._trace, self._legs = cluster, evaluator, trace, legs
        self._leg: Leg = trace.leg
        self._sender, self._receiver = trace.leg.sender.endpoint, trace.leg.receiver.endpoint
        self._is_tcp = trace.leg.question.protocol == _TCP

    def steps(self) -> tuple[Step, ...]:
        if self._sender is not None and self._sender is self._receiver:
            return (Step(Stage.INGRESS, "a pod always reaches itself", Verdict.ALLOW),)
        return tuple(self._steps())

    def _steps(self) -> Iterator[Step]:
        trace = self._trace
        if self._sender is None or trace.egress is None:
            yield Step(Stage.EGRESS, "the source is no pod of its own address: nothing to ask", outcome="none")
        else:
            yield self._network(Stage.EGRESS, trace.egress.network, Direction.EGRESS, self._sender)
            if self._is_tcp:
                yield self._redirect(self._sender)
            if trace.egress.mesh.verdict is Verdict.DENY:
                yield _step(Stage.OUTBOUND, trace.egress.mesh)
        if trace.undelivered is not None:
            origins = (trace.undelivered.origin,) if trace.undelivered.origin else ()
            yield Step(Stage.MTLS, trace.undelivered.text, Verdict.DENY, Delivered.BROKEN.value, origins)
        elif (mtls := self.delivery()) is not None:
            yield self._mtls(mtls)
        if self._receiver is None or trace.ingress is None:
            yield Step(Stage.INGRESS, "the destination is no pod of its own address: nothing to ask", outcome="none")
            return
        yield self._network(Stage.INGRESS, trace.ingress.network, Direction.INGRESS, self._receiver)
        if self._is_tcp:
            yield self._capture(self._receiver)
        yield from self._mesh(self._receiver, trace.ingress.mesh)

    # The network policies

    def _network(self, stage: Stage, layer: LayerDecision, direction: Direction, subject: Workload) -> Step:
        rules, flow = self._cluster.policies.network, self._network_flow(direction, subject)
        near = [each for each in near_network(rules, flow) if each.verdict is not layer.verdict]
        step = _step(stage, layer, near)
        if layer.deny_reason != DropReason.POLICY_DENY:
            return step
        return replace(step, without=verdict_without(rules, layer.origins, flow))

    def _network_flow(self, direction: Direction, subject: Workload) -> NetworkFlow:
        leg, question = self._leg, self._leg.question
        ports = self._receiver.ports if self._receiver is not None else ()
        if direction is Direction.INGRESS:
            peer = self._evaluator.peer(leg.source)
            localhost = Entity.HOST in peer.entities
            return NetworkFlow(direction, subject.peer(), peer, question.protocol, leg.port, ports, localhost)
        peer = self._evaluator.peer(leg.destination)
        if peer.service and self._receiver is not None:
            return self._behind(subject)
        return NetworkFlow(direction, subject.peer(), peer, question.protocol, question.port, ports)

    def _behind(self, subject: Workload) -> NetworkFlow:
        """To a pod behind the Service, which egress policies mean by its address: one that they deny, if there is."""
        policies, question = self._cluster.policies, self._leg.question
        networks, found = policies.referenced_networks(), []
        for leg in (self._leg, *self._legs):
            pod = leg.receiver.endpoint
            if pod is not None:
                peer = pod.peer(frozenset(n for n in networks if any(address in n for address in pod.addresses)))
                found.append(
                    NetworkFlow(Direction.EGRESS, subject.peer(), peer, question.protocol, leg.port, pod.ports)
                )
        denied = (flow for flow in found if verdict_without(policies.network, (), flow) is Verdict.DENY)
        return next(denied, found[0])

    # The redirects

    def _redirect(self, sender: Workload) -> Step:
        seen = self._trace.answer.egress
        if seen is None:
            return Step(Stage.REDIRECT, "the source has no sidecar", outcome="none")
        address = self._leg.question.destination_ip or self._leg.receiver.address
        route = self._route(sender, Direction.EGRESS, self._leg.question.port, _CLASSES[seen], address)
        return Step(Stage.REDIRECT, route, outcome=seen)

    def _capture(self, receiver: Workload) -> Step:
        port_class = self._trace.port_class
        if receiver.proxy is ProxyClass.NONE:
            return Step(Stage.CAPTURE, "the destination has no sidecar: no mesh policy guards it", outcome="none")
        outcome = "bypassed" if port_class is PortClass.EXCLUDED else port_class.value
        return Step(
            Stage.CAPTURE, self._route(receiver, Direction.INGRESS, self._leg.port, port_class, None), outcome=outcome
        )

    def _route(
        self, pod: Workload, direction: Direction, port: int, port_class: PortClass, address: IpAddress | None
    ) -> str:
        """Why the pod's redirect rules do what they do to the flow."""
        state, question = self._cluster.capture_state(pod), self._leg.question
        interface = question.interface or INTERFACE
        if direction is Direction.EGRESS and question.src_uid is not None:
            sent = state.span_at(
                direction, self._leg.family, port, interface=interface, uid=question.src_uid, address=address,
                intended=True,
            )  # fmt: skip
            return str(sent.route) if sent is not None else "as the pod's redirect rules say"
        for span in state.of(direction, self._leg.family, intended=True):
            box = span.box
            interfaces = box.output if direction is Direction.EGRESS else box.input
            if (
                span.port_class is port_class
                and _TCP in box.protocol
                and port in box.port
                and interface in interfaces
                and (address is None or int(address) in box.destination)
            ):
                return str(span.route)
        return "as the pod's redirect rules say"

    # Mutual TLS

    def delivery(self) -> Delivery | None:
        """What the two sides' proxies make of the connection; None where no proxy has a part in it."""
        if not self._is_tcp or self._receiver is None or self._trace.ingress is None:
            return None
        client = self._side(self._sender, captured=self._trace.answer.egress == "captured")
        server = self._side(self._receiver, captured=self._trace.port_class is PortClass.CAPTURED)
        if not client.sidecar and not server.sidecar:
            return None
        tried = (delivery(client, server, self._mode()[0], way) for way in self._sent(client))
        found = [each for each in tried if each is not None]
        return next((each for each in found if each.outcome is not Delivered.BROKEN), found[0] if found else None)

    def _sent(self, client: Side) -> list[Sending]:
        """What the source's sidecar may send, by the ways it knows the destination."""
        if self._sender is None or not client.through_envoy or self._sender.proxy is not ProxyClass.SIDECAR:
            return [AUTOMATIC]
        leg = self._leg
        return list(sendings(self._cluster.registry, leg.question, self._sender, leg.receiver, leg.port))

    @staticmethod
    def _side(workload: Workload | None, *, captured: bool) -> Side:
        sidecar = workload is not None and workload.proxy in (ProxyClass.SIDECAR, ProxyClass.AMBIENT)
        return Side(sidecar, captured and sidecar)

    def _mode(self) -> tuple[MtlsMode, Origin | None]:
        assert self._receiver is not None
        return self._evaluator.guarded(self._leg, self._receiver)[0].guard.mtls.at(self._leg.port)

    def presents(self, delivered: Delivery) -> Principal | str | None:
        """The name the source will present, where it can be told; None: it sends plaintext, or what nobody can read."""
        if delivered.outcome is not Delivered.MTLS:
            return None
        return own_principal(self._evaluator.peer(self._leg.source))

    def _mtls(self, delivered: Delivery) -> Step:
        mode, origin = self._mode()
        principal = self.presents(delivered)
        text = f"{delivered.why}{f', the client as {principal}' if isinstance(principal, str) else ''}"
        said = self._leg.question.principal
        if not isinstance(said, Principal) and principal not in (said, f"spiffe://{said}"):
            text += f"; you asked about {said or 'plaintext'}"
        demands = {MtlsMode.STRICT: "the server demands it", MtlsMode.PERMISSIVE: "the server takes both"}
        if self._trace.port_class is PortClass.CAPTURED:
            by = "set by" if origin else "which is the default"
            text += f"; {demands.get(mode, 'the server takes no mutual TLS')} ({mode.value}), {by}"
            return Step(Stage.MTLS, text, outcome=delivered.outcome.value, origins=(origin,) if origin else ())
        return Step(Stage.MTLS, text, outcome=delivered.outcome.value)

    # The mesh's policies

    def _mesh(self, receiver: Workload, early: LayerDecision) -> Iterator[Step]:
        trace = self._trace
        asked = self._mesh_flow(receiver)
        policies = self._cluster.policies.authorization
        if trace.port_class is PortClass.EXCLUDED:
            unseen = self._without_envoy(asked)
            passing = early.verdict is Verdict.ALLOW
            if (unseen.verdict().verdict is Verdict.ALLOW) is not passing:  # the kubelet's probes pass whatever is said
                yield _step(Stage.EARLY, early)
                return
            near = [n for n in near_mesh(policies, unseen) if (n.verdict is Verdict.ALLOW) is not passing]
            step = _step(Stage.EARLY, early, near)
            yield step if passing else replace(step, open=tuple(undecided(unseen)[:MAX_NEAR]))
            return
        if trace.port_class is not PortClass.CAPTURED:
            return
        near = near_mesh(policies, asked)
        if early.verdict is Verdict.NEEDS_L7:
            yield Step(Stage.EARLY, "nothing denies it for certain, so Envoy is asked", early.verdict)
        else:
            yield _step(Stage.EARLY, early, near if early.verdict is Verdict.DENY else None)
        if trace.http is not None:
            yield self._http_rules(receiver, trace.http)
        said = LayerDecision(Layer.MESH, trace.mesh.verdict, trace.mesh.origins, trace.mesh.deny_reason, Judge.ENVOY)
        open_ = undecided(asked) if said.verdict is Verdict.NEEDS_L7 else []
        step = replace(_step(Stage.ENVOY, said, near), open=tuple(open_[:MAX_NEAR]))
        if said.deny_reason == DropReason.MESH_POLICY_DENY:
            step = replace(step, without=mesh_verdict_without(said.origins, asked))
        yield step

    def _http_rules(self, receiver: Workload, layer: LayerDecision) -> Step:
        assert self._trace.ingress is not None
        said = replace(layer, origins=layer.origins or self._trace.ingress.network.origins)
        http = self._leg.question.http
        if layer.verdict is not Verdict.DENY or http is None:
            return _step(Stage.HTTP_RULES, said)
        request = Request(
            source=self._leg.sender.address or UNSPECIFIED, port=self._leg.port, method=http.method or "",
            path=http.path or "", host=http.host or "", headers=http.joined,
        )  # fmt: skip
        flow = self._network_flow(Direction.INGRESS, receiver)
        return _step(Stage.HTTP_RULES, said, near_http(self._cluster.policies.network, flow, request))

    def _mesh_flow(self, receiver: Workload) -> MeshFlow:
        guarded, facts, protocol = self._evaluator.guarded(self._leg, receiver)
        if protocol is AppProtocol.AUTO and facts.question.http is not None:
            protocol = AppProtocol.HTTP
        return MeshFlow(receiver.peer(), guarded.guard, guarded.jwt_rules, facts, protocol)

    def _without_envoy(self, flow: MeshFlow) -> MeshFlow:
        """What the kernel knows of a flow that Envoy does not see: its address, and whose that is."""
        principal = own_principal(self._evaluator.peer(self._leg.source))
        question = replace(
            flow.facts.question, principal=principal, http=None, claims=None, token=None, sni=None, remote_ip=None
        )
        return replace(flow, facts=replace(flow.facts, question=question), protocol=AppProtocol.AUTO)

    def refusals(self) -> tuple[Refusal, ...]:
        """The refused policies that may concern the flow at either end."""
        found: dict[str, Refusal] = {}
        for workload, direction in ((self._sender, Direction.EGRESS), (self._receiver, Direction.INGRESS)):
            if workload is None:
                continue
            for refusal in self._cluster.policies.selecting(workload).refusals:
                if refusal.layer is Layer.NETWORK and direction not in refusal.directions:
                    continue
                if refusal.layer is Layer.NETWORK or direction is Direction.INGRESS:
                    found[str(refusal)] = refusal
        return tuple(found[key] for key in sorted(found))


def _step(stage: Stage, layer: LayerDecision, near: list[Near] | None = None) -> Step:
    shown = None if near is None else tuple(near[:MAX_NEAR])
    return Step(stage, phrase(layer), layer.verdict, origins=layer.origins, near=shown)
