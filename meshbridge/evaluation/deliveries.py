"""Whether what the source's sidecar sends is what the destination's takes: halves that do not fit deliver nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from meshbridge.bypass.halves import ClientTls, Delivered, Side, delivery
from meshbridge.evaluation.clients import Registry, Sending
from meshbridge.evaluation.cluster import Party
from meshbridge.evaluation.question import Question
from meshbridge.identity.model import ProxyClass, Workload
from meshbridge.policy.baseline import Principal
from meshbridge.policy.mesh import MtlsMode
from meshbridge.policy.model import Origin

_JUDGED: Final = frozenset({ProxyClass.SIDECAR, ProxyClass.NONE})
"""Destinations of which it is known what they take; what ztunnel and gateways are sent is not decided here."""


def undelivered(
    registry: Registry,
    question: Question,
    client: Workload,
    receiver: Party,
    port: int,
    captured: tuple[bool, bool],
    mode: MtlsMode,
) -> tuple[str, Origin | None] | None:
    """Why nothing of a TCP connection is delivered, and the object that is to blame; None: it is.

    A ``peer_principal`` in the question is what is sent, whatever the objects say.

    Args:
        port: the destination's own, where the question's may be a Service's.
        captured: whether the source's sidecar sees the connection, and whether the destination's does.
        mode: of the destination's port.
    """
    failures = [
        _failure(sending, question, receiver, captured, mode)
        for sending in (sendings(registry, question, client, receiver, port) if captured[0] else [_PAST_ENVOY])
    ]
    return failures[0] if all(failures) else None


_PAST_ENVOY: Final = Sending(ClientTls.DISABLE)


def sendings(registry: Registry, question: Question, client: Workload, receiver: Party, port: int) -> Iterator[Sending]:
    """What is sent by each way the source knows the destination; past all Services where none leads there."""
    if receiver.endpoint is not None:
        reached = registry.leading_to(receiver.endpoint, port)
    else:
        asked = (question.port, "TCP")
        reached = [(s, question.port) for s in receiver.services if asked in ((p.port, p.protocol) for p in s.ports)]
    for service, served in reached:
        yield registry.to_service(client, service, served)
    if not reached:
        yield registry.to_address(client, question.destination_ip or receiver.address, question.port)


def _failure(
    sending: Sending, question: Question, receiver: Party, captured: tuple[bool, bool], mode: MtlsMode
) -> tuple[str, Origin | None] | None:
    if sending.blocked:
        text = "the source's sidecar knows no such destination, and outboundTrafficPolicy is REGISTRY_ONLY"
        return text, sending.origin
    pod = receiver.endpoint
    if pod is None or pod.proxy not in _JUDGED:
        return None
    tls, by_envoy = sending.tls, captured[0]
    if not isinstance(question.principal, Principal):
        tls = ClientTls.ISTIO_MUTUAL if question.principal else ClientTls.DISABLE
        by_envoy = by_envoy or bool(question.principal)
    if tls is None:
        return None
    has_sidecar = pod.proxy is ProxyClass.SIDECAR
    found = delivery(Side(sidecar=True, captured=by_envoy), Side(has_sidecar, captured[1]), mode, tls)
    if found.outcome is not Delivered.BROKEN:
        return None
    return f"{found.why}; {found.fix}", sending.origin
