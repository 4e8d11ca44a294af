"""What becomes of a flow between the source's sidecar and the destination's: halves that do not fit deliver nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from meshbridge.bypass.clients import Registry
from meshbridge.bypass.halves import AUTOMATIC, ClientTls, Delivered, Delivery, Sending, Side, delivery
from meshbridge.evaluation.cluster import Party
from meshbridge.evaluation.question import Question, address_of
from meshbridge.identity.model import ProxyClass, Workload
from meshbridge.policy.baseline import Principal
from meshbridge.policy.mesh import MtlsMode

_JUDGED: Final = frozenset({ProxyClass.SIDECAR, ProxyClass.NONE})
"""Ends of which it is known what they send and take; what ztunnel and gateways do is not decided here."""


def delivery_of(
    registry: Registry,
    question: Question,
    client: Workload | None,
    receiver: Party,
    port: int,
    captured: tuple[bool, bool],
    mode: MtlsMode,
) -> Delivery | None:
    """What of a TCP connection is delivered by the best way the source has; None where nobody can tell.

    A ``peer_principal`` in the question is what is sent, whatever the objects say. Without one a source that has no
    sidecar sends plaintext, but where mutual TLS is demanded: it may have a certificate of its own.

    Args:
        client: the source; None: it is no pod.
        port: the destination's own, where the question's may be a Service's.
        captured: whether the source's sidecar sees the connection, and whether the destination's does.
        mode: of the destination's port.
    """
    if client is not None and client.proxy not in _JUDGED:
        return None
    has_sidecar = client is not None and client.proxy is ProxyClass.SIDECAR
    by_envoy, takes = has_sidecar and captured[0], captured[1]
    ways: list[Sending] = [AUTOMATIC]
    if client is not None and by_envoy:
        ways = list(sendings(registry, question, client, receiver, port))
    pod = receiver.endpoint
    server = Side(pod is not None and pod.proxy is ProxyClass.SIDECAR, takes)
    if pod is None or pod.proxy not in _JUDGED:
        blocked = all(way.blocked for way in ways)
        return delivery(Side(has_sidecar, by_envoy), server, mode, ways[0]) if blocked else None
    if not isinstance(question.principal, Principal):
        said = ClientTls.ISTIO_MUTUAL if question.principal else ClientTls.DISABLE
        ways = [way if way.blocked else Sending(said) for way in ways]
        if question.principal and not has_sidecar and (not server.through_envoy or mode is MtlsMode.DISABLE):
            return None  # whose certificate it is, and what for, is not known
        has_sidecar, by_envoy = has_sidecar or bool(question.principal), by_envoy or bool(question.principal)
    elif not has_sidecar and server.through_envoy and mode is MtlsMode.STRICT:
        return None
    found = [delivery(Side(has_sidecar, by_envoy), server, mode, way) for way in ways]
    delivered = (each for each in found if each is None or each.outcome is not Delivered.BROKEN)
    return next(delivered, found[0])


def sendings(registry: Registry, question: Question, client: Workload, receiver: Party, port: int) -> Iterator[Sending]:
    """What is sent by each way the source knows the destination; to a pod's own address where no Service leads.

    A pod that is asked about by its address is called by it, unless the request names a host.
    """
    pod, address = receiver.endpoint, question.destination_ip or receiver.address
    if pod is not None:
        by_host = question.http is not None and question.http.host is not None
        asked_by = address_of(question.destination) if isinstance(question.destination, str) else None
        reached = registry.leading_to(pod, port) if by_host or asked_by not in pod.addresses else []
    else:
        served_at = (question.port, "TCP")
        reached = [
            (s, question.port) for s in receiver.services if served_at in ((p.port, p.protocol) for p in s.ports)
        ]
    for service, served in reached:
        yield registry.to_service(client, service, served)
    if not reached and pod is not None:
        yield registry.to_pod(client, pod, address, question.port)
    elif not reached:
        yield registry.to_address(client, address, question.port)
